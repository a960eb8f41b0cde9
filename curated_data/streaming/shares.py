"""How a stream is divided among parts, exactly: after any number of items, each part has had its share.

The sequence is Tijdeman's (The chairman assignment problem, Discrete Mathematics 32, 1980): after t items,
part i of k with weight w_i has had w_i t of them, within 1 - 1 / (2k - 2), the best that is possible. No dice
are thrown, so shares do not wander off as they do when each item's part is drawn at random.

Weights are ratios of whole numbers, so the sequence is periodic, and the part of any item and its place
within that part are found by a look-up. Where weights change, or the period is long, there is `changing`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

_LONGEST = 1 << 16


@dataclass(frozen=True)
class Pattern:
    """One period of a sequence of parts.

    Attributes:
        part: (period,) the part of each item.
        place: (period,) how many items of that part come before it.
        count: (k,) items of each part in a period.
    """

    part: np.ndarray
    place: np.ndarray
    count: np.ndarray

    def at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The parts of items `start` to `stop`, and the place of each item within its part."""
        period, within = np.divmod(np.arange(start, stop), len(self.part))
        part = self.part[within]
        return part, period * self.count[part] + self.place[within]

    def before(self, item: int) -> np.ndarray:
        """(k,) how many items of each part come before an item."""
        period, within = divmod(item, len(self.part))
        return period * self.count + np.bincount(self.part[:within], minlength=len(self.count))


def pattern(weights: Sequence[Fraction]) -> Pattern | None:
    """The sequence for some weights, at least one of which is above zero; only their ratios count.

    None where it repeats only after more than 65,536 items.
    """
    shares = [weight / sum(weights) for weight in weights]
    period = math.lcm(*(share.denominator for share in shares))
    return None if period > _LONGEST else _tijdeman(tuple(int(share * period) for share in shares))


@lru_cache(maxsize=64)
def _tijdeman(counts: tuple[int, ...]) -> Pattern:
    """In whole numbers: with slack = 1 - 1 / (2k - 2), all times 2k - 2 and the period."""
    period, scale = sum(counts), 2 * max(sum(count > 0 for count in counts), 2) - 2
    used = [i for i, count in enumerate(counts) if count]
    part, place = np.empty(period, np.int64), np.empty(period, np.int64)
    given = [0] * len(counts)
    for item in range(period):
        best, best_due = -1, (0, 1)
        for i in used:
            owed = scale * (counts[i] * (item + 1) - given[i] * period)
            if owed >= period:  # otherwise the part would be ahead of its share by more than the slack
                due = ((scale - 1) * period - owed, counts[i])  # items until it would lag by more
                if best < 0 or due[0] * best_due[1] < best_due[0] * due[1]:
                    best, best_due = i, due
        part[item], place[item] = best, given[best]
        given[best] += 1
    return Pattern(part, place, np.array(counts, np.int64))
