"""One rank's share of the global batches."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import BatchSampler

from curated_data.errors import ConfigError
from curated_data.streaming.envelopes import BatchRequest
from curated_data.streaming.mixture import AnyOrder, MixtureOrder
from curated_data.streaming.training import StreamPosition

_AHEAD = 1 << 13  # samples computed at once, to spread numpy's overhead per call


class GlobalBatchSampler(BatchSampler):
    """One rank's slice [rank::world_size] of each global batch; the same number of batches on every rank.

    In a distributed run, Lightning injects a `DistributedSampler` into any `BatchSampler` that it finds, and
    for prediction it constructs another one. This class accepts both and keeps to its own order.

    Args:
        sampler, batch_size, drop_last: as in `BatchSampler`, for Lightning; only `batch_size` is used, the
            size of this rank's batch.
        order: the global batches.
        rank, world_size: of this process.
        position: where to start; None: always at the beginning of epoch 0.
        n_spares: spare ids per sample, see `BatchRequest`.
        endless: continue into the next epoch until `len` batches are given, for loops that count by
            themselves; otherwise stop at the end of the epoch.
        whole_epochs: begin the next epoch with every iterator, even if the last one was left in the middle.
        plain: give lists of ids instead of `BatchRequest`s, for any dataset, and for loops that pass them on
            to users. What marks padding waits in `paddings`.

    Attributes:
        paddings: of the batches that were requested and have not come yet, if `plain`.
        outdated: whether the latest iterator began at an epoch that `set_epoch` has changed since.

    Raises:
        ConfigError: made by Lightning or Fabric from a loader that was not asked for by a Trainer.
    """

    def __init__(
        self,
        sampler: Any,
        batch_size: int,
        drop_last: bool,
        *,
        order: AnyOrder | None = None,
        rank: int = 0,
        world_size: int = 1,
        position: StreamPosition | None = None,
        n_spares: int = 0,
        endless: bool = False,
        whole_epochs: bool = False,
        plain: bool = False,
    ) -> None:
        if order is None:
            raise ConfigError(
                "the loader of a CuratedDataModule cannot be given another sampler: pass the data module "
                "instead, `trainer.fit(module, datamodule=data)`; with Fabric, ask for the loader after "
                "`fabric.launch()` and pass it to `fabric.setup_dataloaders(loader, "
                "use_distributed_sampler=False)`"
            )
        # Not super().__init__: there is no sampler of single samples here.
        self.sampler = _Samples(order.n_samples, self.set_epoch)
        self.batch_size = batch_size
        self.drop_last = order.last_batch == "drop"
        self.order = order
        self.rank = rank
        self.world_size = world_size
        self.position = position
        self.n_spares = n_spares
        self.endless = endless
        self.whole_epochs = whole_epochs
        self.plain = plain
        self.paddings: deque[np.ndarray] = deque()
        self._began = (0, 0)  # epoch and batch of the last iterator
        self.outdated = False
        self._named = False  # whether a loop has named an epoch

    def set_epoch(self, epoch: int) -> None:
        """Begin with the epoch that a resumed loop names first, if no state was loaded into the loader.

        Lightning and Fabric name every epoch of theirs. Only a first one above 0 tells something new: that of
        a Trainer that was given a bare loader and resumes between two epochs, where Lightning restores no
        loader's state. It has asked for an iterator by then, which has to be started again.
        """
        if not self._named and epoch > 0 and self.whole_epochs and self.position is not None:
            self.outdated = self.position.begin_at_least(epoch)
        self._named = True

    def __len__(self) -> int:
        """Batches of a whole epoch, even if one is resumed in the middle."""
        return self.order.n_batches

    def __iter__(self) -> Iterator[Any]:
        # Read now, not at the first batch: a training loop creates the iterator when it starts counting.
        n, epoch, batch = self.order.n_batches, 0, 0
        if self.position is not None:
            epoch, batch = self.position.begin(n, whole_epochs=self.whole_epochs)
        self._began, self.outdated = (epoch, batch), False
        requests = self._requests(epoch, batch, n if self.endless else n - batch)
        self.paddings.clear()
        return map(self._plain, requests) if self.plain else requests

    def passes(self, n_batches: int) -> dict[str, float]:
        """How often the stream has gone through each component of a mixture, from the beginning of training
        to so many batches into the last iterator; empty for other orders.
        """
        if not isinstance(self.order, MixtureOrder):
            return {}
        epoch, batch = self._began
        return self.order.passes(epoch, batch + n_batches)

    def _plain(self, request: BatchRequest) -> list[int]:
        marks = request.padding
        self.paddings.append(np.zeros(len(request), bool) if marks is None else marks)
        return request.ids

    def _requests(self, epoch: int, batch: int, count: int) -> Iterator[BatchRequest]:
        n, at_once = self.order.n_batches, max(1, _AHEAD // self.order.batch_size)
        stop = batch + count
        while batch < stop:
            first = batch % n
            last = min(first + at_once, n, first + stop - batch)
            yield from self._cut(epoch + batch // n, first, last)
            batch += last - first

    def _cut(self, epoch: int, first: int, last: int) -> Iterator[BatchRequest]:
        order, size = self.order, self.order.batch_size
        positions, ids = order.batches(epoch, first, last)
        spares = order.spares(epoch, positions, self.n_spares) if self.n_spares else None
        sources = order.components(epoch, first, last) if isinstance(order, MixtureOrder) else None
        for low in range(0, len(ids), size):
            high = min(low + size, len(ids))
            mine = np.arange(low + self.rank, high, self.world_size)
            padding = None
            if order.last_batch != "drop":
                padding = positions[mine] >= order.n_samples
                if len(mine) < -(-(high - low) // self.world_size):
                    # A short batch that the ranks cannot share evenly: repeat the last sample, as padding.
                    mine, padding = np.append(mine, high - 1), np.append(padding, True)
            mine_spares = None if spares is None else spares[mine]
            mine_sources = None if sources is None else sources[mine]
            yield BatchRequest(ids[mine].tolist(), epoch, positions[mine], mine_spares, padding, mine_sources)


class _Samples:
    """The sampler of single samples that loops find in a batch sampler, and name their epochs to."""

    def __init__(self, n_samples: int, set_epoch: Callable[[int], None]) -> None:
        self.n_samples = n_samples
        self.set_epoch = set_epoch

    def __len__(self) -> int:
        return self.n_samples

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n_samples))
