"""A level too large for one k-means, in two passes: first groups, then clusters within each group."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from curated_data import parallel
from curated_data.clustering.checkpoint import Arrays, Checkpoint, Running
from curated_data.clustering.rows import Rows

_PORTIONS = 256  # the most portions in which groups are distributed and saved


def split_level(
    rows: Rows,
    level: Any,
    seeds: np.random.SeedSequence,
    run_kmeans: Any,
    saved: Checkpoint,
    name: str,
    checkpoint_seconds: float = 300.0,
    note: Callable[[str], None] = lambda text: None,
) -> Arrays:
    """k-means into `level.n_clusters` groups, then each into `level.n_splits`; ranks share the groups.

    Returns:
        (k, d) centroids of the clusters that are not empty, (n,) assignment, (n,) squared distances, on every
        rank.
    """
    n_groups, n_splits = level.n_clusters, level.n_splits
    first, second = seeds.spawn(2)
    groups = saved.load(f"{name}.groups")
    if groups is None:
        running = Running(saved, f"{name}.running", checkpoint_seconds)
        groups = {"assignment": run_kmeans(rows, n_groups, first, note=note, running=running).assignment}
        if parallel.rank() == 0:
            saved.save(f"{name}.groups", groups)
        running.clear()
    group_of = groups["assignment"]
    order = np.argsort(group_of, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(group_of, minlength=n_groups))])
    children = second.spawn(n_groups)
    portions = np.array_split(np.arange(n_groups), min(_PORTIONS, n_groups))

    loads = np.array([start[p[-1] + 1] - start[p[0]] for p in portions])
    there = set(saved.names())
    pieces = [f"{name}.portion-{i:03d}" for i in range(len(portions))]
    done = [piece in there for piece in pieces]
    owner = _by_size(np.where(done, 0, loads), parallel.world_size())
    mine = [i for i in range(len(portions)) if not done[i] and owner[i] == parallel.rank()]
    parts: list[Arrays] = []
    begun: dict[int, tuple[Running, Arrays]] = {}
    for i, piece in enumerate(pieces):  # all ranks load what is saved together, and one keeps it
        running = Running(saved, f"{piece}.running", checkpoint_seconds, alone=True)
        loaded = saved.load(piece) if done[i] else running.load(there)
        if loaded is not None and done[i] and parallel.rank() == 0:
            parts.append(loaded)
        elif loaded is not None and i in mine:
            begun[i] = running, loaded
    for count, i in enumerate(mine, 1):
        if i in begun:
            running, part = begun.pop(i)
        else:
            running = Running(saved, f"{pieces[i]}.running", checkpoint_seconds, alone=True)
            part = _nothing(rows)
        part = _split(rows, portions[i], order, start, n_splits, children, run_kmeans, running, part)
        saved.save(pieces[i], part)
        running.clear()
        parts.append(part)
        note(f"portion {count} of {len(mine)}")
    return _together(rows, parts, n_groups * n_splits)


def _split(
    rows: Rows,
    portion: np.ndarray,
    order: np.ndarray,
    start: np.ndarray,
    n_splits: int,
    children: list[np.random.SeedSequence],
    run_kmeans: Any,
    running: Running,
    begun: Arrays,
) -> Arrays:
    """Cluster each group of a portion, in this process alone, continuing after those in `begun`."""
    parts = [begun]
    after = int(begun["last"][0]) if "last" in begun else -1
    for g in portion[portion > after]:
        members = order[start[g] : start[g + 1]]
        if len(members):
            fit = run_kmeans(rows.subset(members), min(n_splits, len(members)), children[g], alone=True)
            parts.append(
                {
                    "slots": g * n_splits + np.arange(len(fit.centroids)),
                    "centroids": rows.frame.outside(fit.centroids),
                    "at": members,
                    "assignment": g * n_splits + fit.assignment,
                    "squared": fit.squared,
                }
            )
        running.offer(partial(_up_to, g, parts))
    return _joined(parts)


def _up_to(g: int, parts: list[Arrays]) -> Arrays:
    """The results of a portion's groups up to group g."""
    return _joined(parts) | {"last": np.array([g])}


def _nothing(rows: Rows) -> Arrays:
    """The result for no groups."""
    ids, d = np.empty(0, np.int64), rows.dimension
    none = np.empty(0, np.float32)
    return {
        "slots": ids,
        "centroids": np.empty((0, d), rows.frame.dtype),
        "at": ids,
        "assignment": ids,
        "squared": none,
    }


def _joined(parts: list[Arrays]) -> Arrays:
    return {
        key: np.concatenate([part[key] for part in parts])
        for key in ("slots", "centroids", "at", "assignment", "squared")
    }


def _together(rows: Rows, parts: list[Arrays], n_slots: int) -> Arrays:
    """Join the portions of all ranks to one level; empty slots are dropped, the others numbered in order."""
    mine = _joined([_nothing(rows), *parts])
    every = {key: np.concatenate(parallel.all_gather(array)) for key, array in mine.items()}
    assignment, squared = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
    assignment[every["at"]], squared[every["at"]] = every["assignment"], every["squared"]
    filled = np.bincount(assignment, minlength=n_slots) > 0
    number = np.cumsum(filled) - 1
    by_slot = np.argsort(every["slots"])
    kept = by_slot[filled[every["slots"][by_slot]]]
    return {"centroids": every["centroids"][kept], "assignment": number[assignment], "squared": squared}


def _by_size(loads: np.ndarray, n_owners: int) -> np.ndarray:
    """The owner of each load: the largest first, each to the owner with the least so far."""
    owner, busy = np.empty(len(loads), np.int64), np.zeros(n_owners)
    for i in np.argsort(-loads, kind="stable"):
        owner[i] = busy.argmin()
        busy[owner[i]] += loads[i]
    return owner
