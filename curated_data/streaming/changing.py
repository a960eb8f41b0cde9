"""How a stream is divided among parts whose weights change, exactly, and at any place by itself.

What the weights owe a part after n items is their integral. `Changing` gives every part, after any number of
items, what it is owed rounded down or up: within less than one, for any number of parts. That such sequences
exist is Tijdeman's theorem (The chairman assignment problem, Discrete Mathematics 32, 1980), which allows
weights of each item's own; to open one anywhere it is cut into blocks that are found independently.

**Within a block.** The j-th item of a part may come as soon as more than j - 1 are owed and must have come
when j are. Among the items that may come the one that is due first is taken, which keeps all times if any
sequence does (Jackson's rule for jobs of unit length), and one does if no span of items is asked for more
than its length (Hall's condition).

**Between blocks.** At the end T of a block a part is owed c + f items, 0 <= f < 1; those with f > 0 have an
item that is begun. As many of these as the sum of all f are counted before T and the others after it, so that

(1) among those that might come first, however many of them, are at least floor(the sum of their f), and
(2) among those that are due first, however many of them, are at least floor(the sum of their f).

Such a choice exists: the two chains of sets make a network's matrix, whose bounds f itself satisfies. It is
found in the order of (1), by taking, whenever the sum of f reaches a whole number, the one that is due first.
With (2), Hall's condition holds from T on: let A be the parts that have something due by n. They are owed at
most n - T between T and n, so what they are due, without c, is at most n - T + f(A), as a whole number at
most n - T + floor(f(A)); and at least floor(f(A)) of their begun items came before T. With (1) it holds up to
T in the same way. Spans inside a block ask for no more than is owed in them. A block is so long that every
part is owed at least one item in it, so that no item is begun at both of its ends.
"""

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from curated_data.streaming.shares import Pattern, pattern

_BLOCK = 256  # items, or as many as the smallest share needs


def divided(weights: Mapping[int, Sequence[Fraction]], items_per_step: int) -> "Pattern | Changing":
    """The sequence for some weights, see `Changing`; it repeats if they stay and are of few digits."""
    repeated = pattern(weights[0]) if len(weights) == 1 or len(weights[0]) == 1 else None
    return Changing(weights, items_per_step) if repeated is None else repeated


class _Block(NamedTuple):
    before: list[int]  # items of each part
    part: np.ndarray  # (n,) of each item
    place: np.ndarray  # (n,) how many items of its part come before it, in the whole sequence
    after: list[int]


class Changing:
    """A sequence of parts that follows weights which change.

    Args:
        weights: of each part, above zero, by the step from which they hold; between steps they change
            linearly, after the last they stay. Where their sum is below one, only so much of a step's items
            is divided here.
        items_per_step: of a step in which the weights sum to one. Within a step the weights are their mean
            over it.
    """

    def __init__(self, weights: Mapping[int, Sequence[Fraction]], items_per_step: int) -> None:
        self._items = items_per_step
        self._steps = sorted(weights)
        values = [weights[step] for step in self._steps]
        spans = [after - step for step, after in zip(self._steps, self._steps[1:], strict=False)]
        # All that is owed at whole steps is a whole multiple of one over this.
        denominators = (share.denominator for row in values for share in row)
        self._scale = 2 * math.lcm(*spans) * math.lcm(*denominators)
        # (start, slope, bend) of each part from each step on: what it is owed, times the scale.
        self._owed_from: list[list[tuple[int, int, int]]] = []
        start = [0] * len(values[0])
        for row, following, span in zip(values, [*values[1:], values[-1]], [*spans, 1], strict=True):
            slopes = [int(share * self._scale) for share in row]
            bends = [
                int((then - now) * self._scale / (2 * span)) for now, then in zip(row, following, strict=True)
            ]
            self._owed_from.append(list(zip(start, slopes, bends, strict=True)))
            start = self._owed(self._steps[len(self._owed_from) - 1] + span)
        self._least = [min(column) for column in zip(*values, strict=True)]
        self._least_sum = min(sum(row) for row in values)
        self._length = max(_BLOCK, *(math.ceil(sum(row) / min(row)) for row in values))
        self._kept: dict[int, _Block] = {}  # those of the latest call

    def at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The parts of items `start` to `stop`, and the place of each item within its part."""
        first, last = start // self._length, max(start, stop - 1) // self._length
        kept: dict[int, _Block] = {}
        for number in range(first, last + 1):
            before = kept.get(number - 1) or self._kept.get(number - 1)
            kept[number] = self._kept.get(number) or self._block(number, before and before.after)
        self._kept = kept
        here = slice(start - first * self._length, stop - first * self._length)
        part = np.concatenate([block.part for block in kept.values()])[here]
        return part, np.concatenate([block.place for block in kept.values()])[here]

    def before(self, item: int) -> np.ndarray:
        """(k,) how many items of each part come before an item."""
        number, within = divmod(item, self._length)
        if within == 0:
            return np.array(self._counts_before(item), np.int64)
        self.at(item - 1, item)
        block = self._kept[number]
        return np.array(block.before) + np.bincount(block.part[:within], minlength=len(block.before))

    def _block(self, number: int, before: list[int] | None) -> _Block:
        start, n = number * self._length, self._length
        before = before or self._counts_before(start)
        after = self._counts_before(start + n)
        arriving: list[list[tuple[int, int]]] = [[] for _ in range(n)]
        for i, (floors, ceilings) in enumerate(zip(*self._owed_after_each(start, n), strict=True)):
            may, must = 0, 0
            for j in range(before[i] + 1, after[i] + 1):
                may, must = bisect_left(ceilings, j, may), bisect_left(floors, j, must)
                arriving[may].append((must, i))
        part, place = np.empty(n, np.int64), np.empty(n, np.int64)
        given = list(before)
        waiting: list[tuple[int, int]] = []
        for item in range(n):
            for job in arriving[item]:
                heapq.heappush(waiting, job)
            i = heapq.heappop(waiting)[1]
            part[item], place[item] = i, given[i]
            given[i] += 1
        return _Block(before, part, place, after)

    def _counts_before(self, item: int) -> list[int]:
        """How many items of each part come before one that begins a block."""
        step = self._step_of(item)
        values, unit = self._numerators(step, item)
        counts = [value // unit for value in values]
        begun = [
            (self._when(i, counts[i]), self._when(i, counts[i] + 1), i, value % unit)
            for i, value in enumerate(values)
            if value % unit
        ]
        waiting: list[tuple[Fraction, int]] = []
        owed, chosen = 0, 0
        for _, due, i, fraction in sorted(begun):
            heapq.heappush(waiting, (due, i))
            owed += fraction
            while owed >= (chosen + 1) * unit:
                counts[heapq.heappop(waiting)[1]] += 1
                chosen += 1
        return counts

    def _owed_after_each(self, start: int, n: int) -> tuple[list[list[int]], list[list[int]]]:
        """What every part is owed after each of n items from `start` on, rounded down and up."""
        n_parts = len(self._owed_from[0])
        floors: list[list[int]] = [[] for _ in range(n_parts)]
        ceilings: list[list[int]] = [[] for _ in range(n_parts)]
        item, stop, step = start + 1, start + n + 1, self._step_of(start)
        while item < stop:
            end = min(stop, self._items * sum(self._owed(step + 1)) // self._scale + 1)
            if item < end:
                values, unit = self._numerators(step, item)
                following, _ = self._numerators(step, item + 1)
                for i, (value, other) in enumerate(zip(values, following, strict=True)):
                    rising = range(value, value + (other - value) * (end - item), other - value)
                    floors[i] += [value // unit for value in rising]
                    ceilings[i] += [-(-value // unit) for value in rising]
                item = end
            step += 1
        return floors, ceilings

    def _numerators(self, step: int, item: int) -> tuple[list[int], int]:
        """What every part is owed after items up to one in a step, as a numerator over a common unit."""
        start, end = self._owed(step), self._owed(step + 1)
        rises = [after - before for before, after in zip(start, end, strict=True)]
        rise, over = sum(rises), item * self._scale - self._items * sum(start)
        return [
            self._items * owed * rise + over * own for owed, own in zip(start, rises, strict=True)
        ], self._scale * rise

    def _owed(self, step: int) -> list[int]:
        """What every part is owed at a step, in steps' worth of items, times the scale."""
        segment = bisect_right(self._steps, step, hi=len(self._owed_from)) - 1
        after = step - self._steps[segment]
        return [start + after * (slope + after * bend) for start, slope, bend in self._owed_from[segment]]

    def _step_of(self, item: int) -> int:
        """The step in which an item is; of one at the border of two, the later."""
        steps = range(int(Fraction(item, self._items) / self._least_sum) + 2)
        wanted = item * self._scale
        return bisect_right(steps, wanted, key=lambda step: self._items * sum(self._owed(step))) - 1

    def _when(self, part: int, count: int) -> Fraction:
        """The step, and the fraction of it, at which a part is owed so many items."""
        steps, wanted = range(int(Fraction(count, self._items) / self._least[part]) + 2), count * self._scale
        step = bisect_right(steps, wanted, key=lambda step: self._items * self._owed(step)[part]) - 1
        owed, following = self._owed(step)[part], self._owed(step + 1)[part]
        return step + Fraction(wanted - self._items * owed, self._items * (following - owed))
