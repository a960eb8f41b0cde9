"""Repacking archives as shards: compressed ones and pipes, and those in which parts of samples lie apart."""

import bz2
import json
import logging
import lzma
import os
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec

from curated_data.cache.checksums import read_bytes
from curated_data.cache.paths import is_url, spelled
from curated_data.errors import PoolError, printable
from curated_data.pool.access import RemoteOptions
from curated_data.pool.grouping import parts_apart
from curated_data.pool.index import ShardIndex, index_shard
from curated_data.pool.notes import joined_notes, report_notes
from curated_data.pool.out import LocalFolder, RemoteFolder, writing
from curated_data.pool.storage import stat_shards
from curated_data.pool.store import Store
from curated_data.pool.tar import Source, compression_of, local_source, read_members
from curated_data.pool.urls import expand_urls, is_pipe, is_remote, unreachable
from curated_data.pool.writer import ShardWriter, check_out, existing_shards
from curated_data.progress import progress

log = logging.getLogger(__name__)

_RANGE = 8 << 20  # bytes of a remote archive that are asked for at once
_PIECE = 4 << 10  # bytes that are decompressed at once: any of the formats makes some 100 MB of them at most


def import_archives(
    archives: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    max_samples: int = 10_000,
    max_bytes: int = 1 << 30,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Repack tar archives as plain shards, with the keys and bytes of all samples as they are.

    For archives that a `ShardPool` cannot read at offsets: compressed ones (`.tar.gz`, `.tar.bz2`, `.tar.xz`,
    `.tar.zst`) and the output of commands. Parts of a sample that lie apart in an archive, as in one with all
    images first and all labels later, come together at the place of the first. Samples of one key that have
    an extension in common stay samples of their own.

    An archive that is compressed, remote or a pipe is first unpacked to a file without a name, which takes
    the archive's unpacked size of the disk: where the shards go or, if that is a store, in `$TMPDIR`. From a
    server without ranged reads it is downloaded whole before, to `$TMPDIR` too.

    Args:
        archives: as the shards of a `ShardPool`, and also `pipe:<command>`, commands run in a shell; or a
            file that lists them: `.txt` with one in each line, or the `.json` of wids.
        out: a folder for the shards, or a pattern, as for `ShardWriter`.
        max_samples, max_bytes: per shard.
        overwrite: replace the shards of an earlier run.
        storage_options: for fsspec, to read remote archives and to write to a store.

    Returns:
        The shards, as paths, or as URLs in a store.

    Raises:
        PoolError: an archive is missing, damaged, cut short, without a sample, or one of the shards that
            would be replaced; a command failed; or the package `zstandard` is missing.
        CacheError: the shards cannot be written.

    Examples:
        >>> import_archives("old-{000..099}.tar.gz", "shards")  # doctest: +SKIP
    """
    urls = expand_urls(listed_urls(archives), storage_options, pipes=True)
    options: dict[str, Any] = {
        "max_samples": max_samples,
        "max_bytes": max_bytes,
        "overwrite": overwrite,
        "storage_options": storage_options,
    }
    folder, name = check_out(out, **options)
    _check_kept(urls, folder, name)
    scratch = _scratch_folder(folder)
    with ShardWriter(out, **options) as writer, progress("import", len(urls), "archives") as advance:
        last: str | None = None
        for url in urls:
            with _plain(url, storage_options or {}, scratch) as handle:
                for key, members in _samples(url, handle):
                    if key == last:  # side by side in one shard they would be read as one
                        writer.publish()
                    writer.write({"__key__": key} | members)
                    last = key
            advance()
    log.info(
        "imported %d samples of %d archives to %d shards", writer.n_samples, len(urls), len(writer.shards)
    )
    return writer.shards


def listed_urls(archives: str | Path | Sequence[str | Path]) -> str | Path | Sequence[str | Path]:
    """The archives that a `.txt` or the `.json` of wids lists; all else as it is.

    Raises:
        PoolError: the file cannot be read, or lists none.
    """
    given = list(archives) if isinstance(archives, list | tuple) and len(archives) == 1 else [archives]
    place = given[0]
    if (
        not isinstance(place, str | Path)
        or not str(place).endswith((".txt", ".json"))
        or is_remote(str(place))
    ):
        return archives
    path = Path(spelled(place))
    try:
        text = read_bytes(path).decode("utf-8")
        if path.suffix == ".txt":
            urls = [line.strip() for line in text.splitlines() if line.strip() and line[0] != "#"]
        else:
            content = json.loads(text)
            urls = [str(shard["url"]) for shard in content["shardlist"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PoolError(
            f"{path}: lists no archives ({printable(error)}); give a text with one URL in each line, or an "
            "index of wids, whose `shardlist` has their `url`s"
        ) from error
    if not urls:
        raise PoolError(f"{path}: lists no archives; give one URL in each line")
    return [url if is_url(url) else str(path.parent / url) for url in urls]


def _check_kept(urls: Sequence[str], folder: LocalFolder | RemoteFolder, name: str) -> None:
    """Check that no archive is one of the shards that the writer would remove.

    Raises:
        PoolError: one is.
    """

    def spot(url: str | Path) -> str:
        return str(fsspec.core.strip_protocol(url)) if is_remote(str(url)) else os.path.realpath(url)

    replaced = {spot(folder.place(shard)) for shard in existing_shards(folder, name)}
    for url in urls:
        if not is_pipe(url) and spot(url) in replaced:
            raise PoolError(
                f"{url}: is to be imported, but is one of the shards {name!r} in {folder} that the import "
                "would replace; give another folder or name"
            )


def _scratch_folder(folder: LocalFolder | RemoteFolder) -> Path | None:
    """Where archives are unpacked: on the disk that the shards go to; None for the system's place."""
    if isinstance(folder, RemoteFolder):
        return None
    return next(place for place in (folder.path, *folder.path.absolute().parents) if place.is_dir())


def _samples(url: str, handle: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of an archive, each whole: its key, and its members by extension."""
    before = os.fstat(handle)
    source = local_source(url, handle)
    index = index_shard(source)
    if not len(index):
        raise PoolError(f"{url}: holds no sample to import; a sample is a file with an extension, as key.jpg")
    keys, starts = index.keys(), index.member_start.tolist()
    extensions = index.member_extension.tolist()
    rows_of = {rows[0]: rows for rows in parts_apart(keys, starts, extensions)}
    joined = {row for rows in rows_of.values() for row in rows[1:]}
    _report(url, source, index, len(joined))
    for row, key in enumerate(keys):
        if row in joined:
            continue
        members = [m for part in rows_of.get(row, (row,)) for m in range(starts[part], starts[part + 1])]
        yield (
            key,
            {
                index.extensions[extensions[m]]: _read(
                    source, int(index.member_offset[m]), int(index.member_size[m])
                )
                for m in members
            },
        )
    after = os.fstat(handle)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise PoolError(f"{url}: changed while it was being imported; import it again")


def _report(url: str, source: Source, index: ShardIndex, n_joined: int) -> None:
    """Log what is odd about an archive, and count what is left out of the shards."""
    if n_joined:
        log.info("%s: put %d parts of samples that lay apart back together", url, n_joined)
    notes = {kind: note for kind, note in index.notes.items() if kind != "apart"}
    report_notes(joined_notes([(url, notes)]), strict=False)
    n_others = sum(len(block.names) for block in read_members(source)) - len(index.member_size)
    n_others -= sum(notes[kind].number for kind in ("links", "macos") if kind in notes)  # counted there
    if n_others:
        log.warning(
            "%s: left out %d files whose names make no sample (without an extension, or as __name__)",
            url,
            n_others,
        )


def _read(source: Source, offset: int, size: int) -> bytes:
    pieces: list[bytes] = []
    missing = size
    while missing:  # the system gives 2 GB at once at most
        piece = source.read(offset + size - missing, missing)
        if not piece:
            raise PoolError(f"{source.name}: became shorter while it was being imported; import it again")
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


@contextmanager
def _plain(url: str, storage_options: Mapping[str, Any], scratch: Path | None) -> Iterator[int]:
    """A handle of an archive, or of its plain content in a file that is gone when the block ends."""
    with ExitStack() as stack:
        if not is_remote(url) and not is_pipe(url):
            with _named(url):
                file = stack.enter_context(open(url, "rb"))
                compression = compression_of(file.peek(16))
            if compression is None:
                yield file.fileno()
                return
        place = scratch or tempfile.gettempdir()
        with writing(place):
            copy = stack.enter_context(tempfile.TemporaryFile(dir=scratch))
        for piece in _content(url, storage_options):
            with writing(place):
                copy.write(piece)
        with writing(place):
            copy.flush()
        yield copy.fileno()


def _content(url: str, storage_options: Mapping[str, Any]) -> Iterator[bytes]:
    """An archive's content in sequence, decompressed.

    Raises:
        PoolError: it cannot be read to its end.
    """
    with _named(url):
        pieces = _pieces(url, storage_options)
        first = next(pieces, b"")
        new = _decoder(url, compression_of(first))
        pieces = chain([first], pieces)
        yield from pieces if new is None else _decompressed(pieces, new)


def _pieces(url: str, storage_options: Mapping[str, Any]) -> Iterator[bytes]:
    """What a file or command gives, as it is, in sequence."""
    if is_pipe(url):
        with subprocess.Popen(url.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            yield from iter(partial(process.stdout.read, _PIECE), b"")
        if process.returncode:
            raise OSError(f"its command ended with exit status {process.returncode}")
    elif not is_remote(url):
        with open(url, "rb") as file:
            yield from iter(partial(file.read, _PIECE), b"")
    else:
        (shard,) = stat_shards([url], storage_options)
        store = Store(storage_options, RemoteOptions())
        if store.can_read_ranges(url):
            for start in range(0, shard.size, _RANGE):
                part = store.read(shard, start, min(start + _RANGE, shard.size))
                yield from (part[at : at + _PIECE] for at in range(0, len(part), _PIECE))
            return
        with tempfile.NamedTemporaryFile() as copy:
            store.download(shard, Path(copy.name))
            yield from iter(partial(copy.read, _PIECE), b"")


@contextmanager
def _named(url: str) -> Iterator[None]:
    """Turn errors about an archive's bytes into one that names it."""
    try:
        yield
    except PoolError:
        raise
    except ImportError as error:
        raise unreachable(url, error) from error
    except Exception as error:  # each format and each protocol has its own
        raise PoolError(
            f"{url}: cannot be read to its end ({printable(error)}); copy it again, "
            "or check where it comes from"
        ) from error


def _decoder(url: str, compression: str | None) -> Callable[[], Any] | None:
    """What makes a decompressor of one stream; None for plain content."""
    if compression is None:
        return None
    if compression == "zstd":
        try:
            import zstandard
        except ImportError as error:
            raise PoolError(
                f"{url}: is compressed with zstd; pip install 'curated-data[zstd]' to import it"
            ) from error
        return zstandard.ZstdDecompressor().decompressobj
    makers: dict[str, Callable[[], Any]] = {
        "gzip": partial(zlib.decompressobj, zlib.MAX_WBITS | 16),
        "bzip2": bz2.BZ2Decompressor,
        "xz": lzma.LZMADecompressor,
    }
    return makers[compression]


def _decompressed(pieces: Iterator[bytes], new: Callable[[], Any]) -> Iterator[bytes]:
    """The content of compressed streams in a row, as parallel compressors write them, or one alone.

    Raises:
        EOFError: the last is cut short.
    """
    decoder = new()
    for piece in pieces:
        while piece:
            if decoder.eof:
                piece = piece.lstrip(b"\0")  # padding
                if not piece:
                    break
                decoder = new()
            yield decoder.decompress(piece)
            piece = decoder.unused_data if decoder.eof else b""
    if not decoder.eof:
        raise EOFError("it ends within its compressed data")
