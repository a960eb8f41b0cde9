"""A training on two ranks of which one is killed while it embeds: a program, for the launchers in
`test_dead_ranks.py`.

    python -m tests.support.dying_rank FOLDER RANK
"""

import os
import signal
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch

from curated_data import CuratedDataModule
from curated_data.parallel import rank
from tests.support.trainers import quiet_trainer


class DyingEmbedder:
    """Means of colours; one rank is killed at its third batch, which it notes."""

    dimension, fingerprint, name = 3, "means of a dying rank", "means"

    def __init__(self, dies: int, note: Path) -> None:
        self.dies, self.note, self.batches = dies, note, 0

    def preprocess(self, image):
        return image.float()

    def __call__(self, images):
        self.batches += 1
        time.sleep(0.1)
        if self.batches == 3 and rank() == self.dies:
            self.note.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return images.mean(dim=(2, 3))


class Nothing(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Linear(3, 1)

    def training_step(self, batch, _):
        return self.weight(batch["image"].mean(dim=(2, 3))).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def main(folder: Path, dies: int) -> None:
    data = CuratedDataModule(
        str(folder / "pool-{000..003}.tar"),
        {"target_size": 32, "embedding": {"num_workers": 0, "batch_size": 16}},
        embedder=DyingEmbedder(dies, folder / "died"),
        cache_dir=folder / "cache",
        batch_size=8,
        loader={"num_workers": 0},
        image_size=8,
    )
    trainer = quiet_trainer(devices=2, strategy="ddp", max_epochs=1, default_root_dir=str(folder))
    trainer.fit(Nothing(), data)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
