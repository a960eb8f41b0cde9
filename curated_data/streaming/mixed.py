"""Several pools as one map-style dataset, for the stream of a mixture."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from curated_data.errors import ConfigError, SampleError
from curated_data.streaming.dataset import PoolDataset
from curated_data.streaming.envelopes import BatchRequest, LoadedBatch, as_request
from curated_data.streaming.fields import MISSING, MODALITIES
from curated_data.streaming.generators import Generators
from curated_data.streaming.statistics import BatchReport, StreamStatistics

_TRIED = 16  # samples among which one that can be decoded is searched


class MixtureDataset(Dataset):
    """The samples of several datasets; each has a `source` besides, the number of its dataset.

    A sample's id is that in its own pool plus the pool's `first_id`.

    Args:
        parts: datasets, which may share a pool.
        first_ids: of the pool of each.
        statistics: of all together.
        n_streamed: samples of a rank's epoch, which Lightning's Tuner asks for; None: of the pools.
    """

    decode = True

    def __init__(
        self,
        parts: Sequence[PoolDataset],
        first_ids: Sequence[int],
        statistics: StreamStatistics,
        n_streamed: int | None = None,
    ) -> None:
        self.parts = list(parts)
        self.first_ids = np.array(first_ids, np.int64)
        self.statistics = statistics
        self.n_streamed = n_streamed
        self.generators = Generators()  # put back once for all datasets, not after each
        for part in self.parts:
            part.generators = self.generators
        # Of each dataset, the first that gives the same samples: those of one batch are then read together.
        same = [next(i for i, other in enumerate(parts) if _reads_alike(other, part)) for part in parts]
        self._reader = np.array(same, np.int64)

    def __len__(self) -> int:
        if self.n_streamed is not None:
            return self.n_streamed
        return max(
            int(first) + len(part.pool) for first, part in zip(self.first_ids, self.parts, strict=True)
        )

    def __getitem__(self, sample_id: int) -> dict[str, Any]:
        return self.__getitems__([sample_id]).samples[0]

    def __getitems__(self, request: BatchRequest | Sequence[int]) -> LoadedBatch:
        """The samples of a request; without sources in it, each is of the first dataset of its pool.

        Raises:
            PoolError, SampleError: see `PoolDataset`.
        """
        request = as_request(request)
        return self.generators.kept(lambda: self._loaded(request))

    def _loaded(self, request: BatchRequest) -> LoadedBatch:
        sources = request.sources
        if sources is None:
            starts, numbers = np.unique(self.first_ids, return_index=True)
            sources = numbers[np.searchsorted(starts, np.asarray(request.ids), side="right") - 1]
        found: dict[int, dict[str, Any]] = {}
        report = BatchReport(0, 0, 0, [])
        readers = self._reader[sources]
        for number in np.unique(readers).tolist():
            places, first = np.flatnonzero(readers == number), int(self.first_ids[number])
            loaded = self.parts[number].loaded(request.of_pool(places, first))
            for place, sample in zip(places.tolist(), loaded.samples, strict=True):
                sample["sample_id"] += first
                sample["source"] = int(sources[place])
                found[place] = sample
            report = BatchReport(
                report.n_samples + loaded.report.n_samples,
                report.bytes_read + loaded.report.bytes_read,
                report.bytes_needed + loaded.report.bytes_needed,
                report.skipped + loaded.report.skipped,
            )
        counts = np.bincount(sources, minlength=len(self.parts))
        samples = [found[place] for place in range(len(request))]
        return LoadedBatch(samples, report._replace(of_source=tuple(counts.tolist())))

    @property
    def users_parts(self) -> dict[str, Any]:
        """What users gave that goes to workers, by the name of the argument."""
        return {name: value for part in self.parts for name, value in part.users_parts.items()}


def check_alike(datasets: Mapping[str, PoolDataset], ids: Mapping[str, Sequence[int]]) -> None:
    """Check that samples of all datasets make one batch, by one sample of each.

    Args:
        datasets: by the name of the component.
        ids: of each, to take the first that can be decoded from.

    Raises:
        ConfigError: they differ in what they hold, in the number of views or in a shape or type.
    """
    first: tuple[str, dict[str, str]] | None = None
    for name, dataset in datasets.items():
        sample = _a_sample(dataset, ids[name][:_TRIED])
        if sample is None:  # whether that is an error, `on_error` decides in training
            continue
        found = _described(sample)
        if first is None:
            first = name, found
            continue
        for field in sorted(first[1].keys() | found.keys()):
            here, there = found.get(field, "nothing"), first[1].get(field, "nothing")
            if here != there:
                raise ConfigError(
                    f"mixture: components {first[0]!r} and {name!r} cannot share a batch: {field} is {there} "
                    f"in one and {here} in the other; give them views that make them alike, or "
                    'batches="own"'
                )


def _a_sample(dataset: PoolDataset, ids: Sequence[int]) -> dict[str, Any] | None:
    for sample_id in ids:
        try:
            found = dataset[sample_id]
        except SampleError:
            continue
        if not found.get("padding"):
            return found
    return None


def _described(sample: Mapping[str, Any]) -> dict[str, str]:
    """What must be alike in a batch: kinds and shapes, but of what may be missing."""
    described = {}
    for name, value in sample.items():
        if name == "views":
            described[name] = " and ".join(map(_shape, value))
        elif isinstance(value, Tensor | np.ndarray):
            described[name] = _shape(value)
        elif name in MODALITIES:
            described[name] = type(value).__name__
        elif name not in (*MISSING, "metadata", "sample_id", "source", "view_seed"):
            described[name] = "a number" if isinstance(value, int | float) else "an object"
    return described


def _shape(value: Tensor | np.ndarray) -> str:
    return f"{str(torch.as_tensor(value).dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _reads_alike(one: PoolDataset, other: PoolDataset) -> bool:
    return one.pool is other.pool and one.views is other.views and one.labels is other.labels
