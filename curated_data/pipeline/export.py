"""Write a selection as new shards that can be traced back to the pool and the clusters."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np

from curated_data.checks import check_choice
from curated_data.clustering.tree import ClusterTree
from curated_data.errors import PoolError, printable
from curated_data.pipeline.card import CARD, CROISSANT, PICTURE, TABLE, card, croissant, picture
from curated_data.pool import ShardPool, ShardWriter
from curated_data.pool.encode import encode_member
from curated_data.pool.out import LocalFolder, RemoteFolder
from curated_data.pool.urls import is_remote
from curated_data.pool.writer import Digested, check_out, existing_shards
from curated_data.progress import progress
from curated_data.report.table import CurationTable
from curated_data.streaming.order import EpochOrder

if TYPE_CHECKING:
    from curated_data.stages.curation import Curation

log = logging.getLogger(__name__)

Order = Literal["shuffled", "pool", "given"]
_BLOCK = 256  # samples read at once
_BESIDE = ("manifest.json", "ids.npy", "clusters.npy")  # the shards
_DESCRIBED = (TABLE, PICTURE, CROISSANT, CARD)  # the same, for others


def export(
    pool: ShardPool,
    ids: np.ndarray | Sequence[int],
    out: str | Path,
    *,
    tree: ClusterTree | None = None,
    curation: "Curation | None" = None,
    order: Order = "shuffled",
    seed: int = 0,
    max_samples: int = 10_000,
    max_bytes: int = 1 << 30,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Copy the selected samples of a pool to new shards; members keep their bytes, samples their keys.

    A key that the shard already has (of a repeated sample, or another sample of that name) gets the suffix
    `~2`, `~3`, … The folder also gets `ids.npy`, (n,) int64, the pool's id of each exported sample in the
    order of the shards; with a tree `clusters.npy`, (n, n_levels), its cluster at levels 1, 2, …; and
    `manifest.json` with the pool, the settings, and the number of the first sample of every shard, which
    is written last. The same arguments give the same bytes. An export that was killed at any point is started
    over by the next one to the same place: what it wrote is removed first, and nothing else.

    Args:
        pool: to copy from.
        ids: (n,) integers; a repeated id is written as often.
        out: a folder, or a pattern, as for `ShardWriter`: on this machine, or the URL of a store.
        tree: the cluster tree of the pool; None takes that of the curation, if there is one.
        curation: that the ids are of. The folder then also gets what others read: a data set card `README.md`
            with a picture, Croissant metadata `croissant.json`, and the table of the selected samples,
            `curation.parquet`. A card that was edited since an earlier export stays as it is.
        order: "shuffled", "pool" (ascending ids, the fastest to read), or "given" (as in `ids`).
        seed: for the shuffling.
        max_samples, max_bytes: per shard.
        overwrite: replace the shards of an earlier export.
        storage_options: for fsspec, to write to a store; None takes those of the pool.

    Returns:
        The shards, as paths, or as URLs in a store.

    Raises:
        ConfigError: no ids, or an unknown order.
        PoolError: an id outside the pool, a shard that changed, or `out` already holds shards or an export.
        CacheError: it cannot be written.
    """
    check_choice("order", order, get_args(Order))
    ids = np.asarray(ids)
    if tree is None and curation is not None:
        tree = curation.tree
    shuffled = EpochOrder(ids, seed=seed, batch_size=1, shuffle="full" if order == "shuffled" else "none")
    ids = np.sort(ids) if order == "pool" else shuffled.ids(0, 0, len(ids))
    options: dict[str, Any] = {
        "max_samples": max_samples,
        "max_bytes": max_bytes,
        "overwrite": overwrite,
        "storage_options": pool.storage_options if storage_options is None else storage_options,
    }
    check_export(pool, out, described=curation is not None, **options)
    first_of_shard: list[int] = []
    with (
        ShardWriter(out, **options, digest=curation is not None) as writer,
        progress("export", len(ids), "samples") as advance,
    ):
        is_own_card, stale = _earlier(writer.out, described=curation is not None)
        for name in (*_BESIDE, *stale):  # of an earlier export, no longer true
            writer.remove_beside(name)
        keys: set[str] = set()
        for start in range(0, len(ids), _BLOCK):
            samples = pool.read(ids[start : start + _BLOCK])
            for number, sample in enumerate(samples, start):
                sample["__key__"] = key = _free(sample["__key__"], keys)
                writer.write(sample)
                if len(writer.shards) > len(first_of_shard):
                    first_of_shard.append(number)
                    keys.clear()
                keys.add(key)
            advance(len(samples))
        writer.publish()
        writer.write_beside("ids.npy", encode_member(ids.astype(np.int64, copy=False)))
        if tree is not None:
            clusters = [tree.assignment(level, ids) for level in range(1, tree.n_levels + 1)]
            writer.write_beside("clusters.npy", encode_member(np.stack(clusters, axis=1).astype(np.int32)))
        digest = None
        if curation is not None:
            digest = _describe(curation, pool, writer, with_card=is_own_card)
        manifest = {
            "pool": {"fingerprint": pool.fingerprint, "shards": pool.urls},
            "order": order,
            "seed": seed if order == "shuffled" else None,
            "samples": len(ids),
            "card": digest,
            "levels": 0 if tree is None else tree.n_levels,
            "shards": [
                {"name": str(place).rpartition("/")[2], "first": first}
                for place, first in zip(writer.shards, first_of_shard, strict=True)
            ],
        }
        text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
        writer.write_beside("manifest.json", text.encode())
    log.info("exported %d samples to %d shards in %s", len(ids), len(writer.shards), writer.out)
    return writer.shards


def exported_files(folder: Path) -> list[str]:
    """The names of the files of an export to a folder of this machine, the shards first.

    Raises:
        PoolError: it has no readable `manifest.json`, or a shard that it names is missing.
    """
    try:
        shards = [
            str(shard["name"]) for shard in json.loads((folder / "manifest.json").read_bytes())["shards"]
        ]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise PoolError(f"{folder}: holds no export ({printable(error)}); export to it first") from error
    there = set(LocalFolder(folder).names())
    for name in shards:
        if name not in there:
            raise PoolError(f"{folder}: its shard {name!r} is missing; export again")
    return [*shards, *(name for name in (*_BESIDE, *_DESCRIBED) if name in there)]


def _earlier(out: LocalFolder | RemoteFolder, *, described: bool) -> tuple[bool, list[str]]:
    """Whether a card may be written, as there is none, or one that nobody has edited; and which files for
    others an earlier export left. Files that may be somebody else's stay, which is logged.
    """
    there = out.read(CARD)
    try:
        digest = json.loads(out.read("manifest.json") or b"null")["card"]
    except (ValueError, RecursionError, KeyError, TypeError):  # none of ours, or of an earlier version
        digest = None
    is_own = there is not None and hashlib.sha256(there).hexdigest() == digest
    beside = [TABLE, PICTURE, CROISSANT]
    stale = [] if digest is None else beside
    if CARD in out.names() and not is_own:  # which may also be a folder, or a link that leads nowhere
        log.warning(
            "%s: is not as an earlier export wrote it, and stays; move it away to have a new card",
            out.place(CARD),
        )
    stays = [] if described or stale else sorted(set(beside).intersection(out.names()))
    if stays:
        log.warning(
            "%s: %s stay, and do not describe the new shards; remove them if they are of an earlier export, "
            "whose manifest.json is missing or damaged",
            out, ", ".join(stays),
        )  # fmt: skip
    return there is None or is_own, [*stale, *([CARD] if is_own else [])]


def _describe(curation: "Curation", pool: ShardPool, writer: ShardWriter, *, with_card: bool) -> str:
    """Write what others read of the data set beside its shards; returns the SHA-256 of the card."""
    table = CurationTable(curation, pool, selected=True)
    with writer.create_beside(TABLE) as file:
        digested = Digested(file)
        table.write_to(cast(IO[bytes], digested))
    name = str(writer.out).rstrip("/").rpartition("/")[2] or "curated"
    about = croissant(curation, name, writer.digests, table.schema, digested.sha256.hexdigest())
    writer.write_beside(PICTURE, picture(curation))
    writer.write_beside(CROISSANT, (json.dumps(about, indent=2) + "\n").encode())
    text = card(curation, pool, name, list(writer.digests)).encode()
    if with_card:
        writer.write_beside(CARD, text)
    return hashlib.sha256(text).hexdigest()


def check_export(pool: ShardPool, out: str | Path, *, described: bool = False, **options: Any) -> None:
    """Check where an export goes, before anything takes long; the options are those of `check_out`.

    Args:
        described: a card and what goes with it is to be written, too.

    Raises:
        PoolError, CacheError: see `check_out`; or it would replace shards of the pool that it reads.
    """
    options.setdefault("storage_options", pool.storage_options)
    beside = dict.fromkeys([*_BESIDE, *(_DESCRIBED if described else ())])
    folder, name = check_out(out, **options, beside=beside)
    there = existing_shards(folder, name)
    if isinstance(folder, LocalFolder):
        own = {str(folder.place(found).resolve()) for found in there}
        read = {url: url if is_remote(url) else str(Path(url).resolve()) for url in pool.urls if own}
    else:
        folder.check()
        own = {folder.place(found) for found in there}
        read = {url: url for url in pool.urls if own}
    for url, place in read.items():
        if place in own:
            raise PoolError(
                f"{url}: is a shard of the pool, which the export would replace; give another folder"
            )


def _free(key: str, taken: set[str]) -> str:
    """The key, with the smallest suffix that makes it unique if it is taken."""
    if key not in taken:
        return key
    number = 2
    while f"{key}~{number}" in taken:
        number += 1
    return f"{key}~{number}"
