"""Our stream and its peers as iterators over the sizes of batches, all decoding with the same functions.

Each takes the folder of the data, the ids that are selected, what is done with a JPEG (`decode` or `keep`)
and a number of loader workers; it continues epoch after epoch.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder

from benchmarks.streaming_data import N_SAMPLES, N_SHARDS
from curated_data.pool import ShardPool
from curated_data.pool.decode import decode_image
from curated_data.streaming import (
    EpochOrder,
    GlobalBatchSampler,
    PoolDataset,
    StreamLoader,
    StreamPosition,
    collate,
)

BATCH = 64


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
