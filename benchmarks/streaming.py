"""The stream beside other readers of the same 20,000 JPEGs, in one run: `python benchmarks/streaming.py`.

Photo-like JPEGs of 256 x 256 (23 KB on average) in 20 shards, 10 % (chosen at random) and all of them, as raw
bytes and decoded to 224 x 224, with 0 and 2 loader workers. Figures are samples per CPU second (user and
system, of the process and its workers, page cache warm, after a first epoch, or three
times as long as is measured),
medians over the repeats, which take turns so that other load on the machine meets all readers alike. Every
reader decodes and crops with the same functions.

Decoding is compared besides with decoding the same bytes from a list in memory, by as many workers: both in
one process, a few batches of one, a few of the other, in turn; the median over the turns of what the one
takes over what the other takes.

Peers that are not installed are left out: litdata, mosaicml-streaming, wids (`pip install --no-deps --target
PEERS ...`, then PYTHONPATH=PEERS). Data and the peers' own formats are made once, in `--folder` (2.5 GB).
About six minutes on two idle cores, and two more the first time.
"""

import argparse
import functools
import io
import json
import multiprocessing
import os
import random
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder

from curated_data.pool import ShardPool, ShardWriter
from curated_data.pool.decode import decode_image
from curated_data.streaming import (
    EpochOrder,
    GlobalBatchSampler,
    PoolDataset,
    StreamLoader,
    StreamPosition,
    collate,
)

sys.path = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).parent.resolve()]
"""Without this folder, whose `streaming` would hide mosaicml's."""

N_SAMPLES, N_SHARDS, SIDE, BATCH = 20_000, 20, 256, 64


def crop(image: Tensor) -> Tensor:
    """A random resized crop to 224 x 224, as pretraining takes it."""
    height, width = image.shape[1:]
    area, ratio, top, left = torch.rand(4).tolist()
    side = (height * width * (0.2 + 0.8 * area)) ** 0.5
    ratio = (3 / 4) ** (1 - 2 * ratio)
    h, w = min(height, round(side * ratio**0.5)), min(width, round(side / ratio**0.5))
    box = round(top * (height - h)), round(left * (width - w)), h, w
    return TF.resized_crop(image, *box, [224, 224], antialias=True)


def decode(data: bytes) -> Tensor:
    return crop(decode_image(data))


def keep(data: bytes) -> bytes:
    return bytes(data)  # some readers give views of a buffer, which reach no other process


class Files(Dataset):
    """Any indexable source of bytes as a map-style dataset; `prepare` is `decode` or `keep`."""

    def __init__(self, read: Callable[[int], bytes], n: int, prepare: Callable):
        self.read, self.n, self.prepare = read, n, prepare

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int):
        return self.prepare(self.read(i))


def listed(samples: list):
    return torch.stack(samples) if isinstance(samples[0], Tensor) else samples


def loop(dataset: Dataset, ids: np.ndarray | None, workers: int) -> Iterator[int]:
    """Sizes of batches, shuffled, epoch after epoch."""
    if ids is not None:
        dataset = Subset(dataset, ids.tolist())
    loader = DataLoader(
        dataset,
        BATCH,
        shuffle=True,
        num_workers=workers,
        collate_fn=listed,
        persistent_workers=workers > 0,
        drop_last=True,
    )
    while True:
        for batch in loader:
            yield len(batch)


def ours(folder: Path, ids: np.ndarray, prepare: Callable, workers: int) -> Iterator[int]:
    pool = ShardPool(str(folder / "tar" / "shard-*.tar"), cache_dir=folder / "cache")
    order = EpochOrder(ids, seed=0, batch_size=BATCH)
    done = 0
    sampler = GlobalBatchSampler(
        None, BATCH, True, order=order, rank=0, world_size=1, position=StreamPosition(lambda: done)
    )
    loader = StreamLoader(
        PoolDataset(pool, crop, decode=prepare is decode, extensions=["jpg"]),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    while True:
        for batch in loader:
            done += 1
            yield len(batch["sample_id"])


def memory(folder: Path, ids: np.ndarray, prepare: Callable, workers: int) -> Iterator[int]:
    pool = ShardPool(str(folder / "tar" / "shard-*.tar"), cache_dir=folder / "cache")
    held = [sample["jpg"] for sample in pool.read(ids, ["jpg"])]
    yield from loop(Files(held.__getitem__, len(held), prepare), None, workers)


def webdataset_scan(folder: Path, ids: np.ndarray, prepare: Callable, workers: int) -> Iterator[int]:
    """Scan the shards, drop what is not selected: the way to read a subset with webdataset."""
    chosen = {f"{i:06d}" for i in ids.tolist()}
    urls = sorted(map(str, (folder / "tar").glob("*.tar")))
    dataset = webdataset.WebDataset(urls, shardshuffle=False)
    if len(chosen) < N_SAMPLES:
        dataset = dataset.select(lambda sample: sample["__key__"] in chosen)
    dataset = dataset.map(lambda sample: prepare(sample["jpg"]))
    loader = DataLoader(
        dataset, BATCH, num_workers=workers, collate_fn=listed, persistent_workers=workers > 0
    )
    while True:
        for batch in loader:
            yield len(batch)


def wids_indexed(folder: Path, ids: np.ndarray, prepare: Callable, workers: int) -> Iterator[int]:
    import wids

    shards = [
        {"url": str(path), "nsamples": N_SAMPLES // N_SHARDS}
        for path in sorted((folder / "tar").glob("*.tar"))
    ]
    dataset = wids.ShardListDataset(shards, keep=True, transformations=[], lru_size=N_SHARDS)
    read = Files(lambda i: dataset[i][".jpg"].read(), N_SAMPLES, prepare)
    yield from loop(read, ids, workers)


def litdata_stream(folder: Path, ids: np.ndarray, prepare: Callable, workers: int) -> Iterator[int]:
    """All of it as litdata streams it; a subset by index, for its own `subsample` takes no ids."""
    import litdata

    dataset = litdata.StreamingDataset(str(folder / "litdata"), shuffle=len(ids) == N_SAMPLES)
    if len(ids) < N_SAMPLES:
        yield from loop(Files(lambda i: dataset[i], N_SAMPLES, prepare), ids, workers)
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=workers, collate_fn=functools.partial(_prepared, prepare)
    )
    while True:
        for batch in loader:
            yield len(batch)


def _prepared(prepare: Callable, samples: list[bytes]):
    return listed([prepare(sample) for sample in samples])


def mosaic_stream(folder: Path, ids: np.ndarray, prepare: Callable, workers: int) -> Iterator[int]:
    """All of it as mosaicml-streaming streams it; a subset by index."""
    import streaming

    streaming.base.util.clean_stale_shared_memory()
    whole = len(ids) == N_SAMPLES
    dataset = streaming.StreamingDataset(local=str(folder / "mds"), shuffle=whole, batch_size=BATCH)
    if not whole:
        yield from loop(Files(lambda i: dataset[i]["jpg"], N_SAMPLES, prepare), ids, workers)
    loader = DataLoader(
        dataset,
        BATCH,
        num_workers=workers,
        collate_fn=lambda samples: _prepared(prepare, [sample["jpg"] for sample in samples]),
    )
    while True:
        for batch in loader:
            yield len(batch)


def image_folder(folder: Path, ids: np.ndarray, prepare: Callable, workers: int) -> Iterator[int]:
    dataset = ImageFolder(str(folder / "images"), loader=lambda path: prepare(Path(path).read_bytes()))
    read = Files(lambda i: dataset[i][0], N_SAMPLES, lambda prepared: prepared)
    yield from loop(read, ids, workers)


READERS = {
    "curated_data": (ours, None),
    "webdataset, filter": (webdataset_scan, None),
    "wids": (wids_indexed, "wids"),
    "litdata": (litdata_stream, "litdata"),
    "mosaicml-streaming": (mosaic_stream, "streaming"),
    "ImageFolder": (image_folder, None),
}


def measure(make: Callable[[], Iterable[int]], n: int, seconds: float) -> float:
    """Samples per CPU second of a reader with epochs of n samples, measured for about so long."""

    def rate() -> float:
        batches = iter(make())
        next(batches)  # opening and the first batch are a matter of their own
        seen, end = BATCH, time.monotonic() + 3 * seconds
        while seen < n and time.monotonic() < end:
            seen += next(batches)
        samples, before, end = 0, _cpu(), time.monotonic() + seconds
        for size in batches:
            samples += size
            if time.monotonic() > end and samples >= 10 * BATCH:
                break
        return samples / (_cpu() - before)

    return apart(rate, 4 * seconds + 60)


def beside_memory(folder: Path, ids: np.ndarray, workers: int, turns: int, batches: int) -> float:
    """CPU time of decoding from memory over that of decoding from shards; the median of a few turns."""

    def ratio() -> float:
        readers, pids = [], []
        for make in (ours, memory):
            others = {worker.pid for worker in multiprocessing.active_children()}
            readers.append(make(folder, ids, decode, workers))
            next(readers[-1])
            pids.append([w.pid for w in multiprocessing.active_children() if w.pid not in others])
        own, of_workers = np.zeros((2, turns + 1)), np.zeros((2, turns + 1))
        for turn in range(turns + 1):
            for number, reader in enumerate(readers):
                of_workers[number, turn] = sum(map(_cpu_of, pids[number]))
                before = time.process_time()
                for _ in range(batches):
                    next(reader)
                own[number, turn] = time.process_time() - before
        # What a reader's workers do ahead while the other has its turn is counted to the turn before.
        spent = own[:, 1:-1] + np.diff(of_workers, axis=1)[:, 1:]
        return float(np.median(spent[1] / spent[0]))

    return apart(ratio, 600)


def apart(function: Callable[[], float], timeout: float) -> float:
    """What a function returns, called in a process of its own; not a number if that takes too long."""

    def child(results: multiprocessing.SimpleQueue) -> None:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        results.put(function())
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(0)

    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = _Plain(target=child, args=(results,))
    process.start()
    deadline = time.monotonic() + timeout  # a reader that hangs is no number
    while process.is_alive() and results.empty() and time.monotonic() < deadline:
        time.sleep(0.02)
    found = float("nan") if results.empty() else results.get()
    process.kill()
    process.join()
    return found


class _Plain(multiprocessing.get_context("fork").Process):
    """A process that may have loader workers of its own."""

    daemon = False


def _cpu() -> float:
    """CPU seconds of this process and of its workers so far, those that ended included."""
    workers = multiprocessing.active_children()  # which also collects those that ended
    own, ended = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    seconds = own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime
    return seconds + sum(_cpu_of(worker.pid) for worker in workers)


def _cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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


def a_tenth() -> np.ndarray:
    """The 10 % that are selected."""
    return np.sort(np.random.default_rng(0).choice(N_SAMPLES, N_SAMPLES // 10, replace=False))


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
            resident.append(_resident())
        read, needed = pool.counters.bytes_read - before[0], pool.counters.bytes_needed - before[1]
        print(
            f"{len(share)} of {N_SAMPLES} samples: {read / needed:.3f} bytes read a byte needed; own memory "
            f"after 1, 2, 3 epochs: {', '.join(f'{size / 1e6:.0f}' for size in resident)} MB"
        )
    started, before = time.monotonic(), _resident()
    order = EpochOrder(100_000_000, seed=0, batch_size=4096)
    order.batches(3, 12_345, 12_346)
    began = time.monotonic() - started
    for batch in range(0, 200, 2):
        order.batches(0, batch, batch + 2)
    per_sample = (time.monotonic() - started - began) / (200 * 4096)
    print(
        f"order of 1e8 samples: first batch, in the middle of an epoch, after {1e3 * began:.1f} ms, "
        f"{1e9 * per_sample:.0f} ns a sample, {(_resident() - before) / 1e6:.0f} MB"
    )


def _resident() -> int:
    """Memory of this process in bytes, without the page cache that is mapped."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def make_shards(folder: Path) -> None:
    """The shards; what is there already is kept."""
    if not (folder / "tar" / "done").exists():
        print(f"making {N_SAMPLES} JPEGs in {folder}")
        with ShardWriter(folder / "tar", max_samples=N_SAMPLES // N_SHARDS, overwrite=True) as writer:
            for i, data in enumerate(photos()):
                writer.write({"__key__": f"{i:06d}", "jpg": data, "cls": i % 100})
        (folder / "tar" / "done").touch()
    pool = ShardPool(str(folder / "tar" / "shard-*.tar"), cache_dir=folder / "cache")
    size = pool.sizes(np.arange(N_SAMPLES), ["jpg"]).mean()
    print(f"{len(pool)} samples in {len(pool.urls)} shards, {size / 1e3:.1f} KB a JPEG", flush=True)


def make_formats(folder: Path, names: list[str]) -> None:
    """What each peer reads, from the shards; what is there already is kept."""
    pool = ShardPool(str(folder / "tar" / "shard-*.tar"), cache_dir=folder / "cache")

    def samples() -> Iterator[tuple[int, bytes]]:
        for start in range(0, N_SAMPLES, 500):
            yield from enumerate((s["jpg"] for s in pool.read(range(start, start + 500), ["jpg"])), start)

    if not (folder / "images" / "done").exists():
        for i, data in samples():
            path = folder / "images" / f"class-{i // 200:03d}" / f"{i:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        (folder / "images" / "done").touch()
    if "mosaicml-streaming" in names and not (folder / "mds" / "index.json").exists():
        import streaming

        with streaming.MDSWriter(
            out=str(folder / "mds"), columns={"jpg": "bytes"}, size_limit=1 << 26
        ) as writer:
            for _, data in samples():
                writer.write({"jpg": data})
    if "litdata" in names and not (folder / "litdata" / "index.json").exists():
        import litdata

        litdata.optimize(
            fn=functools.partial(_read_file, str(folder / "images")),
            inputs=list(range(N_SAMPLES)),
            output_dir=str(folder / "litdata"),
            chunk_bytes="64MB",
            num_workers=1,
        )


def _read_file(images: str, i: int) -> bytes:
    return Path(images, f"class-{i // 200:03d}", f"{i:06d}.jpg").read_bytes()


def photos() -> Iterator[bytes]:
    """JPEGs with the spectrum of photographs (amplitude about 1 / frequency), colours, and some edges."""
    rng = np.random.default_rng(0)
    canvases = []
    for _ in range(6):
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(1024), np.fft.rfftfreq(1024), indexing="ij"))
        frequency[0, 0] = 1
        noise = rng.normal(size=(4, *frequency.shape)) + 1j * rng.normal(size=(4, *frequency.shape))
        layers = np.fft.irfft2(noise / frequency**1.1)
        layers /= layers.std(axis=(1, 2), keepdims=True)
        canvas = 0.8 * layers[:1] + 0.3 * layers[1:] + 0.5 * np.sign(layers[1:2] + 0.3)
        canvases.append(np.moveaxis(canvas, 0, 2))
    for _ in range(N_SAMPLES):
        canvas = canvases[rng.integers(len(canvases))]
        top, left = rng.integers(0, 1024 - SIDE, 2)
        tone = canvas[top : top + SIDE, left : left + SIDE, rng.permutation(3)]
        image = np.clip(tone * rng.uniform(30, 60) + rng.uniform(90, 160), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=int(rng.integers(60, 91)))
        yield buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "curated-data-streaming")
    parser.add_argument("--readers", nargs="+", choices=READERS, help="curated_data comes first always")
    parser.add_argument("--modes", nargs="+", choices=("raw", "decoded"), default=["raw", "decoded"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.6, help="of each measurement")
    parser.add_argument("--turns", type=int, default=10, help="of decoding from shards and from memory")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    arguments = parser.parse_args()
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
                ratio = beside_memory(arguments.folder, ids, workers, arguments.turns, batches=6)
                print(f"  {100 * len(ids) // N_SAMPLES} %, {workers} workers: {ratio:.2f}", flush=True)
    compare(arguments.folder, names, arguments.modes, arguments.repeats, arguments.seconds, arguments.workers)
    print(json.dumps({"cpus": os.cpu_count(), "load": [round(load, 1) for load in os.getloadavg()]}))


if __name__ == "__main__":
    main()
