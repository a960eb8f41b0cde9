"""The stage that takes near-duplicates out before clustering, as artifacts of the cache."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import torch

from curated_data.cache import build_once, fingerprint, read_array, read_manifest, write_manifest
from curated_data.config import CurationConfig
from curated_data.embedding import Embedder, EmbeddingStore, embed_pool
from curated_data.errors import ConfigError, PoolError
from curated_data.pool import ShardPool
from curated_data.pool.decode import Decoders
from curated_data.selection.near_duplicates import exact_groups, image_contents, near_duplicates
from curated_data.selection.removed import Removed

log = logging.getLogger(__name__)

VERSION = 2
"""Increased when something else is computed from the same inputs: older artifacts are then not used."""


def open_held_out(config: CurationConfig, root: Path) -> ShardPool | None:
    """The evaluation sets whose samples the pool must not contain; None if there are none.

    Raises:
        PoolError: no shard matches, one cannot be read, or they are empty.
    """
    if not (config.near_duplicates.enabled and config.near_duplicates.held_out):
        return None
    try:
        pool = ShardPool(config.near_duplicates.held_out, cache_dir=root)
        pool.index()
    except PoolError as error:  # which would read as if it were of the pool itself
        raise PoolError(f"near_duplicates.held_out: {error}") from error
    return pool


def embed_held_out(
    pool: ShardPool | None,
    embedder: Embedder,
    root: Path,
    config: CurationConfig,
    device: str | torch.device,
    decoders: Decoders | None,
) -> EmbeddingStore | None:
    """The embeddings of what `open_held_out` gave.

    Raises:
        ConfigError: not one of the samples can be embedded, so that nothing would be held out.
    """
    if pool is None:
        return None
    settings = dataclasses.asdict(config.embedding)
    store = embed_pool(pool, embedder, root, device=device, decoders=decoders, fields=[], **settings)
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
    pool: ShardPool,
    store: EmbeddingStore,
    held_out: EmbeddingStore | None,
    config: CurationConfig,
    origin: dict[str, str],
) -> tuple[Path, bool]:
    """The folder with a pool's near-duplicates, see `Removed`, and whether it was cached."""
    settings = dataclasses.asdict(config.near_duplicates)
    if held_out is not None:
        origin = origin | {"held_out": held_out.fingerprint}
    name = near_duplicates_name(config, origin)

    def build(folder: Path) -> None:
        store.verify()
        valid = store.valid
        contents = image_contents(pool) if config.near_duplicates.prefer == "largest" else None
        found = near_duplicates(
            store,
            valid=valid,
            threshold=config.near_duplicates.threshold,
            n_neighbours=config.near_duplicates.n_neighbours,
            same=None if contents is None else exact_groups(contents.digest),
            prefer=None if contents is None else contents.n_pixels,
            held_out=None if held_out is None else held_out.as_array()[held_out.valid],
        )
        match = found.held_out_match
        if held_out is not None:  # from rows that were compared to samples of the held-out pool
            match = np.append(np.flatnonzero(held_out.valid), -1)[match]
        Removed(found.keep, found.group, match).save(folder)
        removed = int((valid & ~found.keep).sum())
        counts = {"removed": removed, "held_out_matches": int((match >= 0).sum())}
        write_manifest(folder, "near_duplicates", {"inputs": origin, "settings": settings} | counts)
        log.info("near-duplicates: %d samples removed", removed)

    return build_once(root / "near_duplicates" / name, build)


def settle_near_duplicates(
    root: Path, found: Path, store: EmbeddingStore, base: str, settled: np.ndarray, in_tree: np.ndarray
) -> tuple[Path, bool]:
    """Near-duplicates of a pool that has grown around a tree, whose samples stay whatever they are copies of.

    A new sample is removed if it is a copy of a held-out one or of one in the tree. Of new samples that are
    copies of each other one stays: the one that would in the pool as a whole, else that with the smallest id.

    Args:
        found: the folder that `find_near_duplicates` gave for the whole pool.
        base: the name of the tree.
        settled: (n,) bool, the samples that the tree was built over, removed ones included.
        in_tree: (n,) bool, those of them that have a cluster.

    Returns:
        A folder as from `find_near_duplicates`, and whether it was cached.
    """

    def build(folder: Path) -> None:
        whole = Removed.load(found)
        candidates = np.flatnonzero(store.valid & ~settled & (whole.held_out < 0))
        taken = np.zeros(len(settled), bool)
        taken[whole.group[in_tree & (whole.group >= 0)]] = True
        candidates = candidates[~taken[whole.group[candidates]]]
        candidates = candidates[np.lexsort((candidates, ~whole.keep[candidates], whole.group[candidates]))]
        first = np.diff(whole.group[candidates], prepend=-1) != 0
        keep = in_tree.copy()
        keep[candidates[first]] = True
        Removed(keep, whole.group, whole.held_out).save(folder)
        counts = {
            "removed": int((store.valid & ~keep).sum()),
            "removed_new": int((store.valid & ~settled & ~keep).sum()),
            "held_out_matches": int((whole.held_out >= 0).sum()),
            "held_out_in_tree": int((in_tree & (whole.held_out >= 0)).sum()),
        }
        write_manifest(folder, "near_duplicates", {"inputs": inputs} | counts)

    inputs = {"near_duplicates": found.name, "base": base}
    return build_once(root / "near_duplicates" / fingerprint(settled=inputs, version=VERSION), build)


def read_keep(folder: Path) -> np.ndarray:
    """(n,) bool, from the folder of a near-duplicates artifact: which samples were kept."""
    return read_array(folder, "keep", read_manifest(folder, "near_duplicates"))


def near_duplicates_name(config: CurationConfig, origin: dict[str, str]) -> str:
    """The name of a near-duplicates artifact, by its settings and its inputs."""
    settings = dataclasses.asdict(config.near_duplicates)
    return fingerprint(origin=origin, settings=settings, version=VERSION)
