"""A pool as a map-style dataset that makes whole batches, and the loader that keeps its accounts."""

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from curated_data.errors import ConfigError, SampleError
from curated_data.pool import ShardPool
from curated_data.pool.decode import decode_sample
from curated_data.streaming.order import view_seeds
from curated_data.streaming.slow import SlowWatch
from curated_data.streaming.transfer import WorkerCollate

log = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
_MODALITIES = ("image", "array", "text")
_SHARE_COUNTS_FROM = 1000  # samples; before, a few bad ones would be a large share


class Skipped(NamedTuple):
    """A sample that was not used, and why; the reason names its shard, key and member."""

    shard: str
    reason: str


class BatchReport(NamedTuple):
    """What making one batch took; travels from the worker beside the batch."""

    n_samples: int
    bytes_read: int
    bytes_needed: int
    skipped: list[Skipped]


class LoadedSamples(list):
    """The samples of a batch before collation, and the report on them."""

    report: BatchReport


class PoolDataset(Dataset):
    """All samples of a pool by id; `__getitems__` makes a whole batch.

    The randomness of a sample's views is seeded by (seed, epoch, position in the epoch), whichever process
    makes them; the global generators of torch, numpy and Python are as before when it returns. Views that
    draw from the latter two are called twice for the first batch where they do.

    Args:
        pool: where the bytes are.
        views: from a decoded sample (an image is a uint8 tensor (3, H, W)) to a list of tensors or to one;
            None gives the sample as decoded.
        seed: of the views.
        extensions: read only members with these, where not all that samples hold is wanted.
        decode: False gives the members' bytes undecoded, under "members".
        decoders, min_size: own decoders by extension, and reduced decoding, see `decode_sample`.
        on_error: what becomes of a sample that cannot be decoded: "raise", or "skip", which takes one of the
            request's spares in its place, or, where there are none, fills up with padding.
        max_skipped: the largest share of samples that may be skipped, counted over the samples that this
            process was given so far (over 1,000 at least).
        labels: what `label` is, in place of the pool's `.cls`.
        seeds_for_device: give `view_seed` too, (B,) int64, from which views are made on a device.
    """

    def __init__(
        self,
        pool: ShardPool,
        views: Callable[[Any], Tensor | Sequence[Tensor]] | None = None,
        *,
        seed: int = 0,
        extensions: Sequence[str] | None = None,
        decode: bool = True,
        decoders: Mapping[str, Callable[[bytes], Any]] | None = None,
        min_size: int | None = None,
        on_error: OnError = "raise",
        max_skipped: float = 0.01,
        labels: "SampleLabels | None" = None,
        seeds_for_device: bool = False,
    ) -> None:
        if on_error not in get_args(OnError):
            raise ConfigError(f"on_error: expected one of {', '.join(get_args(OnError))}, found {on_error!r}")
        self.pool = pool
        self.views = views
        self.seed = seed
        self.extensions = extensions
        self.decode = decode
        self.decoders = decoders
        self.min_size = min_size
        self.on_error = on_error
        self.statistics = StreamStatistics(max_skipped)
        self.labels = labels
        self.seeds_for_device = seeds_for_device
        self._seeds_all = False  # or torch's generator alone

    def __len__(self) -> int:
        return len(self.pool)

    def __getitem__(self, sample_id: int) -> dict[str, Any]:
        return self.__getitems__([sample_id])[0]

    def __getitems__(self, ids: Sequence[int]) -> LoadedSamples:
        """The samples of a `BatchRequest`, or of plain ids, whose views then are those of epoch 0.

        Raises:
            PoolError: a shard vanished, shrank or changed since it was indexed, whatever `on_error` says.
            SampleError: a sample cannot be decoded.
        """
        skipped: list[Skipped] = []
        counters = self.pool.counters
        before = counters.bytes_read, counters.bytes_needed
        members = self.pool.read(ids, self.extensions)
        loaded = self._decoded(ids, members, skipped) if self.decode else _undecoded(ids, members)
        padding = getattr(ids, "padding", None)
        if padding is not None:
            for sample, padded in zip(loaded, padding.tolist(), strict=True):
                sample.setdefault("padding", padded)
        if self.pool.counters is not counters:  # the pool counts anew in a process that was forked
            counters, before = self.pool.counters, (0, 0)
        read, needed = counters.bytes_read - before[0], counters.bytes_needed - before[1]
        loaded.report = BatchReport(len(loaded), read, needed, skipped)
        return loaded

    def _decoded(
        self, ids: Sequence[int], members: list[dict[str, Any]], skipped: list[Skipped]
    ) -> LoadedSamples:
        positions = getattr(ids, "positions", None)
        places = np.asarray(ids if positions is None else positions, np.int64)
        seeds = view_seeds(self.seed, getattr(ids, "epoch", 0), places).tolist()
        with _generators_kept() as others_moved:
            loaded = self._loaded(ids, members, seeds, skipped)
            if not self._seeds_all and others_moved():
                # The views draw from Python's or numpy's generator, which are seeded from now on. That costs
                # 12 µs a sample, so it is not done for views that draw from torch's alone, as most do.
                self._seeds_all = True
                skipped.clear()
                loaded = self._loaded(ids, members, seeds, skipped)
        self._fill(loaded, skipped)
        if self.labels is not None:
            found = self.labels.of(np.array([sample["sample_id"] for sample in loaded]))
            for sample, label in zip(loaded, found.tolist(), strict=True):
                sample["label"] = label
        if self.seeds_for_device:
            for sample, seed in zip(loaded, seeds, strict=True):
                sample["view_seed"] = seed >> 1  # as an int64
        return loaded

    def _loaded(
        self,
        ids: Sequence[int],
        members: list[dict[str, Any]],
        seeds: list[int],
        skipped: list[Skipped],
    ) -> LoadedSamples:
        loaded = LoadedSamples()
        for place, (sample_members, seed) in enumerate(zip(members, seeds, strict=True)):
            sample = self._load(ids[place], sample_members, seed, skipped)
            if sample is None:
                sample = self._spare(ids, place, seed, skipped)
            loaded.append(sample)
        return loaded

    def _load(
        self, sample_id: int, members: dict[str, Any], seed: int, skipped: list[Skipped]
    ) -> dict[str, Any] | None:
        """One sample, decoded and augmented; None where it is skipped."""
        try:
            sample = decode_sample(
                members,
                decoders=self.decoders,
                image_extensions=self.pool.image_extensions,
                min_size=self.min_size,
            )
            if self.views is not None:
                _seed_generators(seed, all_of_them=self._seeds_all)
                self._augment(sample, f"{members['__url__']}: sample {members['__key__']!r}")
        except SampleError as error:
            if self.on_error == "raise":
                raise
            skipped.append(Skipped(members["__url__"], str(error)))
            return None
        return {"sample_id": sample_id} | {name: sample[name] for name in _BATCH_FIELDS if name in sample}

    def _augment(self, sample: dict[str, Any], place: str) -> None:
        """Replace the decoded image, array or text by its views."""
        name = next((name for name in _MODALITIES if name in sample), None)
        if name is None:
            raise SampleError(f"{place}: nothing to make views of, it holds only {', '.join(sorted(sample))}")
        try:
            views = self.views(sample.pop(name))
        except SampleError as error:  # the views' way to say that a sample will not do
            raise SampleError(f"{place}: {error}") from error
        except Exception as error:  # a fault of theirs, whatever `on_error` says
            error.add_note(f"in the views of {place}")
            raise
        if isinstance(views, Tensor):
            sample["image"] = views
        else:
            sample["views"] = list(views)

    def _spare(
        self, ids: Sequence[int], place: int, seed: int, skipped: list[Skipped]
    ) -> dict[str, Any] | None:
        spares = getattr(ids, "spares", None)
        if spares is None:
            return None
        for spare in spares[place].tolist():
            sample = self._load(spare, self.pool.read([spare], self.extensions)[0], seed, skipped)
            if sample is not None:
                return sample
        last = skipped[-1]
        raise SampleError(
            f"sample {ids[place]} and the {spares.shape[1]} drawn to replace it cannot be decoded; the last: "
            f"{last.reason}"
        )

    def _fill(self, loaded: list[dict[str, Any] | None], skipped: list[Skipped]) -> None:
        """Where nothing may be replaced, as in validation, a skipped place holds padding."""
        good = next((sample for sample in loaded if sample is not None), None)
        if good is None:
            raise SampleError(f"no sample of a batch can be decoded; the first: {skipped[0].reason}")
        for place, sample in enumerate(loaded):
            if sample is None:
                loaded[place] = good | {"padding": True}


def _undecoded(ids: Sequence[int], members: list[dict[str, Any]]) -> LoadedSamples:
    return LoadedSamples(
        {"sample_id": sample_id, "members": content} for sample_id, content in zip(ids, members, strict=True)
    )


_BATCH_FIELDS = ("views", *_MODALITIES, "label", "caption", "metadata")


class SampleLabels:
    """Labels of some samples of a pool, given from outside.

    Args:
        ids: (n,) int64 samples; None: all of the pool.
        labels: (n,) integers.

    Raises:
        ConfigError: not a label for each id, or two different ones.
    """

    def __init__(self, ids: np.ndarray | None, labels: np.ndarray) -> None:
        labels = np.asarray(labels)
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or (ids is not None and len(ids) != len(labels)):
            wanted = "one integer a sample of the pool" if ids is None else f"{len(ids)} integers, one an id"
            raise ConfigError(f"labels: expected {wanted}, found {labels.dtype} of shape {labels.shape}")
        self.ids, self.labels = ids, labels.astype(np.int64)
        if ids is not None:
            self.ids, first, place = np.unique(ids, return_index=True, return_inverse=True)
            differing = np.flatnonzero(labels != labels[first][place])
            if len(differing):
                raise ConfigError(f"labels: sample {ids[differing[0]]} is selected twice with two labels")
            self.labels = self.labels[first]

    def of(self, ids: np.ndarray) -> np.ndarray:
        """The label of each sample, (m,) int64.

        Raises:
            ConfigError: one has none.
        """
        places = ids if self.ids is None else np.searchsorted(self.ids, ids)
        known = places < len(self.labels)
        if self.ids is not None and known.all():
            known = self.ids[places] == ids
        if not known.all():
            raise ConfigError(f"labels: sample {ids[~known][0]} has none; give one for each that is streamed")
        return self.labels[places]


@dataclass
class StreamStatistics:
    """What a loader of this process has been through.

    Attributes:
        max_skipped: the share of skipped samples above which `add` raises.
        n_samples, n_batches: given out.
        n_skipped: samples that could not be decoded.
        bytes_read, bytes_needed: what was read of the shards, gaps between samples included, and what was
            asked for.
        skipped_by_shard: how many of `n_skipped`, by shard.
    """

    max_skipped: float = 0.01
    n_samples: int = 0
    n_batches: int = 0
    n_skipped: int = 0
    bytes_read: int = 0
    bytes_needed: int = 0
    skipped_by_shard: dict[str, int] = field(default_factory=dict)

    def add(self, report: BatchReport) -> None:
        """Count a batch; log the first sample skipped in each shard.

        Raises:
            SampleError: more were skipped than `max_skipped` allows.
        """
        self.n_samples += report.n_samples
        self.n_batches += 1
        self.n_skipped += len(report.skipped)
        self.bytes_read += report.bytes_read
        self.bytes_needed += report.bytes_needed
        for shard, reason in report.skipped:
            if shard not in self.skipped_by_shard:
                log.warning("skipped a sample, more of its shard go unsaid: %s", reason)
            self.skipped_by_shard[shard] = self.skipped_by_shard.get(shard, 0) + 1
        if self.n_skipped > self.max_skipped * max(self.n_samples, _SHARE_COUNTS_FROM):
            shard, count = max(self.skipped_by_shard.items(), key=lambda item: item[1])
            raise SampleError(
                f"{self.n_skipped} of {self.n_samples} samples could not be decoded, more than max_skipped="
                f"{self.max_skipped:g} allows; most of them ({count}) in {shard}; the last: "
                f"{report.skipped[-1].reason}"
            )

    def summary(self) -> str:
        """One line for the log."""
        read = f"read {self.bytes_read / 1e6:,.1f} MB for {self.bytes_needed / 1e6:,.1f} MB needed"
        if not self.n_skipped:
            return f"{self.n_samples} samples, {read}"
        shards = len(self.skipped_by_shard)
        return f"{self.n_samples} samples, {self.n_skipped} skipped in {shards} shards, {read}"


class StreamLoader(DataLoader):
    """A `DataLoader` of a `PoolDataset` that keeps the dataset's statistics as batches are handed out.

    Attributes:
        slow_after: seconds without a batch after which a warning says so, once an epoch; 0 for none.
    """

    slow_after: float = 0.0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.num_workers:
            # Memory of its own for each iterator: workers of an earlier one may still be writing to theirs.
            plain = self.collate_fn.collate if isinstance(self.collate_fn, WorkerCollate) else self.collate_fn
            self.collate_fn = WorkerCollate(plain, 0 if self.dataset.decode else self.num_workers)
        return self._count(super().__iter__())  # not one generator: the iterator, and its workers, begin now

    def _count(self, batches: Iterator[tuple[dict[str, Any], BatchReport]]) -> Iterator[dict[str, Any]]:
        statistics, last = self.dataset.statistics, len(self)
        place = f"rank {getattr(self.batch_sampler, 'rank', 0)}, {self.num_workers} workers"
        with SlowWatch(self.slow_after, place) as watch:
            for number, (batch, report) in enumerate(watch.timed(batches), 1):
                statistics.add(report)
                if number == last:  # here, for nothing runs after the last batch was taken
                    log.info("stream: %s", statistics.summary())
                yield batch


def collate(samples: LoadedSamples) -> tuple[dict[str, Any], BatchReport]:
    """Stack samples to a batch: tensors and numbers to tensors, captions, metadata and raw members to lists.

    Raises:
        ConfigError: views of different shapes.
    """
    names = dict.fromkeys(name for sample in samples for name in sample)
    batch: dict[str, Any] = {}
    for name in names:
        values = [sample.get(name, _MISSING.get(name)) for sample in samples]
        if name == "views":
            batch[name] = [_stack(name, view) for view in zip(*values, strict=True)]
        elif isinstance(values[0], Tensor | np.ndarray):
            batch[name] = _stack(name, values)
        elif name in ("sample_id", "label", "view_seed"):
            batch[name] = torch.tensor(values, dtype=torch.int64)
        elif name == "padding":
            batch[name] = torch.tensor(values, dtype=torch.bool)
        else:
            batch[name] = values
    return batch, samples.report


_MISSING = {"label": -1, "caption": "", "padding": False}


def _stack(name: str, tensors: Sequence[Tensor | np.ndarray]) -> Tensor:
    tensors = [torch.as_tensor(tensor) for tensor in tensors]
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ConfigError(
            f"{name}: cannot be stacked to a batch, shapes differ: {sorted(shapes)[:4]}; resize or crop"
        )
    return default_collate(tensors)  # into shared memory, where this is a worker


@contextlib.contextmanager
def _generators_kept() -> Iterator[Callable[[], bool]]:
    """Leave the global random generators as they were found; tells whether Python's or numpy's were drawn
    from.
    """
    of_torch, of_python, of_numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002

    def others_moved() -> bool:
        now = np.random.get_state()  # noqa: NPY002
        same = now[2:] == of_numpy[2:] and np.array_equal(now[1], of_numpy[1])
        return not same or random.getstate() != of_python

    try:
        yield others_moved
    finally:
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002


def _seed_generators(seed: int, all_of_them: bool) -> None:
    torch.default_generator.manual_seed(seed)  # the CPU's: torch.manual_seed would reach for devices too
    if all_of_them:
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
