"""The loader of a pool's batches, which counts what it reads and skips."""

import logging
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from curated_data.processes import starting_workers
from curated_data.streaming.dataset import PoolDataset
from curated_data.streaming.slow import SlowWatch
from curated_data.streaming.statistics import BatchReport
from curated_data.streaming.transfer import WorkerCollate

log = logging.getLogger(__name__)


class StreamLoader(DataLoader):
    """A `DataLoader` for a `PoolDataset` that updates the dataset's statistics with every batch.

    Attributes:
        slow_after: seconds to wait for a batch before logging a warning, once per epoch; 0 never warns.
    """

    dataset: PoolDataset
    slow_after: float = 0.0

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]  # torch names a class of its own
        if self.num_workers:
            # New shared memory for each iterator: workers of an earlier one may still be writing to theirs.
            plain = self.collate_fn.collate if isinstance(self.collate_fn, WorkerCollate) else self.collate_fn
            self.collate_fn = WorkerCollate(plain, 0 if self.dataset.decode else self.num_workers)
        with starting_workers(self, **self.dataset.users_parts):
            batches = super().__iter__()
        return self._count(batches)  # not a generator itself, so that workers start now

    def _count(self, batches: Iterator[tuple[dict[str, Any], BatchReport]]) -> Iterator[dict[str, Any]]:
        statistics, last = self.dataset.statistics, len(self)
        place = f"rank {getattr(self.batch_sampler, 'rank', 0)}, {self.num_workers} workers"
        with SlowWatch(self.slow_after, place) as watch:
            for number, (batch, report) in enumerate(watch.timed(batches), 1):
                statistics.add(report)
                if number == last:  # before it is yielded: nothing runs after the last batch
                    log.info("stream: %s", statistics.summary())
                yield batch
