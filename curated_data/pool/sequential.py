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
from webdataset.tariterators import group_by_keys, tar_file_expander

from curated_data.errors import PoolError
from curated_data.pool.build import Indexer
from curated_data.pool.index import ShardIndex, index_shard
from curated_data.pool.shards import ShardPool
from curated_data.pool.storage import ShardFile, stat_shards
from curated_data.pool.tar import Source
from curated_data.pool.urls import is_pipe, unreachable

log = logging.getLogger(__name__)

_OPEN_STREAMS = 4
_UNKNOWN_SIZE = 1 << 62


class SequentialPool(ShardPool):
    """A pool of compressed shards (`.tar.gz`, `.tar.zst`, …) or pipes, with the interface of `ShardPool`.

    Such a shard can only be read from its start: indexing reads it completely, and reading a sample reads all
    that precede it. Reading in the order of the ids costs one pass per shard, because streams stay open where
    the last read ended. Samples come through webdataset's own pipeline, which stops silently at a damaged
    header; the index notices that.

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
        found: list[bytes] = []
        names = self.index().extensions
        wanted = list(zip(members.owner.tolist(), members.extension.tolist()))
        samples = {
            row: self._sample(int(shard[row]), int(ids[row])) for row in sorted({row for row, _ in wanted})
        }
        for row, extension in wanted:
            found.append(samples[row][names[extension]])
        self._reader.counters.n_members += len(found)
        self._reader.counters.bytes_needed += sum(map(len, found))
        return found

    def _sample(self, shard: int, sample_id: int) -> dict[str, Any]:
        """One sample, from an open stream that has not passed it, or from a new stream."""
        place = sample_id - int(self.shard_ranges()[shard])
        stream = self._streams.get(shard)
        if stream is None or stream.place > place:
            if stream is not None:
                self._streams.pop(shard).close()
            while len(self._streams) >= _OPEN_STREAMS:
                self._streams.popitem(last=False)[1].close()
            stream = self._streams[shard] = _Stream(self.shards[shard], self.storage_options)
        self._streams.move_to_end(shard)
        sample = stream.skip_to(place)
        if sample is None or sample["__key__"] != self.keys([sample_id])[0]:
            raise PoolError(
                f"{self.urls[shard]}: changed since it was indexed: sample {place} is another or missing"
            )
        return sample

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_open_streams", None)
        return state


@dataclass
class _Stream:
    """A shard being read; `place` is the number of the current sample, -1 before the first."""

    shard: ShardFile
    storage_options: Mapping[str, Any]
    place: int = -1

    def __post_init__(self) -> None:
        self._stack = ExitStack()
        self._samples = self._stack.enter_context(_samples(self.shard, self.storage_options))
        self._sample: dict[str, Any] | None = None

    def skip_to(self, place: int) -> dict[str, Any] | None:
        while self.place < place:
            self._sample = _next(self._samples, self.shard)
            self.place += 1
            if self._sample is None:
                break
        return self._sample

    def close(self) -> None:
        self._stack.close()


def _index_stream(shard: ShardFile, storage_options: Mapping[str, Any]) -> ShardIndex:
    """A shard's index, by the headers of its decompressed stream; offsets are those in the stream."""
    with _decompressed(shard, storage_options) as stream:
        forward = _Forward(stream)
        try:
            return index_shard(Source(shard.url, _UNKNOWN_SIZE, forward.read, least=64 << 10, most=1 << 20))
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


@contextmanager
def _samples(shard: ShardFile, storage_options: Mapping[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
    """A shard's samples, as webdataset reads them."""
    with _decompressed(shard, storage_options) as stream:
        yield group_by_keys(tar_file_expander([{"url": shard.url, "stream": stream}]))


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


def _next(samples: Iterator[dict[str, Any]], shard: ShardFile) -> dict[str, Any] | None:
    try:
        return next(samples, None)
    except Exception as error:  # tarfile's, zlib's, zstd's, the command's
        raise _unreadable(shard, error) from error


def _unreadable(shard: ShardFile, error: Exception) -> PoolError:
    reason = error.args[0] if error.args else ""  # webdataset appends streams to the arguments
    return PoolError(f"{shard.url}: cannot be read to its end ({type(error).__name__}: {reason})")


def _in_sequence(shard: ShardFile) -> ShardFile:
    """The same state with another fingerprint, because offsets in its index are those of a stream."""
    return ShardFile(shard.url, shard.size, f"sequential {shard.version}")
