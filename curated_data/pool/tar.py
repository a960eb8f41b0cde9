"""Find the members of a tar archive by its headers alone.

Supports what Python's `tarfile`, and so webdataset, supports: ustar with its prefix field, old V7, PAX
(extended and global) and GNU long names, octal and base-256 sizes. A damaged header or a truncated file,
which `tarfile` ignores silently in a stream, raises an error: a pool must not lose samples unnoticed.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from curated_data.errors import PoolError

log = logging.getLogger(__name__)

BLOCK = 512
_ZEROS = bytes(BLOCK)
_CHUNK = 16_384  # headers verified at once: 8 MiB
_LONGEST_EXTENSION = 1 << 20  # bytes of an extended header; real ones are far shorter
_REGULAR = frozenset(b"0\x007")
_WITHOUT_DATA = frozenset(b"123456")  # links, devices, folders, pipes: no data, whatever their size field
_PAX_RECORD = re.compile(rb"(\d+) ([^=]+)=")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


class Members(NamedTuple):
    """Regular files of an archive, in order: their raw names, offsets and sizes."""

    names: list[bytes]
    offsets: list[int]
    sizes: list[int]


class Source(NamedTuple):
    """An archive that can be read at any offset.

    `read(offset, length)` returns fewer bytes only at the end. Headers are read in windows of `least` bytes,
    which grow up to `most` where members are small.
    """

    name: str
    size: int
    read: Callable[[int, int], bytes]
    least: int = 4 << 10
    most: int = 256 << 10


def local_source(path: str | Path, handle: int) -> Source:
    """An open file as a `Source`."""
    return Source(
        str(path), os.fstat(handle).st_size, lambda offset, length: os.pread(handle, length, offset)
    )


def read_members(source: Source) -> Iterator[Members]:
    """Yield the regular members of an archive in blocks, after verifying the checksums of their headers.

    Raises:
        PoolError: not a tar, compressed, damaged or truncated (with the offset), or a sparse member.
    """
    window = _Window(source)
    _check_start(source, window)
    names, offsets, sizes = [], [], []
    headers: list[bytes] = []
    starts: list[int] = []
    shared: dict[bytes, bytes] = {}  # PAX global records
    position = 0
    ended = False
    while not ended:
        try:
            while len(headers) < _CHUNK:
                if position >= source.size:
                    ended = _ends_without_marker(source, position)
                    break
                header = window.get(position, BLOCK)
                kind = header[156]
                # The usual member: a file, its size in octal digits with one terminator.
                if (
                    (kind == 0x30 or kind == 0)
                    and header[124] < 0x80
                    and (header[135] == 0 or header[135] == 0x20)
                ):
                    if kind == 0 and header == _ZEROS:
                        _warn_of_rest(source, window, position)
                        ended = True
                        break
                    size = int(header[124:135].partition(b"\0")[0].strip() or b"0", 8)
                    if not shared:
                        headers.append(header)
                        starts.append(position)
                        name = header[:100].partition(b"\0")[0]
                        if kind == 0 and name.endswith(b"/"):  # a folder, in old archives
                            position += BLOCK
                            continue
                        if size < 0 or position + BLOCK + size > source.size:
                            raise _truncated(source, header, position, size)
                        if header[345]:
                            name = header[345:500].partition(b"\0")[0] + b"/" + name
                        names.append(name)
                        offsets.append(position + BLOCK)
                        sizes.append(size)
                        position += BLOCK + (size + 511 & -512)
                        continue
                found, position = _read_odd(source, window, position, shared, headers, starts)
                if found is not None:
                    names.append(found[0])
                    offsets.append(found[1])
                    sizes.append(found[2])
        except (PoolError, ValueError) as error:
            _verify(source, headers, starts)  # report the first damage, not what followed from it
            if isinstance(error, PoolError):
                raise
            raise PoolError(
                f"{source.name}: no readable tar header at offset {position} ({error})"
            ) from error
        _verify(source, headers, starts)
        yield Members(names, offsets, sizes)
        names, offsets, sizes = [], [], []
        headers.clear()
        starts.clear()


class _Window:
    """A part of the archive in memory, longer where headers are close together."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.start = 0
        self.data = b""
        self.length = source.least

    def get(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`.

        Raises:
            PoolError: the archive ends before them.
        """
        at = offset - self.start
        if at < 0 or at + length > len(self.data):
            if offset + length > self.source.size:
                raise PoolError(
                    f"{self.source.name}: truncated: a header at offset {offset} needs {length} bytes, "
                    f"the archive ends at {self.source.size}; copy it again"
                )
            near = 0 <= at <= len(self.data) + self.length
            self.length = min(self.length * 2, self.source.most) if near else self.source.least
            self.data = self.source.read(offset, max(length, self.length))
            self.start, at = offset, 0
            if len(self.data) < length:
                raise PoolError(
                    f"{self.source.name}: truncated: {len(self.data)} of {length} bytes at offset {offset}; "
                    "was it changed just now?"
                )
        return self.data[at : at + length]


def _read_odd(
    source: Source,
    window: _Window,
    position: int,
    shared: dict[bytes, bytes],
    headers: list[bytes],
    starts: list[int],
) -> tuple[tuple[bytes, int, int] | None, int]:
    """One member of any kind, and its extended headers: (name, offset, size) or None; the next position."""
    extensions: list[tuple[int, bytes]] = []
    first = position
    while True:
        if position >= source.size or (header := window.get(position, BLOCK)) == _ZEROS:
            raise PoolError(
                f"{source.name}: the extended header at offset {first} belongs to no member; damaged"
            )
        headers.append(header)
        starts.append(position)
        kind, size = header[156], _number(header[124:136])
        if size < 0:
            raise PoolError(f"{source.name}: negative member size at offset {position}; damaged")
        if kind not in b"xgXLK":
            break
        if size > _LONGEST_EXTENSION:
            raise PoolError(f"{source.name}: extended header of {size} bytes at offset {position}; damaged")
        payload = window.get(position + BLOCK, size)
        if kind == ord("g"):
            shared.update(_pax_records(payload))
        else:
            extensions.append((kind, payload))
        position += BLOCK + (size + 511 & -512)

    name = header[:100].partition(b"\0")[0]
    is_file = kind in _REGULAR and not (kind == 0 and name.endswith(b"/"))
    has_data = kind not in _WITHOUT_DATA and (is_file or kind != 0)
    if header[345] and kind != ord("S"):
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    name = shared.get(b"path", name)
    for extension, payload in reversed(extensions):  # the outermost takes precedence
        if extension == ord("L"):
            name = payload.partition(b"\0")[0]
        elif extension != ord("K"):
            records = shared | _pax_records(payload)
            name = records.get(b"path", name)
            size = int(records.get(b"size", size))
            if any(record.startswith(b"GNU.sparse") for record in records):
                kind = ord("S")
    if kind == ord("S"):
        raise PoolError(
            f"{source.name}: member {_shown(name)} at offset {position} is stored as a sparse file, whose "
            "bytes do not lie in one piece; write the archive without --sparse"
        )
    if has_data and position + BLOCK + size > source.size:
        raise _truncated(source, header, position, size)
    after = position + BLOCK + (size + 511 & -512 if has_data else 0)
    return ((name, position + BLOCK, size) if is_file else None), after


def _pax_records(payload: bytes) -> dict[bytes, bytes]:
    """The records of a PAX header that concern a member's name and size."""
    if b" path=" not in payload and b" size=" not in payload and b" GNU.sparse" not in payload:
        return {}
    records: dict[bytes, bytes] = {}
    at = 0
    while match := _PAX_RECORD.match(payload, at):
        length = int(match.group(1))
        if length == 0:
            raise ValueError("a PAX record of length 0")
        key = match.group(2)
        if key == b"path":
            records[key] = payload[match.end() : at + length - 1].rstrip(b"/")
        elif key == b"size" or key.startswith(b"GNU.sparse"):
            records[key] = payload[match.end() : at + length - 1]
        at += length
    return records


def _number(field: bytes) -> int:
    """A number in a header: octal digits, or base 256 after a marker byte."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    if field[0] == 0xFF:
        return int.from_bytes(field, "big", signed=True)
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _verify(source: Source, headers: list[bytes], starts: list[int]) -> None:
    """Verify the checksums of all headers at once; the checksum field itself counts as eight spaces."""
    if not headers:
        return
    table = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, BLOCK)
    # Byte sums of 8-byte words by two masks: much faster than summing bytes along the short axis.
    words = table.view(np.uint64)
    low = np.uint64(0x00FF00FF00FF00FF)
    pairs = (words & low) + ((words >> np.uint64(8)) & low)  # four 16-bit sums per word, each below 2^9
    total = pairs.sum(1)  # 64 of them stay below 2^15: no carry between the lanes
    unsigned = total.view(np.uint16).reshape(-1, 4).sum(1, dtype=np.int64)
    unsigned -= table[:, 148:156].sum(1, dtype=np.int64) - 8 * 0x20
    digits = table[:, 148:154].astype(np.int64) - ord("0")  # nearly always six octal digits
    usual = ((digits >= 0) & (digits < 8)).all(1) & ((digits @ (8 ** np.arange(5, -1, -1))) == unsigned)
    for row in np.flatnonzero(~usual).tolist():
        try:
            written = _number(headers[row][148:156])
        except ValueError:
            written = -1
        if written not in (int(unsigned[row]), _signed_checksum(headers[row])):
            raise PoolError(
                f"{source.name}: no tar header at offset {starts[row]} (its checksum does not match): the "
                "archive is damaged there, or what came before it was; copy it again or write it anew"
            )


def _signed_checksum(header: bytes) -> int:
    """The checksum of some historic writers, over signed bytes."""
    signed = np.frombuffer(header, np.int8).sum(dtype=np.int64)
    return int(signed - np.frombuffer(header[148:156], np.int8).sum(dtype=np.int64)) + 8 * 0x20


def _check_start(source: Source, window: _Window) -> None:
    """Raise an error that says what the file is, if it cannot be an archive that we can index."""
    if source.size == 0:
        raise PoolError(f"{source.name}: is an empty file, not a tar archive")
    start = window.get(0, min(BLOCK, source.size))
    for magic, compression in _COMPRESSED.items():
        if start.startswith(magic):
            raise PoolError(
                f"{source.name}: is compressed ({compression}), so its members cannot be read at offsets; "
                "unpack it to a plain .tar, or read it in sequence with "
                "curated_data.pool.sequential.SequentialPool"
            )
    if len(start) < BLOCK:
        raise PoolError(f"{source.name}: not a tar archive: {source.size} bytes, a header alone has {BLOCK}")
    if start != _ZEROS:
        try:
            _verify(source, [start], [0])
        except PoolError:
            raise PoolError(
                f"{source.name}: not a tar archive (no header at offset 0; starts {start[:16]!r})"
            ) from None


def _truncated(source: Source, header: bytes, position: int, size: int) -> PoolError:
    return PoolError(
        f"{source.name}: truncated: member {_shown(header[:100].partition(bytes(1))[0])} at offset "
        f"{position} has {size} bytes and ends at {position + BLOCK + size}, the archive at {source.size}; "
        "copy it again"
    )


def _ends_without_marker(source: Source, position: int) -> bool:
    """The last member's data reach the end. The archive may be complete, or cut exactly there."""
    log.warning(
        "%s: ends at offset %d without the end-of-archive marker; is it whole?", source.name, position
    )
    return True


def _warn_of_rest(source: Source, window: _Window, position: int) -> None:
    """Warn of data after the end: every reader of concatenated archives stops after the first one."""
    length = min(64 << 10, source.size - position)
    at = position - window.start
    has_all = at + length <= len(window.data)  # often, which saves a remote shard a request
    rest = window.data[at : at + length] if has_all else source.read(position, length)
    if rest.count(0) != len(rest):
        log.warning(
            "%s: what follows the end-of-archive marker at offset %d is ignored", source.name, position
        )


def _shown(name: bytes) -> str:
    return repr(name.decode("utf-8", "surrogateescape"))
