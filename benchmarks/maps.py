"""t-SimCNE, epoch by epoch, against the PyPI package of its authors, on the same images in one run.

    uv pip install --no-deps tsimcne==0.3.12      # 0.4.24 fails in `fit`
    python -m benchmarks.maps --images 512 --batch-size 128

Both train a ResNet-18 for small images on real ones (Fashion-MNIST, enlarged to 32 x 32), an epoch a stage,
augmentation in the same process, so that an epoch is everything between the images and the updated weights.
CPU seconds; the stages of the peer that follow the first need it, so all three are run in order.
"""

import argparse
import io
import logging
import time
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.machine import print_machine
from curated_data import ShardPool
from lightning_modules import TSimCNE

SHARDS = Path(__file__).parents[1] / "recipes/data/fashion-lt50/fashion-lt50-train-{00..03}.tar"


QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Views(Dataset):
    """Two views of each image, as the data module gives them."""

    def __init__(self, images: np.ndarray, views) -> None:
        self.images, self.views = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, list[Tensor] | int]:
        return {"views": self.views(self.images[i]), "sample_id": i}


class Pictures(Dataset):
    """The peer takes pictures of PIL and a label."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = [Image.fromarray(image) for image in images]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.images[i], 0


class Epochs(L.Callback):
    """CPU seconds of each epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *_) -> None:
        self.began = time.process_time()

    def on_train_epoch_end(self, *_) -> None:
        self.seconds.append(time.process_time() - self.began)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    print_machine()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    images = load(options.images)
    mine = ours(images, options.batch_size)
    peer = theirs(images, options.batch_size)
    print(f"{len(images)} images of 32 x 32, batches of {options.batch_size}, {options.threads} thread(s)")
    print("| stage | ours, CPU s an epoch | tsimcne | ratio |\n|---|---|---|---|")
    for stage, (a, b) in enumerate(zip(mine, peer, strict=True), 1):
        print(f"| {stage} | {a:.1f} | {b:.1f} | {b / a:.2f} |")


def load(n: int) -> np.ndarray:
    """(n, 32, 32, 3) uint8."""
    samples = ShardPool(str(SHARDS)).read(np.arange(n))
    pictures = (Image.open(io.BytesIO(s["png"])) for s in samples)
    return np.stack([np.asarray(picture.convert("RGB").resize((32, 32))) for picture in pictures])


def ours(images: np.ndarray, batch_size: int) -> list[float]:
    torch.manual_seed(0)
    module = TSimCNE("resnet18", image_size=32, small_images=True, epochs=(1, 1, 1), warmup_epochs=0)
    loader = DataLoader(Views(images, module.views()), batch_size, shuffle=True, drop_last=True)
    return fit(L.Trainer, module, loader, max_epochs=3)


def theirs(images: np.ndarray, batch_size: int) -> list[float]:
    """The peer makes its own Trainers, one a stage; each is given the clock."""
    import tsimcne.tsimcne as package

    torch.manual_seed(0)
    clock = Epochs()

    def trainer(**arguments):
        return L.Trainer(**arguments, callbacks=[clock], **QUIET)

    package.pl.Trainer = trainer
    peer = package.TSimCNE(
        total_epochs=[1, 1, 1], batch_size=batch_size, num_workers=0, warmup=[0, 0, 0], devices=1
    )
    peer.fit(Pictures(images))
    return clock.seconds


def fit(trainer, module: L.LightningModule, loader: DataLoader, **arguments) -> list[float]:
    clock = Epochs()
    trainer(accelerator="cpu", devices=1, callbacks=[clock], **QUIET, **arguments).fit(module, loader)
    return clock.seconds


if __name__ == "__main__":
    main()
