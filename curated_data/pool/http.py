"""Reading files from HTTP servers that may be slow, broken or hostile.

No answer is read beyond the bytes that were asked for, an answer that is not to the question is an error, and
so is silence, but not a long download.
"""

import asyncio
import contextlib
import html
import re
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urljoin

from curated_data.pool.shard import ShardFile

_LEAST = 4 << 10  # bytes that must come within the time that counts as silence, so that a trickle ends, too
_SKIPPED = 8 << 20  # bytes to read in vain at most, where a server sends the whole file for a range
_PAGE = 32 << 20  # bytes of a folder's page at most: of 100,000 shards it has about ten million
_LINK = re.compile(r"""<a\s[^>]{0,1000}?href\s{0,9}=\s{0,9}["']?([^"'\s>]{1,4000})""", re.IGNORECASE)
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class OtherSizeError(OSError):
    """The server says that the file has another size than it had when it was indexed."""


async def read_range(
    filesystem: Any, path: str, shard: ShardFile, start: int, stop: int, silence: float
) -> tuple[bytes, bool | None]:
    """The bytes from `start` to `stop`, and whether they are of the indexed version; None if unknown.

    Args:
        filesystem: fsspec's, of HTTP.
        path: of the file in it.
        shard: as it was indexed.
        start, stop: the range.
        silence: seconds after which a server that sends next to nothing has failed.

    Raises:
        OtherSizeError: the file has another size by now.
        OSError: the answer is not to the question, or too slow, too short or too long.
    """
    async with _answer(filesystem, path, silence, start, stop) as response:
        _check(response, shard)
        if response.status == 206:
            total = _range_of(response, start, stop)
            if total is not None and total != shard.size:
                raise OtherSizeError(f"answers with a range of {total} bytes in all, not of {shard.size}")
            _check_length(response, stop - start)
            data = b"".join([piece async for piece in _body(response, stop - start, silence)])
        else:
            if (length := _length(response)) is not None and length != shard.size:
                raise OtherSizeError(f"answers with {length} bytes, the file had {shard.size}")
            if stop > max(_SKIPPED, 2 * (stop - start)):
                raise OSError(
                    "answers with the whole file instead of a range; pass RemoteOptions(access='shards')"
                )
            found, skipped = bytearray(), 0
            async for piece in _body(response, shard.size, silence):
                found += piece[max(0, start - skipped) :]
                skipped += len(piece)
                if skipped >= stop:
                    break
            data = bytes(found[: stop - start])
        etag = response.headers.get("ETag")
        return data, None if etag is None else etag == shard.version


async def read_whole(
    filesystem: Any, path: str, shard: ShardFile, write: Callable[[bytes], Any], silence: float
) -> bool | None:
    """Hand the whole file to `write`, in pieces; returns whether it is of the indexed version.

    Raises:
        OtherSizeError, OSError: as for `read_range`. It may then have been handed over in part.
    """
    async with _answer(filesystem, path, silence) as response:
        _check(response, shard)
        if response.status != 200:
            raise OSError(f"answers with status {response.status} to a request for the whole file")
        if (length := _length(response)) is not None and length != shard.size:
            raise OtherSizeError(f"answers with {length} bytes, the file had {shard.size}")
        async for piece in _body(response, shard.size, silence):
            write(piece)
        etag = response.headers.get("ETag")
        return None if etag is None else etag == shard.version


async def has_ranges(filesystem: Any, path: str, silence: float) -> bool:
    """Whether a server answers a request for two bytes with these.

    Not for one: some servers take `bytes=0-0` for a request without a range.
    """
    async with _answer(filesystem, path, silence, 0, 2) as response:
        if response.status == 404:
            raise FileNotFoundError(path)
        if response.status >= 500:
            response.raise_for_status()
        try:
            if response.status != 206:
                return False
            _range_of(response, 0, 2)
            _check_length(response, 2)
            return sum([len(piece) async for piece in _body(response, 2, silence)]) == 2
        except OSError:
            return False


async def first_bytes(filesystem: Any, path: str, silence: float) -> bytes:
    """Some of the first bytes of a file, to see what it is."""
    async with _answer(filesystem, path, silence, 0, 512) as response:
        response.raise_for_status()
        async for piece in _body(response, 1 << 62, silence):
            return bytes(piece[:512])
    return b""


async def links(filesystem: Any, path: str, silence: float) -> list[str]:
    """The addresses that a page of HTML links to, made absolute.

    Raises:
        OSError: the page is too long, or comes too slowly.
    """
    async with _answer(filesystem, path, silence) as response:
        if response.status == 404:
            return []
        response.raise_for_status()
        page = b"".join([piece async for piece in _body(response, _PAGE, silence)]).decode("utf-8", "ignore")
    return [urljoin(path, html.unescape(link)) for link in _LINK.findall(page)]


@contextlib.asynccontextmanager
async def _answer(
    filesystem: Any, path: str, silence: float, start: int = 0, stop: int | None = None
) -> AsyncIterator[Any]:
    """The answer to a GET request, its headers complete, its body as the server sends it."""
    import aiohttp

    session = await filesystem.set_session()
    options = dict(filesystem.kwargs)
    headers = {**(options.pop("headers", None) or {}), "Accept-Encoding": "identity"}
    if stop is not None:
        headers["Range"] = f"bytes={start}-{stop - 1}"
    if "timeout" not in filesystem.client_kwargs:
        options.setdefault("timeout", aiohttp.ClientTimeout(total=None, sock_read=silence))
    options.setdefault("auto_decompress", False)  # nothing was to be compressed: a few bytes may be a bomb
    try:
        async with asyncio.timeout(silence):
            response = await session.get(filesystem.encode_url(path), headers=headers, **options)
    except TimeoutError as error:
        raise OSError(f"no answer in {silence:g} s") from error
    try:
        yield response
    finally:
        if response.content.at_eof():
            response.release()
        else:
            response.close()  # a server told to send no more may never stop


def _check(response: Any, shard: ShardFile) -> None:
    if response.status == 404:
        raise FileNotFoundError(shard.url)
    response.raise_for_status()
    if response.status not in (200, 206):
        raise OSError(f"answers with status {response.status}")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() not in ("identity", ""):
        raise OSError(f"answers in the encoding {encoding[:40]!r}, although plain bytes were requested")
    if response.status == 200 and response.headers.get("Content-Type", "").startswith("text/html"):
        raise OSError("answers with a web page (text/html)")


def _range_of(response: Any, start: int, stop: int) -> int | None:
    """The size of the whole file by an answer with a range, which must be the one that was asked for."""
    header = response.headers.get("Content-Range", "")
    found = _RANGE.fullmatch(header.strip())
    if not found or (int(found[1]), int(found[2])) != (start, stop - 1):
        raise OSError(f"answers with the range {header[:60]!r} to a request for bytes {start}-{stop - 1}")
    return None if found[3] == "*" else int(found[3])


def _length(response: Any) -> int | None:
    header = response.headers.get("Content-Length", "")
    return int(header) if header.isdecimal() else None


def _check_length(response: Any, expected: int) -> None:
    length = _length(response)
    if length is not None and length != expected:
        raise OSError(f"answers with {length} bytes to a request for {expected}")


async def _body(response: Any, most: int, silence: float) -> AsyncIterator[bytes]:
    """The body in pieces, of at most `most` bytes in all.

    Raises:
        OSError: there are more, or they come too slowly.
    """
    got, ended = 0, False
    while not ended:
        piece = b""
        try:
            async with asyncio.timeout(silence):
                while len(piece) < _LEAST and not ended:
                    some = await response.content.readany()
                    ended = not some
                    piece += some
        except TimeoutError as error:
            raise OSError(f"sent only {len(piece)} bytes in {silence:g} s") from error
        got += len(piece)
        if got > most:
            raise OSError(f"sends more than the {most} bytes asked for")
        yield piece
