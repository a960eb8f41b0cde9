"""Damaged files of every kind: the same result as without the damage, one clear error that names the file, or
failures that are counted and named.
"""

import json
import logging
import os
import random
import time
import traceback
from pathlib import Path
from typing import Any

from curated_data.errors import CuratedDataError
from tests.chaos.artifacts import cache_kinds, shard_kinds
from tests.chaos.cage import Ending
from tests.chaos.damage import damage, forge, remove_stages
from tests.chaos.inputs import input_kinds, row_kinds
from tests.chaos.kinds import Kind
from tests.chaos.seeds import seed_kinds
from tests.chaos.states import state_kinds, training_kinds
from tests.chaos.tables import archive_kinds, changed_kinds, table_kinds
from tests.chaos.tally import GOOD, Tally
from tests.chaos.world import World

_LIMIT = 40.0
_BATCH = 40  # cases in one attacked process
_LATER = {
    "index": ("pool",),
    "embeddings": ("near_duplicates", "tree", "retrieval", "selection"),
    "near_duplicates": ("tree", "retrieval", "selection"),
    "tree": ("retrieval", "selection"),
    "retrieval": ("selection",),
}


def attack(world: World, tally: Tally, rng: random.Random, until: float, cases: int | None = None) -> None:
    """Damage files until a time (of `time.monotonic`), or so many."""
    kinds = [
        *cache_kinds(world), *shard_kinds(world), *input_kinds(world), *row_kinds(world), *state_kinds(world),
        *training_kinds(world), *archive_kinds(world), *changed_kinds(world), *table_kinds(world),
        *seed_kinds(world),
    ]  # fmt: skip
    expected: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        expected[kind.name] = {}
        for name, read in kind.reads.items():
            world.cage.fresh(kind.start)
            ending = world.cage.run(read, limit=_LIMIT)
            assert ending.how == "done", (kind.name, name, ending)
            expected[kind.name][name] = ending.value
    number, notes = 0, world.cage.inside / "tmp" / "batch.jsonl"
    while time.monotonic() < until and number != cases:
        count = _BATCH if cases is None else min(_BATCH, cases - number)
        seed, pools = rng.getrandbits(32), world.pools()
        notes.unlink(missing_ok=True)

        def batch(number: int = number, count: int = count, seed: int = seed) -> None:
            generator = random.Random(seed)
            for place in range(number, number + count):
                kind = kinds[place % len(kinds)]
                name = generator.choice(list(kind.reads))
                _attack(world, generator, kind, name, expected[kind.name][name], notes)
                if time.monotonic() > until:
                    return

        ending = world.cage.start(batch).wait(_LIMIT, watched=notes)
        lines = notes.read_text().splitlines() if notes.exists() else []
        open_case: list[str] = []
        for line in lines:
            found = json.loads(line)
            if len(found) == 2:
                open_case = found
                continue
            open_case = []
            tally.add(*found)
            number += 1
        if open_case:  # the process ended within a case
            bad = "hung" if ending.how == "hung" else "unclear"
            tally.add(open_case[0], bad, open_case[1], f"{ending.how} {ending.error} {ending.said[-1500:]}")
            number += 1
        else:
            assert ending.how == "done", ending
        if world.cage.is_touched() or world.pools() != pools:
            tally.add("files: what lies beside", "escaped", f"{lines[-_BATCH:]}")


def _attack(world: World, rng: random.Random, kind: Kind, name: str, expected: Any, notes: Path) -> None:
    """One case, in an attacked process; its outcome is noted."""
    case = world.cage.fresh(kind.start)
    os.chdir(case)  # the one before is gone
    files = kind.find(case)
    path = rng.choice(files)
    same = [
        other for other in files if other.suffix == path.suffix and other != path and other.stat().st_size
    ]
    forged = (
        kind.forges and rng.random() < 0.25 and path.suffix in (".json", ".npy") and bool(path.stat().st_size)
    )
    if kind.forges and rng.random() < 0.5 and name not in ("verify", "reopen"):
        later = _LATER.get(path.relative_to(case / "cache").parts[0], ())
        remove_stages(case / "cache", [stage for stage in later if name != "extend" or stage != "tree"])
    named = {path.name, path.parent.name, *kind.names} - {"case", "cache", ""}
    if path.name == "cache.json":
        named.add("written in cache format")
    label = f"files: {kind.name}" + (", forged" if forged else "")
    before = path.read_bytes()
    if kind.change is not None:
        what = kind.change(rng)
    else:
        what = forge(path, rng) if forged else damage(path, rng, same, world.cage.canary / "precious")
    what = f"{path.relative_to(case)}: {what}, then {name}"
    with open(notes, "a") as file:
        file.write(json.dumps([label, what]) + "\n")
        file.flush()
        said = _Said()
        n_escapes = world.cage.n_escapes()
        with said:
            try:
                ending = Ending("done", json.loads(json.dumps(kind.reads[name]())))
            except BaseException as error:
                message = f"{type(error).__name__}: {error}"
                ours = isinstance(error, CuratedDataError)
                ending = Ending("error", error=message, trace=traceback.format_exc(), is_ours=ours)
        ending.said = "\n".join(said.lines)
        outcome = _outcome(ending, expected, named, kind, name, forged)
        is_same = path.is_file() and _content(path.read_bytes()) == _content(before)
        # What is gone may be yet to come, and what .pools holds is derived, and checked when read.
        is_known = not forged and ".pools" not in path.parts and os.path.lexists(path)
        if name == "verify" and kind.forges and is_known and not is_same and ending.value == []:
            outcome = "different without a word"  # of which `inspect --verify` says that it is whole
        if world.cage.n_escapes() != n_escapes:
            outcome = "escaped"
        text = (
            f"{ending.error[:600]}\n{ending.trace[-2500:]}\nvalue {str(ending.value)[:400]}\n"
            f"for    {str(expected)[:400]}\n{ending.said[-600:]}"
        )
        file.write(json.dumps([label, outcome, what, "" if outcome in GOOD else text]) + "\n")


def _content(data: bytes) -> object:
    """The value of a JSON text, which may be spelled in several ways; of all else the bytes."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return data


class _Said(logging.Handler):
    """What the package logs within a block."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> None:
        logging.getLogger("curated_data").addHandler(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("curated_data").removeHandler(self)


def _outcome(ending: Ending, expected: Any, named: set[str], kind: Kind, name: str, forged: bool) -> str:
    if ending.how == "error":
        is_clear = ending.is_ours and "\n" not in ending.error.strip() and len(ending.error) < 1500
        return "one clear error" if is_clear and any(one in ending.error for one in named) else "unclear"
    if ending.value == expected:
        return "equal"
    if name == "verify":
        return "one clear error" if any(one in str(ending.value) for one in named) else "unclear"
    judged = kind.judge(name, ending.value, expected, ending)
    if judged is not None:
        return judged
    return "taken as it is" if forged else "different without a word"
