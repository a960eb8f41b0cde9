"""Properties of the order that must hold for any selection, seed and shuffle settings."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from curated_data.errors import ConfigError
from curated_data.streaming import EpochOrder, permuted
from curated_data.streaming.order import _STRATA, _key, _mix

KEYS = st.integers(0, 2**64 - 1)
quick = settings(max_examples=60, deadline=None)


@st.composite
def orders(draw, last_batches=("drop", "pad", "short")):
    """An order over a random selection, with repeats, of a pool of a few shards, some of them empty."""
    shard_sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any))
    starts = np.concatenate([[0], np.cumsum(shard_sizes)])
    selection = draw(
        st.one_of(
            st.lists(st.integers(0, int(starts[-1]) - 1), min_size=1, max_size=120).map(np.array),
            st.just(int(starts[-1])),
        )
    )
    n = selection if isinstance(selection, int) else len(selection)
    kind = draw(st.sampled_from(["full", "block", "none", "strata"]))
    strata = None
    if kind == "strata":
        strata = np.array(draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)))
    last = draw(st.sampled_from(last_batches))
    return EpochOrder(
        selection,
        seed=draw(st.integers(0, 1000)),
        batch_size=draw(st.integers(1, n if last == "drop" else 2 * n)),
        shuffle="full" if kind == "strata" else kind,
        last_batch=last,
        shard_starts=starts,
        shards_per_window=draw(st.integers(1, 4)),
        strata=strata,
    )


def selected(order: EpochOrder) -> np.ndarray:
    return np.arange(order.selection) if isinstance(order.selection, int) else order.selection


@quick
@given(n=st.integers(1, 3000), key=KEYS)
def test_a_permutation_holds_every_place_once(n, key):
    assert np.array_equal(np.sort(permuted(np.arange(n), n, key)), np.arange(n))


@quick
@given(n=st.integers(1, 10**12), key=KEYS, data=st.data())
def test_places_of_a_huge_permutation_are_computed_by_themselves(n, key, data):
    places = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    images = permuted(places, n, key)
    assert images.min() >= 0
    assert images.max() < n
    assert [int(permuted(places[i : i + 1], n, key)[0]) for i in range(len(places))] == images.tolist()
    assert len(np.unique(images)) == len(np.unique(places))


@pytest.mark.parametrize("n", [4, 10, 97, 4096])
def test_permutations_are_uniform_over_keys(n):
    rng = np.random.default_rng(n)
    keys = [int(key) for key in rng.integers(0, 2**63, 3000)]
    images = np.stack([permuted(np.arange(min(n, 4)), n, key) for key in keys])
    bins = min(n, 8)
    expected = np.bincount(np.arange(n) * bins // n) / n * len(keys)
    pvalues = [
        chisquare(np.bincount(column * bins // n, minlength=bins), expected).pvalue for column in images.T
    ]
    # where the second place goes, seen from the first: uniform over the other places
    apart = (images[:, 1] - images[:, 0]) % n
    expected = np.bincount(np.arange(1, n) * bins // n, minlength=bins) / (n - 1) * len(keys)
    filled = expected > 0
    observed = np.bincount(apart * bins // n, minlength=bins)
    assert observed[~filled].sum() == 0
    pvalues.append(chisquare(observed[filled], expected[filled]).pvalue)
    assert min(pvalues) > 1e-4


def test_all_permutations_of_few_occur_equally_often():
    images = [
        tuple(permuted(np.arange(4), 4, int(key)))
        for key in np.random.default_rng(0).integers(0, 2**63, 6000)
    ]
    _, counts = np.unique(images, axis=0, return_counts=True)
    assert len(counts) == 24
    assert chisquare(counts).pvalue > 1e-4


@quick
@given(order=orders(), epoch=st.integers(0, 5))
def test_an_epoch_is_the_selection_in_some_order(order, epoch):
    ids = order.ids(epoch, 0, order.n_samples)
    assert ids.dtype == np.int64
    assert np.array_equal(np.sort(ids), np.sort(selected(order)))


@quick
@given(order=orders(), epoch=st.integers(0, 3), data=st.data())
def test_any_part_is_that_part_of_the_whole(order, epoch, data):
    start = data.draw(st.integers(0, order.n_samples))
    stop = data.draw(st.integers(start, order.n_samples))
    whole = order.ids(epoch, 0, order.n_samples)
    order.ids(epoch + 1, 0, 1)  # another epoch in between leaves no trace
    assert np.array_equal(order.ids(epoch, start, stop), whole[start:stop])


@quick
@given(order=orders(), epoch=st.integers(0, 3), data=st.data())
def test_global_batches_laid_end_to_end_are_the_epoch(order, epoch, data):
    cut = data.draw(st.integers(0, order.n_batches))
    parts = [order.batches(epoch, 0, cut), order.batches(epoch, cut, order.n_batches)]
    positions, ids = (np.concatenate(column) for column in zip(*parts, strict=True))
    real = positions < order.n_samples
    whole = order.ids(epoch, 0, order.n_samples)
    assert np.array_equal(positions, np.arange(len(positions)))
    assert np.array_equal(ids[real], whole[: real.sum()])
    if order.last_batch == "drop":
        assert real.all()
        assert len(ids) == order.n_samples // order.batch_size * order.batch_size
    elif order.last_batch == "short":
        assert real.all()
        assert len(ids) == order.n_samples
    else:
        assert len(ids) == order.n_batches * order.batch_size
        assert real.sum() == order.n_samples
        assert set(ids[~real]) <= set(ids[real])


@quick
@given(order=orders(last_batches=("drop",)))
def test_batch_size_and_the_last_batch_do_not_change_the_order(order):
    other = EpochOrder(
        order.selection,
        seed=order.seed,
        batch_size=1,
        shuffle=order.shuffle,
        last_batch="pad",
        shard_starts=np.array([0, 10**6]) if order.shuffle == "block" else None,
        strata=order.strata,
    )
    if order.shuffle != "block":
        n = order.n_samples
        assert other.fingerprint == order.fingerprint
        assert np.array_equal(order.ids(2, 0, n), other.ids(2, 0, n))


def test_epochs_and_seeds_differ():
    ids = [
        tuple(
            EpochOrder(
                1000, seed=seed, batch_size=10, shuffle=shuffle, shard_starts=np.arange(0, 1001, 50)
            ).ids(e, 0, 1000)
        )
        for shuffle in ("full", "block")
        for seed in (0, 1)
        for e in (0, 1)
    ]
    assert len(set(ids)) == 8


@quick
@given(order=orders())
def test_blocks_read_few_shards_at_a_time(order):
    if order.shuffle != "block":
        return
    whole = np.searchsorted(order._shard_first, order._block_places(1, 0, order.n_samples), side="right")
    # whole shards come and go in groups of at most shards_per_window
    first_seen = {shard: place for place, shard in reversed(list(enumerate(whole)))}
    last_seen = {shard: place for place, shard in enumerate(whole)}
    for place in range(len(whole)):
        open_shards = [s for s in first_seen if first_seen[s] <= place <= last_seen[s]]
        assert len(open_shards) <= order.shards_per_window


@quick
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    batch=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_stratified_batches_hold_the_proportions_of_the_whole(sizes, batch, seed):
    strata = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    n = len(strata)
    order = EpochOrder(n, seed=seed, batch_size=batch, last_batch="short", strata=strata)
    for number in range(order.n_batches):
        _, ids = order.batches(3, number, number + 1)
        counts = np.bincount(strata[ids], minlength=len(sizes))
        # each stratum recurs at even distances d = n / size, so a run of m places holds m / d of it, rounded;
        # the others shift a place by one member each at most
        assert np.all(np.abs(counts - len(ids) * np.array(sizes) / n) <= 2 + len(sizes) * np.array(sizes) / n)


@quick
@given(
    strata=st.lists(st.sampled_from([-1, 0, 7, 10**12]), min_size=1, max_size=200).map(np.array),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 9),
)
def test_stratified_order_by_its_definition(strata, seed, epoch):
    """The j-th sample of a stratum of m, in random order, at (j + u) / m; ties in the same random order."""
    n = len(strata)
    key = _key(seed, _STRATA, epoch)
    priority = permuted(np.arange(n), n, key)
    u = _mix(np.arange(len(np.unique(strata)), dtype=np.uint64) ^ np.uint64(key)) / 2.0**64
    place = np.empty(n)
    for number, stratum in enumerate(np.unique(strata)):
        members = np.flatnonzero(strata == stratum)
        members = members[np.argsort(priority[members])]
        place[members] = (np.arange(len(members)) + u[number]) / len(members)
    order = EpochOrder(n, seed=seed, batch_size=1, strata=strata)
    assert order.ids(epoch, 0, n).tolist() == np.lexsort((priority, place)).tolist()


def test_spares_come_from_the_selection_and_depend_on_the_position_alone():
    selection = np.arange(0, 1000, 7)
    order = EpochOrder(selection, seed=3, batch_size=8)
    spares = order.spares(1, np.arange(100), 3)
    assert spares.shape == (100, 3)
    assert np.isin(spares, selection).all()
    assert np.array_equal(order.spares(1, np.array([42]), 3)[0], spares[42])
    assert len(np.unique(spares)) > 90


def test_a_hundred_million_samples_begin_anywhere_at_once():
    order = EpochOrder(100_000_000, seed=0, batch_size=4096)
    _, ids = order.batches(7, 20_000, 20_002)
    assert len(np.unique(ids)) == 2 * 4096
    assert 0.4 < np.mean(ids < 50_000_000) < 0.6


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"selection": np.array([0.5])}, "^selection: "),
        ({"selection": np.zeros((2, 2), int)}, "^selection: "),
        ({"selection": np.array([], int)}, "^selection: "),
        ({"selection": 3}, "^selection: .* 3 .* 4"),
        ({"batch_size": 0}, "batch_size"),
        ({"shuffle": "random"}, "^shuffle: .*'random'"),
        ({"last_batch": "keep"}, "^last_batch: .*'keep'"),
        ({"shuffle": "block"}, "shard_starts"),
        ({"strata": np.zeros(5, int)}, "^strata: 5 .* 10"),
        ({"strata": np.zeros(10, int), "shuffle": "none"}, "stratified"),
        ({"shards_per_window": 0}, "shards_per_window"),
    ],
)
def test_wrong_settings_are_named(arguments, named):
    with pytest.raises(ConfigError, match=named):
        EpochOrder(**{"selection": np.arange(10), "seed": 0, "batch_size": 4, **arguments})
