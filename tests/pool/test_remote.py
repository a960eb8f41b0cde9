"""Remote shards, read from real servers on this machine."""

import multiprocessing
import socket
import time

import fsspec
import numpy as np
import pytest
import torch

pytest.importorskip("aiohttp")

from curated_data import CuratedDataModule
from curated_data.errors import PoolError
from curated_data.pool import RemoteOptions, ShardPool, ShardWriter, store
from curated_data.pool.store import Store
from tests.pool.test_shard_cache import sizes_in
from tests.support.ranks import on_ranks
from tests.support.server import Server
from tests.support.small_shards import contents

STAT = Store.stat
QUICK = {"attempts": 4, "backoff": 0.01}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four shards of 25 samples with 3 to 5 KB each."""
    folder = tmp_path_factory.mktemp("remote")
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "p-%03d.tar", max_samples=25) as writer:
        for i in range(100):
            writer.write(
                {"__key__": f"{i:04d}", "bin": rng.bytes(int(rng.integers(3000, 5000))), "cls": i % 5}
            )
    return folder


@pytest.fixture
def serve(folder):
    servers = []

    def start(path=folder, **options):
        servers.append(Server(path, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def expected(folder):
    return contents(ShardPool(folder / "*.tar").read(np.arange(100)))


PATTERN = "/p-{000..003}.tar"


def test_ranges(serve, expected, folder):
    server = serve()
    pool = ShardPool(server.url + PATTERN)
    assert contents(pool.read(np.arange(100))) == expected
    assert pool.labels(np.arange(100)).tolist() == [i % 5 for i in range(100)]
    assert pool.urls[3] == server.url + "/p-003.tar"
    server.bytes_sent = 0
    before = pool.counters.bytes_read
    ids = np.array([90, 3, 50, 3])
    assert contents(pool.read(ids)) == [expected[i] for i in ids]
    assert server.bytes_sent == pool.counters.bytes_read - before
    assert server.bytes_sent < 20_000


def test_ranges_are_merged_over_gaps(serve):
    server = serve()
    requests = {}
    for gap in (0, 64 << 10):
        pool = ShardPool(server.url + PATTERN, remote=RemoteOptions(gap=gap))
        len(pool)
        pool.read([0, 25, 50, 75], ["cls"])  # each shard looked at
        server.requests.clear()
        pool.read(np.arange(100), ["bin"])
        requests[gap] = server.requests["GET"]
    assert requests == {0: 100, 64 << 10: 4}


def test_reads_ask_for_the_bytes_alone(serve, expected):
    """Answers tell of which version they are: looking again before each would double the requests."""
    server = serve()
    pool = ShardPool(server.url + PATTERN, remote=RemoteOptions(recheck=0, gap=0))
    pool.read([0])
    server.requests.clear()
    assert contents(pool.read([5, 30, 99], ["bin"])) == [
        {name: value for name, value in expected[i].items() if name != "cls"} for i in (5, 30, 99)
    ]
    assert server.requests == {"GET": 3}


class Bytes:
    dimension, fingerprint, preprocess = 4, "bytes", staticmethod(lambda content: content)

    def __call__(self, batch):
        return batch


def start(urls, cache_dir):
    pool = ShardPool(urls, cache_dir=cache_dir, image_extensions=["bin"])
    config = {"target_size": 10, "levels": [{"n_clusters": 5}], "embedding": {"num_workers": 0}}
    decoders = {"bin": lambda content: torch.frombuffer(bytearray(content[:4]), dtype=torch.uint8)}
    data = CuratedDataModule(
        pool,
        config,
        embedder=Bytes(),
        decoding={"decoders": decoders},
        cache_dir=cache_dir,
        loader={"num_workers": 0},
        batch_size=2,
    )
    data.setup()
    return data.train_dataloader()


def test_a_start_looks_at_each_shard_once(serve, tmp_path):
    server = serve()
    start(server.url + PATTERN, tmp_path)
    server.requests.clear()
    assert len(start(server.url + PATTERN, tmp_path)) == 5
    assert server.requests == {"HEAD": 4}


def start_on_a_rank(rank, urls, cache_dir):
    start(urls, cache_dir)


def test_ranks_look_at_each_shard_once_together(serve, folder, tmp_path):
    server = serve()
    urls = [f"{server.url}/p-{number:03d}.tar" for number in range(3)] + [str(folder / "p-003.tar")]
    start(urls, tmp_path)
    for n_ranks in (2, 4):
        server.requests.clear()
        on_ranks(n_ranks, start_on_a_rank, urls, tmp_path)
        assert server.requests == {"HEAD": 3}  # and nothing is embedded again: they see the same versions


def test_small_shards_are_indexed_by_one_request(serve):
    server = serve()
    pool = ShardPool(server.url + PATTERN, num_workers=1)
    assert len(pool) == 100
    assert server.requests == {"HEAD": 4, "GET": 4 + 1}  # and one, whether the server has ranges


def test_requests_run_at_once(serve, expected):
    server = serve(latency=0.05)
    pool = ShardPool(server.url + PATTERN, remote=RemoteOptions(gap=0, n_threads=20))
    len(pool)
    server.most_at_once = 0
    ids = np.arange(0, 100, 2)
    assert contents(pool.read(ids, ["bin"])) == [
        {k: v for k, v in expected[i].items() if k != "cls"} for i in ids
    ]
    assert server.most_at_once > 8


@pytest.mark.parametrize("access", ["auto", "shards"])
def test_without_ranges_shards_are_kept_in_the_cache(serve, expected, tmp_path, access, folder):
    server = serve(ranges=access == "shards")
    pool = ShardPool(
        server.url + PATTERN, cache_dir=tmp_path / "cache", remote=RemoteOptions(access=access, **QUICK)
    )
    assert contents(pool.read(np.arange(100))) == expected
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 4
    total = sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert total <= server.bytes_sent < total * 1.3 + (50_000 if access == "auto" else 0)
    sent = server.bytes_sent
    again = ShardPool(server.url + PATTERN, cache_dir=tmp_path / "cache", remote=RemoteOptions(access=access))
    assert contents(again.read([7, 99])) == [expected[7], expected[99]]
    assert server.bytes_sent - sent < 160_000  # at most the probe for ranges, which is answered with a file


def test_without_ranges_and_cache_the_error_says_what_to_do(serve):
    pool = ShardPool(serve(ranges=False).url + PATTERN, remote=RemoteOptions(**QUICK))
    with pytest.raises(PoolError, match=r"p-00\d\.tar: .*cache_dir"):
        len(pool)


def test_the_cache_is_bounded_and_shared(serve, expected, tmp_path, folder):
    """Room for two of four shards, two processes that read at random: never more, always right."""
    server = serve(ranges=False)
    limit = int(2.5 * max(path.stat().st_size for path in folder.glob("*.tar")))
    options = RemoteOptions(cache_bytes=limit, **QUICK)
    pool = ShardPool(server.url + PATTERN, cache_dir=tmp_path / "cache", remote=options)
    len(pool)
    processes = multiprocessing.get_context("fork")
    results = processes.Queue()

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(6):
            ids = rng.permutation(100)[:10]
            if contents(pool.read(ids)) != [expected[i] for i in ids]:
                results.put("wrong")
                return
        results.put("right")

    runs = [processes.Process(target=work, args=(seed,)) for seed in range(2)]
    for run in runs:
        run.start()
    most = 0
    while any(run.is_alive() for run in runs):
        files = sizes_in(tmp_path / "cache" / "shards")
        if files == sizes_in(tmp_path / "cache" / "shards"):  # else some went and came while we looked
            most = max(most, sum(size for _, size in files))
        time.sleep(0.002)
    assert [results.get(timeout=30) for _ in runs] == ["right", "right"]
    assert 0 < most <= limit
    small = ShardPool(
        server.url + PATTERN, cache_dir=tmp_path / "cache", remote=RemoteOptions(cache_bytes=1000, **QUICK)
    )
    for path in (tmp_path / "cache" / "shards").glob("*.tar"):
        path.unlink()
    with pytest.raises(PoolError, match=r"p-00\d\.tar: .* 1000 .*cache_bytes"):
        small.read([0])


class TestFaults:
    def test_failures_are_retried(self, serve, expected, caplog):
        server = serve()
        server.fail_next = 2
        pool = ShardPool(server.url + PATTERN, remote=RemoteOptions(**QUICK))
        len(pool)
        server.fail_next, server.cut_next = 2, 2
        assert contents(pool.read(np.arange(100))) == expected
        assert "trying again" in caplog.text

    def test_then_an_error_that_names_the_shard(self, serve):
        server = serve()
        pool = ShardPool(server.url + PATTERN, remote=RemoteOptions(**QUICK))
        pool.read([0])
        server.fail_next = 1000
        with pytest.raises(PoolError, match=r"p-000\.tar: .*4 attempts.*503"):
            pool.read([1])

    def test_nothing_listens(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}/p.tar"
            with pytest.raises(PoolError, match=f"{url}: .*4 attempts"):
                len(ShardPool(url, remote=RemoteOptions(**QUICK)))

    def test_missing(self, serve):
        server = serve()
        with pytest.raises(PoolError, match=r"p-007\.tar: "):
            len(ShardPool(server.url + "/p-{000,007}.tar", remote=RemoteOptions(**QUICK)))
        assert server.requests["GET"] <= 2

    def test_unknown_protocol(self):
        with pytest.raises(PoolError, match=r"gopher://x/p\.tar"):
            len(ShardPool("gopher://x/p.tar", remote=RemoteOptions(**QUICK)))

    def test_changed_since_it_was_indexed(self, serve, tmp_path, folder):
        own = tmp_path / "own"
        own.mkdir()
        (own / "p.tar").write_bytes((folder / "p-000.tar").read_bytes())
        server = serve(own)
        pool = ShardPool(server.url + "/p.tar", cache_dir=tmp_path / "cache")
        len(pool)
        fingerprint = pool.fingerprint
        (own / "p.tar").write_bytes((folder / "p-001.tar").read_bytes())
        with (
            multiprocessing.get_context("fork").Pool(1) as workers,
            pytest.raises(PoolError, match=r"/p\.tar: changed"),
        ):
            workers.apply(pool.read, ([0],))
        again = ShardPool(server.url + "/p.tar", cache_dir=tmp_path / "cache")
        assert again.fingerprint != fingerprint
        assert again.read([0])[0]["__key__"] == "0025"

    @pytest.mark.parametrize("how", ["other bytes", "longer", "shorter", "gone"])
    def test_overwritten_while_it_is_read(self, serve, tmp_path, folder, how):
        """After a check and reads in this very process; each answer tells."""
        own = tmp_path / "own"
        own.mkdir()
        content = (folder / "p-000.tar").read_bytes()
        (own / "p.tar").write_bytes(content)
        pool = ShardPool(serve(own).url + "/p.tar", remote=RemoteOptions(**QUICK))
        assert len(pool.read(np.arange(5))) == 5
        if how == "gone":
            (own / "p.tar").unlink()
        else:
            changed = {
                "other bytes": content[::-1],
                "longer": content + bytes(512),
                "shorter": content[:60_000],
            }
            (own / "p.tar").write_bytes(changed[how])
        named = "does not exist" if how == "gone" else "changed"
        with pytest.raises(PoolError, match=rf"/p\.tar: {named}"):
            pool.read([20])


def test_workers_after_a_fork(serve, expected, tmp_path):
    """The parent has used its event loop and threads; a forked worker starts its own."""
    pool = ShardPool(serve().url + PATTERN, cache_dir=tmp_path / "cache")
    assert contents(pool.read([0])) == [expected[0]]
    with multiprocessing.get_context("fork").Pool(2) as workers:
        for i, samples in enumerate(workers.map(pool.read, [[i, 99 - i] for i in range(10)])):
            assert contents(samples) == [expected[i], expected[99 - i]]


@pytest.mark.parametrize("access", ["auto", "ranges", "shards"])
def test_the_plan_is_kept_to(serve, expected, tmp_path, folder, access):
    server = serve()
    cache = tmp_path / "cache"
    pool = ShardPool(server.url + PATTERN, cache_dir=cache, remote=RemoteOptions(access=access))
    ids = np.concatenate([np.arange(25), [30, 60]])
    plan = pool.plan_access(ids)
    assert (
        plan.tolist()
        == {
            "auto": [True, False, False, False],
            "ranges": [False, False, False, False],
            "shards": [True, True, True, True],
        }[access]
    )
    with multiprocessing.get_context("fork").Pool(1) as workers:
        assert contents(workers.apply(pool.read, (ids,))) == [expected[i] for i in ids]
    if access == "auto":
        assert {path.stem for path in (cache / "shards").glob("*.tar")} == {
            pool.shards[number].fingerprint for number in np.flatnonzero(plan)
        }


def test_the_whole_pool(serve, tmp_path):
    pool = ShardPool(serve().url + PATTERN, cache_dir=tmp_path)
    for ids in (None, np.random.default_rng(0).permutation(100)):
        assert pool.plan_access(ids).tolist() == [True] * 4
    assert not ShardPool(serve().url + PATTERN).plan_access(None).any()  # no cache to keep them in


def test_local_pools_have_nothing_to_plan(folder):
    assert not ShardPool(folder / "*.tar").plan_access([0, 1]).any()


def test_local_and_remote_shards_mix(serve, expected, folder, tmp_path):
    pool = ShardPool([folder / "p-000.tar", serve().url + "/p-{001..003}.tar"], cache_dir=tmp_path / "cache")
    ids = np.random.default_rng(0).permutation(100)
    assert contents(pool.read(ids)) == [expected[i] for i in ids]
    plain = ShardPool(folder / "p-000.tar")
    assert plain.shard_fingerprints[0] == pool.shard_fingerprints[0]


def test_s3(s3, expected, folder, monkeypatch):
    """Against moto's S3 server: listings by a glob and for many shards, ranges, a change told by the ETag."""
    options, url = s3
    bucket = fsspec.filesystem("s3", **options)
    for path in folder.glob("*.tar"):
        bucket.pipe(f"{url}/pool/{path.name}", path.read_bytes())
    remote = RemoteOptions(recheck=0, **QUICK)
    pool = ShardPool(f"{url}/pool/p-*.tar", storage_options=options, remote=remote)
    ids = np.random.default_rng(0).permutation(100)
    assert contents(pool.read(ids)) == [expected[i] for i in ids]
    assert pool.urls == [f"{url}/pool/p-00{i}.tar" for i in range(4)]
    looked_at = []
    monkeypatch.setattr(Store, "stat", lambda self, url: looked_at.append(url) or STAT(self, url))
    pool.read(ids)
    assert not looked_at  # answers tell of which version they are
    monkeypatch.setattr(store, "_LISTED_FROM", 4)
    listed = ShardPool(f"{url}/pool/p-{{000..003}}.tar", storage_options=options)
    assert listed.shards == pool.shards
    assert looked_at == listed.urls[:1]  # to see that it says what the listing says
    with pytest.raises(PoolError, match=r"/q-\*\.tar"):
        ShardPool(f"{url}/pool/q-*.tar", storage_options=options)
    bucket.pipe(f"{url}/pool/p-000.tar", (folder / "p-001.tar").read_bytes())
    with pytest.raises(PoolError, match=r"p-000\.tar: changed"):
        pool.read([0])
    again = ShardPool(f"{url}/pool/p-*.tar", storage_options=options)
    same = [a == b for a, b in zip(pool.shard_fingerprints, again.shard_fingerprints)]
    assert same == [False, True, True, True]


def test_any_fsspec_url(folder, expected, monkeypatch):
    """fsspec's memory file system stands for the protocols that are not HTTP or S3."""
    memory = fsspec.filesystem("memory")
    for path in folder.glob("*.tar"):
        memory.pipe(f"/pool/{path.name}", path.read_bytes())
    pool = ShardPool("memory://pool/p-{000..003}.tar")
    assert contents(pool.read(np.arange(100))) == expected
    monkeypatch.setattr(store, "_LISTED_FROM", 1)
    assert ShardPool("memory://pool/p-{000..003}.tar").shards == pool.shards
    with pytest.raises(PoolError, match=r"memory://pool/p-004\.tar: "):
        ShardPool("memory://pool/p-{000..004}.tar", remote=RemoteOptions(**QUICK)).shards  # noqa: B018
    with pytest.raises(PoolError, match=r"memory://other/p-000\.tar: "):
        ShardPool("memory://other/p-000.tar", remote=RemoteOptions(**QUICK)).shards  # noqa: B018
    assert ShardPool("memory://pool/*.tar").urls[0].endswith("pool/p-000.tar")
