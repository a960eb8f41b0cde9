"""Trainings on a mixture, on several ranks, killed and resumed: a program, as `trainer_runs` is.

python -m tests.support.mixture_runs FOLDER
"""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from curated_data import Component, CuratedDataModule, Mixture
from tests.support.options import grouped
from tests.support.trainer_runs import (
    GLOBAL_BATCH,
    SELECTION,
    Recorder,
    noisy_crop,
    trainer,
    write_pools,
)

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


if __name__ == "__main__":
    torch.set_num_threads(1)
    (killed if sys.argv[2:] == ["killed"] else main)(Path(sys.argv[1]))
