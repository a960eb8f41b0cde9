"""The components of a data module's mixture: opened, curated, and put in one order."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from curated_data.arguments import checked_selection, load_ids, open_pool
from curated_data.cache import fingerprint
from curated_data.config import CurationConfig
from curated_data.errors import ConfigError
from curated_data.mixture import Component, Mixture
from curated_data.pool import ShardPool
from curated_data.streaming.mixture import AnyOrder, MixtureOrder, Part
from curated_data.streaming.order import EpochOrder, LastBatch, Shuffle
from curated_data.streaming.strata import check_level

if TYPE_CHECKING:
    from curated_data.datamodule import CuratedDataModule
    from curated_data.stages.curation import Curation


class ComponentRow(NamedTuple):
    """A component at the beginning: its samples, its share of the stream, and how many others hold too."""

    name: str
    size: int
    share: float
    shared: int


class MixedComponent:
    """One component as the data module streams it; a `RecurationCallback` takes it for a data module.

    Attributes:
        name, batches, views, stratify_level, embedder, curation_config: see `Component`.
        pool: its shards, opened; components that share one have the same.
        first_id: of its pool, among the ids of the mixture.
        first_selection: (n,) int64 ids of the pool that it begins with; None: the whole pool.
        curation, base_curation, lost_tree: as of `CuratedDataModule`.
    """

    def __init__(self, component: Component, pool: ShardPool, data: "CuratedDataModule") -> None:
        config = component.curation
        assert config is None or isinstance(config, CurationConfig), "loaded by the component"
        self.curation_config = config
        self.name = component.name
        self.batches = component.batches
        self.views = component.views
        self.stratify_level = component.stratify_level
        self.shuffle: Shuffle = component.shuffle or data.shuffle
        self.embedder = data.embedder if component.embedder is None else component.embedder
        self.pool = pool
        self.first_id = 0
        self.first_selection: np.ndarray | None = None
        self.curation: Curation | None = None
        self.base_curation: Curation | None = None
        self.lost_tree: str | None = None
        self._given = component.selection
        self._data = data

    @property
    def where(self) -> str:
        """For errors."""
        return f"mixture, component {self.name!r}"

    @property
    def cache_dir(self) -> Path | None:
        return self._data.cache_dir

    @property
    def decoders(self) -> Any:
        return self._data.decoders

    @property
    def fields(self) -> Sequence[str] | None:
        return self._data.fields

    @property
    def selection(self) -> np.ndarray | None:
        """(n,) int64 ids of the pool that the next epoch streams; None: the whole pool."""
        return self._data.component_selection(self.name)

    def set_selection(self, ids: np.ndarray) -> None:
        """Stream other samples of the pool from the next epoch on, see `CuratedDataModule.set_selection`."""
        self._data.set_selection(ids, component=self.name)

    def stream_curation(self, curation: "Curation") -> None:
        """Stream what a curation of the pool selected, see `CuratedDataModule.stream_curation`."""
        self.set_selection(curation.ids)  # the stream keeps the selections of all components as one

    def begin_anew(self) -> None:
        """For a new Trainer: the first curation counts."""
        self.curation, self.lost_tree = self.base_curation, None

    def index(self) -> None:
        """Index the pool, and read the ids that were given.

        Raises:
            ConfigError: no samples, or ids that are not in the pool.
        """
        self.pool.index()
        if not len(self.pool):
            raise ConfigError(f"{self.where}, pool: holds no sample; give another or leave the component out")
        if self._given is not None:
            name = f"{self.where}, selection"
            self.first_selection = checked_selection(load_ids(self._given, name), self.pool, name)

    def candidates(self, most: int) -> list[int]:
        """The first ids that may be streamed, before there is a curation."""
        if self.first_selection is not None:
            return self.first_selection[:most].tolist()
        return list(range(min(most, len(self.pool))))

    def curate(self, device: Any) -> None:
        """Make its curation, or find it in the cache."""
        if self.curation_config is None:
            return
        from curated_data.pipeline import curate

        assert self.cache_dir is not None, "checked with the arguments"
        self.curation = self.base_curation = curate(
            self.pool,
            self.curation_config,
            embedder=self.embedder,
            cache_dir=self.cache_dir,
            device=device,
            decoders=self.decoders,
            fields=self.fields,
        )
        self.first_selection = self.curation.ids

    @property
    def n_first(self) -> int:
        """Samples that it begins with; before its curation, as many as that may select."""
        if self.first_selection is not None:
            return len(self.first_selection)
        config = self.curation_config
        n = len(self.pool)
        return n if config is None else min(config.target_size, n * config.max_repeats)


def open_components(
    mixture: Mixture, data: "CuratedDataModule", storage_options: Mapping[str, Any] | None
) -> list[MixedComponent]:
    """Open every pool once; check what a component needs of the data module.

    Raises:
        ConfigError: a curation without an embedder or a cache, or a level or shuffle that do not fit.
        PoolError: no shard matches.
    """
    pools: dict[tuple[Any, ...], ShardPool] = {}
    found = []
    for component in mixture.components:
        pool = open_pool(component.pool, data.cache_dir, storage_options)
        pool = pools.setdefault((*pool.urls, repr(pool.images), *pool.image_extensions), pool)
        found.append(MixedComponent(component, pool, data))
    for opened in found:
        _check(opened)
    return found


def _check(component: MixedComponent) -> None:
    where, config = component.where, component.curation_config
    if config is not None and component.embedder is None:
        raise ConfigError(f"{where}, embedder: a curation needs one, its own or the data module's")
    if config is not None and component.cache_dir is None:
        raise ConfigError(f"{where}: a curation needs the data module's cache_dir, shared by all ranks")
    if component.stratify_level is None:
        return
    if component.shuffle != "full":
        raise ConfigError(f'{where}, stratify_level: takes shuffle="full", found {component.shuffle!r}')
    assert config is not None, "checked by the component"
    if config.levels:
        try:
            check_level(component.stratify_level, len(config.levels))
        except ConfigError as error:
            raise ConfigError(f"{where}, {error}") from error


def number_pools(components: Sequence[MixedComponent]) -> None:
    """Give every pool its first id in the mixture: the samples of the pools before it."""
    first_ids: dict[int, int] = {}
    following = 0
    for component in components:
        if id(component.pool) not in first_ids:
            first_ids[id(component.pool)] = following
            following += len(component.pool)
        component.first_id = first_ids[id(component.pool)]


def check_batches(mixture: Mixture, components: Sequence[MixedComponent], n_batches: int) -> None:
    """Check that every component with batches of its own has at least one in an epoch.

    Raises:
        ConfigError: names the component.
    """
    for component, share in zip(components, mixture.least_shares, strict=True):
        if component.batches == "own" and share * n_batches < 1 - 1e-9:
            raise ConfigError(
                f"{component.where}, weight: {share:g} of the {n_batches} global batches of an epoch is less "
                "than one batch of its own; raise its weight or epoch_size"
            )


def epoch_batches(
    mixture: Mixture, components: Sequence[MixedComponent], batch_size: int, last_batch: LastBatch
) -> int:
    """Global batches of an epoch of a mixture. It does not depend on what re-curations select.

    Raises:
        ConfigError: none.
    """
    size = mixture.epoch_size or sum(component.n_first for component in components)
    n_batches = -(-size // batch_size) if last_batch == "pad" else size // batch_size
    if not n_batches:
        raise ConfigError(
            f"mixture.epoch_size: {size} samples do not fill one global batch of {batch_size}; raise it, or "
            'pass last_batch="pad"'
        )
    return n_batches


def mixture_order(
    mixture: Mixture,
    components: Sequence[MixedComponent],
    selections: Sequence[np.ndarray | None],
    *,
    seed: int,
    batch_size: int,
    shuffled: bool,
    last_batch: LastBatch,
    strata_of: Callable[[MixedComponent, np.ndarray | None], np.ndarray],
) -> AnyOrder:
    """The order of a mixture; of one component without an `epoch_size`, that of its selection alone.

    Args:
        mixture, components: what to mix.
        selections: of each component, ids of its pool; None: the whole pool.
        seed, batch_size, last_batch: of the stream.
        shuffled: False to take every component as it is.
        strata_of: the stratum of each sample, for components with a `stratify_level`.
    """
    alone = len(components) == 1 and mixture.epoch_size is None
    parts = []
    for component, ids in zip(components, selections, strict=True):
        shuffle = component.shuffle if shuffled else "none"
        stratified = component.stratify_level is not None and shuffle == "full"
        try:
            order = EpochOrder(
                len(component.pool) if ids is None else ids,
                seed=seed if alone else int(fingerprint(seed=seed, component=component.name)[:16], 16),
                batch_size=batch_size if alone else 1,
                shuffle=shuffle,
                last_batch=last_batch if alone else "drop",
                shard_starts=component.pool.shard_ranges() if shuffle == "block" else None,
                strata=strata_of(component, ids) if stratified else None,
            )
        except ConfigError as error:
            raise ConfigError(f"{component.where}, {error}") from error
        if alone:
            return order
        parts.append(Part(component.name, order, component.batches == "own", component.first_id))
    n_batches = epoch_batches(mixture, components, batch_size, last_batch)
    check_batches(mixture, components, n_batches)
    return MixtureOrder(parts, mixture.weights, batch_size=batch_size, epoch_size=n_batches * batch_size)


def packed(selections: Mapping[int, np.ndarray]) -> np.ndarray:
    """The ids of some components as one array, which the stream keeps and checkpoints name."""
    pieces = [np.r_[number, len(selections[number]), selections[number]] for number in sorted(selections)]
    return np.concatenate(pieces).astype(np.int64)


def unpacked(array: np.ndarray | None, components: Sequence[MixedComponent]) -> dict[int, np.ndarray]:
    """The inverse of `packed`.

    Raises:
        ConfigError: it is none, or holds ids that are not in the component's pool.
    """
    found: dict[int, np.ndarray] = {}
    place = 0
    while array is not None and place < len(array):
        number, n = [*array[place : place + 2].tolist(), 0][:2]
        ids = array[place + 2 : place + 2 + max(n, 0)]
        if not 0 <= number < len(components) or number in found or n < 1 or len(ids) != n:
            raise ConfigError(
                "the checkpoint's selection: is none of this mixture; resume with the components of that run"
            )
        name = f"{components[number].where}, the checkpoint's selection"
        found[number] = checked_selection(ids, components[number].pool, name)
        place += 2 + n
    return found


def plan_access(components: Sequence[MixedComponent], order: MixtureOrder, epochs: int) -> None:
    """For remote pools, choose byte ranges or whole shards, by how often what will be read."""
    drawn = order.given(1, 0)
    for pool in {id(component.pool): component.pool for component in components}.values():
        own = [number for number, component in enumerate(components) if component.pool is pool]
        selections = [order.parts[number].order.selection for number in own]
        whole = any(isinstance(ids, int) for ids in selections)
        ids = None if whole else np.unique(np.concatenate([np.asarray(ids) for ids in selections]))
        n = len(pool) if ids is None else len(ids)
        pool.plan_access(ids, epochs=max(1, round(epochs * int(drawn[own].sum()) / n)))


def mixture_summary(mixture: Mixture, components: Sequence[MixedComponent]) -> str:
    """One line: of each component its size, its share and how many of its samples others hold too."""
    return ", ".join(
        f"{row.name} {row.size} samples ({100 * row.share:.3g} %, {row.shared} in others too)"
        for row in mixture_rows(mixture, components)
    )


def mixture_rows(mixture: Mixture, components: Sequence[MixedComponent]) -> list[ComponentRow]:
    """What a report says of each component."""
    holders = {id(component.pool): np.zeros(len(component.pool), np.int16) for component in components}
    for component in components:
        holders[id(component.pool)][_distinct(component)] += 1
    rows = []
    for component, share in zip(components, mixture.shares, strict=True):
        shared = int((holders[id(component.pool)][_distinct(component)] > 1).sum())
        rows.append(ComponentRow(component.name, component.n_first, share, shared))
    return rows


def _distinct(component: MixedComponent) -> np.ndarray | slice:
    """The ids that it begins with, for indexing."""
    return slice(None) if component.first_selection is None else np.unique(component.first_selection)
