"""The loader of a pool's batches, which keeps their accounts."""

import logging
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from curated_data.streaming.slow import SlowWatch
from curated_data.streaming.statistics import BatchReport
from curated_data.streaming.transfer import WorkerCollate

log = logging.getLogger(__name__)


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
