"""A level too large for one k-means: groups first, then every group apart."""

from typing import Any

import numpy as np

from curated_data import distributed
from curated_data.clustering.checkpoint import Checkpoint
from curated_data.clustering.kmeans import uncentred
from curated_data.clustering.rows import Rows

_PORTIONS = 256  # groups are handed out and kept in at most so many portions, however many there are


def split_level(
    rows: Rows,
    level: Any,
    seeds: np.random.SeedSequence,
    run_kmeans: Any,
    saved: Checkpoint,
    name: str,
) -> dict[str, np.ndarray]:
    """k-means into `level.n_clusters` groups, each into `level.n_splits`; ranks share the groups by size.

    Returns:
        (k, d) centroids, empty ones dropped, (n,) assignment, (n,) squared distances, on every rank.
    """
    n_groups, n_splits = level.n_clusters, level.n_splits
    first, second = seeds.spawn(2)
    groups = saved.load(f"{name}.groups")
    if groups is None:
        groups = {"assignment": run_kmeans(rows, n_groups, first).assignment}
        if distributed.rank() == 0:
            saved.save(f"{name}.groups", groups)
    group_of = groups["assignment"]
    order = np.argsort(group_of, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(group_of, minlength=n_groups))])
    children = second.spawn(n_groups)
    portions = np.array_split(np.arange(n_groups), min(_PORTIONS, n_groups))

    loads = np.array([start[p[-1] + 1] - start[p[0]] for p in portions])
    there = set(saved.names())
    done = [f"{name}.portion-{i:03d}" in there for i in range(len(portions))]
    owner = _by_size(np.where(done, 0, loads), distributed.world_size())
    parts: list[dict[str, np.ndarray]] = []
    for i, portion in enumerate(portions):
        piece = f"{name}.portion-{i:03d}"
        if done[i]:
            loaded = saved.load(piece)  # by all ranks together, kept by one
            assert loaded is not None
            if distributed.rank() == 0:
                parts.append(loaded)
        elif owner[i] == distributed.rank():
            part = _split(rows, portion, order, start, n_splits, children, run_kmeans)
            saved.save(piece, part)
            parts.append(part)
    return _together(rows, parts, n_groups * n_splits)


def _split(
    rows: Rows,
    portion: np.ndarray,
    order: np.ndarray,
    start: np.ndarray,
    n_splits: int,
    children: list[np.random.SeedSequence],
    run_kmeans: Any,
) -> dict[str, np.ndarray]:
    """Each group of a portion into its own clusters, by this process alone."""
    slots, centroids, at, assignment, squared = [], [], [], [], []
    for g in portion:
        members = order[start[g] : start[g + 1]]
        if not len(members):
            continue
        part = rows.subset(members)
        fit = run_kmeans(part, min(n_splits, len(members)), children[g], alone=True)
        slots.append(g * n_splits + np.arange(len(fit.centroids)))
        centroids.append(uncentred(fit.centroids, rows))
        at.append(members)
        assignment.append(g * n_splits + fit.assignment)
        squared.append(fit.squared)
    d = rows.dimension
    return {
        "slots": np.concatenate([np.empty(0, np.int64), *slots]),
        "centroids": np.concatenate([np.empty((0, d), np.float32), *centroids]),
        "at": np.concatenate([np.empty(0, np.int64), *at]),
        "assignment": np.concatenate([np.empty(0, np.int64), *assignment]),
        "squared": np.concatenate([np.empty(0, np.float32), *squared]),
    }


def _together(rows: Rows, parts: list[dict[str, np.ndarray]], n_slots: int) -> dict[str, np.ndarray]:
    """All ranks' portions as one level: slots that hold no row are dropped, the others numbered in order."""
    empty = _split(rows, np.empty(0, np.int64), np.empty(0), np.empty(0), 1, [], None)
    every = {
        key: np.concatenate(distributed.all_gather(np.concatenate([empty[key], *(p[key] for p in parts)])))
        for key in empty
    }
    assignment, squared = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
    assignment[every["at"]], squared[every["at"]] = every["assignment"], every["squared"]
    filled = np.bincount(assignment, minlength=n_slots) > 0
    number = np.cumsum(filled) - 1
    by_slot = np.argsort(every["slots"])
    kept = by_slot[filled[every["slots"][by_slot]]]
    return {"centroids": every["centroids"][kept], "assignment": number[assignment], "squared": squared}


def _by_size(loads: np.ndarray, n_owners: int) -> np.ndarray:
    """Who takes which load: the largest first, each to whoever has least."""
    owner, busy = np.empty(len(loads), np.int64), np.zeros(n_owners)
    for i in np.argsort(-loads, kind="stable"):
        owner[i] = busy.argmin()
        busy[owner[i]] += loads[i]
    return owner
