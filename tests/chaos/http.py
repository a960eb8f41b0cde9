"""A small remote pool on hostile servers of this machine, with kills: the right embeddings or one error that
names a shard; and after that, from an honest server, the right ones.
"""

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curated_data import ShardPool
from curated_data.cache.artifacts import open_cache
from curated_data.embedding import embed_pool, resolve_embedder
from curated_data.pool import RemoteOptions
from tests.chaos.tally import Tally
from tests.chaos.world import EMBEDDER, World
from tests.support.hostile_http import RANGES, Hostile, head, honest, silent, whole

_LIMIT = 90.0
_QUICK: dict[str, Any] = {"attempts": 2, "backoff": 0.01, "silence": 0.4}


def attack(world: World, tally: Tally, rng: random.Random, until: float, cases: int | None = None) -> None:
    """Serve hostile mixes until a time (of `time.monotonic`), or so many times."""
    expected: dict[str, Any] = {}
    for access in ("ranges", "shards"):
        with _servers(world, 0.0, 0) as ports:
            world.cage.fresh(None)
            ending = world.cage.run(lambda: _embed(world, ports, access), limit=_LIMIT)  # noqa: B023
        assert ending.how == "done", ending
        expected[access] = ending.value
        n_events = ending.n_events
    number = 0
    while time.monotonic() < until and number != cases:
        access = ("ranges", "shards")[number % 2]
        number += 1
        seed, share, kill = rng.getrandbits(32), rng.choice((0.05, 0.2, 0.6)), {}
        if rng.random() < 0.3:
            kill = {"kill_at": rng.randint(1, n_events)}
        elif rng.random() < 0.2:
            kill = {"kill_after": rng.uniform(0, 1.0)}
        world.cage.fresh(None)
        with _servers(world, share, seed) as ports:
            first = world.cage.run(lambda: _embed(world, ports, access), limit=_LIMIT, **kill)  # noqa: B023
        with _servers(world, 0.0, 0, ports) as ports:
            last = world.cage.run(lambda: _embed(world, ports, access), limit=_LIMIT)  # noqa: B023
        outcome = "equal"
        if first.escapes or last.escapes or world.cage.is_touched():
            outcome = "escaped"
        elif "hung" in (first.how, last.how):
            outcome = "hung"
        elif last.how != "done":
            outcome = "lost"  # what the hostile server left is in the way
        elif last.value != expected[access] or (first.how == "done" and first.value != expected[access]):
            outcome = "different without a word"
        elif first.how == "error":
            is_clear = first.is_ours and "\n" not in first.error and len(first.error) < 700
            outcome = "one clear error" if is_clear and "http://127.0.0.1" in first.error else "unclear"
        elif first.how == "died":
            outcome = "unclear"
        what = f"{access}, {share:.0%} hostile, seed {seed}, {kill}: {first.how}, then {last.how}"
        bad = last if outcome == "lost" else first
        said = f"{bad.error[:800]}\n{bad.trace[-2500:]}\n{str(first.value)[:300]}\n{bad.said[-800:]}"
        tally.add(f"http: {access}", outcome, what, said)


def _embed(world: World, ports: list[int], access: Any) -> Any:
    torch.set_num_threads(1)
    cache = open_cache(world.cage.case / "cache")
    urls = [f"http://127.0.0.1:{port}/p.tar" for port in ports]
    pool = ShardPool(urls, cache_dir=cache, remote=RemoteOptions(access=access, **_QUICK))
    store = embed_pool(pool, resolve_embedder(EMBEDDER), cache, device="cpu", num_workers=0)
    return [pool.keys(range(len(pool))), np.asarray(store.as_array()).round(4).tolist(), store.n_failures]


@contextlib.contextmanager
def _servers(world: World, share: float, seed: int, ports: list[int] | None = None) -> Iterator[list[int]]:
    """Two servers in a process of their own, that answer a share of the requests in some hostile way."""
    shards = sorted(world.home.glob("pool-*.tar"))[:2]
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(reading)
            servers = [
                _Mixed(shard, share, random.Random(f"{seed} {number}"), ports[number] if ports else 0)
                for number, shard in enumerate(shards)
            ]
            os.write(writing, " ".join(str(server.port) for server in servers).encode() + b"\n")
            signal.pause()
        finally:
            os._exit(0)
    os.close(writing)
    try:
        with open(reading) as file:
            yield [int(port) for port in file.readline().split()]
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


class _Mixed(Hostile):
    """A server that is honest to some requests."""

    def __init__(self, shard: Path, share: float, rng: random.Random, port: int) -> None:
        self.share, self.rng, self.wanted = share, rng, port
        super().__init__(shard.read_bytes(), self.mixed, port=port)
        self.look = self.looked
        self.port = self.listener.getsockname()[1]

    def mixed(self, data: bytes, start: int, stop: int) -> Any:
        if self.rng.random() >= self.share:
            is_whole = start == 0 and stop >= len(data)
            return whole(data, start, stop) if is_whole else honest(data, start, stop)
        return RANGES[self.rng.choice(list(RANGES))](data, start, stop)

    def looked(self) -> Any:
        """The answer to HEAD."""
        if self.rng.random() >= self.share:
            return [head(200, len(self.data))]
        return self.rng.choice(
            (
                lambda: [head(200)],
                lambda: [head(200, 0)],
                lambda: [head(200, -1)],
                lambda: [head(200, 1 << 50)],
                lambda: [head(503, 0)],
                lambda: [head(404, 0)],
                lambda: [head(200, len(self.data), Content_Type="text/html")],
                lambda: [head(200, len(self.data) - 512)],
                lambda: [b"HTTP/1.1 200 OK\r\nContent-Length: nonsense\r\n\r\n"],
                lambda: [],
                lambda: silent(b""),
            )
        )()
