"""Greedy selections in cells (`sampling: greedy`): what cells cost in value, and a million rows.

    python -m benchmarks.facility_location                     # 1e6 x 256 takes a minute and 2 GB
    python -m benchmarks.facility_location --samples 100000

The value of a selection is the sum over all samples of 1 + the cosine to the nearest selected one, over that
of the greedy selection of the whole pool, which is found beside it from the (n, n) matrix of 8,000 rows.
"""

import time

import numpy as np
import torch

from benchmarks.greedy import facility_location
from benchmarks.machine import print_machine
from curated_data import Level, hierarchical_kmeans
from curated_data.matrix import unit
from curated_data.programs import described_parser
from curated_data.selection import sparse
from curated_data.selection.greedy import greedy_order

DIMENSION, CONCEPTS = 256, 500


def main() -> None:
    parser = described_parser(__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--cells", type=int, nargs="+", default=[500, 1000, 2000], help="sizes tried")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print_machine()
    rows = long_tailed(8_000)
    centred = unit(rows - rows.mean(axis=0))
    size = len(rows) // 10
    before = time.process_time()
    whole = value(centred, facility_location(centred, size, 0))
    whole_seconds = time.process_time() - before
    chance = value(centred, np.random.default_rng(0).choice(len(rows), size, replace=False))
    print("| 8,000 rows, a tenth | value, x that of the whole pool's greedy | CPU s |")
    print("|---|---|---|")
    print(f"| greedy of the whole pool | 1.0000 | {whole_seconds:.1f} |")
    print(f"| random | {chance / whole:.4f} | |")
    usual = sparse.CELL
    for cell in options.cells:
        sparse.CELL = cell
        order, seconds = in_cells(rows, size)
        print(f"| in cells of at most {cell:,} | {value(centred, order) / whole:.4f} | {seconds:.1f} |")
    sparse.CELL = usual
    _, seconds = in_cells(long_tailed(options.samples), options.samples // 10)
    pool = f"{options.samples:,} x {DIMENSION}, a tenth, cells of {usual:,}"
    print(f"\n{pool}: {seconds:.1f} CPU s after the tree")


def long_tailed(n: int) -> np.ndarray:
    """(n, DIMENSION) float32 rows around CONCEPTS centres, whose shares fall as 1 / rank."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, CONCEPTS + 1)
    concept = rng.choice(CONCEPTS, n, p=share / share.sum())
    rows = rng.standard_normal((n, DIMENSION), dtype=np.float32)
    rows += 2 * rng.standard_normal((CONCEPTS, DIMENSION), dtype=np.float32)[concept]
    return rows


def in_cells(rows: np.ndarray, size: int) -> tuple[np.ndarray, float]:
    """The order, and its CPU seconds; the tree is given."""
    tree = hierarchical_kmeans(rows, [Level(max(2, len(rows) // 1000))], metric="cosine")
    before = time.process_time()
    order = greedy_order(rows, tree, size)
    return order, time.process_time() - before


def value(rows: np.ndarray, chosen: np.ndarray) -> float:
    """The sum over rows of norm 1."""
    return float((1 + (rows @ rows[chosen].T).max(axis=1)).sum())


if __name__ == "__main__":
    main()
