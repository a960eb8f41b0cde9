"""Trainings killed (SIGKILL) inside a re-curation and resumed from their last checkpoint. A program, so that
its forks start clean.

    python -m tests.support.recuration_kills FOLDER RANKS [MOMENT...]

Each run leaves <run>-<rank>.jsonl of what was trained on, step by step, and <run>-<rank>.npy, the last
selection. A moment is the name of one of `MOMENTS`, or a number k: the k-th file or folder that the
re-curation publishes.
"""

import functools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from curated_data import CuratedDataModule, RecurationCallback
from curated_data.cache.publishing import atomic_write_json
from curated_data.clustering import hierarchy
from curated_data.embedding.embedders import ModuleEmbedder
from curated_data.parallel import rank
from curated_data.pipeline import curate as pipeline
from curated_data.training import callbacks
from lightning_modules import SimCLR
from tests.support.trainers import quiet_trainer

EPOCHS, WHICH = 3, 2  # the second re-curation is the one that is killed
MOMENTS = {
    "embedding": (ModuleEmbedder, "forward", 2),
    "clustering": (hierarchy, "_balanced_sample", 2),
    "sampling": (pipeline, "hierarchical_sample", 1),
    "switching": (CuratedDataModule, "stream_curation", 1),
    "just after": (callbacks, "_compare", 1),
}


class Recorder(Callback):
    """Writes down, by step, what is trained on, and in the end the selection."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        line = [trainer.global_step, trainer.current_epoch, batch["sample_id"].tolist()]
        with open(f"{self.path}-{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def on_fit_end(self, trainer, pl_module):
        np.save(f"{self.path}-{trainer.global_rank}.npy", trainer.datamodule.selection)


def train(folder: Path, run: str, cache: str, ranks: int, share: float, resume: Path | None = None) -> None:
    lightning.seed_everything(0, verbose=False)
    levels = [{"n_clusters": 10, "n_resamples": 2, "sample_size": 4}, {"n_clusters": 3, "n_resamples": 1}]
    embedding = {"num_workers": 0, "dtype": "float32", "batch_size": 8}
    data = CuratedDataModule(
        str(folder / "pool-*.tar"),
        {"target_size": 24, "levels": levels, "embedding": embedding},
        embedder="pixels:8",
        batch_size=8 // ranks,
        loader={"num_workers": 0},
        cache_dir=folder / cache,
    )
    module = SimCLR(
        "resnet10", image_size=8, small_images=True, backbone_options={"width": 4}, optimizer="sgd",
        warmup_epochs=0,
    )  # fmt: skip
    saving = ModelCheckpoint(folder / f"{run}-checkpoints", every_n_train_steps=2, save_top_k=-1)
    trainer = quiet_trainer(
        max_epochs=EPOCHS, devices=ranks, strategy="ddp_fork" if ranks > 1 else "auto",
        callbacks=[RecurationCallback(1, share=share), saving, Recorder(folder / run)],
        enable_checkpointing=True, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume)


def kill_at(moment: str, rank_to_kill: int) -> None:
    """Have this process killed at the moment of its second re-curation."""
    state = {"recurations": 0, "calls": 0}
    begin = callbacks.RecurationCallback._recurate

    @functools.wraps(begin)
    def counted(*arguments: Any) -> Any:
        state["recurations"] += 1
        return begin(*arguments)

    callbacks.RecurationCallback._recurate = counted
    owner, name, number = (os, "replace", int(moment)) if moment.isdigit() else MOMENTS[moment]
    original: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(original)
    def deadly(*arguments: Any, **named: Any) -> Any:
        state["calls"] += state["recurations"] == WHICH
        if state["calls"] == number and rank() == rank_to_kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    setattr(owner, name, deadly)


def in_a_fork(function: Callable[[], None]) -> int:
    """The wait status of a fork that runs the function; 0 if it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1]


def last_checkpoint(folder: Path) -> Path:
    return max(folder.glob("*.ckpt"), key=lambda path: torch.load(path, weights_only=True)["global_step"])


def main() -> None:
    folder, ranks, moments = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    statuses: dict[str, int] = {}
    for share in sorted({share_of(moment) for moment in moments}):
        whole = f"whole-{share}"
        settings = {"ranks": ranks, "share": share}
        statuses[whole] = in_a_fork(lambda: train(folder, whole, f"cache-{whole}", **settings))  # noqa: B023
    for moment in moments:
        run, settings = moment, {"ranks": ranks, "share": share_of(moment)}

        def killed(moment: str = moment, run: str = run, settings: dict[str, Any] = settings) -> None:
            kill_at(moment.removesuffix(" of a share"), ranks - 1)
            train(folder, run, f"cache-{run}", **settings)

        statuses[f"{run} killed"] = in_a_fork(killed)
        checkpoint = last_checkpoint(folder / f"{run}-checkpoints")
        statuses[f"{run} from"] = torch.load(checkpoint, weights_only=True)["global_step"]

        def resumed(run: str = run, checkpoint: Path = checkpoint, settings: Any = settings) -> None:
            train(folder, run, f"cache-{run}", resume=checkpoint, **settings)

        statuses[f"{run} resumed"] = in_a_fork(resumed)
    atomic_write_json(folder / "statuses.json", statuses)


def share_of(moment: str) -> float:
    return 0.5 if moment.endswith(" of a share") else 1.0


if __name__ == "__main__":
    main()
