"""Does each pretraining method beat its own random initialisation, by k-NN, after minutes on a CPU?

    python -m benchmarks.pretraining --seeds 3 --out pretraining.json

Trains each small setting of configs/pretrain on the long-tailed Fashion-MNIST shards of recipes/data (all
4,196 images of 28 x 28, labels unused) and classifies the 1,500 balanced held-out images by their nearest
neighbours among the training images, before and after. The configs train on a curated selection of 1,000;
here whatever they count in epochs is less by that share, so that the steps are as many. Prints a Markdown
table; a second run continues from what `--out` holds, so another `--longer` takes another. `--map PATH` also
draws t-SimCNE's map.
"""

import argparse
import importlib
import io
import json
import logging
import tarfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.machine import print_machine
from lightning_modules import TSimCNE
from lightning_modules.evaluation.knn import knn
from lightning_modules.evaluation.online import embed_share, evaluation_mode
from lightning_modules.maps import draw_map
from lightning_modules.pretraining.base import PretrainingModule

ROOT = Path(__file__).parents[1]
DATA = ROOT / "recipes" / "data" / "fashion-lt50"
METHODS = ("simclr", "dinov2", "mae", "tsimcne")
COLUMNS = ("CPU minutes", "1-NN before", "after", "10-NN before", "after")
Images = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=(*METHODS, "sp2ot"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--longer", type=int, default=1, help="train so many times as long as the configs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="keep what is measured; a second run continues from it")
    parser.add_argument("--map", type=Path, help="where the map of t-SimCNE's first seed is drawn")
    arguments = parser.parse_args()
    print_machine()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    kept = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    train, test = load("fashion-lt50-train-*.tar"), load("fashion-test-*.tar")
    for seed in range(arguments.seeds):
        for method in arguments.methods:
            if f"{method} {seed}" not in kept:
                map_path = arguments.map if seed == 0 else None
                kept[f"{method} {seed}"] = measure(method, seed, train, test, arguments.longer, map_path)
                if arguments.out:
                    arguments.out.write_text(json.dumps(kept, indent=1))
            print(f"{method} {seed}: {json.dumps(kept[f'{method} {seed}'])}", flush=True)
    print(f"\n| method | backbone | images x epochs, batch | {' | '.join(COLUMNS)} |")
    print("|---|---|---|" + "---|" * len(COLUMNS))
    for method in arguments.methods:
        runs = [kept[f"{method} {seed}"] for seed in range(arguments.seeds)]
        figures = np.array([run["figures"] for run in runs])
        cells = [f"{m:.1f} ± {s:.1f}" for m, s in zip(figures.mean(0), figures.std(0), strict=True)]
        print(f"| {method} | {runs[0]['backbone']} | {runs[0]['training']} | {' | '.join(cells)} |")
    maps = [
        kept[f"tsimcne {seed}"]["map"] for seed in range(arguments.seeds) if "tsimcne" in arguments.methods
    ]
    if maps:
        print(f"\nt-SimCNE, 15-NN on the 2-D map: {np.mean(maps):.1f} ± {np.std(maps):.1f} %")


def measure(
    method: str, seed: int, train: Images, test: Images, longer: int, map_path: Path | None
) -> dict[str, Any]:
    """Figures of one training: CPU minutes and k-NN in %, in the order of `COLUMNS`."""
    L.seed_everything(seed, verbose=False)
    module, batch_size, epochs = build(method, len(train[0]), longer)
    before = score(module, train, test)
    seconds = fit(module, train[0], batch_size, epochs)
    after = score(module, train, test)
    size = sum(p.numel() for p in module.backbone.parameters()) / 1e6
    result = {
        "backbone": f"{module.backbone.name.split(':')[-1]}, {size:.2f} M",
        "training": f"{len(train[0])} x {epochs}, {batch_size}",
        "figures": [seconds / 60, *(100 * some[k] for k in (1, 10) for some in (before, after))],
    }
    if isinstance(module, TSimCNE):
        result["map"] = score_map(module, train, test, map_path)
    return result


def build(method: str, n_images: int, longer: int = 1, **options: Any) -> tuple[PretrainingModule, int, int]:
    """The module of configs/pretrain/METHOD_fashion.yaml, its batch size, and its epochs over `n_images`.

    Args:
        n_images: of the set to train on; epochs are scaled to it.
        longer: so many times as many epochs.
        options: replace the module's.
    """
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "pretrain" / f"{method}_fashion.yaml"))
    n_configured = config["data"].get("curation", {}).get("target_size", n_images)
    share = longer * n_configured / n_images
    arguments = config["model"]["init_args"] | options
    epochs = round(share * config["trainer"]["max_epochs"])
    for name, value in arguments.items():
        if name.endswith("_epochs"):
            arguments[name] = share * value
    if "epochs" in arguments:  # t-SimCNE's stages
        _, second, third = (max(round(share * n), 1) for n in arguments["epochs"])
        arguments["epochs"] = (epochs - second - third, second, third)
    path, _, name = config["model"]["class_path"].rpartition(".")
    module = getattr(importlib.import_module(path), name)(**arguments)
    return module, config["data"]["batch_size"], epochs


def score_map(module: TSimCNE, train: Images, test: Images, path: Path | None) -> float:
    """k-NN on the two-dimensional map in %, and its figure."""
    module.embed = module.coordinates
    with evaluation_mode(module):
        sets = [embed_share(module, Labelled(*some, module)) for some in (train, test)]
    if path is not None:
        images = torch.cat([train[0], test[0]])
        figure = draw_map(
            torch.cat([sets[0][0], sets[1][0]]).numpy(),
            labels=torch.cat([train[1], test[1]]).numpy(),
            thumbnail=lambda i: images[i].permute(1, 2, 0).numpy(),
            title="t-SimCNE of long-tailed Fashion-MNIST",
        )
        figure.savefig(path)
    return 100 * knn(*sets[0], *sets[1], k=15, metric="euclidean").accuracy[15]


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


def score(module: PretrainingModule, train: Images, test: Images) -> dict[int, float]:
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


def load(pattern: str) -> Images:
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
