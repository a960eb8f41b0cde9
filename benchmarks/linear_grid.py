"""The grid of linear heads in one pass beside its largest single head: `python benchmarks/linear_grid.py`.

Two heads' costs: from features in memory, where a head is a matrix product and 13 of them are 13 such
products read from memory as one; and with the backbone's pass over the images in front of it, where the heads
share the features. Prints seconds for the same number of steps and the ratio, medians over repeats.
"""

import argparse
import statistics
import time

import torch

from lightning_modules.backbones import build_backbone
from lightning_modules.evaluation.linear import LEARNING_RATES, LinearSettings, linear


def seconds(
    features: dict[str, torch.Tensor], labels: torch.Tensor, rates: tuple[float, ...], n_iter: int
) -> float:
    settings = LinearSettings(learning_rates=rates, n_iter=n_iter)
    start = time.process_time()
    linear(features, labels, {k: v[:256] for k, v in features.items()}, labels[:256], settings=settings)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-iter", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # ViT-S: class token, and with the average of patches; of the last block, and of the last four.
    backbone = build_backbone("timm:vit_small_patch16_224", image_size=224).eval()
    images = torch.randn(8, 3, 224, 224)
    with torch.no_grad():
        backbone(images)
        start = time.process_time()
        backbone(images)
        a_batch = (time.process_time() - start) * 128 / len(images)
    print("| classes | heads | largest alone, s | grid, s | ratio | with the backbone's passes: ratio |")
    print("|---|---|---|---|---|---|")
    for n_classes in (10, 100):
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, n_classes, (4096,), generator=generator)
        sizes = {"class token": 384, "class token, average": 768, "4 blocks": 1536, "4 blocks, average": 1920}
        features = {name: torch.randn(4096, size, generator=generator) for name, size in sizes.items()}
        largest = {"4 blocks, average": features["4 blocks, average"]}
        runs = [
            (
                seconds(largest, labels, LEARNING_RATES[-1:], arguments.n_iter),
                seconds(features, labels, LEARNING_RATES, arguments.n_iter),
            )
            for _ in range(arguments.repeats)
        ]
        alone, grid = (statistics.median(run[i] for run in runs) for i in range(2))
        passes = a_batch * arguments.n_iter
        print(
            f"| {n_classes} | {len(sizes) * len(LEARNING_RATES)} | {alone:.2f} | {grid:.2f} | "
            f"{grid / alone:.1f} "
            f"| {(grid + passes) / (alone + passes):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
