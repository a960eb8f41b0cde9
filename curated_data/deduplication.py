"""The stage that takes near-duplicates out before clustering, as artifacts of the cache."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from curated_data.cache import build_once, fingerprint, read_array, read_manifest, write_manifest
from curated_data.config import CurationConfig
from curated_data.embedding import EmbeddingStore
from curated_data.embedding.existing import EmbeddedPool
from curated_data.embedding.stage import AnyPool, EmbeddingStage
from curated_data.errors import ConfigError, PoolError
from curated_data.holds import hold
from curated_data.pool import ShardPool
from curated_data.pool.decode import has_images
from curated_data.selection.near_duplicates import exact_groups, image_contents, near_duplicates
from curated_data.selection.removed import Removed

log = logging.getLogger(__name__)

VERSION = 3
"""Increased when something else is computed from the same inputs: older artifacts are then not used."""


def open_held_out(config: CurationConfig, root: Path, like: AnyPool) -> AnyPool | None:
    """The evaluation sets whose samples the pool must not contain; None if there are none.

    Args:
        like: the pool, by whose settings their images are decoded too. Those of a pool of rows are `.npy`
            files of rows.

    Raises:
        PoolError: no shard matches, one cannot be read, or they are empty.
        ConfigError: rows of another length than those of the pool.
    """
    if not (config.near_duplicates.enabled and config.near_duplicates.held_out):
        return None
    held_out = config.near_duplicates.held_out
    try:
        if isinstance(like, EmbeddedPool):
            rows = EmbeddedPool(held_out)
            if rows.name != like.name:
                raise ConfigError(
                    f"near_duplicates.held_out: its rows are {rows.dimension} x {rows.dtype}, those of the "
                    f"pool {like.dimension} x {like.dtype}; give embeddings of the same network and type"
                )
            return rows
        pool = ShardPool(held_out, cache_dir=root, storage_options=like.storage_options)
        pool.images = like.images
        pool.index()
    except PoolError as error:  # which would read as if it were of the pool itself
        raise PoolError(f"near_duplicates.held_out: {error}") from error
    return pool


def check_preference(config: CurationConfig, pool: AnyPool) -> None:
    """Check, before anything is embedded, that near-duplicates can be told apart as asked.

    Raises:
        ConfigError: the largest copies shall stay, and the pool has no images.
    """
    asked = config.near_duplicates.enabled and config.near_duplicates.prefer == "largest"
    if isinstance(pool, EmbeddedPool):
        if asked:
            raise ConfigError("near_duplicates.prefer: 'largest' is of images, and the pool is of rows")
        return
    present = pool.index().extensions
    if asked and not has_images(present, pool.image_extensions):
        raise ConfigError(
            "near_duplicates.prefer: 'largest' is of images, and the pool has none, its members are "
            f"{', '.join(present)}; leave it out"
        )


def embed_held_out(pool: AnyPool | None, stage: EmbeddingStage) -> EmbeddingStore | None:
    """The embeddings of what `open_held_out` gave.

    Raises:
        ConfigError: not one of the samples can be embedded, so that nothing would be held out.
    """
    if pool is None:
        return None
    store = stage.store(pool, fields=[])
    if store.n_failures == len(store):
        first = next(store.iterate_failures())
        raise ConfigError(
            f"near_duplicates.held_out: none of its {len(store)} samples could be embedded; give shards that "
            f"the embedder can read, or leave it out; the first: {first['shard']}, key {first['key']!r}: "
            f"{first['reason']}"
        )
    if store.n_failures:
        log.warning(
            "near_duplicates.held_out: %d of %d held-out samples could not be embedded; copies of these are "
            "not recognised in the pool",
            store.n_failures,
            len(store),
        )
    return store


def find_near_duplicates(
    root: Path,
    pool: AnyPool,
    store: EmbeddingStore,
    held_out: EmbeddingStore | None,
    config: CurationConfig,
    origin: dict[str, str],
    grown: "Grown | None" = None,
) -> tuple[Path, bool]:
    """The folder with a pool's near-duplicates, see `Removed`, and whether it was cached.

    Args:
        origin: the names of what the embeddings are made of.
        grown: for a pool that has grown around a tree, whose samples stay.
    """
    settings = dataclasses.asdict(config.near_duplicates)
    if held_out is not None:
        origin = origin | {"held_out": held_out.fingerprint}
    if grown is not None:
        origin = origin | {"base": grown.base}
    name = near_duplicates_name(config, origin)

    def build(folder: Path) -> None:
        store.verify()
        valid = store.valid
        contents = None
        if isinstance(pool, ShardPool) and config.near_duplicates.prefer == "largest":
            contents = image_contents(pool)
        found = near_duplicates(
            store,
            valid=valid,
            threshold=config.near_duplicates.threshold,
            n_neighbours=config.near_duplicates.n_neighbours,
            same=None if contents is None else exact_groups(contents.digest),
            prefer=None if contents is None else contents.n_pixels,
            held_out=None if held_out is None else held_out.as_array()[held_out.valid],
            stay=None if grown is None else grown.in_tree,
        )
        match = found.held_out_match
        if held_out is not None:  # from rows that were compared to samples of the held-out pool
            match = np.append(np.flatnonzero(held_out.valid), -1)[match]
        Removed(found.keep, found.near, match, found.cosine).save(folder)
        left_out = valid & ~found.keep
        counts = {"removed": int(left_out.sum()), "held_out_matches": int((match >= 0).sum())}
        if grown is not None:
            counts["removed_new"] = int((left_out & ~grown.known).sum())
            counts["held_out_in_tree"] = int((grown.in_tree & (match >= 0)).sum())
        write_manifest(folder, "near_duplicates", {"inputs": origin, "settings": settings} | counts)
        log.info("near-duplicates: %d samples removed", counts["removed"])

    hold(root / "near_duplicates" / name)
    return build_once(root / "near_duplicates" / name, build)


@dataclass(frozen=True)
class Grown:
    """What a pool of n samples, which has grown, has of an earlier tree.

    Samples that were in the tree stay, whatever they are copies of. All others are looked at anew, also those
    that were removed before the tree was built: what they were copies of may have left the pool since.

    Attributes:
        base: the name of the tree.
        known: (n,) bool, the samples that the tree was built over, removed ones included.
        in_tree: (n,) bool, those of them that have a cluster.
    """

    base: str
    known: np.ndarray
    in_tree: np.ndarray


def read_keep(folder: Path, n: int) -> np.ndarray:
    """(n,) bool, from the folder of a near-duplicates artifact: which samples were kept."""
    return read_array(folder, "keep", read_manifest(folder, "near_duplicates"), dtype=bool, shape=(n,))


def near_duplicates_name(config: CurationConfig, origin: dict[str, str]) -> str:
    """The name of a near-duplicates artifact, by its settings and its inputs."""
    settings = dataclasses.asdict(config.near_duplicates)
    return fingerprint(origin=origin, settings=settings, version=VERSION)
