"""The order of a stream that mixes several selections by weights.

Like the order of one selection it is a pure function of its settings and of the position: the same on any
number of ranks and workers, and it continues at the next sample after an interruption. Every component has a
stream of its own, which begins another epoch, in another order, where it ends. Which component gives the next
sample follows `shares`, so that after any number of samples each has given what its weight says, within one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache

import numpy as np

from curated_data.cache.artifacts import fingerprint
from curated_data.errors import ConfigError
from curated_data.streaming.order import EpochOrder, LastBatch
from curated_data.streaming.shares import Pattern, pattern, pattern_of_counts, rounded

Weights = Sequence[float] | Mapping[int, Sequence[float]]

_CHUNK = 16  # global batches between which changing weights are held
_LEAST = Fraction(1, 100_000)  # of all weights: patterns resolve shares to 2^-18


@dataclass(frozen=True)
class Part:
    """One component of a `MixtureOrder`.

    Attributes:
        name: for errors and the log.
        order: of its own samples; its batch size does not matter.
        own: whether global batches hold this component alone, instead of mixing it with others.
        first_id: what is added to its ids, so that ids of several pools differ.
    """

    name: str
    order: EpochOrder
    own: bool = False
    first_id: int = 0


_Given = tuple[np.ndarray, np.ndarray]  # batches of each component with own ones, and of the others; samples


@dataclass(frozen=True)
class _Segment:
    """Global batches between which the weights do not change."""

    first: int  # global batch
    given: np.ndarray  # (k,) samples of each component before it
    # Of the components with own batches, and then of all the others together: shares, or numbers of batches.
    batch_shares: list[Fraction] | list[int]
    mixed_shares: list[Fraction] | list[int]  # of samples, in the batches of the others; may be empty

    @property
    def batches(self) -> Pattern:
        return _pattern(self.batch_shares)

    @property
    def mixed(self) -> Pattern:
        return _pattern(self.mixed_shares)


def _pattern(shares: list[Fraction] | list[int]) -> Pattern:
    """Kept for the latest ones, but not made before it is needed: a stream may open at any place."""
    whole = all(isinstance(share, int) for share in shares)
    return pattern_of_counts(shares) if whole else _kept(tuple(shares))  # type: ignore[arg-type]


@lru_cache(maxsize=16)
def _kept(shares: tuple[Fraction, ...]) -> Pattern:
    return pattern(shares)


class MixtureOrder:
    """The global batches of every epoch of a mixture; used as an `EpochOrder` is.

    An epoch is a number of samples: `epoch_size` of them, less what does not fill a global batch. The stream
    continues from one epoch to the next without leaving out any.

    Args:
        parts: the components.
        weights: of the components, positive; or at certain global batches, counted over all epochs,
            `{0: [0.9, 0.1], 100_000: [0.7, 0.3]}`: in between they change linearly, afterwards they stay.
        batch_size: samples of a global batch, over all ranks.
        epoch_size: samples of an epoch.

    Raises:
        ConfigError: no parts, weights that are not positive numbers or not as many as parts, or an epoch that
            is smaller than a global batch.
    """

    last_batch: LastBatch = "drop"

    def __init__(self, parts: Sequence[Part], weights: Weights, *, batch_size: int, epoch_size: int) -> None:
        self.parts = list(parts)
        self.weights = checked_weights(weights, [part.name for part in self.parts])
        if epoch_size < batch_size:
            raise ConfigError(
                f"mixture.epoch_size: {epoch_size} samples do not fill one global batch of {batch_size}"
            )
        self.batch_size = batch_size
        self.n_batches = epoch_size // batch_size
        self.n_samples = self.n_batches * batch_size
        self._mixed = [number for number, part in enumerate(self.parts) if not part.own]
        self._own = [number for number, part in enumerate(self.parts) if part.own]
        self._last_change = max(self.weights)
        self._n_chunks = -(-self._last_change // _CHUNK)  # in which weights change
        self._latest: _Segment | None = None

    @property
    def selection(self) -> np.ndarray:
        """(n,) int64 ids that the mixture can give, ascending and without repeats."""
        ids = [
            part.first_id + np.arange(part.order.selection)
            if isinstance(part.order.selection, int)
            else part.first_id + part.order.selection
            for part in self.parts
        ]
        return np.unique(np.concatenate(ids))

    @cached_property
    def fingerprint(self) -> str:
        """Of everything that determines the order, except the batch size."""
        return fingerprint(
            parts=[[part.name, part.order.fingerprint, part.own, part.first_id] for part in self.parts],
            weights={
                str(batch): [str(weight) for weight in weights] for batch, weights in self.weights.items()
            },
            epoch_batches=self.n_batches,
            changes=2 if self._last_change else None,  # the version of how they are followed
        )

    def batches(self, epoch: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The concatenated global batches `first` to `last` (exclusive) of an epoch: positions, and ids."""
        positions = np.arange(first * self.batch_size, last * self.batch_size)
        component, place = self._places(epoch * self.n_batches + first, epoch * self.n_batches + last)
        ids = np.empty(len(positions), np.int64)
        for number, part in enumerate(self.parts):
            here = np.flatnonzero(component == number)
            if len(here):
                ids[here] = part.first_id + _stream(part.order, int(place[here[0]]), len(here))
        return positions, ids

    def components(self, epoch: int, first: int, last: int) -> np.ndarray:
        """The component's number of each sample of global batches `first` to `last` of an epoch."""
        return self._places(epoch * self.n_batches + first, epoch * self.n_batches + last)[0]

    def spares(self, epoch: int, positions: np.ndarray, n_spares: int) -> np.ndarray:
        """(m, n_spares) ids of the same component to try if the sample at a position cannot be read."""
        low, high = int(positions.min()) // self.batch_size, int(positions.max()) // self.batch_size + 1
        component = self.components(epoch, low, high)[positions - low * self.batch_size]
        found = np.empty((len(positions), n_spares), np.int64)
        for number, part in enumerate(self.parts):
            here = component == number
            found[here] = part.first_id + part.order.spares(epoch, positions[here], n_spares)
        return found

    def given(self, epoch: int, batch: int) -> np.ndarray:
        """(k,) samples of each component before a global batch of an epoch."""
        at = epoch * self.n_batches + batch
        segment = self._segment(at)
        groups = segment.batches.before(at - segment.first)
        given = segment.given.copy()
        given[self._own] += groups[: len(self._own)] * self.batch_size
        if self._mixed and groups[-1]:
            given[self._mixed] += segment.mixed.before(int(groups[-1]) * self.batch_size)
        return given

    def passes(self, epoch: int, batch: int) -> dict[str, float]:
        """How often each component's samples were given before a global batch of an epoch, by its name."""
        given = self.given(epoch, batch)
        return {
            part.name: float(count / part.order.n_samples)
            for part, count in zip(self.parts, given, strict=True)
        }

    def _places(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """For batches counted over all epochs: each sample's component, and its place in its stream."""
        component = np.empty((last - first) * self.batch_size, np.int64)
        place = np.empty_like(component)
        at = first
        while at < last:
            segment = self._segment(at)
            end = min(last, segment.first + _CHUNK) if segment.first < self._last_change else last
            here = slice((at - first) * self.batch_size, (end - first) * self.batch_size)
            component[here], place[here] = self._within(segment, at - segment.first, end - segment.first)
            at = end
        return component, place

    def _within(self, segment: _Segment, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        group, turn = segment.batches.at(first, last)
        component = np.empty((last - first, self.batch_size), np.int64)
        place = turn[:, None] * self.batch_size + np.arange(self.batch_size)
        for number, part in enumerate(self._own):
            component[group == number] = part
        others = np.flatnonzero(group == len(self._own))
        if len(others):
            start = int(turn[others[0]]) * self.batch_size
            stop = start + len(others) * self.batch_size
            kind, place_of_kind = segment.mixed.at(start, stop)
            component[others] = np.asarray(self._mixed)[kind].reshape(-1, self.batch_size)
            place[others] = place_of_kind.reshape(-1, self.batch_size)
        component = component.ravel()
        return component, segment.given[component] + place.ravel()

    def _segment(self, at: int) -> _Segment:
        """The segment that holds a global batch."""
        number = min(at // _CHUNK, self._n_chunks)
        first = number * _CHUNK
        if self._latest is None or self._latest.first != first:
            batches, given = self._before_chunk(number)
            if number < self._n_chunks:
                batches_then, given_then = self._before_chunk(number + 1)
                in_batches = (batches_then - batches).tolist()
                of_mixed = (given_then - given)[self._mixed].tolist() if in_batches[-1] else []
                self._latest = _Segment(first, given, in_batches, of_mixed)
            else:
                weights = self.weights[self._last_change]
                of_mixed = [weights[part] for part in self._mixed]
                groups = [*(weights[part] for part in self._own), sum(of_mixed, Fraction(0))]
                self._latest = _Segment(first, given, groups, of_mixed)
        return self._latest

    def _before_chunk(self, number: int) -> _Given:
        """What is given before a chunk, in whole batches and samples.

        The nearest to what is owed, but not less than before an earlier chunk nor more than before a later
        one: of these, the ends and then always the middle are found first, so that a chunk is found by
        itself, in a few steps, wherever it is.
        """
        low, high = 0, self._n_chunks
        lower = np.zeros(len(self._own) + 1, np.int64), np.zeros(len(self.parts), np.int64)
        upper = self._near_owed(high, lower, None)
        while low < number < high:
            middle = (low + high) // 2
            between = self._near_owed(middle, lower, upper)
            if number < middle:
                high, upper = middle, between
            else:
                low, lower = middle, between
        return lower if number == low else upper

    def _near_owed(self, number: int, lower: _Given, upper: _Given | None) -> _Given:
        owed, n_batches = self._owed(number * _CHUNK), number * _CHUNK
        shares = owed[self._own] / self.batch_size
        most = [n_batches] * len(shares) + [n_batches if self._mixed else 0] if upper is None else upper[0]
        batches = rounded([*shares, n_batches - shares.sum()], n_batches, lower[0], most)
        given = np.zeros(len(self.parts), np.int64)
        given[self._own] = np.array(batches[:-1], np.int64) * self.batch_size
        if self._mixed and number:
            n_mixed, of_mixed = batches[-1] * self.batch_size, owed[self._mixed]
            shares = of_mixed / of_mixed.sum() * n_mixed
            ceiling = None if upper is None else upper[1][self._mixed]
            given[self._mixed] = rounded(shares.tolist(), n_mixed, lower[1][self._mixed], ceiling)
        return np.array(batches, np.int64), given

    def _owed(self, at: int) -> np.ndarray:
        """(k,) samples that the weights promise each component before a global batch: their integral."""
        knots = sorted(self.weights)
        total = np.zeros(len(self.parts))
        for knot, following in zip(knots, [*knots[1:], None], strict=True):
            if knot >= at:
                break
            end = at if following is None else min(at, following)
            start_weights = np.array(self.weights[knot], float)
            change = np.zeros_like(start_weights)
            if following is not None:
                change = (np.array(self.weights[following], float) - start_weights) / (following - knot)
            length = end - knot
            total += length * start_weights + change * length**2 / 2
        return total * self.batch_size


AnyOrder = EpochOrder | MixtureOrder


def _stream(order: EpochOrder, start: int, count: int) -> np.ndarray:
    """`count` ids of a component's endless stream of epochs."""
    parts = []
    while count > 0:
        epoch, place = divmod(start, order.n_samples)
        stop = min(place + count, order.n_samples)
        parts.append(order.ids(epoch, place, stop))
        start, count = start + stop - place, count - (stop - place)
    return np.concatenate(parts)


def checked_weights(weights: Weights, names: Sequence[str]) -> dict[int, tuple[Fraction, ...]]:
    """Weights that sum to one, by the global batch from which they hold.

    Each is taken as the decimal number that it prints as, so that 0.1 is a tenth.
    """
    if not names:
        raise ConfigError("mixture: has no components")
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise ConfigError(f"mixture: two components are named {twice!r}; names must differ")
    by_batch = dict(weights) if isinstance(weights, Mapping) else {0: weights}
    if 0 not in by_batch:
        raise ConfigError(f"mixture.weights: given at steps {sorted(by_batch)}, but not at step 0")
    checked = {}
    for batch, values in by_batch.items():
        if isinstance(batch, bool) or not isinstance(batch, int | np.integer) or batch < 0:
            raise ConfigError(f"mixture.weights: expected steps of 0 or more, got {batch!r}")
        if not isinstance(values, Sequence | np.ndarray) or isinstance(values, str):
            raise ConfigError(f"mixture.weights: expected a list at step {batch}, found {values!r}")
        if len(values) != len(names):
            raise ConfigError(
                f"mixture.weights: {len(values)} weights at step {batch} for {len(names)} components"
            )
        for name, value in zip(names, values, strict=True):
            if isinstance(value, bool) or not isinstance(value, int | float | np.number):
                raise ConfigError(f"mixture: the weight of {name!r} is {value!r}, expected a number")
            if not 0 < value < float("inf"):
                raise ConfigError(f"mixture: the weight of {name!r} is {value}, expected more than 0")
        exact = [Fraction(repr(float(value))) for value in values]
        shares = tuple(weight / sum(exact) for weight in exact)
        for name, share in zip(names, shares, strict=True):
            if share < _LEAST:
                raise ConfigError(
                    f"mixture: the weight of {name!r} is {float(share):.1e} of all at step {batch}, expected "
                    f"at least {float(_LEAST):g}; raise it, or leave the component out"
                )
        checked[int(batch)] = shares
    return checked
