"""The grid of linear heads in one pass beside its largest single head: `python -m benchmarks.linear_grid`.

13 learning rates x 4 kinds of ViT-S features. A step's time for the largest head alone and for the whole
grid, the ratio, and the share of the product's peak that each reaches: the grid has 31 times the largest
head's arithmetic, so from features in memory the ratio must come near that as soon as one head keeps the
processor busy. Then with what comes before the heads: features read from a file at random, and the backbone's
pass over the images.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import print_machine
from lightning_modules.backbones import build_backbone
from lightning_modules.evaluation.linear import LEARNING_RATES, LinearSettings, _train_grid

SIZES = {"class token": 384, "class token, average": 768, "4 blocks": 1536, "4 blocks, average": 1920}
LARGEST = "4 blocks, average"
BATCH, N = 128, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-iter", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    arguments = parser.parse_args()
    print_machine()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    features = {name: torch.randn(N, size, generator=generator) for name, size in SIZES.items()}
    a_pass, a_read, peak = backbone_seconds(), read_seconds(), product_rate()
    print(f"product alone {peak:.0f} GFLOP/s; a batch: backbone {a_pass:.2f} s, file {1e3 * a_read:.2f} ms")
    columns = ("classes", "largest alone, ms", "share of peak", "grid of 52, ms", "share of peak", "ratio",
               "from a file", "with the backbone")  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for n_classes in arguments.classes:
        labels = torch.randint(0, n_classes, (N,), generator=generator)
        n_iter = max(4, arguments.n_iter // max(1, n_classes // 100))

        runs = [
            (
                a_step({LARGEST: features[LARGEST]}, labels, n_classes, LEARNING_RATES[-1:], n_iter),
                a_step(features, labels, n_classes, LEARNING_RATES, n_iter),
            )
            for _ in range(arguments.repeats)
        ]
        alone, grid = (statistics.median(run[i] for run in runs) for i in range(2))
        # Two products per step, of 2 x batch x columns x (features + 1) operations each.
        work = 4 * BATCH * n_classes / 1e9
        rows = SIZES[LARGEST] + 1, len(LEARNING_RATES) * sum(size + 1 for size in SIZES.values())
        shares = work * rows[0] / alone / peak, work * rows[1] / grid / peak
        print(
            f"| {n_classes} | {1e3 * alone:.2f} | {shares[0]:.0%} | {1e3 * grid:.1f} | {shares[1]:.0%} | "
            f"{grid / alone:.1f} | {(grid + a_read) / (alone + a_read):.1f} | "
            f"{(grid + a_pass) / (alone + a_pass):.2f} |",
            flush=True,
        )


def a_step(
    features: dict[str, torch.Tensor],
    labels: torch.Tensor,
    n_classes: int,
    rates: tuple[float, ...],
    n_iter: int,
) -> float:
    """CPU seconds of one step of the heads."""
    settings = LinearSettings(learning_rates=rates, n_iter=n_iter)
    start = time.process_time()
    _train_grid(features, labels, torch.arange(N), n_classes, settings)
    return (time.process_time() - start) / n_iter


def backbone_seconds() -> float:
    """CPU seconds that ViT-S takes for a batch, by a part of it."""
    backbone = build_backbone("timm:vit_small_patch16_224", image_size=224).eval()
    images = torch.randn(8, 3, 224, 224)
    with torch.inference_mode():
        return median_seconds(lambda: backbone(images)) * BATCH / len(images)


def read_seconds() -> float:
    """CPU seconds to read a batch's features at random from a float16 file that the system holds in
    memory.
    """
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npy"
        np.save(path, rng.standard_normal((20_000, sum(SIZES.values())), np.float32).astype(np.float16))
        stored = np.load(path, mmap_mode="r")
        return median_seconds(lambda: stored[rng.integers(0, len(stored), BATCH)].astype(np.float32), 9)


def product_rate() -> float:
    """GFLOP/s of a large product in torch, one thread."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return 2 * 2048**3 / 1e9 / median_seconds(lambda: a @ b, 5)


def median_seconds(run: Callable[[], object], repeats: int = 3) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
