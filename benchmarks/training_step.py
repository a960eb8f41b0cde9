"""Step time of the pretraining modules in a Trainer against a bare PyTorch loop doing the same mathematics.

    python -m benchmarks.training_step --steps 40

Two copies of a module train side by side in one process on the same batches, kept in memory so that no loader
is measured: one in a Trainer, with everything that a module does a step (checks, schedules, logging), the
other by loss, backward, clipping, optimiser and moving average alone. The steps alternate, so that whatever
else the machine does meets both; printed are medians of CPU time, the median of the ratios of neighbouring
steps with its quartiles, and how far the weights are apart at the end: nearly nothing, or the two did not do
the same.
"""

import argparse
import copy
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.machine import print_machine
from lightning_modules import MAE, SP2OT, DINOv2, SimCLR, TSimCNE
from lightning_modules.pretraining.base import PretrainingModule
from lightning_modules.pretraining.dinov2 import SMALL, update_average

RESNET: dict[str, Any] = {
    "backbone": "resnet18",
    "image_size": 32,
    "small_images": True,
    "backbone_options": {"width": 16},
}
VIT: dict[str, Any] = {
    "backbone": "timm:vit_tiny_patch16_224",
    "image_size": 32,
    "backbone_options": {"patch_size": 4, "depth": 6},
}
BUILD: dict[str, Callable[[], PretrainingModule]] = {
    "simclr": lambda: SimCLR(**RESNET, optimizer="sgd", learning_rate=0.1),
    "mae": lambda: MAE(**VIT, decoder_dimension=128, decoder_depth=2, decoder_heads=4),
    "dinov2": lambda: DINOv2(**VIT, local_image_size=16, drop_path=0.0, **SMALL),
    "tsimcne": lambda: TSimCNE(**RESNET, epochs=(1, 0, 0)),
    "sp2ot": lambda: SP2OT(10, **RESNET, buffer_size=320),
}

WARM_UP = 2  # steps that are not counted: the first ones pay for what is set up once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(BUILD))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    print_machine()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print("| method | bare, ms per step | in a Trainer | ratio (quartiles) | weights differ by |")
    print("|---|---|---|---|---|")
    for method in arguments.methods:
        bare, trained, apart = side_by_side(method, arguments)
        low, ratio, high = statistics.quantiles((t / b for t, b in zip(trained, bare, strict=True)), n=4)
        print(
            f"| {method} | {1e3 * statistics.median(bare):.1f} | {1e3 * statistics.median(trained):.1f} "
            f"| {ratio:.3f} ({low:.3f}-{high:.3f}) | {apart:.0e} |",
            flush=True,
        )


def side_by_side(method: str, arguments: argparse.Namespace) -> tuple[list[float], list[float], float]:
    """Seconds of each bare step and of the Trainer's beside it, and the weights' largest difference."""
    torch.manual_seed(0)
    module = BUILD[method]()
    batch = make_batch(module, arguments.batch_size, arguments.device)
    if isinstance(module, SP2OT):
        fill_buffer(module, batch)
    twin = copy.deepcopy(module).train().to(arguments.device)
    alternating = Alternating(batch, BareLoop(module, twin), arguments.steps + WARM_UP)
    trainer = L.Trainer(
        accelerator="gpu" if arguments.device == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(alternating, batch_size=None))
    alternating.loop.step(batch, alternating.n - 1)  # of the last batch, after which none is asked for
    pairs = zip(module.parameters(), twin.parameters(), strict=True)
    apart = max(float((a.to(b.device) - b).detach().abs().max()) for a, b in pairs)
    return alternating.bare[WARM_UP:], alternating.trained[WARM_UP:], apart


class Alternating(IterableDataset):
    """The same batch again and again. Between two requests for it lies one step of the Trainer, and at each
    request the bare loop makes the same step.
    """

    def __init__(self, batch: dict[str, Any], loop: "BareLoop", n: int) -> None:
        self.batch, self.loop, self.n = batch, loop, n
        self.bare: list[float] = []
        self.trained: list[float] = []

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for step in range(self.n):
            start = clock()
            yield self.batch
            self.trained.append(clock() - start)
            self.bare.append(self.loop.step(self.batch, step))


class BareLoop:
    """What a plain script would do, at the rates that the Trainer's module had at the same step."""

    def __init__(self, module: PretrainingModule, twin: PretrainingModule) -> None:
        self.module, self.twin = module, twin
        self.optimizer = twin.configure_optimizers()

    def step(self, batch: dict[str, Any], step: int) -> float:
        """One step; its seconds, without those for copying the rates."""
        module, twin, momentum = self.module, self.twin, 0.0
        for mine, theirs in zip(self.optimizer.param_groups, module.trainer.optimizers[0].param_groups):
            mine.update({name: value for name, value in theirs.items() if name != "params"})
        twin.draw = module.draw
        if isinstance(module, DINOv2):
            momentum, temperature = module.teacher_momentum_at(step), module.teacher_temperature_at(step)
            twin.teacher_temperature_at = lambda _: temperature
        if isinstance(module, SP2OT):
            rho = module.rho_at(step)
            twin.rho_at = lambda _: rho

        start = clock()
        loss = twin.loss(batch)
        loss = loss[0] if isinstance(loss, tuple) else loss
        self.optimizer.zero_grad()
        loss.backward()
        if isinstance(twin, DINOv2):
            torch.nn.utils.clip_grad_norm_(twin.parameters(), twin.hparams.gradient_clip)
        self.optimizer.step()
        if isinstance(twin, DINOv2):
            for teacher, student in zip(twin.teacher_parts, twin.student.values()):
                update_average(teacher.parameters(), student.parameters(), momentum)
        return clock() - start


def make_batch(module: PretrainingModule, n: int, device: str) -> dict[str, Any]:
    """Views of noise, of the sizes that the module asks for."""
    size = module.image_size
    sizes = [view.shape[-1] for view in module.views()(torch.zeros(3, size, size, dtype=torch.uint8))]
    views = [torch.randn(n, 3, side, side, device=device) for side in sizes]
    return {"views": views, "sample_id": torch.arange(n, device=device)}


@torch.no_grad()
def fill_buffer(module: SP2OT, batch: dict[str, Any]) -> None:
    """A full buffer and neighbours, so that every step counts and none is the first pass."""
    n, size = module.hparams.buffer_size, len(batch["sample_id"])
    module.set_neighbors(torch.arange(size), torch.randn(size, 64))
    logits = module._classify(torch.randn(n * 2, module.backbone.dimension))
    module._push(logits.view(-1, n, 2, module.hparams.n_clusters).permute(1, 0, 2, 3), torch.arange(n) % size)


def clock() -> float:
    """Process time on a CPU, where other programs may run; wall clock after the queue on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    main()
