"""The stream beside other readers of the same 20,000 JPEGs, in one run: `python -m benchmarks.streaming`.

Photo-like JPEGs of 256 x 256 (23 KB on average) in 20 shards, 10 % (chosen at random) and all of them, as raw
bytes and decoded to 224 x 224, with 0 and 2 loader workers. Figures are samples per CPU second (user and
system, of the process and its workers, with a warm page cache, after a first epoch or three times the time
that is measured), medians over the repeats, in which readers take turns so that other load on the machine
affects all alike. All readers decode and crop with the same functions.

Decoding is also compared with decoding the same bytes from a list in memory, with as many workers: both in
one
process, taking turns of a few batches; the figure is the median ratio over the turns.

Peers that are not installed are left out: litdata, mosaicml-streaming, wids (`pip install --no-deps --target
PEERS ...`, then PYTHONPATH=PEERS). Data and the peers' own formats are made once, in `--folder` (2.5 GB).
About six minutes on two idle cores, and two more the first time.
"""

import functools
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.cpu_time import by_turns, measure
from benchmarks.machine import print_machine
from benchmarks.process_memory import anonymous_bytes
from benchmarks.streaming_data import N_SAMPLES, a_tenth, make_formats, make_shards
from benchmarks.streaming_readers import BATCH, READERS, decode, keep, memory, ours
from curated_data.pool import ShardPool
from curated_data.programs import described_parser
from curated_data.streaming import EpochOrder


def compare(
    folder: Path, names: list[str], modes: list[str], repeats: int, seconds: float, workers: list[int]
) -> None:
    columns = [
        (share, prepare, count)
        for count in workers
        for prepare in ({"raw": keep, "decoded": decode}[mode] for mode in modes)
        for share in (a_tenth(), np.arange(N_SAMPLES))
    ]
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(repeats):
        for name in names:
            for column, (ids, prepare, count) in enumerate(columns):
                make = functools.partial(READERS[name][0], folder, ids, prepare, count)
                rates.setdefault((name, column), []).append(measure(make, len(ids), seconds))
    medians = {key: statistics.median(values) for key, values in rates.items()}
    titles = [
        f"{100 * len(ids) // N_SAMPLES} % {'raw' if prepare is keep else 'decoded'}, {count} w"
        for ids, prepare, count in columns
    ]
    print("\nsamples per CPU second\n\n| reader | " + " | ".join(titles) + " |")
    print("|---" * (len(titles) + 1) + "|")
    for name in names:
        print(f"| {name} | " + " | ".join(f"{medians[name, c]:,.0f}" for c in range(len(columns))) + " |")
    print(
        "\ncurated_data over each, medians of the ratios within a turn\n\n| reader | "
        + " | ".join(titles)
        + " |"
    )
    print("|---" * (len(titles) + 1) + "|")
    for name in names[1:]:
        ratios = [
            statistics.median(a / b for a, b in zip(rates[names[0], c], rates[name, c], strict=True))
            for c in range(len(columns))
        ]
        print(f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


def beginnings(folder: Path) -> None:
    """How long the first batch takes, what is read, and whether memory stays where it is."""
    ids = a_tenth()
    first = []
    for workers in (0, 2):
        for _ in range(3):
            started = time.monotonic()
            next(iter(ours(folder, ids, decode, workers)))
            first.append(time.monotonic() - started)
    print(f"\nfirst batch of an indexed pool: {min(first):.3f} s; of the slowest of 6: {max(first):.3f} s")
    pool = ShardPool(str(folder / "tar" / "shard-*.tar"), cache_dir=folder / "cache")
    for share in (ids, np.arange(N_SAMPLES)):
        pool.close()
        before = pool.counters.bytes_read, pool.counters.bytes_needed
        resident = []
        for epoch in range(3):
            order = EpochOrder(share, seed=0, batch_size=BATCH)
            for batch in range(order.n_batches):
                pool.read(order.batches(epoch, batch, batch + 1)[1])
            resident.append(anonymous_bytes())
        read, needed = pool.counters.bytes_read - before[0], pool.counters.bytes_needed - before[1]
        print(
            f"{len(share)} of {N_SAMPLES} samples: {read / needed:.3f} bytes read a byte needed; own memory "
            f"after 1, 2, 3 epochs: {', '.join(f'{size / 1e6:.0f}' for size in resident)} MB"
        )
    started, before = time.monotonic(), anonymous_bytes()
    order = EpochOrder(100_000_000, seed=0, batch_size=4096)
    order.batches(3, 12_345, 12_346)
    began = time.monotonic() - started
    for batch in range(0, 200, 2):
        order.batches(0, batch, batch + 2)
    per_sample = (time.monotonic() - started - began) / (200 * 4096)
    print(
        f"order of 1e8 samples: first batch, in the middle of an epoch, after {1e3 * began:.1f} ms, "
        f"{1e9 * per_sample:.0f} ns per sample, {(anonymous_bytes() - before) / 1e6:.0f} MB"
    )


def main() -> None:
    parser = described_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "curated-data-streaming")
    parser.add_argument("--readers", nargs="+", choices=READERS, help="curated_data comes first always")
    parser.add_argument("--modes", nargs="+", choices=("raw", "decoded"), default=["raw", "decoded"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.6, help="of each measurement")
    parser.add_argument("--turns", type=int, default=10, help="of decoding from shards and from memory")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    arguments = parser.parse_args()
    print_machine()
    random.seed(0)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    make_shards(arguments.folder)
    beginnings(arguments.folder)  # before a peer is imported, with threads of its own
    names = []
    for name, (_, module) in READERS.items():
        if arguments.readers and name not in arguments.readers and name != "curated_data":
            continue
        if module is not None:
            try:
                __import__(module)
            except Exception as error:  # its own, or that of a package that it needs
                print(f"left out: {name} ({error})")
                continue
        names.append(name)
    make_formats(arguments.folder, names)
    if "decoded" in arguments.modes:
        print("\ndecoding from shards over decoding from memory:")
        for workers in arguments.workers:
            for ids in (a_tenth(), np.arange(N_SAMPLES)):
                made = (
                    functools.partial(make, arguments.folder, ids, decode, workers) for make in (memory, ours)
                )
                ratio = by_turns(*made, arguments.turns, batches=6)
                print(f"  {100 * len(ids) // N_SAMPLES} %, {workers} workers: {ratio:.2f}", flush=True)
    compare(arguments.folder, names, arguments.modes, arguments.repeats, arguments.seconds, arguments.workers)


if __name__ == "__main__":
    main()
