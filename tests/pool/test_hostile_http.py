"""HTTP servers that are slow, broken or hostile: the right bytes, or one short error that names the shard,
after bounded bytes and time.
"""

import gzip
import os
import re
import socket
import threading
import time
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("aiohttp")

from curated_data.errors import CacheError, CuratedDataError, PoolError
from curated_data.pool import RemoteOptions, ShardPool
from curated_data.pool.shard import ShardFile
from curated_data.pool.shard_cache import ShardCache
from tests.support.images import write_samples

QUICK = {"attempts": 2, "backoff": 0.01, "silence": 0.5}
MOST = 64 << 20  # bytes that a server sends at most, so that a test that fails ends


class Hostile:
    """A server on this machine whose answers to GET are made by a function of (data, start, stop).

    It returns the raw answer as an iterator of pieces, after which the connection is closed. HEAD is answered
    honestly, and GET too while `honest` is set.
    """

    def __init__(self, data, answer=None, port=0):
        self.data, self.answer, self.honest = data, answer, answer is None
        self.requests, self.sent = Counter(), 0
        self.headers, self.more, self.look = [], {}, None
        self.listener = socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/p.tar"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.handle, args=(connection,), daemon=True).start()

    def handle(self, connection):
        with connection:
            connection.settimeout(10)
            request = b""
            while b"\r\n\r\n" not in request:
                piece = connection.recv(65536)
                if not piece:
                    return
                request += piece
            text = request.decode("latin-1")
            self.headers.append(text)
            method = text.split(" ")[0]
            self.requests[method] += 1
            asked = re.search(r"range: bytes=(\d+)-(\d+)", text, re.IGNORECASE)
            start, stop = (int(asked[1]), int(asked[2]) + 1) if asked else (0, len(self.data))
            if method == "HEAD":
                known = [head(200, len(self.data), **self.more)]
                pieces = self.look() if self.look else known
            elif self.honest:
                pieces = honest(self.data, start, stop) if asked else whole(self.data, start, stop)
            else:
                pieces = self.answer(self.data, start, stop)
            sent = 0
            try:
                for piece in pieces:
                    connection.sendall(piece)
                    sent += len(piece)
                    self.sent += len(piece)
                    if sent > MOST:
                        return
            except OSError:
                return  # who asked has seen enough

    def close(self):
        self.listener.close()


def head(status, length=None, **headers):
    lines = [f"HTTP/1.1 {status} X", 'ETag: "v1"', "Connection: close"]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def span(start, stop, total):
    return f"bytes {start}-{stop - 1}/{total}"


def honest(data, start, stop):
    stop = min(stop, len(data))
    return [head(206, stop - start, Content_Range=span(start, stop, len(data))), data[start:stop]]


def whole(data, start, stop):
    return [head(200, len(data)), data]


def endless(first):
    yield first
    while True:
        yield bytes(1 << 16)


def chunks(first):
    yield first
    while True:
        yield b"10000\r\n" + bytes(1 << 16) + b"\r\n"


def trickle(first, step=0.1):
    yield first
    for _ in range(200):
        time.sleep(step)
        yield b"x"


def silent(first):
    yield first
    time.sleep(20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("hostile"), np.random.default_rng(0)
    write_samples(folder / "p-%d.tar", ({"bin": rng.bytes(4000)} for _ in range(40)))
    return folder


@pytest.fixture
def data(folder):
    return (folder / "p-0.tar").read_bytes()


@pytest.fixture
def expected(folder):
    return [sample["bin"] for sample in ShardPool(folder / "p-0.tar").read(range(40))]


@pytest.fixture
def serve():
    servers = []

    def start(data, answer=None):
        servers.append(Hostile(data, answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def shifted(data, start, stop):
    return [head(206, stop - start, Content_Range=span(start + 512, stop + 512, len(data))), data[start:stop]]


RANGES = {
    "another range": shifted,
    "no Content-Range": lambda data, start, stop: [head(206, stop - start), data[start:stop]],
    "an unreadable Content-Range": lambda data, start, stop: [
        head(206, stop - start, Content_Range="bytes all/everything"),
        data[start:stop],
    ],
    "another unit": lambda data, start, stop: [
        head(206, stop - start, Content_Range=f"items {start}-{stop - 1}/{len(data)}"),
        data[start:stop],
    ],
    "another total": lambda data, start, stop: [
        head(206, stop - start, Content_Range=span(start, stop, len(data) + 1)),
        data[start:stop],
    ],
    "too long by its header": lambda data, start, stop: [
        head(206, 1 << 40, Content_Range=span(start, stop, len(data))),
        data,
    ],
    "endless": lambda data, start, stop: endless(head(206, Content_Range=span(start, stop, len(data)))),
    "endless chunks": lambda data, start, stop: chunks(
        head(206, Transfer_Encoding="chunked", Content_Range=span(start, stop, len(data)))
    ),
    "cut short": lambda data, start, stop: [
        head(206, stop - start, Content_Range=span(start, stop, len(data))),
        data[start : stop - 1],
    ],
    "short without a length": lambda data, start, stop: [
        head(206, Content_Range=span(start, stop, len(data))),
        data[start : stop - 1],
    ],
    "packed": lambda data, start, stop: [
        head(206, Content_Encoding="gzip", Content_Range=span(start, stop, len(data))),
        gzip.compress(bytes(MOST)),
    ],
    "packed by a bomb of the right size": lambda data, start, stop: [
        head(206, stop - start, Content_Encoding="gzip", Content_Range=span(start, stop, len(data))),
        gzip.compress(bytes(MOST))[: stop - start].ljust(stop - start, b"\0"),
    ],
    "one byte at a time": lambda data, start, stop: trickle(
        head(206, stop - start, Content_Range=span(start, stop, len(data)))
    ),
    "headers one byte at a time": lambda data, start, stop: trickle(b"HTTP/1.1 206 X\r\nX-Long: "),
    "silence after the headers": lambda data, start, stop: silent(
        head(206, stop - start, Content_Range=span(start, stop, len(data)))
    ),
    "silence": lambda data, start, stop: silent(b""),
    "a page of HTML": lambda data, start, stop: [
        head(200, len(data), Content_Type="text/html"),
        b"<html>" + bytes(len(data) - 6),
    ],
    "416": lambda data, start, stop: [head(416, 0)],
    "503": lambda data, start, stop: [head(503, 0)],
    "403": lambda data, start, stop: [head(403, 0)],
    "204": lambda data, start, stop: [head(204)],
    "a loop of redirects": lambda data, start, stop: [head(302, 0, Location="/p.tar")],
    "a redirect to nowhere": lambda data, start, stop: [head(302, 0, Location="http://127.0.0.1:1/p.tar")],
    "no HTTP": lambda data, start, stop: [bytes(range(256)) * 5000],
    "nothing": lambda data, start, stop: [],
    "binary in the reason": lambda data, start, stop: [
        b"HTTP/1.1 500 \xff\xfe" + b"\x80" * 7000 + b"\r\n\r\n"
    ],
}


def check(caught, server, data):
    """One line that can be printed, with the shard's name and no reply; and little was read."""
    text = str(caught.value)
    assert server.url in text
    assert len(text) < 600
    assert text.isprintable()
    assert server.sent < 12 << 20


@pytest.mark.parametrize("name", RANGES)
def test_a_range_is_what_was_asked_for_or_one_error(serve, data, name):
    server = serve(data, RANGES[name])
    server.honest = True
    pool = ShardPool(server.url, remote=RemoteOptions(**QUICK))
    assert len(pool) == 40
    server.honest, server.sent, before = False, 0, server.requests.total()
    with pytest.raises(PoolError) as caught:
        pool.read([30])
    check(caught, server, data)
    assert server.requests.total() - before <= 2 * 14  # attempts, and the redirects of each


@pytest.mark.parametrize("name", sorted(RANGES.keys() - {"another range", "no Content-Range"}))
def test_a_pool_that_cannot_be_indexed_is_one_error(serve, data, name, tmp_path):
    server = serve(data, RANGES[name])
    pool = ShardPool(server.url, cache_dir=tmp_path, remote=RemoteOptions(**QUICK))
    if name in ("another unit", "another total", "an unreadable Content-Range"):
        with pytest.raises(CuratedDataError):
            len(pool)
        return
    with pytest.raises(CuratedDataError) as caught:
        len(pool)
    check(caught, server, data)
    assert not list((tmp_path / "shards").glob("*.tar"))


WHOLE = {
    "endless": lambda data, start, stop: endless(head(200)),
    "endless chunks": lambda data, start, stop: chunks(head(200, Transfer_Encoding="chunked")),
    "longer": lambda data, start, stop: [head(200, len(data) + 512), data + bytes(512)],
    "longer without a length": lambda data, start, stop: [head(200), data + bytes(512)],
    "shorter": lambda data, start, stop: [head(200, len(data) - 512), data[:-512]],
    "cut": lambda data, start, stop: [head(200, len(data)), data[:-512]],
    "cut without a length": lambda data, start, stop: [head(200), data[:-512]],
    "packed": lambda data, start, stop: [head(200, Content_Encoding="gzip"), gzip.compress(bytes(MOST))],
    "a range": lambda data, start, stop: honest(data, 0, len(data)),
    "silence": lambda data, start, stop: silent(head(200, len(data))),
    "one byte at a time": lambda data, start, stop: trickle(head(200, len(data))),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_download_is_the_shard_or_one_error(serve, data, name, tmp_path):
    server = serve(data, WHOLE[name])
    most = []
    limit = len(data) + 1000
    options = RemoteOptions(access="shards", cache_bytes=limit, **QUICK)
    pool = ShardPool(server.url, cache_dir=tmp_path, remote=options)
    watching = threading.Event()

    def watch():
        while not watching.wait(0.01):
            sizes = [
                path.stat().st_blocks * 512 for path in (tmp_path / "shards").glob("*.tar") if path.exists()
            ]
            most.append(sum(sizes))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with pytest.raises(PoolError) as caught:
            len(pool)
    finally:
        watching.set()
        watcher.join()
    check(caught, server, data)
    assert max(most, default=0) <= limit + 4096
    assert not [path for path in (tmp_path / "shards").iterdir() if path.suffix == ".tar"]
    server.honest = True
    assert len(ShardPool(server.url, cache_dir=tmp_path, remote=options)) == 40


class TestHonest:
    """What is unusual but right is read."""

    def test_the_whole_file_for_a_range(self, serve, data, expected):
        server = serve(data, whole)
        server.honest = True
        pool = ShardPool(server.url, remote=RemoteOptions(**QUICK))
        len(pool)
        server.honest = False
        assert [sample["bin"] for sample in pool.read([0, 39])] == [expected[0], expected[39]]

    def test_no_length_but_right(self, serve, data, expected):
        def answer(data, start, stop):
            return [head(206, Content_Range=span(start, stop, "*")), data[start:stop]]

        pool = ShardPool(serve(data, answer).url, remote=RemoteOptions(**QUICK))
        assert pool.read([7])[0]["bin"] == expected[7]

    def test_a_slow_download_that_goes_on(self, serve, data, expected, tmp_path):
        """Longer in all than what counts as silence."""

        def slow(data, start, stop):
            yield head(200, len(data))
            for first in range(0, len(data), len(data) // 20):
                time.sleep(0.1)
                yield data[first : first + len(data) // 20]

        options = RemoteOptions(access="shards", **QUICK)
        pool = ShardPool(serve(data, slow).url, cache_dir=tmp_path, remote=options)
        assert pool.read([7])[0]["bin"] == expected[7]

    def test_a_server_that_takes_the_first_byte_for_the_whole_file(self, serve, data, expected):
        """`bytes=0-0` ends in a zero, which is taken for no end."""

        def answer(data, start, stop):
            return whole(data, 0, 0) if stop == 1 else honest(data, start, stop)

        server = serve(data, answer)
        pool = ShardPool(server.url, remote=RemoteOptions(**QUICK))  # and without a cache
        assert pool.read([7])[0]["bin"] == expected[7]

    def test_nothing_is_to_be_packed(self, serve, data):
        server = serve(data)
        ShardPool(server.url, remote=RemoteOptions(**QUICK)).read([3])
        asked = [text.lower() for text in server.headers]
        assert all("accept-encoding: identity" in text for text in asked)

    def test_failures_that_pass(self, serve, data, expected):
        """Every other answer is one of the bad ones."""
        bad = [answer for name, answer in RANGES.items() if "silence" not in name and "byte" not in name]
        turn = iter(range(10**6))

        def answer(data, start, stop):
            number = next(turn)
            return honest(data, start, stop) if number % 2 else bad[number // 2 % len(bad)](data, start, stop)

        server = serve(data, answer)
        server.honest = True
        options = RemoteOptions(attempts=5, backoff=0.001, silence=5.0, n_threads=1)
        pool = ShardPool(server.url, remote=options)
        len(pool)
        server.honest = False
        for number in range(len(bad)):
            assert pool.read([number])[0]["bin"] == expected[number]

    def test_the_etag_changes_in_the_middle(self, serve, data, expected):
        def answer(data, start, stop):
            return [piece.replace(b'"v1"', b'"v2"') for piece in honest(data, start, stop)[:1]] + [
                data[start:stop]
            ]

        server = serve(data, answer)
        server.honest = True
        pool = ShardPool(server.url, remote=RemoteOptions(**QUICK))
        assert pool.read([1])[0]["bin"] == expected[1]
        server.honest, server.data = False, data + bytes(512)  # HEAD tells of the new size
        with pytest.raises(PoolError, match="changed since it was indexed"):
            pool.read([2])


LOOKS = {
    "silence": lambda: silent(b""),
    "one byte at a time": lambda: trickle(b"HTTP/1.1 200 X\r\nX-Long: "),
    "no length": lambda: [head(200)],
    "a negative length": lambda: [head(200, -5)],
    "no number": lambda: [head(200, "many")],
    "packed": lambda: [head(200, 100, Content_Encoding="gzip")],
    "503": lambda: [head(503, 0)],
    "a loop of redirects": lambda: [head(302, 0, Location="/p.tar")],
    "no HTTP": lambda: [bytes(range(256)) * 5000],
    "endless headers": lambda: endless(b"HTTP/1.1 200 X\r\nX-Long: "),
    "nothing": lambda: [],
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_look_ends(serve, data, name):
    server = serve(data, lambda data, start, stop: LOOKS[name]())
    server.look = LOOKS[name]
    with pytest.raises(PoolError) as caught:
        len(ShardPool(server.url, remote=RemoteOptions(**QUICK)))
    check(caught, server, data)


PAGE = b"""<html><body><a href="../">up</a> <A class=x HREF='p-1.tar'>1</A> <a href=p-0.tar>0</a>
<a href="/p-2.tar">2</a> <a href="http://elsewhere/p-3.tar">3</a> <a href="sub/p-4.tar">4</a>
<a href="p-&amp;5.tar">5</a> <a href="q.tar">6</a> <a href="p-1.tar">again</a>"""


def test_a_pattern_takes_the_files_of_the_folders_page(serve, data):
    server = serve(PAGE)
    base = server.url.removesuffix("/p.tar")
    assert ShardPool(f"{base}/p-*.tar").urls == [f"{base}/p-{name}.tar" for name in ("&5", "0", "1", "2")]
    with pytest.raises(PoolError, match=r"no shard matches .*/x-\*\.tar"):
        ShardPool(f"{base}/x-*.tar")


@pytest.mark.parametrize("name", sorted(LOOKS.keys() - {"no length", "a negative length", "no number"}))
def test_a_listing_ends(serve, name, monkeypatch):
    monkeypatch.setattr("curated_data.pool.urls._SILENCE", 0.5)
    server = serve(b"", lambda data, start, stop: LOOKS[name]())
    with pytest.raises(PoolError) as caught:
        ShardPool(server.url.replace("p.tar", "p-*.tar"))
    assert server.url.removesuffix("p.tar") in str(caught.value)
    assert len(str(caught.value)) < 600
    assert server.sent < 12 << 20


def test_an_endless_listing_ends(serve, monkeypatch):
    monkeypatch.setattr("curated_data.pool.http._PAGE", 1 << 20)
    server = serve(b"", lambda data, start, stop: endless(head(200, Content_Type="text/html")))
    with pytest.raises(PoolError, match="sends more than"):
        ShardPool(server.url.replace("p.tar", "p-*.tar"))
    assert server.sent < 12 << 20


def test_a_folder_is_named_as_such(serve):
    with pytest.raises(PoolError, match=r"folder.*\*\.tar"):
        ShardPool("http://127.0.0.1:1/pool/")
    with pytest.raises(PoolError, match=r"s3://bucket/pool/' is a folder.*\*\.tar"):
        ShardPool("s3://bucket/pool/")


def test_a_folder_of_a_store_is_named_as_such(folder):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/a-folder/p.tar", b"x")
    with pytest.raises(PoolError, match=r"memory://a-folder' is a folder.*\*\.tar"):
        len(ShardPool("memory://a-folder", remote=RemoteOptions(**QUICK)))


def test_a_page_of_html_is_no_shard(serve):
    page = b"<!DOCTYPE html><title>Index of /pool</title>" + bytes(2000)
    server = serve(page, lambda data, start, stop: [head(200, len(data), Content_Type="text/html"), data])
    server.more["Content_Type"] = "text/html"
    with pytest.raises(PoolError, match=r"web page.*\*\.tar"):
        len(ShardPool(server.url, remote=RemoteOptions(**QUICK)))


def test_a_shard_that_is_called_a_page_is_a_shard(serve, data, expected):
    server = serve(data)
    server.more["Content_Type"] = "text/html"
    assert ShardPool(server.url, remote=RemoteOptions(**QUICK)).read([7])[0]["bin"] == expected[7]


class TestShardCache:
    SHARD = ShardFile("http://x/a", 1000, "a")

    def cache(self, tmp_path, limit=1500):
        calls = []

        def download(shard, path):
            calls.append(shard.url)
            with open(path, "r+b") as file:
                file.write(b"x" * shard.size)

        return ShardCache(tmp_path / "shards", limit), download, calls

    def content(self, cache, download, shard=SHARD):
        handle = cache.open(shard, download)
        with open(handle, "rb") as file:
            return file.read()

    @pytest.mark.parametrize("damage", ["cut", "empty", "longer", "link", "dangling", "pipe"])
    def test_what_is_not_the_shard_is_repaired(self, tmp_path, damage, caplog):
        cache, download, calls = self.cache(tmp_path)
        self.content(cache, download)
        (path,) = (tmp_path / "shards").glob("*.tar")
        victim = tmp_path / "victim"
        victim.write_bytes(b"v" * 1000)
        if damage in ("cut", "empty", "longer"):
            os.truncate(path, {"cut": 500, "empty": 0, "longer": 2000}[damage])
        else:
            path.unlink()
            if damage == "pipe":
                os.mkfifo(path)
            else:
                path.symlink_to(victim if damage == "link" else tmp_path / "nowhere")
        before = victim.stat()
        assert self.content(cache, download) == b"x" * 1000
        assert len(calls) == 2
        assert victim.read_bytes() == b"v" * 1000
        assert victim.stat().st_mtime_ns == before.st_mtime_ns
        assert not (tmp_path / "nowhere").exists()
        assert path.name in caplog.text

    def test_a_folder_in_its_place_is_an_error(self, tmp_path):
        cache, download, _ = self.cache(tmp_path)
        path = tmp_path / "shards" / f"{self.SHARD.fingerprint}.tar"
        path.mkdir(parents=True)
        (path / "x").touch()
        with pytest.raises(CacheError, match="is a folder"):
            cache.open(self.SHARD, download)
        assert (path / "x").exists()

    def test_a_pool_reads_on_when_its_file_is_cut(self, serve, data, expected, tmp_path):
        options = RemoteOptions(access="shards", **QUICK)
        pool = ShardPool(serve(data).url, cache_dir=tmp_path, remote=options)
        assert pool.read([3])[0]["bin"] == expected[3]
        (path,) = (tmp_path / "shards").glob("*.tar")
        os.truncate(path, 100)
        assert [sample["bin"] for sample in pool.read([3, 39])] == [expected[3], expected[39]]
        again = ShardPool(pool.urls, cache_dir=tmp_path, remote=options)
        os.truncate(path, 5000)
        assert again.read([39])[0]["bin"] == expected[39]

    def test_links_are_evicted_and_not_what_they_point_to(self, tmp_path):
        cache, download, _ = self.cache(tmp_path)
        (tmp_path / "shards").mkdir()
        victim = tmp_path / "victim"
        victim.write_bytes(bytes(10**6))
        names = [f"{'0' * 20}.tar", f".tmp-{'0' * 12}-{'1' * 20}.tar"]
        for name in names:
            (tmp_path / "shards" / name).symlink_to(victim)
        for name in ("mine.tar", ".tmp-x.tar", ".tmp-y-..-z.tar"):  # of others: neither counted nor removed
            (tmp_path / "shards" / name).write_bytes(bytes(5000))
        assert self.content(cache, download) == b"x" * 1000
        assert self.content(cache, download, ShardFile("http://x/b", 1000, "b")) == b"x" * 1000
        assert victim.stat().st_size == 10**6
        for name in ("mine.tar", ".tmp-x.tar", ".tmp-y-..-z.tar"):
            assert (tmp_path / "shards" / name).stat().st_size == 5000

    def test_waiting_for_room_says_for_what_and_ends(self, tmp_path, monkeypatch, caplog):
        cache, download, _ = self.cache(tmp_path)
        monkeypatch.setattr(cache, "patience", 0.3)
        caplog.set_level("INFO")
        begun, end = threading.Event(), threading.Event()

        def hang(shard, path):
            begun.set()
            end.wait(30)
            download(shard, path)

        other = threading.Thread(target=lambda: os.close(cache.open(self.SHARD, hang)))
        other.start()
        begun.wait(30)
        try:
            wanted = ShardFile("http://x/b", 1000, "b")
            with pytest.raises(PoolError, match=r"http://x/b: .*cache_bytes"):
                cache.open(wanted, download)
            assert "waiting for 1 other download" in caplog.text
        finally:
            end.set()
            other.join()
        assert self.content(cache, download, wanted) == b"x" * 1000
