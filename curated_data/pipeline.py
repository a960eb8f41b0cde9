"""From a pool to a selection, stage by stage: index, embed, remove near-duplicates, cluster, sample.

This is the only module that knows the order of the stages. Each artifact is named by a fingerprint of
everything that determines it, so a second call only reads the cache, and a changed setting redoes only what
depends on it.
"""

import atexit
import contextlib
import dataclasses
import functools
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from omegaconf import DictConfig

from curated_data.cache import build_once, fingerprint, open_cache, read_array, read_manifest, write_manifest
from curated_data.clustering.hierarchy import hierarchical_kmeans
from curated_data.clustering.levels import Level, TooManyClusters
from curated_data.clustering.tree import EXCLUDED, ClusterTree
from curated_data.config import CurationConfig, levels_for, load_config
from curated_data.deduplication import (
    check_preference,
    embed_held_out,
    find_near_duplicates,
    open_held_out,
    read_keep,
)
from curated_data.embedding import EmbeddingStore
from curated_data.embedding.existing import EmbeddedPool, Source
from curated_data.embedding.stage import AnyEmbedder, AnyPool, embedding_stage
from curated_data.errors import CacheError, ConfigError, CuratedDataError, PoolError
from curated_data.holds import Hold, hold, holding
from curated_data.parallel import check_same, rank, together
from curated_data.pool import ShardPool
from curated_data.pool.decode import Decoders
from curated_data.progress import show_log
from curated_data.remedies import Remedy
from curated_data.removal import tidy
from curated_data.selection.metrics import cluster_balance
from curated_data.selection.sampling import Strategy, flat_sample, hierarchical_sample
from curated_data.selection.sparse import neighbour_distances, sparse_sample
from curated_data.shared_build import build_together, check_shared

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

VERSIONS = {"tree": 6, "selection": 2}
"""Increased when a stage computes something else from the same inputs: older artifacts are then not used."""

_NO_LIMIT_GB = 1e9


@dataclass(frozen=True)
class Curation:
    """The result of a curation.

    Attributes:
        ids: (m,) int64, the selected samples in ascending order, with repeats if `max_repeats` > 1.
        tree: the clusters; its level 0 is the pool.
        embeddings: of the whole pool.
        report: what each stage found, as plain numbers and strings.
        config: the settings, with derived levels filled in.
        folders: the folder of each stage's artifact in the cache.

    Example:
        >>> from curated_data import curate
        >>> curation = curate(
        ...     "pool-{000..001}.tar", {"target_size": 10}, embedder="pixels:8", cache_dir="cache"
        ... )
        >>> curation.tree.n_samples, curation.report["failed"]
        (40, 0)
    """

    ids: np.ndarray
    tree: ClusterTree
    embeddings: EmbeddingStore
    report: dict[str, Any]
    config: CurationConfig
    folders: dict[str, Path]

    def __post_init__(self) -> None:
        # While the curation is in use, no other run removes what it consists of.
        object.__setattr__(self, "_holds", [Hold(folder) for folder in self.folders.values()])

    def table(self, pool: AnyPool | None = None, **options: Any) -> "pa.Table":
        """All that is known of each sample, as a table in memory; `CurationTable` tells its columns.

        For what does not fit into memory, `CurationTable(curation, pool).write("curation.parquet")`.

        Args:
            pool: that was curated; None leaves out what only it knows.
            options: of `CurationTable`, as `selected=True` or `images=64`.

        Example:
            >>> from curated_data import ShardPool, curate
            >>> pool = ShardPool("pool-{000..001}.tar")
            >>> curation = curate(pool, {"target_size": 10}, embedder="pixels:8", cache_dir="cache")
            >>> curation.table(pool, selected=True).num_rows
            10
        """
        from curated_data.table import CurationTable

        return CurationTable(self, pool, **options).read()


def curate(
    pool: ShardPool | EmbeddedPool | str | Path | Sequence[str | Path],
    config: CurationConfig | Mapping[str, Any] | DictConfig | str | Path,
    *,
    embedder: AnyEmbedder | None,
    cache_dir: str | Path,
    device: str | torch.device = "auto",
    decoders: Decoders | None = None,
    fields: Sequence[str] | None = None,
) -> Curation:
    """Select a subset of a pool in which what is rare has more of a share, without labels.

    With `preset: paper` by hierarchical k-means with resampling (arXiv 2405.15613).

    In a process group every rank calls it, does a part of each stage, and returns the same result.

    Args:
        pool: a `ShardPool`, or anything that `ShardPool` takes; or an `EmbeddedPool`.
        config: a `CurationConfig`, its fields as a mapping, or a YAML file of them.
        embedder: a name, a network, a function or an embedder, see `resolve_embedder`; None for an
            `EmbeddedPool`.
        cache_dir: a folder for the artifacts of every stage. All ranks need the same one; several runs may
            share it.
        device: for embedding and clustering; "auto" takes the current CUDA device, or the CPU if there is
            none.
        decoders: of pool members by extension, see `decode_sample`.
        fields: what training will ask for besides the images, as for `CuratedDataModule`. A sample of which
            one cannot be decoded counts as failed and is not selected. None: all.

    Raises:
        ConfigError: a setting that is unknown, out of range, or asks for more clusters than the pool has
            samples.
        PoolError: no shard matches, or one cannot be read.
        EmbedderError: the embedder cannot be found or does not fit the pool.
        CacheError: the cache cannot be written, or another version of the package wrote it.
        RankError: another rank has failed or died.

    Example:
        >>> from curated_data import curate
        >>> curation = curate(
        ...     "pool-{000..001}.tar", {"target_size": 10}, embedder="pixels:8", cache_dir="cache"
        ... )
        >>> len(curation.ids)
        10
    """
    with opened(pool, config, cache_dir) as (shards, settings, root):
        return _curate(shards, settings, embedder, root, device, decoders, fields)


@contextlib.contextmanager
def opened(
    pool: ShardPool | EmbeddedPool | str | Path | Sequence[str | Path],
    config: CurationConfig | Mapping[str, Any] | DictConfig | str | Path,
    cache_dir: str | Path,
) -> Iterator[tuple[AnyPool, CurationConfig, Path]]:
    """The inputs of a curation, for a block in which ranks work together: an error of one ends all."""
    show_log()
    with together(), holding():
        settings = load_config(config)
        root = open_cache(cache_dir)
        shards: AnyPool
        if isinstance(pool, EmbeddedPool):
            shards = pool
        else:
            shards = pool.with_cache(root) if isinstance(pool, ShardPool) else ShardPool(pool, cache_dir=root)
        check_shared(root)
        yield shards, settings, root


def _curate(
    pool: AnyPool,
    config: CurationConfig,
    embedder: AnyEmbedder | None,
    root: Path,
    device: str | torch.device,
    decoders: Decoders | None,
    fields: Sequence[str] | None,
) -> Curation:
    source = embedding_stage(pool, embedder, config, root, device, decoders, fields)
    held_out_pool = open_held_out(config, root, pool)
    check_same(curation=fingerprint(config=dataclasses.asdict(config)))
    if isinstance(pool, ShardPool):
        pool.stat_on_all_ranks()
    seconds: dict[str, float] = {}
    cached: dict[str, bool] = {}

    with _timed(seconds, "index"):
        n_samples = len(pool)
    check_same(pool=pool.fingerprint)
    log.info("pool: %d samples in %d shards", n_samples, len(pool.urls))
    check_levels(config.levels, n_samples)
    check_preference(config, pool)

    with _timed(seconds, "embed"):
        held_out = embed_held_out(held_out_pool, source)  # the smaller
        store = source.store(pool)
    valid = store.valid
    folders = {"embeddings": store.folder}

    origin = {"embedder": store.folder.name, "embeddings": store.fingerprint}
    if config.near_duplicates.enabled:
        with _timed(seconds, "near_duplicates"):
            folder, cached["near_duplicates"] = find_near_duplicates(
                root, pool, store, held_out, config, origin
            )
        folders["near_duplicates"] = folder
        valid &= read_keep(folder, len(valid))
        origin["near_duplicates"] = folder.name
    n_valid = int(valid.sum())
    if not n_valid:
        if store.n_failures < n_samples:
            raise PoolError(
                f"near-duplicates: all of the pool's {n_samples - store.n_failures} samples that could be "
                "embedded are copies of held-out ones; raise near_duplicates.threshold, or look at what "
                "held_out names"
            )
        first = next(store.iterate_failures())
        raise PoolError(
            f"none of the pool's {n_samples} samples could be embedded; the first: {first['shard']}, key "
            f"{first['key']!r}: {first['reason']}"
        )
    derived = not config.levels
    config = dataclasses.replace(config, levels=levels_for(config, n_valid))
    check_levels(config.levels, n_valid)

    with _timed(seconds, "cluster"):
        folders["tree"], cached["tree"] = build_tree(
            root, pool, store, valid, config, origin, device, derived=derived
        )
        tree = ClusterTree.load(folders["tree"] / "tree", memory_map=True)
    with _timed(seconds, "sample"):
        folders["selection"], cached["selection"] = select(
            root,
            tree,
            config,
            folders["tree"].name,
            store,
            lambda ids: report_of(pool, store, valid, tree, ids, config),
        )
        ids, report = read_selection(folders["selection"], n_samples)
    report |= {"cached": cached, "seconds": seconds}
    log.info(
        "selection: %d of %d samples%s",
        len(ids),
        n_samples,
        " (found in the cache)" if all(cached.values()) else "",
    )
    return Curation(ids, tree, store, report, config, folders)


def curate_embeddings(
    rows: EmbeddedPool | Source | Sequence[Source],
    config: CurationConfig | Mapping[str, Any] | DictConfig | str | Path,
    *,
    cache_dir: str | Path | None = None,
    device: str | torch.device = "auto",
) -> Curation:
    """Select from embeddings that exist already, without shards: the whole of `curate` but for embedding.

    Args:
        rows: an `EmbeddedPool`, or what it takes: an array, a `.npy` file, a folder of parts, a list.
        config: as for `curate`, but for `embedding`; `near_duplicates.held_out` takes `.npy` files.
        cache_dir: as for `curate`; None takes a temporary folder, which is removed when the process ends.
        device: for the clustering.

    Returns:
        A curation whose ids are numbers of rows.

    Raises:
        ConfigError, PoolError, CacheError, RankError: as for `curate`.

    Example:
        >>> import numpy as np
        >>> from curated_data import curate_embeddings
        >>> rows = np.random.default_rng(0).normal(size=(2000, 16))
        >>> curation = curate_embeddings(rows, {"target_size": 100})
        >>> len(rows[curation.ids])
        100
    """
    pool = rows if isinstance(rows, EmbeddedPool) else EmbeddedPool(rows)
    return curate(pool, config, embedder=None, cache_dir=cache_dir or temporary_cache(), device=device)


def build_tree(
    root: Path,
    pool: AnyPool,
    store: EmbeddingStore,
    valid: np.ndarray,
    config: CurationConfig,
    origin: dict[str, str],
    device: str | torch.device,
    complete: Callable[[ClusterTree], ClusterTree] | None = None,
    *,
    derived: bool = False,
) -> tuple[Path, bool]:
    """The folder of the cluster tree, and whether it was cached. All ranks of a group build it together.

    Args:
        complete: makes a tree over the pool of the tree over the store's rows, if these are not the same;
            called on rank zero.
        derived: the levels are not the user's, so they shrink where rows repeat.

    Raises:
        ConfigError: the user's levels ask for more clusters than the distinct rows fill.
        PoolError: no row can be clustered.
    """
    settings = tree_settings(config)
    levels = settings.pop("levels")
    folder = root / "tree" / tree_name(config, origin)
    name = folder.name
    checkpoint = root / "checkpoints" / f"tree-{name}"
    hold(folder)

    def cluster() -> ClusterTree:
        assert config.levels is not None, "derived by now"
        try:
            return hierarchical_kmeans(
                store,
                config.levels,
                valid=valid,
                device=device,
                checkpoint=checkpoint,
                max_memory=int(min(config.max_memory_gb, _NO_LIMIT_GB) * 1e9),
                shrink=derived,
                **settings,
            )
        except CuratedDataError:
            raise
        except TooManyClusters as error:  # known only from the rows: too many equal ones leave clusters empty
            raise ConfigError(f"levels: {error}; or leave `levels` out to have them derived") from error
        except ValueError as error:
            raise PoolError(f"the pool's embeddings cannot be clustered: {error}") from error

    def build(temporary: Path | None) -> None:
        tree = cluster()
        if temporary is not None:
            tree = tree if complete is None else complete(tree)
            content = {"inputs": origin, "settings": settings | {"levels": levels}}
            publish_tree(temporary, tree, pool, store, content)

    _, cached = build_together(folder, build, check=store.verify)
    if rank() == 0:
        tidy(checkpoint, below=checkpoint.parent)
    if cached and not derived:
        _check_shrunk(folder, config.levels or [])
    return folder, cached


def _check_shrunk(folder: Path, levels: list[Level]) -> None:
    """Refuse a tree whose levels were derived and have shrunk, if the same are now asked for."""
    found = list(ClusterTree.load(folder / "tree", memory_map=True).n_clusters.values())
    asked = [level.n_clusters * level.n_splits for level in levels]
    # Splits may leave some out, whoever asked for them.
    same = (k == total or level.n_splits > 1 for k, total, level in zip(found, asked, levels, strict=False))
    if len(found) != len(asked) or not all(same):
        raise ConfigError(
            f"levels: {asked} clusters asked for, but rows repeat so often that only {found} can be filled; "
            "ask for these, or leave `levels` out to have them derived"
        )


def tree_settings(config: CurationConfig) -> dict[str, Any]:
    """The settings that determine a tree, as plain values."""
    names = ("resample", "metric", "init", "n_init", "n_iter", "tol", "seed")
    levels = [dataclasses.asdict(level) for level in config.levels or ()]
    return {name: getattr(config, name) for name in names} | {"levels": levels}


def tree_name(config: CurationConfig, origin: dict[str, str]) -> str:
    """The name of a tree's folder, by its settings and its inputs."""
    settings = tree_settings(config)
    levels = settings.pop("levels")
    return fingerprint(origin=origin, settings=settings, levels=levels, version=VERSIONS["tree"])


def publish_tree(
    folder: Path, tree: ClusterTree, pool: AnyPool, store: EmbeddingStore, manifest: dict[str, Any]
) -> None:
    """Write a tree and the shards that it covers, by which a pool that has grown finds its old samples."""
    tree.save(folder / "tree")
    np.save(folder / "shards.npy", np.array(store.shard_fingerprints, "S20"))
    np.save(folder / "shard_ranges.npy", pool.shard_ranges())
    write_manifest(folder, "clustering", manifest)


def select(
    root: Path,
    tree: ClusterTree,
    config: CurationConfig,
    tree_name: str,
    store: EmbeddingStore,
    figures: Callable[[np.ndarray], dict[str, Any]],
) -> tuple[Path, bool]:
    """The folder of a selection from a tree, and whether it was cached.

    Args:
        store: embeddings of all samples of the tree, for their neighbours.
        figures: of the selected ids, the report of their curation, which is kept with them: plain numbers and
            strings that depend on nothing but the tree and the settings.
    """
    settings = selection_settings(config)
    name = selection_name(config, tree_name)

    def build(folder: Path) -> None:
        size, repeats, seed = config.target_size, config.max_repeats, config.seed
        if config.sampling == "sparse":
            distance = neighbour_distances(store, tree)
            ids = sparse_sample(tree, distance, size, max_repeats=repeats, seed=seed)
        else:
            sample = flat_sample if config.sampling == "flat" else hierarchical_sample
            strategy = cast(Strategy, config.strategy)  # one of them, by `load_config`
            ids = sample(tree, size, strategy=strategy, max_repeats=repeats, seed=seed)
        np.save(folder / "ids.npy", ids)
        content = {"inputs": {"tree": tree_name}, "settings": settings, "size": len(ids)}
        write_manifest(folder, "selection", content | {"report": figures(ids)})

    return build_once(root / "selection" / name, build)


def read_selection(folder: Path, n_samples: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The ids in a selection's folder, of a pool of `n_samples`, and the report of the run that drew them.

    Raises:
        CacheError: it is missing or damaged, or an earlier version drew it.
    """
    manifest = read_manifest(folder, "selection")
    if not isinstance(manifest.get("report"), dict):
        raise CacheError(
            f"{folder}: was drawn by an earlier version, which kept no report; run its curation again, which "
            "draws it anew"
        )
    ids = read_array(folder, "ids", manifest, dtype=np.int64, shape=(manifest.get("size"),))
    if len(ids) and not 0 <= ids.min() <= ids.max() < n_samples:
        raise CacheError(
            f"{folder / 'ids.npy'}: damaged (ids from {ids.min()} to {ids.max()}, of {n_samples} samples); "
            f"{Remedy(folder / 'ids.npy')}"
        )
    return ids, manifest["report"]


def selection_settings(config: CurationConfig) -> dict[str, Any]:
    """The settings that determine a selection from a tree."""
    names = ("target_size", "strategy", "sampling", "max_repeats", "seed")
    return {name: getattr(config, name) for name in names}


def selection_name(config: CurationConfig, tree: str) -> str:
    """The name of a selection's folder, by its settings and the name of its tree."""
    return fingerprint(tree=tree, settings=selection_settings(config), version=VERSIONS["selection"])


def check_levels(levels: list[Level] | None, n_samples: int) -> None:
    """Reject levels with more clusters than samples early, before any long stage starts."""
    asked = levels[0].n_clusters * levels[0].n_splits if levels else 0
    if asked > n_samples:
        raise ConfigError(
            f"levels[0].n_clusters: {asked} clusters of {n_samples} samples; ask for fewer, or leave "
            "`levels` out to have them derived"
        )


def report_of(
    pool: AnyPool,
    store: EmbeddingStore,
    valid: np.ndarray,
    tree: ClusterTree,
    ids: np.ndarray,
    config: CurationConfig,
) -> dict[str, Any]:
    """A curation's numbers: what went in, what was left out and why, what was selected.

    Args:
        valid: (n,) bool, the samples that were to be clustered; those that the tree lacks are `excluded`, as
            zero embeddings are under the cosine metric.
    """
    return {
        "shards": len(pool.urls),
        "samples": len(pool),
        "failed": store.n_failures,
        "near_duplicates": int(len(pool) - store.n_failures - valid.sum()),
        "excluded": int((valid & (tree.parent[1] == EXCLUDED)).sum()),
        "target_size": config.target_size,
        "selected": len(ids),
        "distinct": len(np.unique(ids)),
        "levels": [dataclasses.asdict(level) for level in cluster_balance(tree, ids)],
    }


@functools.cache
def temporary_cache() -> Path:
    """A cache for this process, which is removed when it ends."""
    folder = tempfile.TemporaryDirectory(prefix="curated_data-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[stage] = round(time.monotonic() - started, 3)
