"""Step time of the pretraining modules in a Trainer against a bare PyTorch loop doing the same mathematics.

    python benchmarks/training_step.py --steps 40 --rounds 5

Both train the same module on the same batches, kept in memory so that no loader is measured: the Trainer with
everything that a module does a step (checks, schedules, logging, moving averages), the bare loop with loss,
backward, clipping, optimiser and moving average alone. Rounds alternate; prints the medians of CPU time and
their ratio.
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_modules import MAE, DINOv2, SimCLR, TSimCNE
from lightning_modules.pretraining.base import PretrainingModule
from lightning_modules.pretraining.dinov2 import SMALL, update_average

VIT: dict[str, Any] = {
    "backbone": "timm:vit_tiny_patch16_224",
    "image_size": 32,
    "backbone_options": {"patch_size": 4, "depth": 6},
}
BUILD = {
    "simclr": lambda: SimCLR(
        "resnet18", image_size=32, small_images=True, optimizer="sgd", learning_rate=0.1
    ),
    "mae": lambda: MAE(**VIT, decoder_dimension=128, decoder_depth=2, decoder_heads=4),
    "dinov2": lambda: DINOv2(**VIT, local_image_size=16, drop_path=0.0, **SMALL),
    "tsimcne": lambda: TSimCNE("resnet18", epochs=(1, 0, 0)),
}


class Batches(IterableDataset):
    """The same batch, so many times."""

    def __init__(self, batch: dict[str, Any], n: int) -> None:
        self.batch, self.n = batch, n

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter([self.batch] * self.n)


class Timer(L.Callback):
    """Process time after each step: the first one ends the start of the Trainer, which is no step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.times.append(clock())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(BUILD))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print("| method | bare ms a step | in a Trainer | ratio |\n|---|---|---|---|")
    for method in arguments.methods:
        bare, trained = [], []
        for _ in range(arguments.rounds):
            bare.append(bare_loop(method, arguments))
            trained.append(in_a_trainer(method, arguments))
        ratio = statistics.median(trained) / statistics.median(bare)
        print(
            f"| {method} | {1e3 * statistics.median(bare):.1f} | {1e3 * statistics.median(trained):.1f} "
            f"| {ratio:.3f} |",
            flush=True,
        )


def in_a_trainer(method: str, arguments: argparse.Namespace) -> float:
    """Seconds a step."""
    module, batch = prepare(method, arguments)
    timer = Timer()
    trainer = L.Trainer(
        accelerator="gpu" if arguments.device == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        callbacks=[timer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Batches(batch, arguments.steps + 1), batch_size=None))
    return (timer.times[-1] - timer.times[0]) / arguments.steps


def bare_loop(method: str, arguments: argparse.Namespace) -> float:
    """Seconds a step."""
    module, batch = prepare(method, arguments)
    module.train().to(arguments.device)
    optimizer = module.configure_optimizers()
    for step in range(arguments.steps + 1):
        module.draw = step
        loss = module.loss(batch)
        loss = loss[0] if isinstance(loss, tuple) else loss
        optimizer.zero_grad()
        loss.backward()
        if isinstance(module, DINOv2):
            torch.nn.utils.clip_grad_norm_(module.parameters(), 3.0)
        optimizer.step()
        if isinstance(module, DINOv2):
            for teacher, student in zip(module.teacher_parts, module.student.values()):
                update_average(teacher.parameters(), student.parameters(), 0.99)
        if step == 0:
            start = clock()
    return (clock() - start) / arguments.steps


def prepare(method: str, arguments: argparse.Namespace) -> tuple[PretrainingModule, dict[str, Any]]:
    torch.manual_seed(0)
    module = BUILD[method]()
    n, size = arguments.batch_size, module.image_size
    sizes = [view.shape[-1] for view in module.views()(torch.zeros(3, size, size, dtype=torch.uint8))]
    views = [torch.randn(n, 3, side, side, device=arguments.device) for side in sizes]
    return module, {"views": views, "sample_id": torch.arange(n, device=arguments.device)}


def clock() -> float:
    """Process time on a CPU, where other programs may run; wall clock after the queue on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    main()
