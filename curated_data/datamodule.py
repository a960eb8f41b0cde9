"""The DataModule: curate a pool, or load an earlier curation, and stream the selection to every rank."""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DataLoader

from curated_data.arguments import (
    Ids,
    Pool,
    check_alone,
    check_arguments,
    checked_selection,
    load_ids,
    load_labels,
    open_pool,
)
from curated_data.cache import absolute
from curated_data.components import (
    MixedComponent,
    check_batches,
    epoch_batches,
    mixture_order,
    mixture_summary,
    number_pools,
    open_components,
    packed,
    plan_access,
    unpacked,
)
from curated_data.config import CurationConfig, load_config
from curated_data.errors import ConfigError
from curated_data.mixture import Mixture, as_mixture
from curated_data.parallel import together
from curated_data.pool import ShardPool
from curated_data.pool.decode import Decoders
from curated_data.pool.urls import is_remote
from curated_data.processes import check_picklable
from curated_data.resuming import is_tuned, resume_stream
from curated_data.streaming.batch import as_views, collate
from curated_data.streaming.classes import ClassNumbers, class_names
from curated_data.streaming.crop import CenterCrop
from curated_data.streaming.dataset import OnError, PoolDataset
from curated_data.streaming.device import DeviceViews
from curated_data.streaming.encoded import DeviceDecoder
from curated_data.streaming.labels import SampleLabels
from curated_data.streaming.loader import StreamLoader
from curated_data.streaming.mixed import MixtureDataset, check_alike
from curated_data.streaming.mixture import AnyOrder, MixtureOrder
from curated_data.streaming.order import EpochOrder, LastBatch, Shuffle
from curated_data.streaming.sampler import GlobalBatchSampler
from curated_data.streaming.statistics import StreamStatistics
from curated_data.streaming.strata import check_level, strata
from curated_data.streaming.training import TrainingStream
from curated_data.trainer import (
    change_setting,
    cores_per_rank,
    epochs_to_come,
    forget_loader,
    from_module,
    is_between_epochs,
    is_running,
    n_trained,
    ranks,
    setting,
)

if TYPE_CHECKING:
    from curated_data.pipeline import Curation

log = logging.getLogger(__name__)

_RELOAD = "reload_dataloaders_every_n_epochs"
_PROBED = 16  # samples of a component, of which one that can be decoded is compared with the others
_SPARES = 6  # with a tenth of the pool bad, a sample and all of its spares are bad once in ten million


class CuratedDataModule(pl.LightningDataModule):
    """Selected samples of a pool of tar shards, as batches for a Trainer.

    `setup("fit")` runs the curation, or finds it in the cache; `train_dataloader` streams the selection. A
    batch is a dict: `views` (list of tensors (B, C, H, W)) or `image` (B, C, H, W), `sample_id` (B,) int64,
    and, if the pool has them, `label` (B,) int64, `caption` and `metadata` (lists of B), and outputs of own
    decoders, by extension (see `fields`). Labels that are class names, as text, are numbered in sorted order
    from 0, over `pool` and `val_pool` together. Where a batch may be padded (validation, prediction,
    `last_batch="pad"`), `padding` (B,) bool marks the samples to ignore.

    The order of global batches depends only on the selection, the seed, the epoch and the global batch size,
    and checkpoints hold the position in it: training resumes at the very next sample, on any number of ranks
    and workers, as long as `batch_size` times ranks stays the same.

    Args:
        pool: the shards: a path or URL with braces or a glob, a list of these, or a `ShardPool`.
        curation: what to select, a `CurationConfig` or a mapping of its fields; None streams the whole pool,
            or `selection`.
        mixture: several selections in one stream, a `Mixture` or a mapping of its fields, instead of `pool`,
            `curation` and `selection`. Batches then have `source` (B,) int64, the number of each sample's
            component; see `component_of` for the ids.
        embedder: the network or function whose features are clustered, as for `curate`; required by a
            curation.
        views: maps a decoded image, uint8 (3, H, W), to one tensor or a list of tensors. None takes the
            module's `views()` if it has that method, otherwise a single image, resized, centre-cropped and
            scaled to 0..1.
        device_views: makes the views on the training device instead, one batch at a time: a function of the
            samples that `views` returned (by default the image cropped to `image_size`, still uint8),
            (B, C, H, W), and of their seeds, (B,) int64, to one tensor or a list of tensors; see
            `curated_data.streaming.device`. For machines with few CPU cores per device.
        decode_on_device: decode JPEGs on the device too, one batch at a time, before `device_views`. Workers
            then only read them, and decode other formats.
        batch_size: samples per rank and step.
        num_workers: processes that read, decode and augment; None takes the cores available to this rank, at
            most 16.
        seed: for the order and the views.
        cache_dir: a folder, shared by all ranks, for the index, the embeddings and the curation's artifacts;
            required by a curation.
        selection: ids, or a `.npy` file of them, to stream instead of a curation's.
        labels: (n,) integers, or a `.npy` file of them, that replace the pool's labels in training: one for
            each id of `selection`, as in `CaptionLabels`, or without a `selection` one for each sample of the
            pool.
        val_pool: labelled shards for validation; every sample is used exactly once.
        eval_transform: like `views`, for validation and prediction. None takes the module's
            `eval_transform()` if it has that method, otherwise the resized and cropped image.
        eval_batch_size: like `batch_size`, for validation and prediction; None takes `batch_size`.
        shuffle: "full", "block" (a few shards at a time, for pools on disks or networks) or "none", see
            `EpochOrder`.
        last_batch: what to do with samples that do not fill the last global batch: "drop" them, or "pad" the
            batch and mark the padding.
        stratify_level: give every global batch the clusters of this level of the tree in the proportions of
            the selection.
        decoders: by extension, see `decode_sample`.
        fields: what batches have besides images: some of "label", "caption" and "metadata", and the
            extensions of `decoders` for members that are none of these. Members of other fields are not
            decoded, so what they hold does not matter; a curation takes no sample whose fields cannot be
            decoded. None: all.
        min_size: decode larger JPEGs at a reduced scale whose sides are at least this many pixels.
        image_size: side of the default image, in pixels.
        on_error: what to do about a sample that cannot be decoded: "raise", or "skip" (another one replaces
            it).
        max_skipped: the share of samples that may be skipped before an error is raised after all.
        pin_memory, persistent_workers, prefetch_factor: as in torch's `DataLoader`. None pins memory if there
            is a CUDA device, keeps training workers between epochs, and leaves prefetching to torch.
        multiprocessing_context: how workers start: "fork", "spawn" or "forkserver"; None takes Python's
            default. With the last two, `views`, `eval_transform` and `decoders` must pickle.
        worker_timeout: seconds to wait for a batch from the workers before raising an error; 0 waits forever.
        slow_after: seconds to wait for a batch before logging a warning, once per epoch; 0 never warns.
        storage_options: for fsspec, to read remote shards of pools that are given as paths or URLs.

    Attributes:
        mixture: the `Mixture`, or None; then `pool` is the pool of its first component.
        components: of the mixture, with their pools, curations and selections; empty without one.
        curation: what `curate` returned; None before `setup`, and without a curation.
        base_curation: the first curation, made with `embedder`; a re-curation replaces only `curation`.
        lost_tree: the name of the resumed selection's tree, if a later re-curation has removed it and
            `curation` is the first one; None otherwise.
        selection: (n,) int64 ids that the next epoch streams; None before `setup`, and for a whole pool. Of a
            mixture, all ids that it can stream, ascending and without repeats.
        statistics: what this process streamed, skipped and read in training.
        class_names: in the order of their numbers, if the `.cls` members hold names; None before a loader is
            made, and if they hold integers.

    Raises:
        ConfigError: arguments that contradict each other or are out of range.
        PoolError: no shard matches.

    Example:
        >>> from curated_data import CuratedDataModule
        >>> data = CuratedDataModule(
        ...     "pool-{000..001}.tar",
        ...     {"target_size": 12},
        ...     embedder="pixels:8",
        ...     batch_size=4,
        ...     cache_dir="cache",
        ... )
        >>> data.setup("fit")
        >>> len(data.train_dataloader())
        3
    """

    def __init__(
        self,
        pool: Pool | None = None,
        curation: CurationConfig | Mapping[str, Any] | None = None,
        *,
        mixture: Mixture | Mapping[str, Any] | None = None,
        embedder: str | nn.Module | Callable[[Tensor], Tensor] | Any | None = None,
        views: Callable[[Tensor], Any] | None = None,
        device_views: DeviceViews | None = None,
        decode_on_device: bool = False,
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        selection: Ids | None = None,
        labels: Ids | None = None,
        val_pool: Pool | None = None,
        eval_transform: Callable[[Tensor], Any] | None = None,
        eval_batch_size: int | None = None,
        shuffle: Shuffle = "full",
        last_batch: LastBatch = "drop",
        stratify_level: int | None = None,
        decoders: Decoders | None = None,
        fields: Sequence[str] | None = None,
        min_size: int | None = None,
        image_size: int = 224,
        on_error: OnError = "raise",
        max_skipped: float = 0.01,
        pin_memory: bool | None = None,
        persistent_workers: bool | None = None,
        prefetch_factor: int | None = None,
        multiprocessing_context: str | None = None,
        worker_timeout: float = 1800.0,
        slow_after: float = 60.0,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.cache_dir = None if cache_dir is None else absolute(cache_dir)
        self.embedder = embedder
        self.shuffle = shuffle
        self.decoders = decoders
        self.fields = fields
        self.components: list[MixedComponent] = []
        self.mixture = None if mixture is None else as_mixture(mixture)
        if self.mixture is not None:
            check_alone(pool=pool, curation=curation, selection=selection, labels=labels)
            self.components = open_components(self.mixture, self, storage_options)
            self.pool = self.components[0].pool
        elif pool is None:
            raise ConfigError("pool: missing; give shards, or a mixture of several pools or selections")
        else:
            self.pool = open_pool(pool, cache_dir, storage_options)
        self.val_pool = None if val_pool is None else open_pool(val_pool, cache_dir, storage_options)
        self.curation_config = None if curation is None else load_config(curation)
        self.views = views
        self.device_views = device_views
        self.decode_on_device = decode_on_device
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.eval_transform = eval_transform
        self.eval_batch_size = eval_batch_size
        self.last_batch = last_batch
        self.stratify_level = stratify_level
        self.min_size = min_size
        self.image_size = image_size
        self.on_error = on_error
        self.max_skipped = max_skipped
        self.pin_memory = pin_memory
        self.persistent_workers = persistent_workers
        self.prefetch_factor = prefetch_factor
        self.multiprocessing_context = multiprocessing_context
        self.worker_timeout = worker_timeout
        self.slow_after = slow_after
        self.curation: Curation | None = None
        self.base_curation: Curation | None = None
        self.lost_tree: str | None = None
        self.class_names: tuple[str, ...] | None = None
        self._class_names_known = False
        self.statistics = StreamStatistics(max_skipped)
        self.statistics.of_component = dict.fromkeys(self._names, 0)
        self._given_selection = selection
        self._given_labels = labels
        check_arguments(self, selection, labels)
        self._stream = TrainingStream(self._n_trained, self.cache_dir, self._checked_ids)
        self._is_set_up = False
        self._reload_every: int | None = None
        self._decoder: DeviceDecoder | None = None
        self._planned: object = (
            None  # the selection, or what names the mixture, for which remote access was planned
        )
        if device_views is not None:
            # On the instance: a hook in the class would keep the module's own from ever running.
            self.on_after_batch_transfer = self._make_device_views  # type: ignore[method-assign]
        self._hide_val_dataloader()

    def __repr__(self) -> str:
        if self.mixture is not None:
            return f"{type(self).__name__}({self.mixture!r}, batch_size={self.batch_size})"
        ids = self.selection
        if ids is not None:
            streams = f"{len(ids)} samples selected"
        elif self.curation_config is not None or self._given_selection is not None:
            streams = "not set up"
        else:
            streams = "the whole pool"
        return f"{type(self).__name__}({self.pool!r}, {streams}, batch_size={self.batch_size})"

    def __str__(self) -> str:
        return repr(self)  # Lightning's makes every loader, and so would run the curation

    @property
    def selection(self) -> np.ndarray | None:
        if self.mixture is None:
            return self._stream.selection
        return self._mixed_selection() if self._is_set_up else None

    def component(self, name: str) -> MixedComponent:
        """A component of the mixture, with its `pool`, `curation` and `selection`.

        Raises:
            ConfigError: there is none of that name.
        """
        if name not in self._names:
            known = f"its components are {', '.join(self._names)}" if self.components else "has no mixture"
            raise ConfigError(f"component: the data module has no {name!r}; {known}")
        return self.components[self._names.index(name)]

    def component_selection(self, name: str) -> np.ndarray | None:
        """(n,) int64 ids of its pool that a component gives next; None: all, or no `setup` yet."""
        component = self.component(name)
        replaced = unpacked(self._stream.selection, self.components)
        return replaced.get(self._names.index(name), component.first_selection)

    def component_of(
        self, sample_ids: np.ndarray | Tensor, sources: np.ndarray | Tensor
    ) -> list[tuple[str, int]]:
        """The component of each sample of a batch, and the sample's id in the component's own pool.

        In a mixture, the id of a sample is its id in its pool plus the number of samples of the pools before
        it, in the order in which the components name them; so ids differ between pools.

        Args:
            sample_ids, sources: (b,) a batch's `sample_id` and `source`.
        """
        pairs = zip(np.asarray(sample_ids).tolist(), np.asarray(sources).tolist(), strict=True)
        found = ((self.components[source], sample_id) for sample_id, source in pairs)
        return [(component.name, sample_id - component.first_id) for component, sample_id in found]

    def component_passes(self) -> dict[str, float]:
        """How often the training has gone through each component so far, as `mixture/NAME`, for `log_dict`.

        It is the same on all ranks, and a resumed run goes on counting.
        """
        order = self._stream.order
        if order is None:
            return {f"mixture/{name}": 0.0 for name in self._names}
        epoch, batch = self._stream.position.now(order.n_batches)
        if isinstance(order, MixtureOrder):
            return {f"mixture/{name}": passes for name, passes in order.passes(epoch, batch).items()}
        return {f"mixture/{name}": epoch + batch / order.n_batches for name in self._names}

    def setup(self, stage: str | None = None) -> None:
        """Index the pools; for "fit" (or None) curate, or find the curation in the cache.

        Every rank takes part in the work, so it is not in `prepare_data`, where all ranks would wait for one.
        A second call does nothing.
        """
        configs = [self.curation_config, *(component.curation_config for component in self.components)]
        curates = stage in (None, "fit") and any(configs) and not self._is_set_up
        with together() if curates else contextlib.nullcontext():
            if stage in (None, "fit"):
                self._attach()
                self._select()
            if stage in (None, "fit", "validate") and self.val_pool is not None:
                self.val_pool.index()
            if stage == "predict":
                self._index_pools()

    def set_selection(self, ids: np.ndarray, *, component: str | None = None) -> None:
        """Stream another selection from the next epoch on. Call it on every rank with the same ids.

        Within `Trainer.fit` that epoch gets a new loader, whose length may differ. Checkpoints refer to the
        selection in the cache, or contain it if there is no `cache_dir`. A selection that is set during a
        run is that run's: another Trainer begins with the first one again. One that is set outside a run is
        for all runs to come.

        Args:
            ids: (n,) integers; an id that is repeated is streamed as often.
            component: of a mixture, whose samples they replace; ids of its own pool. The others go on where
                they are, and so does the length of an epoch.

        Raises:
            ConfigError: ids that are not in the pool, or a mixture and no name of one of its components.
        """
        if self.mixture is not None and component is None:
            raise ConfigError(f"component: missing; the mixture has {', '.join(self._names)}")
        if component is None:
            ids = checked_selection(np.asarray(ids), self.pool, "ids")
        else:
            ids = checked_selection(np.asarray(ids), self.component(component).pool, "ids")
            replaced = unpacked(self._stream.selection, self.components)
            ids = packed(replaced | {self._names.index(component): ids})
        self._stream.replace(ids, for_this_run=is_running(self.trainer))
        self._follow_selection()

    def train_dataloader(self) -> StreamLoader:
        if not self._is_set_up:
            self._select()
        self._stay_within_selection()
        overfits = bool(setting(self.trainer, "overfit_batches"))
        shuffle = "none" if overfits else self.shuffle
        settings = (
            self.batch_size,
            ranks(self.trainer)[1],
            self.seed,
            shuffle,
            self.last_batch,
            self.stratify_level,
        )
        order = self._stream.prepare(self.trainer, settings, lambda ids: self._training_order(ids, shuffle))
        self._follow_selection()
        dataset = self._training_dataset()
        dataset.n_streamed = order.n_samples // ranks(self.trainer)[1]
        self._plan_access(order)
        keep = self.persistent_workers
        if keep is None:  # kept workers, pinned memory and a reload leak file handles (Lightning #18487)
            keep = not (self._pins() and setting(self.trainer, _RELOAD))
        loader = self._loader(
            dataset,
            order,
            self.batch_size,
            keep_workers=keep,
            position=None if overfits else self._stream.position,
            n_spares=_SPARES if self.on_error == "skip" else 0,
            endless=self.trainer is not None and not overfits,
            whole_epochs=self.trainer is None,
        )
        loader.stream = self._stream if self.trainer is None else None
        return loader

    def val_dataloader(self) -> DataLoader:
        """All of `val_pool` in its order, each sample once. Without a `val_pool` the method is hidden.

        Raises:
            ConfigError: a subclass calls it without a `val_pool`.
        """
        if self.val_pool is None:
            raise ConfigError("val_pool: none was given, so there is nothing to validate on")
        return self._evaluation_loader(self.val_pool)

    def predict_dataloader(self) -> DataLoader:
        """The whole pool in its order, each sample once. Prediction writers get the ids as batch indices.

        Of a mixture, all pools, one after the other.
        """
        if self.mixture is None:
            return self._evaluation_loader(self.pool, plain=True)
        self._index_pools()
        first_of_pool = list({id(component.pool): component for component in self.components[::-1]}.values())
        components = sorted(first_of_pool, key=lambda component: component.first_id)
        return self._evaluation_loader(*(component.pool for component in components), plain=True)

    def teardown(self, stage: str | None = None) -> None:
        for pool in self._pools:
            pool.close()

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream: what was trained on, not what workers have prefetched."""
        return self._stream.state_dict(self.trainer is not None and is_between_epochs(self.trainer))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken.

        Raises:
            CacheError: the state is damaged, or a re-curated selection is no longer in the cache.
            ConfigError: the state is of another pool.
        """
        # A Trainer restores the data module for validation and prediction too; training does not resume then.
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            self._stream.load_state_dict(state_dict, self.trainer)
            self._follow_selection()
            if self.trainer is not None:
                forget_loader(self.trainer)

    def _hide_val_dataloader(self) -> None:
        if self.val_pool is None and type(self).val_dataloader is CuratedDataModule.val_dataloader:
            # Hide the method: a Trainer warns of one if the module has no validation_step.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        # A method that hides another is pickled by name, and would come back as the hidden one.
        return {name: value for name, value in self.__dict__.items() if name != "val_dataloader"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._hide_val_dataloader()

    def _stay_within_selection(self) -> None:
        """Stop a Tuner's search for a batch size at the largest one that the selection fills."""
        if self.mixture is not None:
            n_samples = self.mixture.epoch_size or sum(component.n_first for component in self.components)
        else:
            n_samples = len(self.pool) if self.selection is None else len(self.selection)
        most = n_samples // ranks(self.trainer)[1]
        if self.last_batch == "drop" and self.batch_size > most > 0 and is_tuned(self.trainer):
            log.warning("batch_size: %d is more than the selection fills; trying %d", self.batch_size, most)
            self.batch_size = most

    def _attach(self) -> None:
        """Begin anew for a Trainer that the stream has not met yet, on the first selection."""
        if self.trainer is None:
            return
        resume_stream(self.trainer)
        if self._stream.attach(self.trainer):
            self.curation, self.lost_tree, self._reload_every = self.base_curation, None, None
            for component in self.components:
                component.begin_anew()

    def _checked_ids(self, ids: np.ndarray) -> np.ndarray:
        if self.mixture is not None:
            self._index_pools()
            unpacked(ids, self.components)
            return ids
        return checked_selection(ids, self.pool, "the checkpoint's selection")

    def _select(self) -> None:
        if self._is_set_up:
            return
        if self.mixture is not None:
            self._select_components(self.mixture)
        elif self.curation_config is not None:
            from curated_data.pipeline import curate

            assert self.embedder is not None, "a curation comes with one"
            assert self.cache_dir is not None, "a curation comes with one"
            self.curation = curate(
                self.pool,
                self.curation_config,
                embedder=self.embedder,
                cache_dir=self.cache_dir,
                device=self._curation_device,
                decoders=self.decoders,
                fields=self.fields,
            )
            self.base_curation = self.curation
            self._stream.start_with(self.curation.ids)
        elif self._given_selection is not None:
            ids = load_ids(self._given_selection)
            self._stream.start_with(checked_selection(ids, self.pool, "selection"))
        else:
            self.pool.index()
        self._is_set_up = True

    def _select_components(self, mixture: Mixture) -> None:
        """Index, check and curate all components; what cannot be mixed is an error before the curations."""
        self._index_pools()
        if len(self.components) > 1 or mixture.epoch_size is not None:
            size = self.batch_size * ranks(self.trainer)[1]
            n_batches = epoch_batches(mixture, self.components, size, self.last_batch)
            check_batches(mixture, self.components, n_batches)
        mixed = [component for component in self.components if component.batches == "mixed"]
        if len(mixed) > 1:
            check_alike(
                dict(zip((c.name for c in mixed), self._component_datasets(mixed), strict=True)),
                {component.name: component.candidates(_PROBED) for component in mixed},
            )
        for component in self.components:
            component.curate(self._curation_device)
        if ranks(self.trainer)[0] == 0:
            log.info("mixture: %s", mixture_summary(mixture, self.components))

    def _training_order(self, ids: np.ndarray | None, shuffle: Shuffle) -> AnyOrder:
        batch_size = self.batch_size * ranks(self.trainer)[1]
        order: AnyOrder
        if self.mixture is not None:
            replaced = unpacked(ids, self.components)
            order = mixture_order(
                self.mixture,
                self.components,
                [replaced.get(number, c.first_selection) for number, c in enumerate(self.components)],
                seed=self.seed,
                batch_size=batch_size,
                shuffled=not setting(self.trainer, "overfit_batches"),
                last_batch=self.last_batch,
                strata_of=self._strata,
            )
        else:
            order = EpochOrder(
                len(self.pool) if ids is None else ids,
                seed=self.seed,
                batch_size=batch_size,
                shuffle=shuffle,
                last_batch=self.last_batch,
                shard_starts=self.pool.shard_ranges() if shuffle == "block" else None,
                strata=self._strata(self, ids) if self.stratify_level and shuffle == "full" else None,
            )
        log.info(
            "stream: %d samples, %d global batches of %d", order.n_samples, order.n_batches, order.batch_size
        )
        return order

    def _strata(self, of: "CuratedDataModule | MixedComponent", ids: np.ndarray | None) -> np.ndarray:
        """The cluster of each id, of the whole stream or of one component."""
        assert of.stratify_level is not None, "or there are no strata"
        assert of.curation is not None, "stratify_level comes with a curation"
        assert self.cache_dir is not None, "a curation comes with one"
        check_level(of.stratify_level, of.curation.tree.n_levels)
        return strata(
            ids,
            of.stratify_level,
            find=None if of.lost_tree else of.curation.tree.assignment,
            tree=of.lost_tree or of.curation.folders["tree"].name,
            cache_dir=self.cache_dir,
            keep=ranks(self.trainer)[0] == 0,
        )

    def _training_views(self) -> Callable[[Tensor], Any] | None:
        """What workers apply to a decoded image; None for nothing."""
        if self.decode_on_device:
            return None
        if self.device_views is not None:
            return self.views or CenterCrop(self.image_size, scale=False)
        return self.views or from_module(self.trainer, "views") or CenterCrop(self.image_size)

    def _training_dataset(self) -> PoolDataset | MixtureDataset:
        if self.mixture is not None:
            parts = self._component_datasets(self.components)
            return MixtureDataset(parts, [c.first_id for c in self.components], self.statistics)
        labels = load_labels(self._given_labels, self._given_selection, self.pool)
        dataset = self._dataset(self.pool, self._training_views(), labels)
        dataset.statistics = self.statistics
        dataset.seeds_for_device = self.device_views is not None
        dataset.encoded = self.decode_on_device
        if self.decode_on_device:
            self._decoder = DeviceDecoder(dataset, CenterCrop(self.image_size, scale=False))
        return dataset

    def _component_datasets(self, components: Sequence[MixedComponent]) -> list[PoolDataset]:
        common = self._training_views()  # the same object for all, by which readers are shared
        datasets = []
        for component in components:
            dataset = self._dataset(component.pool, component.views or common)
            dataset.seeds_for_device = self.device_views is not None
            if component.views is not None:
                dataset.views_name = f"views of component {component.name!r}"
            datasets.append(dataset)
        return datasets

    def _plan_access(self, order: AnyOrder) -> None:
        """For a remote pool, choose byte ranges or whole shards, by how much of each will be read."""
        if isinstance(order, MixtureOrder):
            if self._planned != order.fingerprint and any(
                is_remote(url) for p in self._pools for url in p.urls
            ):
                plan_access(self.components, order, epochs_to_come(self.trainer, order.n_batches))
                self._planned = order.fingerprint
            return
        planned = self._planned is order.selection and self._planned is not None
        if planned or not any(map(is_remote, self.pool.urls)):
            return
        ids = None if isinstance(order.selection, int) else np.unique(order.selection)
        self.pool.plan_access(ids, epochs=epochs_to_come(self.trainer, order.n_batches))
        self._planned = order.selection

    def _make_device_views(self, batch: Any, dataloader_idx: int) -> Any:
        """Lightning's `on_after_batch_transfer`; a subclass's own, or the module's, gets what it returns."""
        batch = self._with_device_views(batch)
        if type(self).on_after_batch_transfer is not CuratedDataModule.on_after_batch_transfer:
            return type(self).on_after_batch_transfer(self, batch, dataloader_idx)
        module = None if self.trainer is None else self.trainer.lightning_module
        if module is not None and is_overridden("on_after_batch_transfer", module):
            return module.on_after_batch_transfer(batch, dataloader_idx)  # Lightning calls only one of two
        return batch

    def _with_device_views(self, batch: Any) -> Any:
        """A batch for training with its views; others unchanged."""
        if not isinstance(batch, dict) or "view_seed" not in batch:
            return batch
        assert self.device_views is not None, "seeds are there for its sake"
        seeds = batch.pop("view_seed")
        if "encoded" in batch:
            assert self._decoder is not None, "made with the loader"
            self._decoder(batch, seeds.device)
        if "image" not in batch:
            raise ConfigError("views: with device_views they give one tensor, and not a list of views")
        views = as_views(self.device_views(batch.pop("image"), seeds), "device_views")
        batch["image" if isinstance(views, Tensor) else "views"] = views
        return batch

    def _n_trained(self) -> int:
        """Batches whose optimizer step is done; without a Trainer, batches handed out."""
        if self.trainer is None:
            return self.statistics.n_batches
        return n_trained(self.trainer)

    def _follow_selection(self) -> None:
        """While a new selection is waiting, make the Trainer ask for a new loader at the next epoch."""
        if self.trainer is None:
            return
        waiting = self._stream.waiting
        if waiting and self._reload_every is None:
            self._reload_every = change_setting(self.trainer, _RELOAD, 1)
        elif not waiting and self._reload_every is not None:
            change_setting(self.trainer, _RELOAD, self._reload_every)
            self._reload_every = None

    @property
    def _names(self) -> list[str]:
        return [component.name for component in self.components]

    @property
    def _pools(self) -> list[ShardPool]:
        """All that are read, each once."""
        pools = [self.pool, *(component.pool for component in self.components), self.val_pool]
        return list({id(pool): pool for pool in pools if pool is not None}.values())

    @property
    def _curation_device(self) -> Any:
        return "auto" if self.trainer is None else self.trainer.strategy.root_device

    def _index_pools(self) -> None:
        if self.mixture is None:
            self.pool.index()
            return
        for component in self.components:
            component.index()
        number_pools(self.components)

    def _mixed_selection(self) -> np.ndarray:
        pieces = []
        for component in self.components:
            ids = component.selection
            pieces.append(component.first_id + (np.arange(len(component.pool)) if ids is None else ids))
        return np.unique(np.concatenate(pieces))

    def _evaluation_loader(self, *pools: ShardPool, plain: bool = False) -> DataLoader:
        transform = (
            self.eval_transform or from_module(self.trainer, "eval_transform") or CenterCrop(self.image_size)
        )
        size = self.eval_batch_size or self.batch_size
        order = EpochOrder(
            sum(map(len, pools)),
            seed=self.seed,
            batch_size=size * ranks(self.trainer)[1],
            shuffle="none",
            last_batch="short",
        )
        datasets = [self._dataset(pool, transform) for pool in pools]
        for part in datasets:
            part.views_name = "eval_transform"
        dataset: PoolDataset | MixtureDataset = datasets[0]
        if self.mixture is not None and plain:
            first_ids = np.cumsum([0, *(len(pool) for pool in pools[:-1])]).tolist()
            dataset = MixtureDataset(datasets, first_ids, StreamStatistics(self.max_skipped))
        return self._loader(dataset, order, size, keep_workers=False, plain=plain)

    def _dataset(
        self, pool: ShardPool, views: Callable[[Tensor], Any] | None, labels: SampleLabels | None = None
    ) -> PoolDataset:
        dataset = PoolDataset(
            pool,
            views,
            seed=self.seed,
            decoders=self.decoders,
            fields=self.fields,
            min_size=self.min_size,
            on_error=self.on_error,
            max_skipped=self.max_skipped,
            labels=labels,
        )
        if "label" in dataset.fields and labels is None and "cls" not in (dataset.decoders or {}):
            if not self._class_names_known:
                self.class_names = class_names(self._pools, self.cache_dir)
                self._class_names_known = True
            if self.class_names is not None:
                dataset.decoders = {**(dataset.decoders or {}), "cls": ClassNumbers(self.class_names)}
        return dataset

    def _loader(
        self,
        dataset: PoolDataset | MixtureDataset,
        order: AnyOrder,
        batch_size: int,
        *,
        keep_workers: bool,
        **sampling: Any,
    ) -> StreamLoader:
        number, n_ranks = ranks(self.trainer)
        sampler = GlobalBatchSampler(
            None,
            batch_size,
            order.last_batch == "drop",
            order=order,
            rank=number,
            world_size=n_ranks,
            **sampling,
        )
        n_workers = self.num_workers
        if n_workers is None:
            n_workers = min(16, cores_per_rank(self.trainer))
        loader = StreamLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=n_workers,
            pin_memory=self._pins(),
            persistent_workers=keep_workers and n_workers > 0,
            prefetch_factor=self.prefetch_factor if n_workers else None,
            multiprocessing_context=self.multiprocessing_context if n_workers else None,
            timeout=self.worker_timeout if n_workers else 0,
            # The workers' base seed is drawn from this generator instead of the global one.
            generator=torch.Generator().manual_seed(self.seed),
        )
        loader.slow_after = self.slow_after
        check_picklable(loader, **dataset.users_parts)
        return loader

    def _pins(self) -> bool:
        return torch.cuda.is_available() if self.pin_memory is None else self.pin_memory
