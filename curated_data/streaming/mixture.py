"""The order of a stream that mixes several selections by weights.

Like the order of one selection it is a pure function of its settings and of the position: the same on any
number of ranks and workers, and it continues at the next sample after an interruption. Every component has a
stream of its own, which begins another epoch, in another order, where it ends. Which component gives the next
sample follows `shares`, so that after any number of samples each has given what its weight says, within one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from curated_data.cache.artifacts import fingerprint
from curated_data.errors import ConfigError
from curated_data.streaming.changing import Changing, divided
from curated_data.streaming.order import EpochOrder, LastBatch
from curated_data.streaming.shares import Pattern

Weights = Sequence[float] | Mapping[int, Sequence[float]]

_LEAST = Fraction(1, 100_000)  # of all weights: a block of changing ones is as long as the least needs


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
            # The version of how weights are followed that do not repeat.
            changes=3 if self._changes else None,
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
        batches = self._by_batch.before(epoch * self.n_batches + batch)
        given = np.empty(len(self.parts), np.int64)
        given[self._own] = batches[: len(self._own)] * self.batch_size
        if self._mixed:
            given[self._mixed] = self._by_sample.before(int(batches[-1]) * self.batch_size)
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
        group, turn = self._by_batch.at(first, last)
        component = np.empty((last - first, self.batch_size), np.int64)
        place = turn[:, None] * self.batch_size + np.arange(self.batch_size)
        for number, part in enumerate(self._own):
            component[group == number] = part
        others = np.flatnonzero(group == len(self._own))
        if len(others):
            start = int(turn[others[0]]) * self.batch_size
            kind, place_of_kind = self._by_sample.at(start, start + len(others) * self.batch_size)
            component[others] = np.asarray(self._mixed)[kind].reshape(-1, self.batch_size)
            place[others] = place_of_kind.reshape(-1, self.batch_size)
        return component.ravel(), place.ravel()

    @property
    def _changes(self) -> bool:
        shares = [self._by_batch, *([self._by_sample] if self._mixed else [])]
        return any(isinstance(share, Changing) for share in shares)

    @cached_property
    def _by_batch(self) -> Pattern | Changing:
        """The global batches, of every component with own ones and, last, of all others together."""
        shares = {step: [weights[part] for part in self._own] for step, weights in self.weights.items()}
        for step, weights in self.weights.items() if self._mixed else ():
            shares[step].append(sum((weights[part] for part in self._mixed), Fraction(0)))
        return divided(shares, 1)

    @cached_property
    def _by_sample(self) -> Pattern | Changing:
        """The samples of the batches that the others share."""
        shares = {step: [weights[part] for part in self._mixed] for step, weights in self.weights.items()}
        return divided(shares, self.batch_size)


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
