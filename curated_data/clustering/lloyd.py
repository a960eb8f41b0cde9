"""Lloyd's iterations: assign every row to its nearest centroid, move centroids to the means, repeat."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from curated_data import parallel
from curated_data.clustering.bounds import Bounds, widened
from curated_data.clustering.checkpoint import Arrays
from curated_data.clustering.nearest import Centroids, map_into, squared_distances
from curated_data.clustering.neighbourhoods import (
    FEW,
    Neighbourhoods,
    coarse_centres,
    loses_little,
    sampled_loss,
)
from curated_data.clustering.rows import BLOCK, Rows, blocks, rows_at


@dataclass
class Fit:
    """A finished run over the rows of all ranks, the same on each; centroids are centred like the rows."""

    centroids: torch.Tensor
    assignment: np.ndarray
    squared: np.ndarray
    inertia: float
    n_iter: int
    n_repaired: int
    exact: bool  # False: some rows may have missed their nearest centroid

    def state(self) -> Arrays:
        """The fit as arrays, to be saved."""
        numbers = np.array([self.inertia, self.n_iter, self.n_repaired, self.exact], np.float64)
        return {
            "centroids": self.centroids.cpu().numpy(), "assignment": self.assignment, "squared": self.squared,
            "numbers": numbers,
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: Arrays, device: torch.device) -> Self:
        """The fit from its `state`."""
        inertia, n_iter, n_repaired, exact = state["numbers"].tolist()
        return cls(
            torch.from_numpy(state["centroids"]).to(device), state["assignment"], state["squared"],
            inertia, int(n_iter), int(n_repaired), bool(exact),
        )  # fmt: skip


class Lloyd:
    """Lloyd's iterations over this rank's rows.

    They are exact without computing every distance again: each row has the score of its own centroid, and a
    lower bound on the score of all others. When some centroids have moved, a row is only compared with those,
    or with all if its own score has risen above the bound. From `MANY` centroids on, the first iterations
    only search each row's neighbourhood, as long as many move, and exact ones then correct what these missed.
    """

    def __init__(
        self,
        rows: Rows,
        centroids: torch.Tensor,
        world: int = 1,
        first: int = 0,
        weight: np.ndarray | None = None,
    ) -> None:
        self.rows, self.centroids, self.world, self.first = rows, centroids.clone(), world, first
        self.weight = weight  # (n,) float64 of the rows; None: each counts once
        self.k = len(centroids)
        n = len(rows)
        self.bounds = Bounds(n)
        self.sums = np.zeros((self.k, rows.dimension))
        self.counts = np.zeros(self.k, np.int64)
        self.norms = map_into(
            rows, np.empty(n, np.float32), lambda start, stop, block: block.square().sum(1).cpu().numpy()
        )
        self.done, self.before, self.inertia, self.n_repaired = 0, np.inf, np.inf, 0
        self.near: Neighbourhoods | None = None
        self.exact = False  # whether the exact iterations have begun

    def run(
        self,
        n_iter: int,
        tol: float,
        *,
        rough: bool,
        exact: bool,
        note: Callable[[str], None],
        keep: Callable[[Callable[[], Arrays]], None],
    ) -> Fit:
        """Iterate until the inertia falls by less than a share `tol`.

        Args:
            rough: begin with iterations within neighbourhoods.
            exact: always continue with exact iterations; otherwise only if neighbourhoods miss too much.
            note: called with a status after each iteration.
            keep: called with `self.state` after each iteration.
        """
        if rough and not self.exact:
            if self.near is None:
                self.near = Neighbourhoods(self.rows, coarse_centres(self.centroids), world=self.world)
            near = self.near
            if self.inertia == np.inf:
                self.inertia = self._approach(near, None)
            self._iterate(lambda moved: self._approach(near, moved), n_iter - exact, tol, note, keep)
        if exact or not rough or self.exact or not self._loses_little():
            if not self.exact:
                self.before, self.inertia = self.inertia, self._assign(None)
                self.exact = True
            self._iterate(self._assign, n_iter, tol, note, keep)
        squared = squared_distances(self.rows, self.centroids, self.bounds.assignment)
        assignment = np.concatenate(self._gather(self.bounds.assignment))
        squared = np.concatenate(self._gather(squared))
        weight = None if self.weight is None else np.concatenate(self._gather(self.weight))
        inertia = float(squared.sum() if weight is None else (squared * weight).sum())
        return Fit(
            self.centroids, assignment, squared.astype(np.float32), inertia, self.done, self.n_repaired,
            self.exact,
        )  # fmt: skip

    def state(self) -> Arrays:
        """All that later iterations depend on, for the rows of all ranks; all ranks call it together."""
        progress = (self.done, self.before, self.inertia, self.n_repaired, self.exact)
        state = {
            "centroids": self.centroids.cpu().numpy(), "sums": self.sums, "counts": self.counts,
            "progress": np.array(progress, np.float64),
        }  # fmt: skip
        if self.near is not None and self.near.seen is not None:
            state["centres"], state["seen"] = self.near.centres.cpu().numpy(), self.near.seen
        for name in ("assignment", "own", "other"):
            state[name] = np.concatenate(self._gather(getattr(self.bounds, name)))
        return state

    def restore(self, state: Arrays) -> None:
        """Continue from a state."""
        self.centroids = torch.from_numpy(state["centroids"]).to(self.centroids.device)
        self.sums, self.counts = state["sums"], state["counts"]
        if "centres" in state:
            centres = torch.from_numpy(state["centres"]).to(self.centroids.device)
            self.near = Neighbourhoods(self.rows, centres, state["seen"], self.world)
        for name in ("assignment", "own", "other"):
            setattr(self.bounds, name, state[name][self.first : self.first + len(self.rows)].copy())
        self.done, self.before, self.inertia, self.n_repaired, self.exact = (
            kind(value) for kind, value in zip((int, float, float, int, bool), state["progress"], strict=True)
        )

    def _iterate(
        self,
        assign: Callable[[np.ndarray], float],
        n_iter: int,
        tol: float,
        note: Callable[[str], None],
        keep: Callable[[Callable[[], Arrays]], None],
    ) -> None:
        """Alternate means and assignments, starting from the current assignment."""
        while self.done < n_iter and (
            self.before - self.inertia > tol * self.before or self.before == np.inf
        ):
            moved = self._update()
            if not moved.any():
                break
            self.done += 1
            self.before, self.inertia = self.inertia, assign(moved)
            note(f"iteration {self.done}, inertia {self.inertia:.5g}")
            keep(self.state)

    def _approach(self, near: Neighbourhoods, moved: np.ndarray | None) -> float:
        """Assign every row to the nearest centroid in its neighbourhood; returns the inertia."""
        if moved is not None and moved.sum() <= FEW:
            return self._assign(moved)
        before = self.bounds.assignment.copy()
        near.look(self.centroids, moved, self.bounds)
        self._move_sums(before)
        return self._inertia()

    def _loses_little(self) -> bool:
        n = int(self._sum(np.array([len(self.rows)]))[0])
        loss = sampled_loss(self.rows, self.centroids, self.bounds.assignment, first=self.first, n=n)
        return loses_little(self._sum(loss))

    def _assign(self, moved: np.ndarray | None) -> float:
        """Assign every row to its nearest centroid, knowing which moved (None: all); returns the inertia."""
        bounds, before = self.bounds, self.bounds.assignment.copy()
        if moved is not None and moved.sum() <= 0.5 * self.k:
            self._compare_moved(moved)
        elif self.near is None or not self.near.look_exactly(self.centroids, bounds):
            every, everything = np.arange(self.k), Centroids(self.centroids)
            self.rows.map(
                lambda start, stop, block: bounds.compare(slice(start, stop), block, every, everything)
            )
        self._move_sums(before)
        return self._inertia()

    def _compare_moved(self, moved: np.ndarray) -> None:
        """Compare every row with the centroids that have moved, and with all where that leaves it unsure."""
        ids, every, everything = widened(moved), np.arange(self.k), Centroids(self.centroids)
        some = Centroids(rows_at(self.centroids, ids))

        def look(start: int, stop: int, block: torch.Tensor) -> None:
            unsure = self.bounds.compare_moved(slice(start, stop), block, ids, some)
            if len(unsure):
                self.bounds.compare(unsure + start, rows_at(block, unsure), every, everything)

        self.rows.map(look)

    def _inertia(self) -> float:
        squared = self.bounds.own.astype(np.float64) + self.norms
        if self.weight is not None:
            squared *= self.weight
        return float(self._sum(np.array([squared.sum()]))[0])

    def _move_sums(self, before: np.ndarray) -> None:
        """Update sums and counts over all ranks to the new assignment, by the rows that changed."""
        now = self.bounds.assignment
        changed = np.flatnonzero(before != now)
        sums, counts = np.zeros_like(self.sums), np.zeros_like(self.counts)
        for assignment, sign in ((now, 1), (before, -1)):
            at, clusters = changed, assignment[changed]
            if clusters.min(initial=0) < 0:  # at first, no row has a cluster
                at = changed[clusters >= 0]
                clusters = assignment[at]
            counts += sign * np.bincount(clusters, minlength=self.k)
            _add_segments(sums, self.rows, at, clusters, sign, self.weight)
        self.sums += self._sum(sums)
        self.counts += self._sum(counts)

    def _mass(self) -> np.ndarray:
        """The sum of weights of each cluster, summed afresh: differences leave a trace in emptied ones."""
        if self.weight is None:
            return self.counts
        return self._sum(np.bincount(self.bounds.assignment, self.weight, self.k).astype(np.float64))

    def _update(self) -> np.ndarray:
        """Move centroids to the means, empty clusters' to far rows; returns which moved, (k,) bool."""
        mass = self._mass()
        means = self.sums / np.where(mass > 0, mass, 1)[:, None]
        frame = self.rows.frame
        if frame.normalise:
            middle = 0.0 if frame.mean is None else frame.mean  # of unit rows
            means = means * frame.scale + middle
            length = np.linalg.norm(means, axis=1, keepdims=True)
            means = np.divide(means, length, out=means, where=length > 0)
            means = (means - middle) / frame.scale
        new = torch.from_numpy(means.astype(np.float32)).to(self.centroids.device)
        still = mass == 0
        if frame.normalise:
            still |= length[:, 0] == 0  # unit rows that cancel out have no mean direction
        still = torch.from_numpy(still).to(new.device)
        new[still] = self.centroids[still]
        self._repair(new)
        moved = (new != self.centroids).any(1).cpu().numpy()
        self.centroids = new
        return moved

    def _repair(self, new: torch.Tensor) -> None:
        """Move the centroid of each empty cluster to one of the rows farthest from theirs."""
        empty = np.flatnonzero(self.counts == 0)
        if not len(empty):
            return
        squared = self.bounds.own + self.norms
        far = _largest(squared, len(empty))
        far = far[squared[far] > 1e-5 * self.norms[far]]  # at distance zero, it would duplicate a centroid
        gap = np.concatenate(self._gather(squared[far]))
        found = np.concatenate(self._gather(self.rows.take(far).cpu().numpy()))
        order = np.argsort(-gap, kind="stable")[: len(empty)]
        filled = torch.from_numpy(empty[: len(order)]).to(new.device)
        new[filled] = torch.from_numpy(found[order]).to(new.device)
        self.n_repaired += len(order)

    def _sum(self, array: np.ndarray) -> np.ndarray:
        return array if self.world == 1 else parallel.all_reduce(array)

    def _gather(self, array: np.ndarray) -> list[np.ndarray]:
        return [array] if self.world == 1 else parallel.all_gather(array)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """The places of the `count` largest values, in descending order, the first on ties, in linear time."""
    if count < len(values):
        some = np.flatnonzero(values >= np.partition(values, len(values) - count)[len(values) - count])
    else:
        some = np.arange(len(values))
    return some[np.argsort(-values[some], kind="stable")[:count]]


def _add_segments(
    sums: np.ndarray,
    rows: Rows,
    at: np.ndarray,
    clusters: np.ndarray,
    sign: int,
    weight: np.ndarray | None = None,
) -> None:
    """Add `sign` times the rows at `at`, times their weights, to the sums of their clusters, in float64.

    They are added in pieces of a block of the rows in the order of their clusters, whether they are read in
    that order from memory or block by block from a disk: the sums are the same to the last bit.
    """
    order = _stable_order(clusters, rows.device)
    clusters = clusters[order]
    size = BLOCK if rows.device.type == "cpu" else 16 * BLOCK
    begins = np.arange(len(at)) % size == 0
    begins[1:] |= clusters[1:] != clusters[:-1]
    first = np.flatnonzero(begins)
    edges = [*first.searchsorted(np.arange(0, len(at), size)).tolist(), len(first)]
    if rows.held:
        at = at[order]
        # A few pieces at a time: their sums may be as large as the rows.
        for begin, end in blocks(len(edges) - 1, 4 * torch.get_num_threads()):
            chunk = at[begin * size : end * size]

            def one(
                start: int, stop: int, block: torch.Tensor, begin: int = begin, chunk: np.ndarray = chunk
            ) -> np.ndarray:
                piece = begin + start // size
                block = _weighed(block, weight, chunk[start:stop])
                return segment_sums(block, first[edges[piece] : edges[piece + 1]] - piece * size)

            for piece, partial in enumerate(rows.map(one, size, chunk), begin):
                sums[clusters[first[edges[piece] : edges[piece + 1]]]] += sign * partial
        return
    segment_of = np.empty(len(at), np.int64)
    segment_of[order] = np.cumsum(begins) - 1
    found = np.zeros((len(first), rows.dimension))

    def grouped(
        start: int, stop: int, block: torch.Tensor, begin: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        of = segment_of[begin + start : begin + stop]
        inside = _stable_order(of, rows.device)
        segments = of[inside]
        starts = np.flatnonzero(np.concatenate([[True], segments[1:] != segments[:-1]]))
        block = _weighed(block, weight, at[begin + start : begin + stop])
        return segments[starts], starts, rows_at(block, inside).cpu().numpy()

    for begin, end in blocks(len(at), 4 * torch.get_num_threads() * size):
        for ids, starts, values in rows.map(functools.partial(grouped, begin=begin), size, at[begin:end]):
            # One row after the other, as within a piece: each sum continues from where it stands.
            going_on = np.insert(values.astype(np.float64), starts, found[ids], axis=0)
            found[ids] = np.add.reduceat(going_on, starts + np.arange(len(starts)), axis=0)
    for piece in range(len(edges) - 1):
        own = slice(edges[piece], edges[piece + 1])
        sums[clusters[first[own]]] += sign * found[own]


def _weighed(block: torch.Tensor, weight: np.ndarray | None, at: np.ndarray) -> torch.Tensor:
    """Rows times their weights, in float64; as they are without weights."""
    if weight is None:
        return block
    return block.double() * torch.from_numpy(weight[at]).to(block.device)[:, None]


def _stable_order(values: np.ndarray, device: torch.device) -> np.ndarray:
    """`values.argsort(kind="stable")`; a device sorts a million in a few milliseconds."""
    if device.type == "cpu":
        return np.argsort(values, kind="stable")
    return torch.from_numpy(values).to(device).argsort(stable=True).cpu().numpy()


def segment_sums(values: torch.Tensor, first: np.ndarray) -> np.ndarray:
    """Sums of the runs of rows that begin at `first`, (len(first), d) float64, repeatable on any device."""
    if values.device.type == "cpu":
        return np.add.reduceat(values.numpy(), first, axis=0, dtype=np.float64)
    lengths = torch.from_numpy(np.diff(first, append=len(values))).to(values.device)
    return torch.segment_reduce(values.double(), "sum", lengths=lengths, axis=0).cpu().numpy()
