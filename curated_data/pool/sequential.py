"""Pools of compressed shards or pipes, which can only be read in sequence."""

import bz2
import gzip
import io
import logging
import lzma
import os
import subprocess
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import fsspec
import numpy as np

from curated_data.errors import PoolError
from curated_data.pool.build import Indexer
from curated_data.pool.index import ShardIndex, index_shard
from curated_data.pool.shard import ShardFile
from curated_data.pool.shards import ShardPool
from curated_data.pool.storage import stat_shards
from curated_data.pool.tar import BLOCK, UNKNOWN_SIZE, Source, is_header
from curated_data.pool.urls import is_pipe, unreachable

log = logging.getLogger(__name__)

_OPEN_STREAMS = 4
_RECENT = 8  # members of a stream that are kept, so that the same sample can be read again
_MOST_KEPT = 64 << 20  # bytes of members that links share, of a stream


class SequentialPool(ShardPool):
    """A pool of compressed shards (`.tar.gz`, `.tar.zst`, …) or pipes, with the interface of `ShardPool`.

    Such a shard can only be read from its start: indexing reads it completely, and reading a sample reads all
    that precede it. Reading in the order of the ids costs one pass per shard, because streams stay open where
    the last read ended. Members that several links share are kept in memory, up to 64 MiB for each stream.

    Args:
        urls: as for `ShardPool`, and also `pipe:<command>` with braces; commands run in a shell.
        options: `cache_dir` and the other options of `ShardPool`.

    Raises:
        PoolError: as for `ShardPool`; also for zstd shards if the package `zstandard` is missing.
    """

    _takes_pipes = True

    def __init__(self, urls: str | Path | Sequence[str | Path], **options: Any) -> None:
        super().__init__(urls, **options)
        log.info(
            "%d shards are read in sequence (compressed, or pipes): each sample costs all that precede it in "
            "its shard; plain .tar shards are read at offsets",
            len(self.urls),
        )

    @cached_property
    def shards(self) -> list[ShardFile]:
        """Each shard in its state at first use; a pipe is identified by its command alone."""
        files = [url for url in self._places if not is_pipe(url)]
        states = iter(stat_shards(files, self.storage_options, self.remote))
        return [
            ShardFile(url, 0, "sequential pipe") if is_pipe(url) else _in_sequence(next(states))
            for url in self._places
        ]

    def iterate(
        self, ids: Sequence[int] | np.ndarray | None = None, extensions: Sequence[str] | None = None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Pass once over the shards that contain selected samples, in shard order, then tar order.

        Args:
            ids: the selection, in any order; None for all. Repeats are ignored.
            extensions: the members to keep.

        Yields:
            (id, sample), with the sample as from `read`.
        """
        ids = np.arange(len(self)) if ids is None else np.unique(self._checked(ids))
        for first in range(0, len(ids), 256):
            block = ids[first : first + 256]
            yield from zip(block.tolist(), self.read(block, extensions))

    def plan_access(
        self,
        ids: Sequence[int] | np.ndarray | None,
        extensions: Sequence[str] | None = None,
        *,
        epochs: int = 1,
    ) -> np.ndarray:
        """Nothing to plan: every shard is streamed."""
        return np.zeros(len(self.urls), bool)

    def close(self) -> None:
        """Close all open streams."""
        while self._streams:
            self._streams.popitem()[1].close()

    @property
    def _streams(self) -> "OrderedDict[int, _Stream]":
        """The open streams of this process; after a fork, those of the parent must not be used."""
        process, streams = self.__dict__.get("_open_streams", (None, None))
        if process != os.getpid():
            streams = OrderedDict()
            self.__dict__["_open_streams"] = os.getpid(), streams
        return streams

    @property
    def _indexer(self) -> Indexer:
        return partial(_index_stream, storage_options=self.storage_options)

    def _read_members(self, ids: np.ndarray, shard: np.ndarray, members: Any) -> list[bytes]:
        found: list[bytes] = [b""] * len(members.offset)
        of_shard = shard[members.owner]
        for place in np.lexsort((members.offset, of_shard)).tolist():
            number, sample_id = int(of_shard[place]), int(ids[members.owner[place]])
            offset, size = int(members.offset[place]), int(members.size[place])
            data = self._stream(number, offset).read(offset, size, self._key_of(sample_id))
            if data is None:
                raise PoolError(
                    f"{self.urls[number]}: changed since it was indexed: sample "
                    f"{sample_id - int(self.shard_ranges()[number])} is another or missing"
                )
            found[place] = data
        self._reader.counters.n_members += len(found)
        self._reader.counters.bytes_needed += sum(map(len, found))
        return found

    def _stream(self, shard: int, offset: int) -> "_Stream":
        """An open stream of a shard that has not passed an offset or keeps what is there, or a new one."""
        stream = self._streams.get(shard)
        if stream is None or not stream.can_read(offset):
            if stream is not None:
                self._streams.pop(shard).close()
            while len(self._streams) >= _OPEN_STREAMS:
                self._streams.popitem(last=False)[1].close()
            stream = _Stream(self.shards[shard], self.storage_options, self._shared_offsets(shard))
            self._streams[shard] = stream
        self._streams.move_to_end(shard)
        return stream

    def _shared_offsets(self, shard: int) -> frozenset[int]:
        """The offsets of members that several links of a shard lead to."""
        index = self.index()
        if "linked" not in index.notes:
            return frozenset()
        first, last = index.member_start[index.shard_start[shard : shard + 2]]
        offsets, counts = np.unique(index.member_offset[first:last], return_counts=True)
        return frozenset(offsets[counts > 1].tolist())

    def _key_of(self, sample_id: int) -> bytes | None:
        """The key that the header before a member must have; None where it may be that of a link's target."""
        if "linked" in self.index().notes:
            return None
        return self.keys([sample_id])[0].encode("utf-8", "surrogateescape")

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_open_streams", None)
        return state


@dataclass
class _Stream:
    """A shard being read forwards. Its last members stay in memory, as do those at the `shared` offsets."""

    shard: ShardFile
    storage_options: Mapping[str, Any]
    shared: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self._stack = ExitStack()
        self._forward = _Forward(self._stack.enter_context(_decompressed(self.shard, self.storage_options)))
        self._recent: OrderedDict[int, bytes] = OrderedDict()
        self._kept: dict[int, bytes] = {}
        self._kept_bytes = 0

    def can_read(self, offset: int) -> bool:
        """Whether a member's data are in memory, or still to come."""
        return offset in self._recent or offset in self._kept or offset - BLOCK >= self._forward.start

    def read(self, offset: int, size: int, key: bytes | None) -> bytes | None:
        """The data of the member at an offset; None if there is no such member.

        Raises:
            PoolError: the stream cannot be read.
        """
        data = self._recent.get(offset, self._kept.get(offset))
        if data is not None:
            return data
        try:
            content = self._forward.read(offset - BLOCK, BLOCK + size)
        except Exception as error:  # zlib's, zstd's, the command's
            raise _unreadable(self.shard, error) from error
        self._forward.drop()  # the data, of which there is a copy
        header, data = content[:BLOCK], content[BLOCK:]
        if len(data) != size or not is_header(header, size, key):
            return None
        self._recent[offset] = data
        while len(self._recent) > _RECENT:
            self._recent.popitem(last=False)
        if offset in self.shared and self._kept_bytes + size <= _MOST_KEPT:
            self._kept[offset] = data
            self._kept_bytes += size
        return data

    def close(self) -> None:
        self._stack.close()


def _index_stream(shard: ShardFile, storage_options: Mapping[str, Any]) -> ShardIndex:
    """A shard's index, by the headers of its decompressed stream; offsets are those in the stream."""
    with _decompressed(shard, storage_options) as stream:
        forward = _Forward(stream)
        try:
            return index_shard(Source(shard.url, UNKNOWN_SIZE, forward.read, least=64 << 10, most=1 << 20))
        except PoolError:
            raise
        except Exception as error:  # zlib's, zstd's, the command's
            raise _unreadable(shard, error) from error


class _Bytes(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Forward:
    """Reads a stream at offsets that never decrease."""

    def __init__(self, stream: _Bytes) -> None:
        self.stream = stream
        self.start, self.data = 0, b""

    def read(self, offset: int, length: int) -> bytes:
        position = self.start + len(self.data)
        kept = self.data[offset - self.start :] if offset < position else b""
        while position < offset:
            skipped = len(self.stream.read(min(1 << 20, offset - position)))
            if not skipped:
                break
            position += skipped
        pieces = [kept]
        missing = length - len(kept) if position >= offset else 0
        while missing > 0 and (piece := self.stream.read(missing)):
            pieces.append(piece)
            missing -= len(piece)
        self.start, self.data = offset, b"".join(pieces)
        return self.data[:length]

    def drop(self) -> None:
        """Forget what was read, and go on behind it."""
        self.start, self.data = self.start + len(self.data), b""


@contextmanager
def _decompressed(shard: ShardFile, storage_options: Mapping[str, Any]) -> Iterator[_Bytes]:
    """A shard's tar stream."""
    with ExitStack() as stack:
        try:
            if is_pipe(shard.url):
                raw: io.BufferedReader = io.BufferedReader(
                    stack.enter_context(_Command(shard.url[5:])), 1 << 20
                )
            else:
                opened = fsspec.open(shard.url, "rb", **storage_options).open()
                raw = io.BufferedReader(_Readable(stack.enter_context(opened)), 1 << 20)
            magic = raw.peek(6)[:6]
        except ImportError as error:
            raise unreachable(shard.url, error) from error
        except OSError as error:
            raise PoolError(f"{shard.url}: cannot be opened ({error})") from error
        stream: _Bytes = raw
        if magic.startswith(b"\x1f\x8b"):
            stream = stack.enter_context(gzip.GzipFile(fileobj=raw))
        elif magic.startswith(b"BZh"):
            stream = stack.enter_context(bz2.BZ2File(raw))
        elif magic.startswith(b"\xfd7zXZ"):
            stream = stack.enter_context(lzma.LZMAFile(raw))
        elif magic.startswith(b"\x28\xb5\x2f\xfd"):
            try:
                import zstandard
            except ImportError as error:
                raise PoolError(
                    f"{shard.url}: is compressed with zstd; pip install 'curated-data[zstd]'"
                ) from error
            stream = stack.enter_context(
                zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            )
        yield stream


class _Command(io.RawIOBase):
    """The output of a shell command as a raw stream; if it failed, reading its end raises an error."""

    def __init__(self, command: str) -> None:
        self._process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE)
        assert isinstance(self._process.stdout, io.BufferedReader)
        self._output = self._process.stdout

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._output.readinto(buffer)
        if count == 0 and self._process.wait() != 0:
            raise OSError(f"its command ended with exit status {self._process.returncode}")
        return count

    def close(self) -> None:
        if not self.closed:
            self._output.close()  # a command that is still writing gets a signal
            self._process.wait()
        super().close()


class _Readable(io.RawIOBase):
    """Any object with a `read` method, as a raw stream."""

    def __init__(self, stream: _Bytes) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _unreadable(shard: ShardFile, error: Exception) -> PoolError:
    return PoolError(f"{shard.url}: cannot be read to its end ({type(error).__name__}: {error})")


def _in_sequence(shard: ShardFile) -> ShardFile:
    """The same state with another fingerprint, because offsets in its index are those of a stream."""
    return ShardFile(shard.url, shard.size, f"sequential {shard.version}")
