"""Embedding a pool: every process takes whole shards until none is left.

So a killed run loses at most one shard of work per process. Batches never span shards and are always cut the
same way, so that a shard's embeddings do not depend on which process computes them, or with which others.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from curated_data.cache.artifacts import fingerprint
from curated_data.cache.holds import Hold
from curated_data.cache.layout import EMBEDDINGS
from curated_data.cache.locks import locked
from curated_data.embedding.batches import Claim, InputLoader
from curated_data.embedding.contents import Contents, content_name
from curated_data.embedding.embedders import Embedder
from curated_data.embedding.equal import equal_rows
from curated_data.embedding.forward import Forward
from curated_data.embedding.identity import module_fingerprint
from curated_data.embedding.shard_files import ShardFiles
from curated_data.embedding.store import VERSION, EmbeddingStore, forget_table, store_fingerprint
from curated_data.errors import ConfigError, EmbedderError
from curated_data.parallel import check_ranks, rank, world_size
from curated_data.pool import ShardPool
from curated_data.pool.decode import IMAGE_EXTENSIONS, Decoders, as_decoders
from curated_data.pool.fields import checked_fields
from curated_data.progress import progress

log = logging.getLogger(__name__)

_PILLOWS_LIMIT = 89_478_485  # pixels, its default


def embed_pool(
    pool: ShardPool,
    embedder: Embedder,
    cache_root: Path,
    *,
    batch_size: int = 256,
    num_workers: int = 2,
    dtype: str = "float16",
    device: str | torch.device = "auto",
    precision: str = "auto",
    decoders: Decoders | None = None,
    fields: Sequence[str] | None = None,
    multiprocessing_context: str | None = None,
    ids: np.ndarray | None = None,
    keep: np.ndarray | None = None,
) -> EmbeddingStore:
    """Embed the shards that are not in the cache yet, and open the store.

    The ranks of a process group, and unrelated runs that share the cache, divide the shards among themselves
    by locks; there are no collective calls. A sample whose bytes cannot be decoded or preprocessed, or whose
    embedding is not finite, gets a row of zeros and an entry in the store's `failures`. So does one of which
    a field cannot be decoded that training will ask for. An error that does not come from the bytes (see
    `is_samples`) stops the work, and nothing of that shard is published.

    Args:
        pool: n samples.
        embedder: see `resolve_embedder`.
        cache_root: an opened cache; the store is in its folder `embeddings`.
        batch_size: samples per forward pass; it changes the result only by rounding.
        num_workers: processes that read, decode and preprocess; 0 does so in this process.
        dtype: of the stored rows, "float16" or "float32".
        device: of the embedder; "auto" takes the current CUDA device, or the CPU if there is none.
        precision: "32", or "bf16" for autocast; "auto" takes bf16 on CUDA devices that support it.
        decoders: by extension, see `decode_sample`.
        fields: those that training will ask for, see `checked_fields`; None: all.
        multiprocessing_context: how those processes start, see `EmbeddingConfig`.
        ids: (m,) int64, ascending and unique: embed only these samples. The store then has one row for each,
            in their order, and is separate from that of the whole pool.
        keep: (n,) bool, the samples that a filter keeps; None: all. The others are not embedded, and `valid`
            is False for them. Rows that the cache has, by whatever filter, are not embedded again.

    Raises:
        EmbedderError: the embedder fails on good input or returns another shape than (B, dimension).
        PoolError: a shard cannot be read.
    """
    forward = Forward(embedder, dtype=dtype, device=device, precision=precision)
    name = embeddings_name(
        pool, embedder, dtype=dtype, precision=precision, decoders=decoders, fields=fields, ids=ids
    )
    folder = Path(cache_root) / EMBEDDINGS / name
    held = Hold(folder)  # before looking what it has
    contents = Contents(Path(cache_root), pool)
    # Of a shard that is embedded in part, the content cannot be learned on the way.
    contents.recognise(every=ids is not None)
    ranges = pool.shard_ranges() if ids is None else np.searchsorted(ids, pool.shard_ranges())
    files = ShardFiles(folder, ranges, keep)
    missing = files.missing(contents.names)
    if keep is not None:
        log.info("embedding: %d of %d samples, the others are filtered out", int(keep.sum()), len(keep))
    if missing:
        _forget_table(files, contents, dtype)
        forward.move()
        samples = int(sum(files.to_embed(number, contents.names[number]).sum() for number in missing))
        started = time.monotonic()
        with progress(f"embedding ({forward.device.type})", samples, "images") as advance:
            loader = InputLoader(
                pool,
                embedder,
                batch_size,
                num_workers,
                decoders,
                forward.device,
                multiprocessing_context,
                ranges,
                ids,
                checked_fields(fields, as_decoders(decoders), pool.image_extensions),
            )
            done = 0
            # Ranks start at different shards, so that they do not queue for the same locks. A second pass,
            # which waits for locks, takes the shards that another process gave up.
            first = rank() * len(missing) // world_size()
            turned = missing[first:] + missing[:first]
            # It may wait for a shard while holding others, so all processes go in the same order.
            in_one_order = sorted(missing, key=contents.locks.__getitem__)
            for wait, numbers in ((False, turned), (True, in_one_order)):
                done += _embed_shards(numbers, files, loader, contents, wait, forward, advance)
        seconds = time.monotonic() - started
        if done:
            log.info("embedded %d samples at %.0f samples/s with %s", done, done / seconds, forward.name)
        files.refresh()
        _forget_table(files, contents, dtype)
    names = [name for name in contents.names if name is not None]
    found = files.names(contents.names)
    assert len(found) == len(pool.urls), "every shard is embedded, by this process or another"
    left_out = None if keep is None else ~keep
    store = EmbeddingStore(
        folder, names, embedder.dimension, dtype, ids=ids, urls=pool.urls, files=found, left_out=left_out
    )
    del held  # the store has its own
    if store.n_failures:
        n = len(store) if keep is None else int(keep.sum())
        failure = next(store.iterate_failures())
        log.warning(
            "%d of %d samples could not be embedded and will not be selected, the first: %s, key %r: %s",
            store.n_failures, n, failure["shard"], failure["key"], failure["reason"],
        )  # fmt: skip
    if rank() == 0:
        _warn_of_equal(pool, store)
    log.info("embeddings: %d x %d %s, %d shards were cached", *store.shape, dtype, len(names) - len(missing))
    return store


def _forget_table(files: ShardFiles, contents: Contents, dtype: str) -> None:
    """Forget the summary of a store, some of whose shards are written again."""
    # A file that is to be written again is known by the name of its shard's content.
    names = [files.find(number, name) or name for number, name in enumerate(contents.names)]
    known = [name for name in names if name is not None]
    if len(known) == len(names):
        forget_table(files.folder, store_fingerprint(files.folder, known, dtype))


def embed_samples(
    pool: ShardPool,
    embedder: Embedder,
    ids: np.ndarray,
    *,
    batch_size: int = 256,
    num_workers: int = 2,
    dtype: str = "float16",
    device: str | torch.device = "auto",
    precision: str = "auto",
    decoders: Decoders | None = None,
    multiprocessing_context: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Embed a few samples of a pool of any size as `embed_pool` does, in memory, in this process alone.

    Args:
        ids: (m,) int64, ascending and unique.

    The other arguments and the errors are as for `embed_pool`.

    Returns:
        (m, d) rows, zeros for samples that failed, and (m,) bool, False for these.
    """
    forward = Forward(embedder, dtype=dtype, device=device, precision=precision)
    ranges = np.searchsorted(ids, pool.shard_ranges())
    forward.move()
    loader = InputLoader(
        pool,
        embedder,
        batch_size,
        num_workers,
        decoders,
        forward.device,
        multiprocessing_context,
        ranges,
        ids,
    )
    rows = np.zeros((len(ids), embedder.dimension), dtype)
    valid = np.zeros(len(ids), bool)
    for batch in loader.batches(map(Claim, np.flatnonzero(np.diff(ranges)).tolist())):
        rows[batch.rows], reasons = forward(batch.inputs, batch.reasons)
        valid[batch.rows] = [not reason for reason in reasons]
    return rows, valid


def embeddings_name(
    pool: ShardPool,
    embedder: Embedder,
    *,
    dtype: str,
    precision: str,
    decoders: Decoders | None = None,
    fields: Sequence[str] | None = None,
    ids: np.ndarray | None = None,
    **_: Any,
) -> str:
    """The name of the folder of `embed_pool`, by what determines the embeddings."""
    unusual: dict[str, Any] = {} if ids is None else {"ids": ids}
    if pool.image_extensions != IMAGE_EXTENSIONS:  # which decide what of a sample is embedded
        unusual["image_extensions"] = pool.image_extensions
    if Image.MAX_IMAGE_PIXELS != _PILLOWS_LIMIT:  # which decides what counts as too large to decode
        unusual["max_image_pixels"] = Image.MAX_IMAGE_PIXELS
    if fields is not None:
        own = as_decoders(decoders)
        checked = checked_fields(fields, own, pool.image_extensions)
        if checked != checked_fields(None, own, pool.image_extensions):
            unusual["fields"] = sorted(checked)
    return fingerprint(
        images=pool.images._asdict(),
        embedder=embedder.fingerprint,
        dtype=dtype,
        precision=precision,
        decoders=_decoder_fingerprints(decoders),
        version=VERSION,
        **unusual,
    )


def _warn_of_equal(pool: ShardPool, store: EmbeddingStore) -> None:
    found = equal_rows(store)
    if found.are_many:
        key = pool.keys([found.example])[0]
        shard = pool.urls[int(pool.shard_of([found.example])[0])]
        log.warning(
            "of %d embeddings looked at, %d equal another one, and %d are one and the same, as that of %s, "
            "key %r; are these samples copies, or does decoding or preprocessing make them so?",
            found.looked_at,
            found.equal,
            found.largest,
            shard,
            key,
        )


def _decoder_fingerprints(decoders: Decoders | None) -> list[Any]:
    """The extension and the fingerprint of each decoder."""
    found = []
    for extension, decode in sorted((as_decoders(decoders) or {}).items()):
        try:
            found.append([extension, module_fingerprint(decode)])
        except EmbedderError as error:
            raise ConfigError(
                f"decoders[{extension!r}]: its identity cannot be determined; give it an attribute "
                "`fingerprint` (a string that changes whenever its output does)"
            ) from error
    return found


def _embed_shards(
    numbers: list[int],
    files: ShardFiles,
    loader: InputLoader,
    contents: Contents,
    wait: bool,
    forward: Forward,
    advance: Callable[..., None],
) -> int:
    """Embed those of the shards that are missing and can be claimed; returns their number of samples."""
    pool, ranges = loader.pool, loader.ranges
    locks: dict[int, ExitStack] = {}
    begun: dict[int, _Shard] = {}
    done = 0

    def finish(number: int) -> None:
        shard = begun.pop(number)
        origin: dict[str, Any] = {"url": pool.urls[number], "embedder": forward.name}
        origin |= {"transparent": shard.transparent}
        name = contents.names[number]
        if shard.is_read:  # it may have changed though its state did not
            name = content_name(contents.layouts[number], shard.digest.digest())
        assert name is not None, "of a shard that is not read as a whole, found before"
        files.look(name)
        files.publish(name, shard.rows, shard.wanted, shard.failures, origin)
        if shard.is_read:
            contents.record(number, shard.digest.digest())
        locks.pop(number).close()

    def claims() -> Iterator[Claim]:
        for number in numbers:
            if files.find(number, contents.names[number]) is not None:
                continue
            lock = ExitStack()
            held = lock.enter_context(locked(files.folder / contents.locks[number], wait=wait))
            if held:
                contents.look(number)  # another process may have embedded it since
                files.look(contents.names[number])
            name = contents.names[number]
            if not held or files.find(number, name) is not None:
                lock.close()
                continue
            locks[number] = lock
            wanted = files.to_embed(number, name)
            # All of it is read where that is needed to learn its content, or costs no more.
            is_read = loader.ids is None and (name is None or bool(wanted.all()))
            begun[number] = _Shard(wanted, is_read, loader.embedder.dimension, forward.dtype)
            if wanted.any() or (is_read and len(wanted)):
                yield Claim(number, None if wanted.all() else wanted, is_read)
            else:  # which gives no batch
                finish(number)

    try:
        all_transparent, example = 0, ""
        for batch in loader.batches(claims()):
            check_ranks()
            shard = begun[batch.shard]
            place = batch.rows - ranges[batch.shard]
            shard.rows[place], reasons = forward(batch.inputs, batch.reasons)
            failed = [position for position, reason in enumerate(reasons) if reason]
            for position, key in zip(failed, pool.keys(loader.samples(batch.rows[failed])), strict=True):
                shard.failures.append(
                    {
                        "place": int(place[position]),
                        "shard": pool.urls[batch.shard],
                        "key": key,
                        "reason": reasons[position],
                    }
                )
            shard.digest.update(b"".join(batch.digests))
            done += len(place)
            advance(len(place))
            shard.transparent += batch.transparent
            all_transparent += batch.transparent
            example = example or batch.transparent_example
            if batch.is_last:
                finish(batch.shard)
        if all_transparent:
            log.warning(
                "%d of %d images have transparent pixels, the first: %s; they were put on the colour %s "
                "(`background` of ShardPool)",
                all_transparent,
                done,
                example,
                pool.images.background,
            )
    finally:
        for lock in locks.values():
            lock.close()
    return done


class _Shard:
    """A shard that is being embedded; the arguments are those of its `Claim`."""

    def __init__(self, wanted: np.ndarray, is_read: bool, dimension: int, dtype: str) -> None:
        self.wanted, self.is_read = wanted, is_read
        self.shape, self.dtype = (len(wanted), dimension), dtype
        self.failures: list[dict[str, Any]] = []
        self.digest = hashlib.sha256()
        self.transparent = 0

    @cached_property
    def rows(self) -> np.ndarray:
        """What is embedded so far; claims are made ahead of the work, so it is allocated when that begins."""
        return np.zeros(self.shape, self.dtype)
