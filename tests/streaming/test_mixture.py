"""Properties of mixtures that must hold for any components and weights."""

import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curated_data.errors import ConfigError
from curated_data.streaming.mixture import MixtureOrder, Part
from curated_data.streaming.order import EpochOrder
from curated_data.streaming.sampler import GlobalBatchSampler
from curated_data.streaming.shares import pattern, pattern_of_counts, rounded
from curated_data.streaming.training import StreamPosition

quick = settings(max_examples=60, deadline=None)
weights = st.lists(st.integers(1, 400).map(lambda n: Fraction(n, 100)), min_size=1, max_size=7)


EITHER, NEVER, ALWAYS = st.booleans(), st.just(False), st.just(True)


@st.composite
def mixtures(draw, own=EITHER, changing=EITHER):
    """A mixture of a few components over disjoint ranges of ids, some with batches of their own."""
    values = [float(weight) for weight in draw(weights)]
    parts = []
    for number in range(len(values)):
        n = draw(st.integers(1, 60))
        shuffle = draw(st.sampled_from(["full", "none"]))
        order = EpochOrder(np.arange(n), seed=draw(st.integers(0, 99)), batch_size=1, shuffle=shuffle)
        parts.append(Part(f"part {number}", order, own=draw(own), first_id=1000 * number))
    given = values
    if draw(changing):
        steps = draw(st.lists(st.integers(1, 80), min_size=1, max_size=3, unique=True))
        given = {0: values} | {
            step: [draw(st.integers(1, 100)) / 100 for _ in values] for step in sorted(steps)
        }
    batch = draw(st.integers(1, 12))
    return MixtureOrder(parts, given, batch_size=batch, epoch_size=draw(st.integers(batch, 9 * batch)))


def stream(order: MixtureOrder, batches: int) -> np.ndarray:
    """The ids of so many global batches, over as many epochs as it takes."""
    epochs = range(-(-batches // order.n_batches))
    ids = np.concatenate([order.batches(epoch, 0, order.n_batches)[1] for epoch in epochs])
    return ids[: batches * order.batch_size]


@quick
@given(values=weights)
def test_after_any_number_of_items_each_part_has_had_its_share(values):
    n, shares = 3000, np.array([float(weight / sum(values)) for weight in values])
    part, place = pattern(values).at(0, n)
    counts = np.cumsum(part[:, None] == np.arange(len(values)), axis=0)
    least = 1 - 1 / max(2 * len(values) - 2, 2)
    assert np.abs(counts - np.arange(1, n + 1)[:, None] * shares).max() <= least + n * 2.0**-18
    assert (place == counts[np.arange(n), part] - 1).all()
    assert (pattern(values).before(1234) == counts[1233]).all()


@quick
@given(counts=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any))
def test_a_pattern_of_counts_has_each_part_as_often(counts):
    found = pattern_of_counts(counts)
    assert np.bincount(found.part, minlength=len(counts)).tolist() == counts


@quick
@given(values=st.lists(st.floats(-3, 50), min_size=1, max_size=6), total=st.integers(0, 200))
def test_rounded_numbers_have_the_sum(values, total):
    found = rounded(values, total)
    assert sum(found) == total
    assert min(found) >= 0


@quick
@given(order=mixtures(own=NEVER, changing=NEVER))
def test_the_first_samples_of_a_mixture_are_shared_out_exactly(order):
    ids = stream(order, 40)
    shares = np.array([float(weight) for weight in order.weights[0]])
    counts = np.cumsum((ids // 1000)[:, None] == np.arange(len(shares)), axis=0)
    assert np.abs(counts - np.arange(1, len(ids) + 1)[:, None] * shares).max() < 1


@quick
@given(order=mixtures(own=EITHER, changing=NEVER))
def test_own_batches_have_their_share_of_all_batches_and_the_others_theirs_of_the_rest(order):
    sources = order.components(0, 0, 120).reshape(120, order.batch_size)
    own = [number for number, part in enumerate(order.parts) if part.own]
    for number in own:
        counts = np.cumsum((sources == number).all(axis=1))
        owed = np.arange(1, 121) * float(order.weights[0][number])
        assert np.abs(counts - owed).max() < 1
    rest = sources[~np.isin(sources[:, 0], own)].ravel()
    weights = np.array([float(weight) for weight in order.weights[0]])
    weights[own] = 0
    shares = weights / max(weights.sum(), 1e-9)
    counts = np.cumsum(rest[:, None] == np.arange(len(shares)), axis=0)
    assert np.abs(counts - np.arange(1, len(rest) + 1)[:, None] * shares).max(initial=0) < 1


@quick
@given(order=mixtures())
def test_any_batch_is_computed_by_itself_and_components_run_through_their_epochs(order):
    new = [copy.copy(order) for _ in range(4)]
    ids = stream(order, 50)
    size = order.batch_size
    for opened, batch in zip(new, (0, 7, 31, 49), strict=True):
        epoch, within = divmod(batch, order.n_batches)
        positions, found = opened.batches(epoch, within, within + 1)
        assert (found == ids[batch * size : (batch + 1) * size]).all()
        assert (positions == np.arange(within * size, (within + 1) * size)).all()
        counts = np.bincount(ids[: batch * size] // 1000, minlength=len(order.parts))
        assert (order.given(epoch, within) == counts).all()
        names = order.components(epoch, within, within + 1)
        assert (names == found // 1000).all()
        assert (order.spares(epoch, positions, 3) // 1000 == names[:, None]).all()
        if any(order.parts[name].own for name in names):
            assert len(set(names)) == 1
    for number, part in enumerate(order.parts):
        mine = ids[ids // 1000 == number] - part.first_id
        n = part.order.n_samples
        epochs = [part.order.ids(epoch, 0, n) for epoch in range(-(-len(mine) // n))]
        assert (mine == np.concatenate([*epochs, np.empty(0, np.int64)])[: len(mine)]).all()


def owed(order: MixtureOrder, batches: np.ndarray) -> np.ndarray:
    """The integral of the weights, in global batches, up to each of some batches; by the trapezoidal rule."""
    knots = sorted(order.weights)
    values = np.array([[float(weight) for weight in order.weights[knot]] for knot in knots])
    at = np.arange(batches.max())[:, None] + [0, 1]
    means = np.stack([np.interp(at, knots, column).mean(axis=1) for column in values.T], axis=1)
    return np.concatenate([np.zeros((1, len(values.T))), np.cumsum(means, axis=0)])[batches]


@quick
@given(order=mixtures(changing=ALWAYS))
def test_changing_weights_are_followed_by_samples_and_by_own_batches(order):
    """At every 16th batch, within two: one while weights change, and one where they stay from then on."""
    size, ends = order.batch_size, np.arange(16, 161, 16)
    given = np.stack([order.given(*divmod(int(end), order.n_batches)) for end in ends])
    wanted = owed(order, ends)
    own = np.array([part.own for part in order.parts])
    assert np.abs(given[:, own] / size - wanted[:, own]).max(initial=0) < 2 + 1e-6
    rest = given[:, ~own].sum(axis=1, keepdims=True)
    shares = wanted[:, ~own] / np.maximum(wanted[:, ~own].sum(axis=1, keepdims=True), 1e-9)
    assert np.abs(given[:, ~own] - shares * rest).max(initial=0) < 2 + 1e-6


def test_weights_that_change_for_ever_open_anywhere():
    last = 10**9
    parts = [
        Part(name, EpochOrder(1000, seed=0, batch_size=1), own=name == "own") for name in ("a", "b", "own")
    ]
    order = MixtureOrder(parts, {0: [0.8, 0.1, 0.1], last: [0.2, 0.6, 0.2]}, batch_size=64, epoch_size=6400)
    for at in (last // 2, last - 1, last + 10_000):
        given = order.given(*divmod(at // 16 * 16, order.n_batches))
        assert given.sum() == at // 16 * 16 * 64
        done = min(at // 16 * 16, last)
        middle = done / last / 2  # of the way to the last weights, on average
        wanted = done * (np.array([0.8, 0.1, 0.1]) * (1 - middle) + np.array([0.2, 0.6, 0.2]) * middle)
        wanted += (at // 16 * 16 - done) * np.array([0.2, 0.6, 0.2])
        np.testing.assert_allclose(given / 64, wanted, atol=2)


@quick
@given(order=mixtures(), start=st.integers(0, 40), data=st.data())
def test_ranks_share_every_global_batch_and_go_on_anywhere(order, start, data):
    world_size = data.draw(st.sampled_from([n for n in range(1, 13) if order.batch_size % n == 0]))
    epoch, first = divmod(start, order.n_batches)
    by_rank = []
    for rank in range(world_size):
        position = StreamPosition(lambda: 0)
        position.restart(epoch, first)
        sampler = GlobalBatchSampler(
            None, 1, True, order=order, rank=rank, world_size=world_size, position=position, endless=True,
            n_spares=2,
        )  # fmt: skip
        assert len(sampler) == order.n_batches
        by_rank.append([pickle.loads(pickle.dumps(request)) for request in sampler])
    for step, requests in enumerate(zip(*by_rank, strict=True)):
        at_epoch, batch = divmod(start + step, order.n_batches)
        positions, ids = order.batches(at_epoch, batch, batch + 1)
        sources = order.components(at_epoch, batch, batch + 1)
        for rank, request in enumerate(requests):
            assert request.epoch == at_epoch
            assert request.padding is None
            assert request.ids == ids[rank::world_size].tolist()
            assert (request.positions == positions[rank::world_size]).all()
            assert (request.sources == sources[rank::world_size]).all()
            assert (request.spares == order.spares(at_epoch, positions, 2)[rank::world_size]).all()
    assert step == order.n_batches - 1
    passes = sampler.passes(order.n_batches)
    given = order.given(*divmod(start + order.n_batches, order.n_batches))
    assert [passes[part.name] * part.order.n_samples for part in order.parts] == pytest.approx(given.tolist())


def test_own_batches_are_a_tenth_of_all_and_spread_evenly():
    parts = [
        Part("web", EpochOrder(np.arange(700), seed=0, batch_size=1)),
        Part("imagenet", EpochOrder(np.arange(90), seed=0, batch_size=1), own=True, first_id=1000),
    ]
    order = MixtureOrder(parts, [0.9, 0.1], batch_size=8, epoch_size=8000)
    ids = stream(order, 1000).reshape(-1, 8) // 1000
    own = np.flatnonzero(ids.all(axis=1))
    assert len(own) == 100
    assert (np.diff(own) == 10).all()
    assert not ids[np.setdiff1d(np.arange(1000), own)].any()


def test_everything_that_determines_the_order_is_in_its_fingerprint():
    def order(weights=(0.5, 0.5), own=False, epoch_size=40, seed=0, name="a"):
        first = EpochOrder(np.arange(20), seed=seed, batch_size=1)
        parts = [Part(name, first, own=own), Part("b", first, first_id=1000)]
        return MixtureOrder(parts, weights, batch_size=4, epoch_size=epoch_size)

    others = [order((1, 2)), order(own=True), order(epoch_size=80), order(seed=1), order(name="c")]
    assert len({order().fingerprint, *(other.fingerprint for other in others)}) == 6
    assert order((1, 1)).fingerprint == order().fingerprint
    assert (order().selection == np.r_[0:20, 1000:1020]).all()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([0.5, 0.0], "'b'"),
        ([0.5, -1], "'b'"),
        ([float("nan"), 1], "'a'"),
        ([float("inf"), 1], "'a'"),
        (["1", 1], "'a'"),
        ([True, 1], "'a'"),
        ([1], "weights"),
        ({5: [1, 1]}, "step 0"),
        ({0: [1, 1], -3: [1, 1]}, "-3"),
        ({0: [1, 1], 2.5: [1, 1]}, "2.5"),
    ],
)
def test_bad_weights_are_named(values, named):
    order = EpochOrder(np.arange(20), seed=0, batch_size=1)
    with pytest.raises(ConfigError) as caught:
        MixtureOrder([Part("a", order), Part("b", order)], values, batch_size=4, epoch_size=40)
    assert named in str(caught.value)


def test_mixtures_without_parts_with_equal_names_or_too_short_an_epoch():
    order = EpochOrder(np.arange(20), seed=0, batch_size=1)
    for parts, size, named in (
        ([], 40, "components"),
        ([Part("a", order), Part("a", order)], 40, "'a'"),
        ([Part("a", order)], 3, "epoch_size"),
    ):
        with pytest.raises(ConfigError) as caught:
            MixtureOrder(parts, [1.0] * len(parts), batch_size=4, epoch_size=size)
        assert named in str(caught.value)
