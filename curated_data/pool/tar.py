"""Find the members of a tar archive by its headers alone.

Supports what Python's `tarfile`, and so webdataset, supports: ustar with its prefix field, old V7, PAX
(extended and global) and GNU long names, octal and base-256 sizes; links are found too, with their targets. A
damaged header or a truncated file, which `tarfile` ignores silently in a stream, raises an error, and what
follows the end-of-archive marker is counted: a pool must not lose samples unnoticed. Only the headers have
checksums, so damage within a member's data cannot be seen here.
"""

import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from curated_data.errors import PoolError
from curated_data.pool.notes import Notes, add_note

BLOCK = 512
_ZEROS = bytes(BLOCK)
_CHUNK = 16_384  # headers verified at once: 8 MiB
_LONGEST_EXTENSION = 1 << 20  # bytes of the extended headers of a member; real ones are far shorter
_MOST_EXTENSIONS = 64  # in a row
_LONGEST_PADDING = 10_240 + BLOCK  # of zeros at the end, by which tar fills records of 20 blocks
_REGULAR = frozenset(b"0\x007")
_WITHOUT_DATA = frozenset(b"123456")  # links, devices, folders, pipes: no data, whatever their size field
_HARD_LINK, _SYMBOLIC_LINK, _FOLDER = b"125"
_PAX_RECORD = re.compile(rb"([1-9]\d{0,6}) ([^=]+)=")
_COMPRESSED = {  # how such files begin; `BZh` alone may begin a member's name
    "gzip": re.compile(rb"\x1f\x8b"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f][*]M\x18"),
}


class Link(NamedTuple):
    """A member that is a link: its place among the members of its block, and what it points at."""

    place: int
    target: bytes
    is_symbolic: bool


class Members(NamedTuple):
    """Regular files and links of an archive, in order: their raw names, offsets and sizes.

    Links have no data: the offset is that of their own header's end, the size 0.
    """

    names: list[bytes]
    offsets: list[int]
    sizes: list[int]
    links: list[Link]


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

    def read(offset: int, length: int) -> bytes:
        try:
            return os.pread(handle, length, offset)
        except OSError as error:
            raise PoolError(
                f"{path}: cannot be read at offset {offset} ({error.strerror}); check the disk, or copy the "
                "shard again"
            ) from error

    return Source(str(path), os.fstat(handle).st_size, read)


def read_members(source: Source, notes: Notes | None = None) -> Iterator[Members]:
    """Yield the files and links of an archive in blocks, after verifying the checksums of their headers.

    Args:
        notes: take what is odd, such as data after the end-of-archive marker.

    Raises:
        PoolError: not a tar, compressed, damaged or truncated (with the offset), a sparse member, or extended
            headers that are longer than any real ones.
    """
    notes = {} if notes is None else notes
    window = _Window(source)
    _check_start(source, window)
    names, offsets, sizes, links = [], [], [], []
    headers: list[bytes] = []
    starts: list[int] = []
    shared: dict[bytes, bytes] = {}  # PAX global records
    position = 0
    ended = False
    while not ended:
        try:
            while len(headers) < _CHUNK:
                if position >= source.size:
                    add_note(notes, "unmarked", 1, f"at offset {position}")
                    ended = True
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
                        _look_behind(source, window, position, notes)
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
                if found.is_left_out:
                    add_note(notes, "special", 1, f"{_shown(found.name)} at offset {found.offset - BLOCK}")
                elif found.kind != _FOLDER:
                    if found.kind in (_HARD_LINK, _SYMBOLIC_LINK):
                        links.append(Link(len(names), found.target, found.kind == _SYMBOLIC_LINK))
                    names.append(found.name)
                    offsets.append(found.offset)
                    sizes.append(found.size)
        except (PoolError, ValueError) as error:
            _verify(source, headers, starts)  # report the first damage, not what followed from it
            if isinstance(error, PoolError):
                raise
            raise PoolError(
                f"{source.name}: no readable tar header at offset {position} ({error})"
            ) from error
        _verify(source, headers, starts)
        yield Members(names, offsets, sizes, links)
        names, offsets, sizes, links = [], [], [], []
        headers.clear()
        starts.clear()


def compression_of(start: bytes) -> str | None:
    """The compression of a file that begins so; None for a plain one."""
    return next((name for name, pattern in _COMPRESSED.items() if pattern.match(start)), None)


class _Window:
    """A part of the archive in memory, longer where headers are close together."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.start = 0
        self.data = b""
        self.length = source.least

    def held(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset` if all of them are in memory, otherwise none."""
        at = offset - self.start
        return self.data[at : at + length] if at >= 0 and at + length <= len(self.data) else b""

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
                    "was it just changed?"
                )
        return self.data[at : at + length]


class _Odd(NamedTuple):
    """A member of any kind; the kind of a file is `0`."""

    kind: int
    name: bytes
    target: bytes  # of a link
    offset: int  # of its data
    size: int

    @property
    def is_left_out(self) -> bool:
        """Whether it is neither a file, a link nor a folder."""
        return self.kind not in (ord("0"), _HARD_LINK, _SYMBOLIC_LINK, _FOLDER)


def _read_odd(
    source: Source,
    window: _Window,
    position: int,
    shared: dict[bytes, bytes],
    headers: list[bytes],
    starts: list[int],
) -> tuple[_Odd, int]:
    """One member of any kind, and its extended headers; also the next position."""
    extensions: list[tuple[int, bytes]] = []
    first = position
    while True:
        if position >= source.size or (header := window.get(position, BLOCK)) == _ZEROS:
            raise PoolError(
                f"{source.name}: the extended header at offset {first} belongs to no member: damaged"
            )
        headers.append(header)
        starts.append(position)
        kind, size = header[156], _number(header[124:136])
        if size < 0:
            raise PoolError(f"{source.name}: negative member size at offset {position}; damaged")
        if kind not in b"xgXLK":
            break
        if position + size - first > _LONGEST_EXTENSION or len(extensions) == _MOST_EXTENSIONS:
            raise PoolError(
                f"{source.name}: the extended headers at offset {first} have {len(extensions) + 1} parts and "
                f"{position + size - first} bytes, more than {_MOST_EXTENSIONS} or {_LONGEST_EXTENSION}; "
                "damaged, or crafted to be slow: write the archive again"
            )
        extensions.append((kind, window.get(position + BLOCK, size)))
        position += BLOCK + (size + 511 & -512)

    name, target = (header[start : start + 100].partition(b"\0")[0] for start in (0, 157))
    is_file = kind in _REGULAR and not (kind == 0 and name.endswith(b"/"))
    has_data = kind not in _WITHOUT_DATA and (is_file or kind != 0)
    if header[345] and kind != ord("S"):
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    own: dict[bytes, bytes] = {}
    for extension, payload in reversed(extensions):  # the outermost takes precedence
        if extension in b"LK":
            own[b"path" if extension == ord("L") else b"linkpath"] = _long_name(payload)
        elif extension != ord("g"):
            own |= _pax_records(payload)
    for extension, payload in extensions:
        if extension == ord("g"):
            shared |= _pax_records(payload)
    name = own.get(b"path", shared.get(b"path", name))
    target = own.get(b"linkpath", shared.get(b"linkpath", target))
    if b"size" in own or (extensions and b"size" in shared):
        size = int(own.get(b"size", shared.get(b"size", b"")))
    if kind == ord("S") or b"GNU.sparse" in own or b"GNU.sparse" in shared:
        raise PoolError(
            f"{source.name}: member {_shown(name)} at offset {position} is stored as a sparse file, whose "
            "bytes do not lie in one piece; write the archive without --sparse"
        )
    if has_data and position + BLOCK + size > source.size:
        raise _truncated(source, header, position, size)
    after = position + BLOCK + (size + 511 & -512 if has_data else 0)
    if is_file:
        kind = ord("0")
    elif kind == 0:  # a folder, in old archives
        kind = _FOLDER
    return _Odd(kind, name, target, position + BLOCK, size if is_file else 0), after


def _pax_records(payload: bytes) -> dict[bytes, bytes]:
    """The records of a PAX header that concern a member's name, target and size.

    Raises:
        ValueError: the records do not fill the header, as where part of it was overwritten.
    """
    is_whole = b"\0" not in payload and payload[-1:] in (b"\n", b"")
    if is_whole and not any(key in payload for key in (b"path=", b" size=", b" GNU.sparse")):
        return {}
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(payload):
        match = _PAX_RECORD.match(payload, at)
        end = at + int(match.group(1)) if match else 0
        if match is None or not match.end() < end <= len(payload) or payload[end - 1] != ord("\n"):
            raise ValueError(f"byte {at} of its extended header begins no PAX record")
        key, value = match.group(2), payload[match.end() : end - 1]
        if key == b"path":
            records[key] = value.rstrip(b"/")
        elif key == b"linkpath":
            records[key] = value
        elif key == b"size":
            if not value.isdigit() or len(value) > 19:
                raise ValueError(f"a PAX size of {value[:40]!r}")
            records[key] = value
        elif key.startswith(b"GNU.sparse"):
            records[b"GNU.sparse"] = b""
        at = end
    return records


def _long_name(payload: bytes) -> bytes:
    """The name in a GNU header for long ones, which ends in one zero at most, or is filled up to a block."""
    name = payload.partition(b"\0")[0]
    rest = len(payload) - len(name)
    if payload.count(0) != rest or (rest > 1 and len(payload) % BLOCK) or not name:
        raise ValueError(f"a long name of {len(payload)} bytes of which only {len(name)} come before a zero")
    return name


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
                "archive is damaged there, or before it; copy it again, or write it again"
            )


def _checksums(header: bytes) -> tuple[int, int]:
    """The checksums that a header may have."""
    return sum(header) - sum(header[148:156]) + 8 * 0x20, _signed_checksum(header)


def _signed_checksum(header: bytes) -> int:
    """The checksum of some historic writers, over signed bytes."""
    signed = np.frombuffer(header, np.int8).sum(dtype=np.int64)
    return int(signed - np.frombuffer(header[148:156], np.int8).sum(dtype=np.int64)) + 8 * 0x20


def _check_start(source: Source, window: _Window) -> None:
    """Raise an error that says what the file is, if it cannot be an archive that we can index."""
    if source.size == 0:
        raise PoolError(f"{source.name}: is an empty file, not a tar archive")
    start = window.get(0, min(BLOCK, source.size))
    compression = compression_of(start)
    if compression is not None:
        raise PoolError(
            f"{source.name}: is compressed ({compression}), so its members cannot be read at offsets; repack "
            f"it: `curated-data import {shlex.quote(source.name)} NEW`"
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


def _look_behind(source: Source, window: _Window, position: int, notes: Notes) -> None:
    """Note what follows the end-of-archive marker, after which all readers stop: zeros, or lost members.

    Reads on to the end, which is nearly always a few kilobytes away.
    """
    at, length = position, 64 << 10
    first = None  # where something else than zeros is
    n_lost, example = 0, b""
    while at < source.size:
        data = window.held(at, min(length, source.size - at))  # often, which saves a remote shard a request
        data = data or source.read(at, min(length, source.size - at))
        if not data:
            break
        if first is None and data.count(0) != len(data):
            first = at + len(data) - len(data.lstrip(b"\0"))
        if first is not None:
            lost = _headers_among(data)
            n_lost, example = n_lost + len(lost), example or (lost[0] if lost else b"")
        at, length = at + len(data), min(4 * length, 8 << 20)
    if first is not None:
        where = f"zeros from offset {position} on, data again from {first} on"
        add_note(notes, "cut", n_lost, where + (f", as member {_shown(example)}" if example else ""))
    elif at - position > _LONGEST_PADDING:
        add_note(notes, "zeros", 1, f"{at - position} bytes of zeros from offset {position} on")


def _headers_among(data: bytes) -> list[bytes]:
    """The names of the files whose headers are among blocks of an archive."""
    table = np.frombuffer(data, np.uint8, len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)
    found = []
    for row in np.flatnonzero((table[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all(1)).tolist():
        header = table[row].tobytes()
        try:
            is_valid = _number(header[148:156]) in _checksums(header)
        except ValueError:
            continue
        if is_valid and header[156] in _REGULAR:
            found.append(header[:100].partition(b"\0")[0])
    return found


def _shown(name: bytes) -> str:
    return repr(name.decode("utf-8", "surrogateescape"))
