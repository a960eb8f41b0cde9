"""A mixture of five components beside one selection, and beside the mixtures of other readers, in one run:
`python -m benchmarks.mixtures`.

Speed: samples per CPU second (of a process and its workers) of five selections of one pool mixed by weights,
over those of one selection of as many samples, decoded to 224 x 224: both in one process, taking turns of six
batches, so that other load affects both alike; the median of the turns, and of a few such runs.

Shares: the largest distance, over all components, between the samples that a component has given among the
first 10,000 and its share of them; and whether the order survives a resume in the middle and another number
of workers, each tried. Samples are numbers there, so that their rate is the cost of mixing and reading them.

Peers that are not installed are left out: litdata, mosaicml-streaming (see `streaming.py` for how to get
them). Data are made once, in `--folder`. About two minutes on two idle cores, and two more the first time.
"""

import functools
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset

from benchmarks.cpu_time import by_turns
from benchmarks.machine import made, print_machine
from benchmarks.streaming_data import N_SAMPLES, make_shards
from benchmarks.streaming_readers import BATCH, crop
from curated_data import Component, CuratedDataModule, Mixture
from curated_data.programs import described_parser
from curated_data.streaming import StreamLoader

WEIGHTS = [0.4, 0.25, 0.2, 0.1, 0.05]
DRAWN = 10_000
SIZE = 4_000  # samples of each component of the peers' tables


def mixed(folder: Path, workers: int, n_components: int) -> Iterator[int]:
    """Sizes of the batches of a data module, epoch after epoch."""
    pool = str(folder / "tar" / "shard-*.tar")
    ids = np.random.default_rng(0).permutation(N_SAMPLES)
    settings = {"cache_dir": folder / "cache", "batch_size": BATCH, "views": crop}
    settings["loader"] = {"num_workers": workers}
    if n_components == 1:
        data = CuratedDataModule(pool, selection=np.sort(ids), **settings)
    else:
        components = [
            Component(f"part {number}", pool, weight, selection=np.sort(part))
            for number, (part, weight) in enumerate(
                zip(np.array_split(ids, n_components), WEIGHTS, strict=True)
            )
        ]
        data = CuratedDataModule(mixture=Mixture(components), **settings)
    data.setup("fit")
    loader = data.train_dataloader()
    while True:
        for batch in loader:
            yield len(batch["sample_id"])


def speed(folder: Path, repeats: int, turns: int, workers: list[int]) -> None:
    print("\nsamples per CPU second, a mixture of five over one selection\n\n| workers | ratio |\n|---|---|")
    for count in workers:
        one, five = (functools.partial(mixed, folder, count, number) for number in (1, len(WEIGHTS)))
        found = [by_turns(one, five, turns, batches=6) for _ in range(repeats)]
        low, middle, high = min(found), statistics.median(found), max(found)
        print(f"| {count} | {middle:.2f} ({low:.2f} to {high:.2f}) |", flush=True)


class Ours:
    """A data module over five small pools, with its loader's state."""

    name = "curated_data"

    def __init__(self, folder: Path) -> None:
        self.pools = []
        for number in range(len(WEIGHTS)):
            path = folder / f"numbers-{number}.tar"
            if not path.exists():
                with webdataset.TarWriter(f"{path}.part") as writer:
                    for value in range(SIZE):
                        writer.write({"__key__": f"{value:05d}", "npy": np.array([value])})
                os.replace(f"{path}.part", path)
            self.pools.append(str(path))

    def stream(self, workers: int, start: int = 0) -> Iterator[int]:
        def loader() -> StreamLoader:
            components = [
                Component(str(number), pool, weight)
                for number, (pool, weight) in enumerate(zip(self.pools, WEIGHTS, strict=True))
            ]
            data = CuratedDataModule(
                mixture=Mixture(components),
                batch_size=10,
                loader={"num_workers": workers},
                views=torch.from_numpy,
            )
            data.setup("fit")
            return data.train_dataloader()

        for batch in _resumed(loader, start):
            yield from batch["sample_id"].tolist()


class RandomMix:
    """webdataset's; it has no state, so that a resumed run begins again."""

    name = "webdataset.RandomMix"

    def __init__(self, folder: Path) -> None:
        self.pools = Ours(folder).pools

    def stream(self, workers: int, start: int = 0) -> Iterator[int]:
        random.seed(0)
        parts = [
            webdataset.WebDataset(pool, shardshuffle=False, nodesplitter=None, workersplitter=None)
            .shuffle(1000, seed=0)
            .decode()
            .map(functools.partial(_numbered, number))
            .repeat()
            for number, pool in enumerate(self.pools)
        ]
        made = torch.utils.data.DataLoader(
            webdataset.RandomMix(parts, WEIGHTS), batch_size=10, num_workers=workers
        )
        for batch in made:
            yield from batch.tolist()


class Combined:
    """litdata's CombinedStreamingDataset, with its loader's state."""

    name = "litdata.CombinedStreamingDataset"

    def __init__(self, folder: Path) -> None:
        import litdata

        self.litdata = litdata

        def make(numbers: range, target: Path) -> None:
            litdata.optimize(
                _itself, list(numbers), str(target), chunk_bytes="64MB", num_workers=1, start_method="fork"
            )

        self.folders = _tables(folder / "litdata-mixture", make)

    def stream(self, workers: int, start: int = 0) -> Iterator[int]:
        def loader() -> "torch.utils.data.DataLoader":
            parts = [self.litdata.StreamingDataset(folder, shuffle=True, seed=0) for folder in self.folders]
            together = self.litdata.CombinedStreamingDataset(
                parts, weights=WEIGHTS, seed=0, iterate_over_all=False
            )
            return self.litdata.StreamingDataLoader(together, batch_size=10, num_workers=workers)

        for batch in _resumed(loader, start):
            yield from batch.tolist()


class Proportions:
    """mosaicml-streaming's streams with `proportion`, with its loader's state."""

    name = "mosaicml-streaming"

    def __init__(self, folder: Path) -> None:
        import streaming

        self.streaming = streaming

        def make(numbers: range, target: Path) -> None:
            with streaming.MDSWriter(out=str(target), columns={"x": "int"}) as writer:
                for value in numbers:
                    writer.write({"x": value})

        self.folders = _tables(folder / "mosaic-mixture", make)

    def stream(self, workers: int, start: int = 0) -> Iterator[int]:
        def loader() -> "torch.utils.data.DataLoader":
            self.streaming.base.util.clean_stale_shared_memory()
            streams = [
                self.streaming.Stream(local=folder, proportion=weight)
                for folder, weight in zip(self.folders, WEIGHTS, strict=True)
            ]
            dataset = self.streaming.StreamingDataset(
                streams=streams, shuffle=True, shuffle_seed=0, epoch_size=2 * DRAWN, batch_size=10,
                num_canonical_nodes=1,
            )  # fmt: skip
            return self.streaming.StreamingDataLoader(dataset, batch_size=10, num_workers=workers)

        for batch in _resumed(loader, start):
            yield from batch["x"].tolist()


def _resumed(make: Callable[[], Any], start: int) -> Any:
    """A loader; from a place on, one with the state of another that stopped there."""
    loader = make()
    if start:
        batches = iter(loader)
        for _ in range(start // 10):
            next(batches)
        state, loader = loader.state_dict(), make()
        loader.load_state_dict(state)
    return loader


def _tables(folder: Path, make: Callable[[range, Path], None]) -> list[str]:
    """A peer's table of each component: folders of the numbers that stand for its samples."""
    return [
        str(made(folder / str(i), functools.partial(make, range(i * SIZE, (i + 1) * SIZE))))
        for i in range(len(WEIGHTS))
    ]


def _itself(value: int) -> int:
    return value


def _numbered(component: int, sample: dict[str, Any]) -> int:
    return component * SIZE + int(sample["npy"][0])


def shares(folder: Path) -> None:
    print(f"\n| mixture | per CPU second | deviation after {DRAWN:,} | resumes exactly | same by 2 workers |")
    print("|---|---|---|---|---|")
    makers: list[Callable[[], object]] = [
        functools.partial(Ours, folder), functools.partial(RandomMix, folder),
        functools.partial(Combined, folder), functools.partial(Proportions, folder),
    ]  # fmt: skip
    for make in makers:
        try:
            reader = make()
        except Exception as error:  # its own, or that of a package that it needs
            print(f"left out: {getattr(make, 'func', make).name} ({error})")
            continue
        stream = reader.stream(0)
        whole = list(itertools.islice(stream, DRAWN // 10))  # with what opening costs
        began = time.process_time()
        whole += itertools.islice(stream, DRAWN - len(whole))
        rate = (DRAWN - DRAWN // 10) / (time.process_time() - began)
        counts = np.bincount(np.array(whole) // SIZE, minlength=len(WEIGHTS))
        deviation = np.abs(counts - len(whole) * np.array(WEIGHTS) / sum(WEIGHTS)).max()
        try:
            resumed = list(itertools.islice(reader.stream(0, start=DRAWN // 2), 1000))
            resumes = "yes" if resumed == whole[DRAWN // 2 : DRAWN // 2 + 1000] else "no"
        except Exception as error:
            resumes = f"no ({type(error).__name__})"
        others = list(itertools.islice(reader.stream(2), 1000))
        same = "yes" if others == whole[:1000] else "no"
        print(f"| {reader.name} | {rate:,.0f} | {deviation:.1f} | {resumes} | {same} |", flush=True)


def main() -> None:
    parser = described_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "curated-data-streaming")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--turns", type=int, default=25, help="of each in a run")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--parts", nargs="+", choices=("shares", "speed"), default=["shares", "speed"])
    arguments = parser.parse_args()
    print_machine()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if "speed" in arguments.parts:  # before a peer is imported, with threads of its own
        make_shards(arguments.folder)
        speed(arguments.folder, arguments.repeats, arguments.turns, arguments.workers)
    if "shares" in arguments.parts:
        shares(arguments.folder)


if __name__ == "__main__":
    main()
