"""Trainings on a mixture, on several ranks, killed and resumed: a program, as `trainer_runs` is.

python -m tests.support.mixture_runs FOLDER [recurated]
"""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from curated_data import Component, CuratedDataModule, Mixture, RecurationCallback
from tests.support.options import grouped
from tests.support.recuration_runs import TinyModule, to_float
from tests.support.trainer_runs import GLOBAL_BATCH, SELECTION, Recorder, noisy_crop, trainer, write_pools

EPOCH_BATCHES = 7


class SourceRecorder(Recorder):
    """Writes down the components too."""

    def record(self, stage: str, batch: dict[str, Any], **more: Any) -> None:
        passes = self.trainer.datamodule.component_passes()
        super().record(stage, batch, sources=batch["source"].tolist(), passes=passes, **more)


def left_corner(image: torch.Tensor) -> torch.Tensor:
    return image[:, :6, :6].float()


def mixture(folder: Path, **changes: Any) -> Mixture:
    pool = str(folder / "pool-{0..2}.tar")
    weights = {0: [0.5, 0.3, 0.2], 30: [0.2, 0.5, 0.3]}
    settings = {"epoch_size": EPOCH_BATCHES * GLOBAL_BATCH + 3, "weights": weights, **changes}
    return Mixture(
        [
            Component("all", pool),
            Component("others", str(folder / "validation-0.tar"), views=left_corner),
            Component("own", pool, selection=SELECTION, batches="own", shuffle="block"),
        ],
        **settings,
    )


def data(folder: Path, ranks: int, **arguments: Any) -> CuratedDataModule:
    return CuratedDataModule(
        mixture=mixture(folder),
        cache_dir=folder / "cache",
        batch_size=GLOBAL_BATCH // ranks,
        views=noisy_crop,
        **grouped({"num_workers": 0, **arguments}),
    )


def main(folder: Path) -> None:
    write_pools(folder)
    trainer(folder, 1).fit(SourceRecorder(folder, "one"), data(folder, 1))
    trainer(folder, 2).fit(SourceRecorder(folder, "two"), data(folder, 2, num_workers=2))

    program = [sys.executable, "-m", "tests.support.mixture_runs", str(folder), "killed"]
    assert subprocess.run(program).returncode != 0  # a program of its own, as ranks do not fork from a fork
    resumed = SourceRecorder(folder, "killed")
    trainer(folder, 1).fit(resumed, data(folder, 1), ckpt_path=str(folder / "killed" / "step=10.ckpt"))


def killed(folder: Path) -> None:
    """Train on two ranks, both of which are killed at the thirteenth step."""
    kept = ModelCheckpoint(folder / "killed", filename="{step}", every_n_train_steps=5, save_top_k=-1)
    module = SourceRecorder(folder, "killed-first", kill_at=(12, signal.SIGKILL))
    trainer(folder, 2, callbacks=[kept]).fit(module, data(folder, 2, num_workers=1))


class Reselecting(TinyModule):
    """Writes down every batch with its components, and logs how often each was seen."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.run = run

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        with open(f"{self.run}-{self.global_rank}.jsonl", "a") as file:
            samples = [batch[name].tolist() for name in ("sample_id", "source")]
            file.write(json.dumps([self.current_epoch, *samples]) + "\n")
        self.log_dict(self.trainer.datamodule.component_passes())
        return super().training_step(batch, index)


def reselected(folder: Path, ranks: int, curation: dict[str, Any] | None) -> CuratedDataModule:
    """A component that may be curated, twice an epoch, and one that never is."""
    components = [
        Component("curated", str(folder / "pool-{0..2}.tar"), 2, curation=curation),
        Component("whole", str(folder / "validation-0.tar"), 1),
    ]
    return CuratedDataModule(
        mixture=Mixture(components, epoch_size=6 * GLOBAL_BATCH), embedder="pixels:8", views=to_float,
        batch_size=GLOBAL_BATCH // ranks, loader={"num_workers": 0}, cache_dir=folder / "cache",
    )  # fmt: skip


CURATION = {
    "target_size": 16,
    "levels": [{"n_clusters": 8}, {"n_clusters": 3}],
    "embedding": {"num_workers": 0, "dtype": "float32"},
}


def fit_recurated(
    folder: Path, run: str, ranks: int = 1, *, ckpt_path: Path | None = None, save: Path | None = None,
    **options: Any,
) -> pl.Trainer:  # fmt: skip
    """Train three epochs of six batches, with another selection of the first component in each."""
    pl.seed_everything(0, verbose=False)
    # Saved by a callback, because ranks that were forked are gone when `fit` returns.
    callbacks: list[pl.Callback] = [RecurationCallback(every_n_epochs=1, component="curated")]
    if save is not None:
        callbacks.append(ModelCheckpoint(save, filename="{step}", every_n_train_steps=9, save_top_k=-1))
    made = trainer(
        folder, ranks, **{"callbacks": callbacks, "enable_checkpointing": save is not None} | options
    )
    made.fit(Reselecting(folder / run), reselected(folder, ranks, CURATION), ckpt_path=ckpt_path)
    return made


def recurated(folder: Path) -> None:
    """On two ranks: one run, and one that stops in the middle of its second epoch and is resumed."""
    write_pools(folder)
    fit_recurated(folder, "whole", 2)
    fit_recurated(folder, "stopped", 2, max_steps=10, save=folder / "kept")
    fit_recurated(folder, "resumed", 2, ckpt_path=folder / "kept" / "step=9.ckpt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {(): main, ("killed",): killed, ("recurated",): recurated}[tuple(sys.argv[2:])](Path(sys.argv[1]))
