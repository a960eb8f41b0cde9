"""Trainings on several ranks, killed and resumed: a program, so that forks start from a clean process.

    python -m tests.support.trainer_runs FOLDER

trains on a small pool in FOLDER, where <run>-<rank>.jsonl then has a line for every batch a rank was given.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import webdataset
from lightning.pytorch.callbacks import ModelCheckpoint

from curated_data.training.datamodule import CuratedDataModule
from tests.support.images import png
from tests.support.options import grouped
from tests.support.trainers import quiet_trainer

N_SAMPLES, N_VALIDATION = 53, 13
SELECTION = np.sort(np.random.default_rng(0).choice(N_SAMPLES, 40, replace=False))
SELECTION[3] = SELECTION[4]  # one sample is selected twice
GLOBAL_BATCH = 8
EPOCHS = 3


class Recorder(pl.LightningModule):
    """Trains one weight, and writes down what it is given."""

    def __init__(self, folder: Path, run: str, kill_at: tuple[int, int] | None = None):
        super().__init__()
        self.weight = torch.nn.Linear(3, 1)
        self.folder, self.run, self.kill_at = folder, run, kill_at

    def record(self, stage: str, batch: dict[str, Any], **more: Any) -> None:
        padding = batch.get("padding", torch.zeros(len(batch["sample_id"]), dtype=torch.bool))
        line = {
            "stage": stage,
            "ids": batch["sample_id"].tolist(),
            "padding": padding.tolist(),
            "sum": [round(float(image.sum()), 4) for image in batch["image"]],
            **more,
        }
        with open(self.folder / f"{self.run}-{self.trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def training_step(self, batch, batch_idx):
        if self.kill_at is not None and self.trainer.global_step == self.kill_at[0]:
            os.kill(os.getpid(), self.kill_at[1])
        sampler = self.trainer.train_dataloader.batch_sampler
        self.record(
            "train",
            batch,
            epoch=self.current_epoch,
            index=batch_idx,
            length=len(self.trainer.train_dataloader),
            sampler=type(sampler).__name__,
        )
        return self.weight(batch["image"].mean(dim=(2, 3))).sum()

    def validation_step(self, batch, batch_idx):
        self.record("validate", batch)

    def predict_step(self, batch, batch_idx):
        self.record("predict", batch)

    def configure_optimizers(self):
        self.trainer.estimated_stepping_batches  # noqa: B018 - asks for the loader before the loops are restored
        return torch.optim.SGD(self.parameters(), 1e-3)


def noisy_crop(image: torch.Tensor) -> torch.Tensor:
    top = int(torch.randint(0, 3, (1,)))
    return image[:, top : top + 6, :6].float() / 255


def scaled(image: torch.Tensor) -> torch.Tensor:
    return image.float() / 255


def data(folder: Path, ranks: int, **arguments: Any) -> CuratedDataModule:
    return CuratedDataModule(
        str(folder / "pool-{0..2}.tar"),
        **grouped(
            {
                "selection": SELECTION,
                "cache_dir": folder / "cache",
                "batch_size": GLOBAL_BATCH // ranks,
                "num_workers": 0,
                "views": noisy_crop,
                "eval_transform": scaled,
                **arguments,
            }
        ),
    )


def trainer(folder: Path, ranks: int, **arguments: Any) -> pl.Trainer:
    options = {
        "devices": ranks,
        "strategy": "ddp_fork" if ranks > 1 else "auto",
        "max_epochs": EPOCHS,
        "enable_checkpointing": bool(arguments.get("callbacks")),
        "default_root_dir": str(folder),
        "num_sanity_val_steps": 0,
    }
    return quiet_trainer(**(options | arguments))


def in_a_process(function) -> int:
    """Run in a fork, which may be killed; returns its wait status."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def main(folder: Path) -> None:
    write_pools(folder)
    validation = str(folder / "validation-0.tar")

    trainer(folder, 1).fit(Recorder(folder, "one"), data(folder, 1, val_pool=validation, eval_batch_size=4))
    for workers in (0, 2):
        module = Recorder(folder, f"two-{workers}")
        two = data(folder, 2, num_workers=workers, val_pool=validation, eval_batch_size=2)
        trainer(folder, 2).fit(module, two)
    trainer(folder, 2, max_epochs=1).fit(
        Recorder(folder, "padded"), data(folder, 2, selection=None, last_batch="pad")
    )
    trainer(folder, 2).predict(Recorder(folder, "predict-2"), data(folder, 2), return_predictions=False)

    for ranks, resumed in ((2, 1), (1, 2)):
        run = f"from-{ranks}-to-{resumed}"
        kept = ModelCheckpoint(folder / run, filename="{step}", every_n_train_steps=7, save_top_k=-1)
        trainer(folder, ranks, max_steps=9, callbacks=[kept]).fit(
            Recorder(folder, f"{run}-first"), data(folder, ranks)
        )
        trainer(folder, resumed).fit(
            Recorder(folder, run), data(folder, resumed), ckpt_path=str(folder / run / "step=7.ckpt")
        )

    for name, number in (("sigterm", signal.SIGTERM), ("sigkill", signal.SIGKILL)):
        killed = Recorder(folder, f"{name}-first", kill_at=(8, number))
        kept = ModelCheckpoint(folder / name, every_n_train_steps=3, save_last=True, save_on_exception=True)
        status = in_a_process(
            lambda killed=killed, kept=kept: trainer(folder, 1, callbacks=[kept]).fit(
                killed, data(folder, 1, num_workers=2)
            )
        )
        (folder / f"{name}.status").write_text(str(status))
        last = max((folder / name).glob("*.ckpt"), key=lambda path: torch.load(path)["global_step"])
        resumed = Recorder(folder, name)
        trainer(folder, 1).fit(resumed, data(folder, 1), ckpt_path=str(last))


def write_pools(folder: Path) -> Path:
    """Write the shards that every run reads; returns the folder."""
    write_pool(folder, "pool", [20, 1, 32])
    write_pool(folder, "validation", [N_VALIDATION])
    return folder


def write_pool(folder: Path, name: str, sizes: list[int]) -> None:
    rng = np.random.default_rng(len(sizes))
    for number, size in enumerate(sizes):
        with webdataset.TarWriter(str(folder / f"{name}-{number}.tar")) as writer:
            for place in range(size):
                image = png(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                writer.write({"__key__": f"{number}-{place:04d}", "png": image, "cls": str(place % 3)})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
