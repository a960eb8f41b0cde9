"""The order of training: which sample is at which position of which global batch.

The order of an epoch is a pure function of the selection, the seed, the epoch and the shuffle settings. A
global batch is a slice of it, of which rank r of w takes every w-th sample. Nothing depends on workers, on
ranks, or on where a run was interrupted. Any position is computed by itself, without a permutation in memory:
with 1e8 samples an epoch starts immediately, in the middle too.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from curated_data.cache.artifacts import fingerprint
from curated_data.checks import check_choice, whole_number
from curated_data.errors import ConfigError
from curated_data.randomness import GOLDEN, mixed

Shuffle = Literal["full", "block", "none"]
LastBatch = Literal["drop", "pad", "short"]

_ROUNDS = 8
_BLOCK = 1 << 20  # positions permuted at once
_MASK = (1 << 64) - 1
_ORDER, _SHARDS, _STRATA, _SPARES, _VIEWS = range(5)  # one stream of random numbers per purpose


class EpochOrder:
    """The global batches of every epoch over a selection.

    Args:
        selection: (n,) int64 sample ids; a repeated id is drawn as often. A number n stands for range(n), a
            whole pool.
        seed: for the shuffling.
        batch_size: samples of a global batch, over all ranks.
        shuffle: "full": a permutation of the selection; "block": shards in random order, mixed in windows of
            `shards_per_window`, so that a pool on a disk or network is read a few shards at a time; "none":
            as given.
        last_batch: what to do with samples that do not fill a global batch: "drop" leaves them out of this
            epoch (different ones in each epoch, if shuffled), "pad" adds samples from the start of the epoch,
            marked as padding, "short" makes the batch smaller.
        shard_starts: (n_shards + 1,) int64, the first id of each shard; required for "block".
        shards_per_window: how many shards "block" mixes.
        strata: (n,) integers, the stratum of each selected sample, such as its cluster at some level. Every
            run of consecutive samples, and so every global batch, then has the strata in their overall
            proportions, up to rounding. Requires "full", and 40 bytes per sample while an epoch is laid out.

    Raises:
        ConfigError: contradictory settings, or a selection too small for one batch.
    """

    def __init__(
        self,
        selection: np.ndarray | int,
        *,
        seed: int,
        batch_size: int,
        shuffle: Shuffle = "full",
        last_batch: LastBatch = "drop",
        shard_starts: np.ndarray | None = None,
        shards_per_window: int = 8,
        strata: np.ndarray | None = None,
    ) -> None:
        _validate(selection, batch_size, shuffle, last_batch, shard_starts, shards_per_window, strata)
        self.n_samples = selection if isinstance(selection, int) else len(selection)
        if shuffle == "block" and not isinstance(selection, int) and np.any(selection[1:] < selection[:-1]):
            selection = np.sort(selection)
        self.selection = selection
        self.seed = seed
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.last_batch = last_batch
        self.shards_per_window = shards_per_window
        self.strata = None if strata is None else np.asarray(strata)
        self._shard_first: np.ndarray | None = None  # (n_shards + 1,) positions in the sorted selection
        if shuffle == "block":
            starts = np.asarray(shard_starts)
            self._shard_first = starts if isinstance(selection, int) else np.searchsorted(selection, starts)
        self._layout: tuple[int, np.ndarray] | None = None  # (epoch, array that defines its order)
        self._fingerprint: str | None = None

    @property
    def n_batches(self) -> int:
        """Global batches of an epoch."""
        if self.last_batch == "drop":
            return self.n_samples // self.batch_size
        return -(-self.n_samples // self.batch_size)

    @property
    def fingerprint(self) -> str:
        """Of everything that determines the order, except the batch size."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(
                selection=self.selection,
                seed=self.seed,
                shuffle=self.shuffle,
                shards=self._shard_first,
                shards_per_window=self.shards_per_window if self.shuffle == "block" else None,
                strata=self.strata,
            )
        return self._fingerprint

    def ids(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """(stop - start,) sample ids at positions `start` to `stop` of an epoch, at most `n_samples`."""
        if self.strata is not None:
            return self._selected(self._stratified_layout(epoch)[start:stop])
        if self.shuffle == "block":
            return self._selected(self._block_places(epoch, start, stop))
        places = np.arange(start, stop)
        if self.shuffle == "full":
            places = permuted(places, self.n_samples, _key(self.seed, _ORDER, epoch))
        return self._selected(places)

    def batches(self, epoch: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The concatenated global batches `first` to `last` (exclusive) of an epoch.

        Returns:
            positions: (m,) int64, in the order of the epoch. From `n_samples` on they are padding.
            ids: (m,) int64 sample ids; padding repeats the epoch from its start.
        """
        start, stop = first * self.batch_size, last * self.batch_size
        if self.last_batch != "pad":
            stop = min(stop, self.n_samples)
        parts = [self.ids(epoch, min(start, self.n_samples), min(stop, self.n_samples))]
        missing = stop - max(start, self.n_samples)
        while missing > 0:  # more than one round, for a selection smaller than a batch
            parts.append(self.ids(epoch, 0, min(missing, self.n_samples)))
            missing -= len(parts[-1])
        return np.arange(start, stop), np.concatenate(parts)

    def spares(self, epoch: int, positions: np.ndarray, n_spares: int) -> np.ndarray:
        """(m, n_spares) ids to try in order if the sample at a position cannot be read."""
        lanes = _key(self.seed, _SPARES, epoch) ^ np.arange(1, n_spares + 1, dtype=np.uint64)
        drawn = _mix(_mix(positions.astype(np.uint64))[:, None] ^ _mix(lanes))
        return self._selected((drawn % np.uint64(self.n_samples)).astype(np.int64))

    def _selected(self, places: np.ndarray) -> np.ndarray:
        return places if isinstance(self.selection, int) else np.asarray(self.selection[places], np.int64)

    def _block_places(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Positions in the sorted selection: window by window, each a permutation of a few whole shards."""
        first = self._shard_first
        assert first is not None
        order = self._cached(epoch, lambda: self._shard_order(first, epoch))
        ends = np.cumsum((first[1:] - first[:-1])[order])
        window_ends = ends[self.shards_per_window - 1 :: self.shards_per_window]
        if not len(window_ends) or window_ends[-1] != ends[-1]:
            window_ends = np.append(window_ends, ends[-1])
        places = np.empty(stop - start, np.int64)
        for window in range(np.searchsorted(window_ends, start, side="right"), len(window_ends)):
            window_start = int(window_ends[window - 1]) if window else 0
            if window_start >= stop:
                break
            low, high = max(start, window_start), min(stop, int(window_ends[window]))
            key = _key(self.seed, _ORDER, epoch, window)
            within = permuted(
                np.arange(low, high) - window_start, int(window_ends[window]) - window_start, key
            )
            shard = np.searchsorted(ends, within + window_start, side="right")  # its position in `order`
            shard_start = np.where(shard > 0, ends[shard - 1], 0)
            places[low - start : high - start] = first[order[shard]] + within + window_start - shard_start
        return places

    def _shard_order(self, first: np.ndarray, epoch: int) -> np.ndarray:
        filled = np.flatnonzero(np.diff(first))
        return filled[permuted(np.arange(len(filled)), len(filled), _key(self.seed, _SHARDS, epoch))]

    def _stratified_layout(self, epoch: int) -> np.ndarray:
        return self._cached(epoch, lambda: _spread(*self._numbered_strata, _key(self.seed, _STRATA, epoch)))

    @cached_property
    def _numbered_strata(self) -> tuple[np.ndarray, np.ndarray]:
        """(n,) each sample's stratum, numbered from 0, and the size of each."""
        assert self.strata is not None
        _, number, sizes = np.unique(self.strata, return_inverse=True, return_counts=True)
        return number.astype(np.min_scalar_type(len(sizes))), sizes

    def _cached(self, epoch: int, build: Callable[[], np.ndarray]) -> np.ndarray:
        if self._layout is None or self._layout[0] != epoch:
            self._layout = (epoch, build())
        return self._layout[1]


def permuted(places: np.ndarray, n: int, key: int) -> np.ndarray:
    """The images of `places` under a pseudo-random permutation of range(n), computed without storing it.

    A Feistel network on pairs (left, right) of Z_a x Z_b, with a * b just over n, applied again to values
    outside range(n) (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).

    Args:
        places: (m,) integers in range(n).
        n: the length of the permutation.
        key: 64 bits that choose the permutation.
    """
    if n < 2:
        return np.zeros(len(places), np.int64)
    side = int(np.ceil(np.sqrt(n)))
    height, width = np.uint64(side), np.uint64(-(-n // side))
    keys = _mix(np.uint64(key) ^ np.arange(1, _ROUNDS + 1, dtype=np.uint64))
    images = places.astype(np.uint64)
    outside: slice | np.ndarray = slice(None)
    while True:
        left, right = np.divmod(images[outside], width)
        for i in range(0, _ROUNDS, 2):
            left = (left + _mix(right ^ keys[i]) % height) % height
            right = (right + _mix(left ^ keys[i + 1]) % width) % width
        images[outside] = left * width + right
        outside = np.flatnonzero(images >= np.uint64(n))
        if not len(outside):
            return images.astype(np.int64)


def view_seeds(seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
    """(m,) uint64 seeds for the views of the samples at these positions of an epoch."""
    return _mix(_mix(positions.astype(np.uint64)) ^ np.uint64(_key(seed, _VIEWS, epoch)))


def _spread(strata: np.ndarray, sizes: np.ndarray, key: int) -> np.ndarray:
    """A random order in which each stratum is evenly spread: its j-th sample of m is near (j + u) / m."""
    n = len(strata)
    drawn = np.empty(n, np.int64)  # all positions, in random order
    for start in range(0, n, _BLOCK):
        some = np.arange(start, min(start + _BLOCK, n))
        drawn[permuted(some, n, key)] = some
    stratum = strata[drawn]
    by_stratum = np.argsort(stratum, kind="stable")  # in linear time for up to 65,536 strata
    rank = np.empty(n, np.int64)
    rank[by_stratum] = np.arange(n) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    del by_stratum
    phase = _mix(np.arange(len(sizes), dtype=np.uint64) ^ np.uint64(key)) / 2.0**64
    return drawn[np.argsort((rank + phase[stratum]) / sizes[stratum], kind="stable")]


def _key(*parts: int) -> int:
    """A 64-bit key from a few integers: steps of SplitMix64, as `_mix`, which numpy takes 10 µs for."""
    state = 0
    for part in parts:
        state = (state ^ (part & _MASK)) + GOLDEN & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def _mix(x: np.ndarray) -> np.ndarray:
    """A step of SplitMix64 on unsigned words."""
    return mixed(x.view(np.int64) + GOLDEN).view(np.uint64)


def check_choices(shuffle: str, last_batch: str) -> None:
    """Check the names of a shuffle and of what becomes of the last batch.

    Raises:
        ConfigError: it is none of them.
    """
    check_choice("shuffle", shuffle, get_args(Shuffle))
    check_choice("last_batch", last_batch, get_args(LastBatch))


def _validate(
    selection: np.ndarray | int,
    batch_size: int,
    shuffle: str,
    last_batch: str,
    shard_starts: np.ndarray | None,
    shards_per_window: int,
    strata: np.ndarray | None,
) -> None:
    if isinstance(selection, int):
        n_samples = selection
    elif isinstance(selection, np.ndarray) and selection.ndim == 1 and selection.dtype.kind in "iu":
        n_samples = len(selection)
    else:
        found = (
            f"{selection.dtype} {selection.shape}"
            if isinstance(selection, np.ndarray)
            else repr(selection)[:80]
        )
        raise ConfigError(f"selection: expected a one-dimensional array of integer ids, found {found}")
    if not n_samples:
        raise ConfigError("selection: holds no sample; check the curation's target_size and the pool")
    whole_number("batch_size", batch_size, 1)
    check_choices(shuffle, last_batch)
    if last_batch == "drop" and n_samples < batch_size:
        raise ConfigError(
            f"selection: its {n_samples} samples do not fill one global batch of {batch_size}; "
            'lower batch_size, or pass last_batch="pad"'
        )
    if shuffle == "block" and shard_starts is None:
        raise ConfigError('shuffle="block" needs shard_starts, the first id of each shard')
    whole_number("shards_per_window", shards_per_window, 1)
    if strata is not None and shuffle != "full":
        raise ConfigError(f'stratified batches are shuffled: they take shuffle="full", found {shuffle!r}')
    if strata is not None and len(strata) != n_samples:
        raise ConfigError(f"strata: {len(strata)} of them for {n_samples} selected samples")
