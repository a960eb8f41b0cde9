"""Does each pretraining method beat its own random initialisation, by k-NN, after minutes on a CPU?

    python benchmarks/pretraining.py --methods simclr mae dinov2 tsimcne --threads 1

Trains on the long-tailed Fashion-MNIST shards of recipes/data (4,196 images of 28 x 28, labels unused) and
classifies the 1,500 balanced held-out images by their nearest neighbours among the training images, before
and after. Prints a Markdown table; `--map PATH` also draws t-SimCNE's map of the held-out and training
images.
"""

import argparse
import io
import logging
import tarfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_modules import MAE, DINOv2, SimCLR, TSimCNE
from lightning_modules.evaluation.knn import knn
from lightning_modules.evaluation.online import embed_share, evaluation_mode
from lightning_modules.maps import draw_map
from lightning_modules.pretraining.base import PretrainingModule
from lightning_modules.pretraining.dinov2 import SMALL

DATA = Path(__file__).parents[1] / "recipes" / "data" / "fashion-lt50"
RESNET: dict[str, Any] = {
    "backbone": "resnet18",
    "image_size": 28,
    "small_images": True,
    "backbone_options": {"width": 16},
}
VIT: dict[str, Any] = {
    "backbone": "timm:vit_tiny_patch16_224",
    "image_size": 28,
    "backbone_options": {"patch_size": 4, "depth": 6, "embed_dim": 96, "num_heads": 3},
}
GREY = {"jitter": [0.4, 0.4, 0.0, 0.0], "grey": 0.0, "scale": [0.3, 1.0]}  # nothing to learn from colour here


def build(method: str, epochs: int) -> tuple[PretrainingModule, int, int]:
    """The module, its batch size, and its epochs."""
    if method == "simclr":
        module = SimCLR(
            **RESNET,
            temperature=0.2,
            optimizer="sgd",
            learning_rate=0.2,
            weight_decay=5e-4,
            warmup_epochs=1,
            augmentation=GREY,
        )
        return module, 64, epochs or 10
    if method == "mae":
        module = MAE(
            **VIT,
            decoder_dimension=64,
            decoder_depth=2,
            decoder_heads=2,
            learning_rate=2e-3,
            warmup_epochs=2,
            augmentation={"scale": (0.5, 1.0)},
        )
        return module, 64, epochs or 20
    if method == "dinov2":
        module = DINOv2(
            VIT["backbone"],
            image_size=28,
            local_image_size=16,
            backbone_options={"patch_size": 4, "depth": 4, "embed_dim": 64, "num_heads": 2, "reg_tokens": 2},
            drop_path=0.0,
            augmentation={"jitter": (0.4, 0.4, 0.0, 0.0), "grey": 0.0},
            **SMALL | {"n_local_views": 2},
        )
        return module, 64, epochs or 10
    epochs = epochs or 12
    stages = (round(0.7 * epochs), round(0.1 * epochs), epochs - round(0.7 * epochs) - round(0.1 * epochs))
    module = TSimCNE(**RESNET, epochs=stages, warmup_epochs=1, learning_rate=0.12, augmentation=GREY)
    return module, 128, epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["simclr", "mae", "dinov2", "tsimcne"])
    parser.add_argument("--epochs", type=int, default=0, help="0: each method's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--map", type=Path, help="where t-SimCNE's map is drawn")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(arguments.threads)
    train, test = load("fashion-lt50-train-*.tar"), load("fashion-test-*.tar")
    print("| method | backbone | images, epochs | CPU minutes | 10-NN before | after | 1-NN before | after |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for method in arguments.methods:
        L.seed_everything(arguments.seed, verbose=False)
        module, batch_size, epochs = build(method, arguments.epochs)
        before = score(module, train, test)
        seconds = fit(module, train[0], batch_size, epochs)
        after = score(module, train, test)
        size = sum(p.numel() for p in module.backbone.parameters()) / 1e6
        print(
            f"| {method} | {module.backbone.name.split(':')[-1]}, {size:.2f} M | {len(train[0])} x {epochs} "
            f"| {seconds / 60:.1f} | {100 * before[10]:.1f} | {100 * after[10]:.1f} "
            f"| {100 * before[1]:.1f} | {100 * after[1]:.1f} |",
            flush=True,
        )
        if isinstance(module, TSimCNE):
            report_map(module, train, test, arguments.map)


def report_map(
    module: TSimCNE, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], path: Path | None
) -> None:
    """k-NN on the two-dimensional map, and its figure."""
    module.embed = module.coordinates
    with evaluation_mode(module):
        sets = [embed_share(module, Labelled(images, labels, module)) for images, labels in (train, test)]
    result = knn(*sets[0], *sets[1], k=15, metric="euclidean")
    print(f"\nt-SimCNE, 15-NN on the 2-D map: {100 * result.accuracy[15]:.1f} %")
    if path is not None:
        images = torch.cat([train[0], test[0]])
        coordinates = torch.cat([sets[0][0], sets[1][0]]).numpy()
        figure = draw_map(
            coordinates,
            labels=torch.cat([train[1], test[1]]).numpy(),
            thumbnail=lambda i: images[i].permute(1, 2, 0).numpy(),
            title="t-SimCNE of long-tailed Fashion-MNIST",
        )
        figure.savefig(path)


def fit(module: PretrainingModule, images: Tensor, batch_size: int, epochs: int) -> float:
    """Train; CPU seconds."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.process_time()
    trainer.fit(module, DataLoader(Unlabelled(images, module), batch_size, shuffle=True, drop_last=True))
    return time.process_time() - start


def score(
    module: PretrainingModule, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> dict[int, float]:
    """Accuracy of k-NN on frozen features for k of 1 and 10."""
    with evaluation_mode(module):
        sets = [embed_share(module, Labelled(images, labels, module)) for images, labels in (train, test)]
    return knn(*sets[0], *sets[1], k=(1, 10)).accuracy


class Unlabelled(Dataset):
    """Views and ids, as a stream gives them."""

    def __init__(self, images: Tensor, module: PretrainingModule) -> None:
        self.images, self.views = images, module.views()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"views": self.views(self.images[i]), "sample_id": i}


class Labelled(Dataset):
    """Images as `eval_transform` makes them, and labels."""

    def __init__(self, images: Tensor, labels: Tensor, module: PretrainingModule) -> None:
        self.images, self.labels, self.transform = images, labels, module.eval_transform()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"image": self.transform(self.images[i]), "label": self.labels[i]}


def load(pattern: str) -> tuple[Tensor, Tensor]:
    """Images (n, 3, H, W) uint8 and labels (n,) of shards of recipes/data."""
    images, labels = [], []
    for path in sorted(DATA.glob(pattern)):
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
        for name in (n for n in members if n.endswith(".png")):
            images.append(np.array(Image.open(io.BytesIO(members[name])).convert("RGB")))
            labels.append(int(members[name.removesuffix(".png") + ".cls"]))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


if __name__ == "__main__":
    main()
