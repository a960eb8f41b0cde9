"""The loader of a pool's batches, which counts what it reads and skips."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from curated_data.errors import ConfigError
from curated_data.processes import starting_workers
from curated_data.streaming.dataset import PoolDataset
from curated_data.streaming.mixed import MixtureDataset
from curated_data.streaming.sampler import GlobalBatchSampler
from curated_data.streaming.slow import SlowWatch
from curated_data.streaming.statistics import BatchReport
from curated_data.streaming.training import TrainingStream
from curated_data.streaming.transfer import WorkerCollate

log = logging.getLogger(__name__)


class StreamLoader(DataLoader):
    """A `DataLoader` that updates the statistics of its `PoolDataset`, or `MixtureDataset`, with every batch.

    A training loader of a data module that no Trainer holds can be used with Fabric, or any loop: an iterator
    is one whole epoch, the next one the next epoch, and `set_epoch` chooses another. `state_dict` has the
    position, after the batches that were handed out; with `load_state_dict`, the next iterator continues
    there. In a Trainer that holds the data module, the position is in the data module's state, and the
    loader's is empty.

    Attributes:
        slow_after: seconds to wait for a batch before logging a warning, once per epoch; 0 never warns.
        stream: of a training loader that no Trainer holds; None for others.
    """

    dataset: PoolDataset | MixtureDataset
    slow_after: float = 0.0
    stream: TrainingStream | None = None

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch with the next iterator; without it, each one begins the next epoch.

        For the epoch that `load_state_dict` has just continued, it changes nothing.

        Raises:
            ConfigError: not a loader for training without a Trainer, or a negative epoch.
        """
        if self.stream is None:
            raise ConfigError(
                "set_epoch: the data module's Trainer sets the epoch, and validation and prediction have none"
            )
        if type(epoch) is not int or epoch < 0:
            raise ConfigError(f"set_epoch: expected a whole number, found {epoch!r}")
        self.stream.position.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position after the batches that were handed out; the same on every rank."""
        return {} if self.stream is None else self.stream.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken, on any number of ranks with the same global batch size.

        Raises:
            CacheError: the state is damaged, or of a run of a Trainer with the data module.
            ConfigError: the state is of another selection or, within an epoch, of another order.
        """
        if self.stream is not None:
            assert isinstance(self.batch_sampler, GlobalBatchSampler), "made by the data module"
            assert self.batch_sampler.order is not None, "given by the data module"
            self.stream.load_into(state_dict, self.batch_sampler.order)

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]  # torch names a class of its own
        if self.num_workers and not isinstance(self.collate_fn, WorkerCollate):
            self.collate_fn = WorkerCollate(self.collate_fn)
        with starting_workers(self, **self.dataset.users_parts):
            batches = super().__iter__()
        return self._count(batches)  # not a generator itself, so that workers start now

    def _count(self, batches: Iterator[tuple[dict[str, Any], BatchReport]]) -> Iterator[dict[str, Any]]:
        statistics, last = self.dataset.statistics, len(self)
        # Of a plain sampler; a Trainer may have wrapped it, in something that has its attributes.
        paddings = getattr(self.batch_sampler, "paddings", ())
        place = f"rank {getattr(self.batch_sampler, 'rank', 0)}, {self.num_workers} workers"
        with SlowWatch(self.slow_after, place) as watch:
            for number, (batch, report) in enumerate(watch.timed(self._current(batches)), 1):
                statistics.add(report)
                if paddings:
                    marks = torch.from_numpy(paddings.popleft())
                    batch["padding"] = batch["padding"] | marks if "padding" in batch else marks
                if number == last:  # before it is yielded: nothing runs after the last batch
                    log.info("stream: %s", statistics.summary())
                    self._log_passes(number)
                yield batch

    def _current(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The iterator, or another one if it began at an epoch that was changed before its first batch."""
        if isinstance(self.batch_sampler, GlobalBatchSampler) and self.batch_sampler.outdated:
            batches = super().__iter__()
        yield from batches

    def _log_passes(self, n_batches: int) -> None:
        """Log how often each component of a mixture has been seen, on all ranks, since training began."""
        sampler = self.batch_sampler
        passes = sampler.passes(n_batches) if isinstance(sampler, GlobalBatchSampler) else {}
        if passes:
            seen = ", ".join(f"{name} {count:.2f}" for name, count in passes.items())
            log.info("mixture: passes over each component: %s", seen)
