"""HTTP servers that are slow, broken or hostile: the right bytes, or one short error that names the shard,
after bounded bytes and time.
"""

import os
import threading
import time

import numpy as np
import pytest

pytest.importorskip("aiohttp")

from curated_data.errors import CuratedDataError, PoolError
from curated_data.pool import RemoteOptions, ShardPool
from tests.support.hostile_http import LOOKS, RANGES, WHOLE, Hostile, endless, head, honest, span, whole
from tests.support.images import write_samples

QUICK = {"attempts": 2, "backoff": 0.01, "silence": 0.5}
PATIENT = QUICK | {"silence": 60.0}  # where nothing is silent


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
        pool = ShardPool(server.url, remote=RemoteOptions(**PATIENT))
        len(pool)
        server.honest = False
        assert [sample["bin"] for sample in pool.read([0, 39])] == [expected[0], expected[39]]

    def test_no_length_but_right(self, serve, data, expected):
        def answer(data, start, stop):
            return [head(206, Content_Range=span(start, stop, "*")), data[start:stop]]

        pool = ShardPool(serve(data, answer).url, remote=RemoteOptions(**PATIENT))
        assert pool.read([7])[0]["bin"] == expected[7]

    def test_a_slow_download_that_goes_on(self, serve, data, expected, tmp_path):
        """Longer in all than what counts as silence."""

        def slow(data, start, stop):
            yield head(200, len(data))
            for first in range(0, len(data), len(data) // 20):
                time.sleep(0.1)
                yield data[first : first + len(data) // 20]

        options = RemoteOptions(access="shards", **QUICK | {"silence": 1.0})
        pool = ShardPool(serve(data, slow).url, cache_dir=tmp_path, remote=options)
        assert pool.read([7])[0]["bin"] == expected[7]

    def test_a_server_that_takes_the_first_byte_for_the_whole_file(self, serve, data, expected):
        """`bytes=0-0` ends in a zero, which is taken for no end."""

        def answer(data, start, stop):
            return whole(data, 0, 0) if stop == 1 else honest(data, start, stop)

        server = serve(data, answer)
        pool = ShardPool(server.url, remote=RemoteOptions(**PATIENT))  # and without a cache
        assert pool.read([7])[0]["bin"] == expected[7]

    def test_nothing_is_to_be_packed(self, serve, data):
        server = serve(data)
        ShardPool(server.url, remote=RemoteOptions(**PATIENT)).read([3])
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
        options = RemoteOptions(attempts=5, backoff=0.001, silence=60.0, n_threads=1)
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
        pool = ShardPool(server.url, remote=RemoteOptions(**PATIENT))
        assert pool.read([1])[0]["bin"] == expected[1]
        server.honest, server.data = False, data + bytes(512)  # HEAD tells of the new size
        with pytest.raises(PoolError, match=rf"p\.tar: .*{len(data)}.*{len(data) + 512}"):
            pool.read([2])


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
    with pytest.raises(PoolError, match=r"/x-\*\.tar"):
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
    with pytest.raises(PoolError, match=r"p-\*\.tar.*1048576"):
        ShardPool(server.url.replace("p.tar", "p-*.tar"))
    assert server.sent < 12 << 20


def test_a_folder_is_named_as_such(serve):
    with pytest.raises(PoolError, match=r"'http://127\.0\.0\.1:1/pool/\*\.tar'"):
        ShardPool("http://127.0.0.1:1/pool/")
    with pytest.raises(PoolError, match=r"'s3://bucket/pool/\*\.tar'"):
        ShardPool("s3://bucket/pool/")


def test_a_folder_of_a_store_is_named_as_such(folder):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/a-folder/p.tar", b"x")
    with pytest.raises(PoolError, match=r"'memory://a-folder/\*\.tar'"):
        len(ShardPool("memory://a-folder", remote=RemoteOptions(**QUICK)))


def test_a_page_of_html_is_no_shard(serve):
    page = b"<!DOCTYPE html><title>Index of /pool</title>" + bytes(2000)
    server = serve(page, lambda data, start, stop: [head(200, len(data), Content_Type="text/html"), data])
    server.more["Content_Type"] = "text/html"
    with pytest.raises(PoolError, match=f"{server.url}: .*web page"):
        len(ShardPool(server.url, remote=RemoteOptions(**QUICK)))


def test_a_shard_that_is_called_a_page_is_a_shard(serve, data, expected):
    server = serve(data)
    server.more["Content_Type"] = "text/html"
    assert ShardPool(server.url, remote=RemoteOptions(**PATIENT)).read([7])[0]["bin"] == expected[7]


def test_a_pool_reads_on_when_its_file_is_cut(serve, data, expected, tmp_path):
    options = RemoteOptions(access="shards", **PATIENT)
    pool = ShardPool(serve(data).url, cache_dir=tmp_path, remote=options)
    assert pool.read([3])[0]["bin"] == expected[3]
    (path,) = (tmp_path / "shards").glob("*.tar")
    os.truncate(path, 100)
    assert [sample["bin"] for sample in pool.read([3, 39])] == [expected[3], expected[39]]
    again = ShardPool(pool.urls, cache_dir=tmp_path, remote=options)
    os.truncate(path, 5000)
    assert again.read([39])[0]["bin"] == expected[39]
