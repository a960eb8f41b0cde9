"""What a data module trains on: its sources, which of their samples come next, in what order, and where."""

import logging
from typing import TYPE_CHECKING

import numpy as np

from curated_data.streaming.mixture import AnyOrder, MixtureOrder
from curated_data.streaming.training import TrainingStream
from curated_data.training.arguments import checked_selection
from curated_data.training.components import Source, mixture_summary, number_pools, packed, unpacked
from curated_data.training.loaders import check_components
from curated_data.training.mixing import check_mixture, plan_access, stream_order
from curated_data.training.mixture import Mixture
from curated_data.training.resuming import resume_stream
from curated_data.training.trainer import change_setting, epochs_to_come, is_running, n_trained, ranks

if TYPE_CHECKING:
    from curated_data.training.datamodule import CuratedDataModule

log = logging.getLogger(__name__)

_RELOAD = "reload_dataloaders_every_n_epochs"


class SelectedStream:
    """The stream of a data module's sources; a single selection is a mixture of one, without a name.

    Args:
        data: the data module, for its batch size, seed and Trainer.
        mixture: of the sources, or None.
        sources: opened.

    Attributes:
        stream: the selections that replace the first ones, the order and the position.
        is_set_up: whether the sources are indexed and curated.
    """

    def __init__(self, data: "CuratedDataModule", mixture: Mixture | None, sources: list[Source]) -> None:
        self._data = data
        self.mixture = mixture
        self.sources = sources
        self.stream = TrainingStream(self._n_trained, data.cache_dir, self._checked_ids)
        self.is_set_up = False
        self._reload_every: int | None = None  # the Trainer's, while another stands there
        self._planned: str | None = None  # the order for which remote access was planned

    @property
    def ids(self) -> np.ndarray | None:
        """(n,) int64 ids of the next epoch; of a mixture, all that it can stream. None: all, or no set-up."""
        if self.mixture is None:
            return self.stream.selection
        if not self.is_set_up:
            return None
        chosen = zip(self.sources, self.selections(self.stream.selection), strict=True)
        pieces = [
            source.first_id + (np.arange(len(source.pool)) if ids is None else ids) for source, ids in chosen
        ]
        return np.unique(np.concatenate(pieces))

    def selections(self, ids: np.ndarray | None) -> list[np.ndarray | None]:
        """The ids of each source, by those that the stream keeps."""
        if self.mixture is None:
            return [ids]
        replaced = unpacked(ids, self.sources)
        return [replaced.get(number, source.first_selection) for number, source in enumerate(self.sources)]

    def replace(self, source: Source, ids: np.ndarray, *, artifact: str | None = None) -> None:
        """Stream other samples of a source from the next epoch on; `artifact` names them in the cache."""
        ids = checked_selection(np.asarray(ids), source.pool, "ids")
        if self.mixture is not None:
            ids = packed(unpacked(self.stream.selection, self.sources) | {self.sources.index(source): ids})
        self.stream.replace(ids, artifact=artifact, for_this_run=is_running(self._data.trainer))
        self.follow()

    def passes(self) -> list[float]:
        """How often the training has gone through each source so far."""
        order = self.stream.order
        if order is None:
            return [0.0] * len(self.sources)
        epoch, batch = self.stream.position.now(order.n_batches)
        if isinstance(order, MixtureOrder):
            return list(order.passes(epoch, batch).values())
        return [epoch + batch / order.n_batches]

    def index(self) -> None:
        """Index the pools, and number them."""
        for source in self.sources:
            source.index()
        number_pools(self.sources)

    def attach(self) -> None:
        """Begin again for a Trainer that the stream has not met yet, on the first selections."""
        trainer = self._data.trainer
        if trainer is None:
            return
        resume_stream(trainer)
        if self.stream.attach(trainer):
            self._reload_every = None
            for source in self.sources:
                source.begin_anew()

    def set_up(self) -> None:
        """Index, check and curate all sources, once; what cannot be mixed is an error before that."""
        if self.is_set_up:
            return
        data = self._data
        rank, n_ranks = ranks(data.trainer)
        for source in self.sources:
            if source.curation_config is not None:  # which all ranks do together
                source.pool.stat_on_all_ranks()
        self.index()
        if self.mixture is not None:
            check_mixture(self.mixture, self.sources, data.batch_size * n_ranks, data.last_batch)
            check_components(data, [source for source in self.sources if source.batches == "mixed"])
        for source in self.sources:
            source.curate("auto" if data.trainer is None else data.trainer.strategy.root_device)
        if self.mixture is None:
            self.stream.start_with(self.sources[0].first_selection)
        elif rank == 0:
            log.info("mixture: %s", mixture_summary(self.mixture, self.sources))
        self.is_set_up = True

    def n_epoch(self) -> int:
        """Samples of an epoch, before they are cut into batches."""
        if self.mixture is not None:
            return self.mixture.epoch_size or sum(source.n_first for source in self.sources)
        ids = self.stream.selection
        return len(self.sources[0].pool) if ids is None else len(ids)

    def order(self, *, overfits: bool) -> AnyOrder:
        """The order for a new loader, and how remote pools are read for it.

        Args:
            overfits: take every source in its order, for a Trainer that overfits a few batches.
        """
        data = self._data
        rank, n_ranks = ranks(data.trainer)
        size = data.batch_size * n_ranks

        def build(ids: np.ndarray | None) -> AnyOrder:
            made = stream_order(
                self.mixture,
                self.sources,
                self.selections(ids),
                seed=data.seed,
                batch_size=size,
                shuffled=not overfits,
                last_batch=data.last_batch,
                keep_strata=rank == 0,
            )
            log.info("stream: %d samples, %d global batches of %d", made.n_samples, made.n_batches, size)
            return made

        settings = (data.batch_size, n_ranks, data.seed, overfits, data.shuffle, data.last_batch)
        order = self.stream.prepare(data.trainer, settings, build)
        self.follow()
        if any(source.is_remote for source in self.sources) and self._planned != order.fingerprint:
            plan_access(self.sources, order, epochs_to_come(data.trainer, order.n_batches))
            self._planned = order.fingerprint
        return order

    def follow(self) -> None:
        """While a new selection is waiting, make the Trainer ask for a new loader at the next epoch."""
        trainer, waiting = self._data.trainer, self.stream.waiting
        if trainer is None:
            return
        if waiting and self._reload_every is None:
            self._reload_every = change_setting(trainer, _RELOAD, 1)
        elif not waiting and self._reload_every is not None:
            change_setting(trainer, _RELOAD, self._reload_every)
            self._reload_every = None

    def _checked_ids(self, ids: np.ndarray) -> np.ndarray:
        if self.mixture is None:
            return checked_selection(ids, self.sources[0].pool, "the checkpoint's selection")
        self.index()
        unpacked(ids, self.sources)
        return ids

    def _n_trained(self) -> int:
        """Batches whose optimizer step is done; without a Trainer, batches handed out."""
        trainer = self._data.trainer
        return self._data.statistics.n_batches if trainer is None else n_trained(trainer)
