"""The DataModule: curate a pool, or load an earlier curation, and stream the selection to every rank."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import lightning.pytorch as pl
import numpy as np
from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import DataLoader

from curated_data.cache.artifacts import absolute
from curated_data.checks import whole_number
from curated_data.config import CurationConfig
from curated_data.errors import ConfigError
from curated_data.parallel import together
from curated_data.pool import ShardPool
from curated_data.streaming.classes import class_names
from curated_data.streaming.crop import CenterCrop
from curated_data.streaming.device import with_device_views
from curated_data.streaming.encoded import DeviceDecoder
from curated_data.streaming.loader import StreamLoader
from curated_data.streaming.order import LastBatch, Shuffle, check_choices
from curated_data.streaming.statistics import StreamStatistics
from curated_data.training.arguments import Ids, Pool, check_absent, check_functions, named_pools
from curated_data.training.components import Source, open_sources
from curated_data.training.hyperparameters import KEY, hyperparameters
from curated_data.training.loaders import evaluation_loader, training_loader
from curated_data.training.mixture import Component, Mixture, as_mixture
from curated_data.training.options import (
    MOVED,
    DecodingOptions,
    DeviceOptions,
    LoaderOptions,
    Moved,
    OldArguments,
    grouped,
)
from curated_data.training.resuming import is_tuned
from curated_data.training.selected import SelectedStream
from curated_data.training.trainer import forget_loader, is_between_epochs, ranks, setting

if TYPE_CHECKING:
    from curated_data.stages.curation import Curation

log = logging.getLogger(__name__)


class CuratedDataModule(pl.LightningDataModule):
    """Selected samples of a pool of tar shards, as batches for a Trainer.

    `setup("fit")` runs the curation, or finds it in the cache; `train_dataloader` streams the selection. A
    batch is a dict: `views` (list of tensors (B, C, H, W)) or `image` (B, C, H, W), `sample_id` (B,) int64,
    and, if the pool has them, `label` (B,) int64, `caption` and `metadata` (lists of B), and outputs of own
    decoders, by extension. Labels that are class names, as text, are numbered in sorted order from 0, over
    all pools together. Where a batch may be padded (evaluation, `last_batch="pad"`), `padding` (B,) bool
    marks the samples to ignore.

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
        batch_size: samples per rank and step.
        seed: for the order and the views.
        cache_dir: a folder, shared by all ranks, for the index, the embeddings and the curation's artifacts;
            required by a curation.
        selection: ids, or a `.npy` file of them, to stream instead of a curation's.
        labels: (n,) integers, or a `.npy` file of them, that replace the pool's labels in training: one for
            each id of `selection`, as in `CaptionLabels`, or without a `selection` one for each sample of the
            pool. Or the name of a column of integers or names, as `json.class` (see `ShardPool`), from which
            the pools of validation and test that are given as places have their labels, too.
        val_pool: labelled shards for validation; every sample is used exactly once. A mapping of names to
            pools gives several dataloaders, in its order and by its names.
        test_pool: like `val_pool`, for `Trainer.test`.
        eval_transform: like `views`, for validation, test and prediction. None takes the module's
            `eval_transform()` if it has that method, otherwise the resized and cropped image.
        shuffle: "full", "block" (a few shards at a time, for pools on disks or networks) or "none", see
            `EpochOrder`.
        last_batch: what to do with samples that do not fill the last global batch: "drop" them, or "pad" the
            batch and mark the padding.
        stratify_level: give every global batch the clusters of this level of the tree in the proportions of
            the selection.
        image_size: side of the default image, in pixels.
        loader, decoding, device: how batches are loaded, samples decoded, and what is made on the training
            device: `LoaderOptions`, `DecodingOptions` and `DeviceOptions`, or mappings of their fields. The
            fields themselves are still taken as arguments, with a DeprecationWarning.

    Attributes:
        mixture: the `Mixture`, or None; then `pool` is the pool of its first component.
        sources: what is streamed, with pools, curations and selections: a mixture's components, or one.
        curation: what `curate` returned; None before `setup`, and without a curation.
        base_curation: the first curation, made with `embedder`; a re-curation replaces only `curation`.
        lost_tree: the name of the resumed selection's tree, if a later re-curation has removed it and
            `curation` is the first one; None otherwise.
        selection: (n,) int64 ids that the next epoch streams; None before `setup`, and for a whole pool. Of a
            mixture, all ids that it can stream, ascending and without repeats.
        is_set_up: whether the sources are indexed and curated.
        statistics: what this process streamed, skipped and read in training.
        class_names: in the order of their numbers, if the `.cls` members hold names; None before a loader is
            made, and if they hold integers.

    Raises:
        ConfigError: arguments that contradict each other or are out of range.
        PoolError: no shard matches.

    Examples:
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
        batch_size: int = 64,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        selection: Ids | None = None,
        labels: Ids | None = None,
        val_pool: Pool | Mapping[str, Pool] | None = None,
        test_pool: Pool | Mapping[str, Pool] | None = None,
        eval_transform: Callable[[Tensor], Any] | None = None,
        shuffle: Shuffle = "full",
        last_batch: LastBatch = "drop",
        stratify_level: int | None = None,
        image_size: int = 224,
        loader: LoaderOptions | Mapping[str, Any] | None = None,
        decoding: DecodingOptions | Mapping[str, Any] | None = None,
        device: DeviceOptions | Mapping[str, Any] | None = None,
        **old: Unpack[OldArguments],
    ) -> None:
        super().__init__()
        self.loader, self.decoding, self.device = grouped(
            old, loader=loader, decoding=decoding, device=device
        )
        check_functions(views=views, eval_transform=eval_transform)
        check_choices(shuffle, last_batch)
        self.batch_size = whole_number("batch_size", batch_size, 1)
        self.seed = whole_number("seed", seed)
        self.image_size = whole_number("image_size", image_size, 1)
        self.cache_dir = None if cache_dir is None else absolute(cache_dir)
        self.embedder = embedder
        self.views, self.eval_transform = views, eval_transform
        self.shuffle, self.last_batch = shuffle, last_batch
        self.mixture = None if mixture is None else as_mixture(mixture)
        if self.device.decode:
            why = "for images that workers decode; with device.decode they do not"
            check_absent(why, views=views, **{"decoding.min_size": self.decoding.min_size})
        if self.mixture is not None:
            why = "given together with mixture; its components have their own"
            check_absent(why, pool=pool, curation=curation, selection=selection, labels=labels)
            check_absent(why, stratify_level=stratify_level)
            if "source" in (self.decoding.decoders or {}):
                raise ConfigError("decoders['source']: batches of a mixture have it; rename these members")
            components = self.mixture.components
        elif pool is None:
            raise ConfigError("pool: missing; give shards, or a mixture of several pools or selections")
        else:
            chosen: dict[str, Any] = {"selection": selection, "labels": labels, "curation": curation}
            components = [Component("", pool, **chosen, stratify_level=stratify_level)]
        self.sources: list[Source] = open_sources(components, self)
        self.pool = self.sources[0].pool
        options = self.loader.storage_options
        self.val_pools = named_pools(val_pool, cache_dir, options, "val_pool", labels)
        self.test_pools = named_pools(test_pool, cache_dir, options, "test_pool", labels)
        self.class_names: tuple[str, ...] | None = None
        self._class_names_known = False
        self.statistics = StreamStatistics(self.decoding.max_skipped)
        self.statistics.of_component = {source.name: 0 for source in self.components}
        self._selected = SelectedStream(self, self.mixture, self.sources)
        self._decoder: DeviceDecoder | None = None
        if self.device.views is not None:
            # On the instance: a hook in the class would keep the module's own from ever running.
            self.on_after_batch_transfer = self._make_device_views  # type: ignore[method-assign]
        self._hide_dataloaders()

    def __repr__(self) -> str:
        of = f"batch_size={self.batch_size}"
        if self.mixture is not None:
            return f"{type(self).__name__}({self.mixture!r}, {of})"
        ids = self.selection
        if ids is not None:
            streams = f"{len(ids)} samples selected"
        elif self.curation_config is not None or self.sources[0].given_selection is not None:
            streams = "not set up"
        else:
            streams = "the whole pool"
        return f"{type(self).__name__}({self.pool!r}, {streams}, {of})"

    def __str__(self) -> str:
        return repr(self)  # Lightning's makes every loader, and so would run the curation

    @property
    def components(self) -> list[Source]:
        """The sources of a mixture; empty without one."""
        return [] if self.mixture is None else self.sources

    @property
    def curation_config(self) -> CurationConfig | None:
        return None if self.mixture is not None else self.sources[0].curation_config

    @property
    def curation(self) -> "Curation | None":
        return None if self.mixture is not None else self.sources[0].curation

    @property
    def base_curation(self) -> "Curation | None":
        return None if self.mixture is not None else self.sources[0].base_curation

    @property
    def lost_tree(self) -> str | None:
        return None if self.mixture is not None else self.sources[0].lost_tree

    @property
    def selection(self) -> np.ndarray | None:
        return self._selected.ids

    @property
    def is_set_up(self) -> bool:
        return self._selected.is_set_up

    @property
    def hparams_initial(self) -> AttributeDict:
        """What Lightning logs: what a subclass saves and, from `setup("fit")` on, under `curated_data` the
        pool, the settings of the curation and the figures of its selection, or these of each component.

        They are of the first curations. `CurationLogger` logs those of a `RecurationCallback`, too.
        """
        found = AttributeDict(super().hparams_initial)
        if self.is_set_up:
            found[KEY] = hyperparameters(self.mixture, self.sources)
        return found

    def component(self, name: str) -> Source:
        """A component of the mixture, with its `pool`, `curation` and `selection`.

        Raises:
            ConfigError: there is none of that name.
        """
        for source in self.components:
            if source.name == name:
                return source
        raise ConfigError(f"component: the data module has no {name!r}; {self._its_components()}")

    def _its_components(self) -> str:
        return f"its mixture has {', '.join(self.mixture.names)}" if self.mixture else "it has no mixture"

    def selection_of(self, source: Source) -> np.ndarray | None:
        """(n,) int64 ids of its pool that a source gives next; None: all, or no `setup` yet."""
        return self._selected.selections(self._selected.stream.selection)[self.sources.index(source)]

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

        It is the same on all ranks, and a resumed run continues counting.
        """
        names = [f"mixture/{source.name}" for source in self.components]
        return dict(zip(names, self._selected.passes(), strict=False))  # without a mixture there are no names

    def setup(self, stage: str | None = None) -> None:
        """Index the pools; for "fit" (or None) curate, or find the curation in the cache.

        Every rank takes part in the work, so it is not in `prepare_data`, where all ranks would wait for one.
        A second call does nothing.

        For "fit" Lightning then logs `hparams_initial` to every logger, as it does for modules, unless a
        subclass calls `save_hyperparameters(logger=False)`.
        """
        configs = [source.curation_config for source in self.sources]
        curates = stage in (None, "fit") and any(configs) and not self.is_set_up
        with together() if curates else contextlib.nullcontext():
            if stage in (None, "fit"):
                self._selected.attach()
                self._selected.set_up()
                if not self.hparams:
                    self.save_hyperparameters({})  # saves nothing, but makes Lightning log `hparams_initial`
            if stage in (None, "fit", "validate"):
                for pool in self.val_pools.values():
                    pool.index()
            if stage in (None, "test"):
                for pool in self.test_pools.values():
                    pool.index()
            if stage == "predict":
                self._selected.index()

    def set_selection(self, ids: np.ndarray, *, component: str | None = None) -> None:
        """Stream another selection from the next epoch on. Call it on every rank with the same ids.

        Within `Trainer.fit` that epoch gets a new loader, whose length may differ. Checkpoints refer to the
        selection in the cache, or contain it if there is no `cache_dir`. A selection that is set during a
        run is that run's: another Trainer begins with the first one again. One that is set outside a run is
        for all runs to come.

        Args:
            ids: (n,) integers; an id that is repeated is streamed as often.
            component: of a mixture, whose samples they replace; ids of its own pool. The others continue
                where they are, and so does the length of an epoch.

        Raises:
            ConfigError: ids that are not in the pool, or a mixture and no name of one of its components.
        """
        if self.mixture is not None and component is None:
            raise ConfigError(f"component: missing; {self._its_components()}")
        self._selected.replace(self.sources[0] if component is None else self.component(component), ids)

    def stream_curation(self, curation: "Curation") -> None:
        """Stream what a curation of the pool selected from the next epoch on, see `set_selection`.

        Checkpoints refer to its selection in the cache.
        """
        name = curation.folders["selection"].name
        self._selected.replace(self.sources[0], curation.ids, artifact=name)

    def train_dataloader(self) -> StreamLoader:
        self._selected.set_up()
        self._stay_within_selection()
        overfits = bool(setting(self.trainer, "overfit_batches"))
        order = self._selected.order(overfits=overfits)
        loader = training_loader(self, order, self._selected.stream, overfits=overfits)
        if self.device.decode:
            self._decoder = DeviceDecoder(loader.dataset, CenterCrop(self.image_size, scale=False))
        return loader

    def val_dataloader(self) -> Any:
        """All of `val_pool` in its order, each sample once; of a mapping, a loader for each of its names.

        Without a `val_pool` the method is hidden from Trainers.

        Raises:
            ConfigError: a subclass calls it without a `val_pool`.
        """
        return self._evaluation_loaders(self.val_pools, "val_pool: none was given, nothing to validate on")

    def test_dataloader(self) -> Any:
        """The same of `test_pool`.

        Raises:
            ConfigError: a subclass calls it without a `test_pool`.
        """
        return self._evaluation_loaders(self.test_pools, "test_pool: none was given, nothing to test on")

    def predict_dataloader(self) -> DataLoader:
        """The whole pool in its order, each sample once. Prediction writers get the ids as batch indices.

        Of a mixture, all pools, one after the other.
        """
        self._selected.index()
        first_of_pool = {id(source.pool): source for source in self.sources[::-1]}.values()
        in_order = sorted(first_of_pool, key=lambda source: source.first_id)
        return evaluation_loader(self, [source.pool for source in in_order], plain=True)

    def _evaluation_loaders(self, pools: Mapping[str, ShardPool], missing: str) -> Any:
        if not pools:
            raise ConfigError(missing)
        loaders = {name: evaluation_loader(self, [pool]) for name, pool in pools.items()}
        return loaders.get("", loaders)

    def teardown(self, stage: str | None = None) -> None:
        for pool in self._pools:
            pool.close()

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream: what was trained on, not what workers have prefetched."""
        return self._selected.stream.state_dict(self.trainer is not None and is_between_epochs(self.trainer))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken.

        Raises:
            CacheError: the state is damaged, or a re-curated selection is no longer in the cache.
            ConfigError: the state is of another pool.
        """
        # A Trainer restores the data module for validation and prediction too; training does not resume then.
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            self._selected.stream.load_state_dict(state_dict, self.trainer)
            self._selected.follow()
            if self.trainer is not None:
                forget_loader(self.trainer)

    def _hide_dataloaders(self) -> None:
        """Hide methods without a pool: a Trainer warns of one if the module has no step for it."""
        for name, pools in (("val_dataloader", self.val_pools), ("test_dataloader", self.test_pools)):
            if not pools and getattr(type(self), name) is getattr(CuratedDataModule, name):
                setattr(self, name, getattr(super(), name))

    def __getstate__(self) -> dict[str, Any]:
        # A method that hides another is pickled by name, and would come back as the hidden one.
        hidden = ("val_dataloader", "test_dataloader")
        return {name: value for name, value in self.__dict__.items() if name not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._hide_dataloaders()

    def known_class_names(self) -> tuple[str, ...] | None:
        """`class_names`, which are read once."""
        if not self._class_names_known:
            self.class_names = class_names(self._pools, self.cache_dir)
            self._class_names_known = True
        return self.class_names

    def _stay_within_selection(self) -> None:
        """Stop a Tuner's search for a batch size at the largest one that the selection fills."""
        most = self._selected.n_epoch() // ranks(self.trainer)[1]
        if self.last_batch == "drop" and self.batch_size > most > 0 and is_tuned(self.trainer):
            log.warning("batch_size: %d is more than the selection fills; trying %d", self.batch_size, most)
            self.batch_size = most

    def _make_device_views(self, batch: Any, dataloader_idx: int) -> Any:
        """Lightning's `on_after_batch_transfer`; a subclass's own, or the module's, gets what it returns."""
        assert self.device.views is not None, "the hook is there for their sake"
        batch = with_device_views(batch, self.device.views, self._decoder)
        if type(self).on_after_batch_transfer is not CuratedDataModule.on_after_batch_transfer:
            return type(self).on_after_batch_transfer(self, batch, dataloader_idx)
        module = None if self.trainer is None else self.trainer.lightning_module
        if module is not None and is_overridden("on_after_batch_transfer", module):
            return module.on_after_batch_transfer(batch, dataloader_idx)  # Lightning calls only one of two
        return batch

    @property
    def _pools(self) -> list[ShardPool]:
        """All that are read, each once."""
        pools = [source.pool for source in self.sources]
        pools += [*self.val_pools.values(), *self.test_pools.values()]
        return list({id(pool): pool for pool in pools}.values())


for _name in MOVED:
    setattr(CuratedDataModule, _name, Moved(_name))
