"""What a data module streams: the components of its mixture, or one selection, opened and curated."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from curated_data.config import CurationConfig
from curated_data.errors import ConfigError, PoolError
from curated_data.pool import ShardPool
from curated_data.pool.decode import as_decoders
from curated_data.pool.fields import checked_fields
from curated_data.pool.urls import is_remote
from curated_data.streaming.labels import SampleLabels
from curated_data.streaming.order import Shuffle
from curated_data.streaming.strata import check_level, strata
from curated_data.training.arguments import checked_selection, load_ids, load_labels, open_pool
from curated_data.training.mixture import Component, Mixture
from curated_data.training.options import DecodingOptions

if TYPE_CHECKING:
    from curated_data.stages.curation import Curation
    from curated_data.training.datamodule import CuratedDataModule


class ComponentRow(NamedTuple):
    """A component at the beginning.

    Attributes:
        name: its own.
        size: samples, with repeats.
        distinct: different samples.
        share: of the stream.
        shared: different samples that other components hold too.
    """

    name: str
    size: int
    distinct: int
    share: float
    shared: int


class Source:
    """One component as the data module streams it; without a mixture there is one, without a name.

    A `RecurationCallback` curates a source again, and a `CurationLogger` logs its curation.

    Attributes:
        name, batches, views, stratify_level, embedder, curation_config: see `Component`.
        pool: its shards, opened; sources that share one have the same.
        first_id: of its pool, among the ids of the stream.
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
        self.given_selection = component.selection
        self._given_labels = component.labels
        self._data = data

    def named(self, text: str) -> str:
        """The name of a setting for an error, with its component."""
        return _named(self.name, text, self._data)

    def labels(self) -> SampleLabels | None:
        """The labels that replace the pool's, if there are any.

        Raises:
            ConfigError: they do not match the samples.
        """
        return load_labels(self._given_labels, self.given_selection, self.pool, self.named("labels"))

    @property
    def cache_dir(self) -> Path | None:
        return self._data.cache_dir

    @property
    def is_remote(self) -> bool:
        """Whether any of its shards is in a store."""
        return any(map(is_remote, self.pool.urls))

    @property
    def decoding(self) -> DecodingOptions:
        return self._data.decoding

    @property
    def selection(self) -> np.ndarray | None:
        """(n,) int64 ids of the pool that the next epoch streams; None: the whole pool."""
        return self._data.selection_of(self)

    def set_selection(self, ids: np.ndarray) -> None:
        """Stream other samples of the pool from the next epoch on, see `CuratedDataModule.set_selection`."""
        self._data.set_selection(ids, component=self.name or None)

    def stream_curation(self, curation: "Curation") -> None:
        """Stream what a curation of the pool selected, see `CuratedDataModule.stream_curation`."""
        self.set_selection(curation.ids)  # the stream keeps the selections of all components as one

    def begin_anew(self) -> None:
        """For a new Trainer: the first curation counts."""
        self.curation, self.lost_tree = self.base_curation, None

    def index(self) -> None:
        """Index the pool, and read the ids that were given.

        Raises:
            PoolError: the pool cannot be read, or has no sample.
            ConfigError: ids that are not in the pool.
        """
        try:
            self.pool.index()
        except PoolError as error:
            raise PoolError(self.named(str(error))) from error
        if not len(self.pool):
            raise ConfigError(self.named("pool: holds no sample; give another or leave the component out"))
        if self.given_selection is not None:
            name = self.named("selection")
            self.first_selection = checked_selection(load_ids(self.given_selection, name), self.pool, name)

    def candidates(self, most: int) -> list[int]:
        """The first ids that may be streamed, before there is a curation."""
        if self.first_selection is not None:
            return self.first_selection[:most].tolist()
        return list(range(min(most, len(self.pool))))

    def curate(self, device: Any) -> None:
        """Make its curation, or find it in the cache."""
        if self.curation_config is None:
            return
        from curated_data.pipeline.curate import curate

        assert self.cache_dir is not None, "checked with the arguments"
        self.curation = self.base_curation = curate(
            self.pool,
            self.curation_config,
            embedder=self.embedder,
            cache_dir=self.cache_dir,
            device=device,
            decoders=self.decoding.decoders,
            fields=self.decoding.fields,
        )
        self.first_selection = self.curation.ids

    def strata(self, ids: np.ndarray | None, *, keep: bool) -> np.ndarray | None:
        """The cluster of each id at `stratify_level`, see `strata`; None without one."""
        if self.stratify_level is None:
            return None
        assert self.curation is not None, "stratify_level comes with a curation"
        assert self.cache_dir is not None, "a curation comes with one"
        check_level(self.stratify_level, self.curation.tree.n_levels)
        return strata(
            ids,
            self.stratify_level,
            find=None if self.lost_tree else self.curation.tree.assignment,
            tree=self.lost_tree or self.curation.folders["tree"].name,
            cache_dir=self.cache_dir,
            keep=keep,
        )

    def holds(self) -> np.ndarray:
        """(n,) bool, which samples of the pool it begins with."""
        held = np.full(len(self.pool), self.first_selection is None)
        if self.first_selection is not None:
            held[self.first_selection] = True
        return held

    @property
    def n_first(self) -> int:
        """Samples that it begins with; before its curation, as many as that may select."""
        if self.first_selection is not None:
            return len(self.first_selection)
        config = self.curation_config
        n = len(self.pool)
        return n if config is None else min(config.target_size, n * config.max_repeats)


def open_sources(components: Sequence[Component], data: "CuratedDataModule") -> list[Source]:
    """Open every pool once; check what a component needs of the data module.

    Raises:
        ConfigError: a curation without an embedder or a cache, or a level or shuffle that do not fit.
        PoolError: no shard matches.
    """
    pools: dict[tuple[Any, ...], ShardPool] = {}
    found = []
    for component in components:
        try:
            pool = open_pool(component.pool, data.cache_dir, data.loader.storage_options, component.labels)
        except (PoolError, ConfigError) as error:
            raise type(error)(_named(component.name, str(error), data)) from error
        columns = pool.label_column, pool.caption_column
        pool = pools.setdefault((*pool.urls, repr(pool.images), *pool.image_extensions, columns), pool)
        found.append(Source(component, pool, data))
    for opened in found:
        _check(opened, data)
    return found


def _named(name: str, text: str, data: "CuratedDataModule") -> str:
    return text if data.mixture is None else f"mixture, component {name!r}, {text}"


def _check(source: Source, data: "CuratedDataModule") -> None:
    config = source.curation_config
    if config is not None and source.embedder is None:
        raise ConfigError(
            source.named("embedder: a curation needs one, say 'hub:dinov2_vitl14_reg' or a module of yours")
        )
    if config is not None and source.cache_dir is None:
        raise ConfigError(
            source.named("cache_dir: a curation needs a folder for its artifacts, shared by all ranks")
        )
    if source.views is not None and data.device.decode:
        raise ConfigError(
            source.named("views: take images that workers decode; with device.decode they do not")
        )
    check_fields_of_batches(source.pool, data.decoding)
    if source.stratify_level is None:
        return
    if config is None:
        raise ConfigError(source.named("stratify_level: needs a curation, whose tree has the clusters"))
    if source.shuffle != "full":
        raise ConfigError(source.named(f'stratify_level: takes shuffle="full", found {source.shuffle!r}'))
    if config.levels:  # derived ones later, by the tree
        try:
            check_level(source.stratify_level, len(config.levels))
        except ConfigError as error:
            raise ConfigError(source.named(str(error))) from error


def check_fields_of_batches(pool: ShardPool, decoding: DecodingOptions) -> frozenset[str]:
    """The fields of a pool's batches, see `checked_fields`."""
    return checked_fields(decoding.fields, as_decoders(decoding.decoders), pool.image_extensions)


def number_pools(components: Sequence[Source]) -> None:
    """Give every pool its first id in the mixture: the samples of the pools before it."""
    first_ids: dict[int, int] = {}
    following = 0
    for component in components:
        if id(component.pool) not in first_ids:
            first_ids[id(component.pool)] = following
            following += len(component.pool)
        component.first_id = first_ids[id(component.pool)]


def packed(selections: Mapping[int, np.ndarray]) -> np.ndarray:
    """The ids of some components as one array, which the stream keeps and checkpoints name."""
    pieces = [np.r_[number, len(selections[number]), selections[number]] for number in sorted(selections)]
    return np.concatenate(pieces).astype(np.int64)


def unpacked(array: np.ndarray | None, sources: Sequence[Source]) -> dict[int, np.ndarray]:
    """The inverse of `packed`.

    Raises:
        ConfigError: it is none, or holds ids that are not in the component's pool.
    """
    found: dict[int, np.ndarray] = {}
    place = 0
    while array is not None and place < len(array):
        number, n = [*array[place : place + 2].tolist(), 0][:2]
        ids = array[place + 2 : place + 2 + max(n, 0)]
        if not 0 <= number < len(sources) or number in found or n < 1 or len(ids) != n:
            raise ConfigError(
                "the checkpoint's selection: is not of this mixture; resume with the components of that run"
            )
        name = sources[number].named("the checkpoint's selection")
        found[number] = checked_selection(ids, sources[number].pool, name)
        place += 2 + n
    return found


def mixture_summary(mixture: Mixture, sources: Sequence[Source]) -> str:
    """One line: of each component its size, its share and how many of its samples others hold too."""
    return ", ".join(
        f"{row.name} {row.size} samples ({100 * row.share:.3g} %, {row.shared} in others too)"
        for row in mixture_rows(mixture, sources)
    )


def mixture_rows(mixture: Mixture, sources: Sequence[Source]) -> list[ComponentRow]:
    """What a report says of each component."""
    holders = {id(source.pool): np.zeros(len(source.pool), np.int16) for source in sources}
    for source in sources:
        holders[id(source.pool)] += source.holds()
    rows = []
    for source, share in zip(sources, mixture.shares, strict=True):
        held = source.holds()
        shared = int((holders[id(source.pool)][held] > 1).sum())
        rows.append(ComponentRow(source.name, source.n_first, int(held.sum()), share, shared))
    return rows


def overlaps(sources: Sequence[Source]) -> np.ndarray:
    """(k, k) how many different samples each two components hold together at the beginning."""
    held = [source.holds() for source in sources]
    found = np.zeros((len(sources), len(sources)), np.int64)
    for i, one in enumerate(sources):
        for j, other in enumerate(sources):
            if one.pool is other.pool:
                found[i, j] = np.count_nonzero(held[i] & held[j])
    return found
