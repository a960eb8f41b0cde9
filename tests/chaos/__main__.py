"""Attack this package and count how it ends.

    python -m tests.chaos --seconds 60 --seed 0 [--only kills|files|http|ranks] [--cases N]

Everything happens in a fresh temporary folder, which is removed in the end; attacked processes are refused
whatever would write outside of it, or connect to another machine. Prints a table of kinds and outcomes; exits
with 1 if an outcome is bad.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import importlib
import random
import sys
import time

from tests.chaos.cage import caged
from tests.chaos.tally import Tally
from tests.chaos.world import World

ROOMS = {"kills": 0.35, "files": 0.45, "http": 0.1, "ranks": 0.1}  # and their share of the time


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=ROOMS, action="append")
    parser.add_argument("--cases", type=int, help="per room, at most")
    parsed = parser.parse_args(arguments)
    tally = run(parsed.seconds, parsed.seed, parsed.only or list(ROOMS), parsed.cases)
    for text in tally.bad:
        print(text, end="\n\n")
    print(tally.table())
    return 1 if tally.bad else 0


def run(seconds: float, seed: int, rooms: list[str], cases: int | None = None) -> Tally:
    """Attack for some seconds, or with so many cases in each room."""
    tally = Tally()
    sys.dont_write_bytecode = True
    with caged() as cage:
        world = World(cage, seed)
        world.warm_up()
        share = sum(ROOMS[room] for room in rooms)
        for room in rooms:
            attack = importlib.import_module(f"tests.chaos.{room}").attack
            until = time.monotonic() + seconds * ROOMS[room] / share
            attack(world, tally, random.Random(f"{room} {seed}"), until, cases)
    return tally


if __name__ == "__main__":
    sys.exit(main())
