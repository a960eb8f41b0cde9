"""Commands on two ranks of which one is killed: the other ends, and the next run has the same result."""

import datetime
import random
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from tests.chaos.cage import Cage, Ending, snapshot
from tests.chaos.tally import Tally
from tests.chaos.world import World, is_beside, tree_of

_LIMIT = 90.0


def attack(world: World, tally: Tally, rng: random.Random, until: float, cases: int | None = None) -> None:
    """Kill ranks until a time (of `time.monotonic`), or so many."""
    cage = world.cage
    curated = world.start("curated for ranks", world.curation("curate"))
    tree = str(cage.case / "cache" / "tree" / tree_of(curated))
    scenes = {
        "embed": (None, world.curation("embed")),
        "curate": (None, world.curation("curate")),
        "extend": (curated, world.curation("extend", "--tree", tree, grown=True)),
    }
    measured: dict[str, tuple[Any, list[int]]] = {}
    number = 0
    while time.monotonic() < until and number != cases:
        name = list(scenes)[(number + 1) % len(scenes)]
        number += 1
        start, command = scenes[name]
        if name not in measured:
            cage.fresh(start)
            endings = _run(cage, command)
            assert [ending.value for ending in endings] == [0, 0], (name, endings)
            measured[name] = snapshot(cage.case, is_beside), [ending.n_events for ending in endings]
        expected, n_events = measured[name]
        victim = rng.randrange(2)
        kill = {"kill_at": rng.randint(1, max(1, n_events[victim]))}
        cage.fresh(start)
        endings = _run(cage, command, victim, **kill)
        again = _run(cage, command)
        outcome = _outcome(cage, endings[1 - victim], again, snapshot(cage.case, is_beside), expected)
        said = "\n".join(
            f"{one.how} {one.value} {one.error}\n{one.said[-900:]}" for one in [*endings, *again]
        )
        what = f"rank {victim}, {kill}: {[one.how for one in endings]}, then {[one.value for one in again]}"
        tally.add(f"ranks: {name}", outcome, what, said)


def _outcome(cage: Cage, survivor: Ending, again: list[Ending], found: Any, expected: Any) -> str:
    if cage.is_touched() or any(ending.escapes for ending in [survivor, *again]):
        return "escaped"
    if "hung" in [survivor.how, *(ending.how for ending in again)]:
        return "hung"
    if survivor.how != "done":
        return "unclear"
    if [ending.value for ending in again] != [0, 0]:
        return "lost"
    return "equal" if found == expected else "different without a word"


def _run(
    cage: Cage, command: Callable[[], Any], victim: int | None = None, kill_at: int | None = None
) -> list[Ending]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        cage.start(partial(_rank, command, rank, port), kill_at=kill_at if rank == victim else None)
        for rank in range(2)
    ]
    return [process.wait(_LIMIT) for process in started]


def _rank(command: Callable[[], Any], rank: int, port: int) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    dist.barrier()  # under load one rank may be done before the other has connected
    return command()
