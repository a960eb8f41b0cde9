"""Properties of mixtures that must hold for any components and weights."""

import copy
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from curated_data.errors import ConfigError
from curated_data.streaming.changing import Changing
from curated_data.streaming.mixture import MixtureOrder, Part
from curated_data.streaming.order import EpochOrder
from curated_data.streaming.sampler import GlobalBatchSampler
from curated_data.streaming.shares import pattern
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
    found = pattern(values)
    assert found is not None, "a period of at most 2,800"
    part, place = found.at(0, n)
    counts = np.cumsum(part[:, None] == np.arange(len(values)), axis=0)
    least = 1 - 1 / max(2 * len(values) - 2, 2)
    assert np.abs(counts - np.arange(1, n + 1)[:, None] * shares).max() <= least + 1e-9
    assert (place == counts[np.arange(n), part] - 1).all()
    assert (found.before(1234) == counts[1233]).all()


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


def means(order: MixtureOrder, parts: list[int]):
    """The mean weights of some components in each step, exactly; linear between those that were given."""
    knots, step = sorted(order.weights), 0
    while True:
        before = max(knot for knot in knots if knot <= step)
        after = min((knot for knot in knots if knot > step), default=before + 1)
        ends = order.weights[before], order.weights.get(after, order.weights[before])
        way = (step + Fraction(1, 2) - before) / (after - before)
        yield [ends[0][i] + (ends[1][i] - ends[0][i]) * way for i in parts]
        step += 1


@settings(max_examples=40, deadline=None)
@given(order=mixtures(changing=ALWAYS))
def test_changing_weights_are_followed_within_one(order):
    """Own batches after every batch, and of those that share batches the samples after every sample."""
    sources = order.components(0, 0, 100).reshape(100, order.batch_size)
    own = [number for number, part in enumerate(order.parts) if part.own]
    mixed = [number for number, part in enumerate(order.parts) if not part.own]
    owed, counts = [Fraction(0)] * len(own), np.zeros(len(order.parts), int)
    for batch, weights in zip(sources[:, 0], means(order, own), strict=False):
        owed = [before + weight for before, weight in zip(owed, weights, strict=True)]
        counts[batch] += 1
        assert all(abs(Fraction(int(counts[i])) - due) < 1 for i, due in zip(own, owed, strict=True))

    # As long as a step's share of samples lasts, they are divided by its weights; then by those of the next.
    samples = sources[~np.isin(sources[:, 0], own)].ravel()
    steps, left = means(order, mixed), Fraction(0)
    owed, counts = [Fraction(0)] * len(mixed), np.zeros(len(order.parts), int)
    for source in samples:
        needed = Fraction(1)
        while needed:
            if not left:
                weights = next(steps)
                left = sum(weights) * order.batch_size
            taken = min(left, needed)
            owed = [due + weight / sum(weights) * taken for due, weight in zip(owed, weights, strict=True)]
            left, needed = left - taken, needed - taken
        counts[source] += 1
        assert all(abs(Fraction(int(counts[i])) - due) < 1 for i, due in zip(mixed, owed, strict=True))


@quick
@given(
    values=st.lists(st.floats(0.01, 1), min_size=2, max_size=9),
    at=st.integers(0, 10**12),
    n=st.integers(1, 3000),
)
def test_weights_of_many_digits_are_followed_anywhere(values, at, n):
    shares = [Fraction(value) / sum(map(Fraction, values)) for value in values]
    assume(pattern(shares) is None)
    found = Changing({0: shares}, items_per_step=64)
    part, place = found.at(at, at + n)
    before, after = found.before(at), Changing({0: shares}, items_per_step=9).before(at + n)
    assert before.sum() == at
    for i, share in enumerate(shares):
        count = int(before[i])
        for item, was_given in enumerate(part == i):
            if was_given:
                assert place[item] == count
                count += 1
            assert abs(count - share * (at + item + 1)) < 1
        assert count == after[i]


def test_weights_that_change_for_ever_open_anywhere():
    last = 10**9
    parts = [
        Part(name, EpochOrder(1000, seed=0, batch_size=1), own=name == "own") for name in ("a", "b", "own")
    ]
    order = MixtureOrder(parts, {0: [0.8, 0.1, 0.1], last: [0.2, 0.6, 0.2]}, batch_size=64, epoch_size=6400)
    for at in (last // 2 + 7, last - 1, last, last + 10_000):
        given = order.given(*divmod(at, order.n_batches))
        assert given.sum() == at * 64
        done = min(at, last)
        middle = done / last / 2  # of the way to the last weights, on average
        wanted = done * (np.array([0.8, 0.1, 0.1]) * (1 - middle) + np.array([0.2, 0.6, 0.2]) * middle)
        wanted += (at - done) * np.array([0.2, 0.6, 0.2])
        assert abs(given[2] / 64 - wanted[2]) < 1
        np.testing.assert_allclose(given[:2] / 64, wanted[:2], atol=2)  # with the batch that is not "own"


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
    with pytest.raises(ConfigError, match=re.escape(named)):
        MixtureOrder([Part("a", order), Part("b", order)], values, batch_size=4, epoch_size=40)


def test_mixtures_without_parts_with_equal_names_or_too_short_an_epoch():
    order = EpochOrder(np.arange(20), seed=0, batch_size=1)
    for parts, size, named in (
        ([], 40, "components"),
        ([Part("a", order), Part("a", order)], 40, "'a'"),
        ([Part("a", order)], 3, "epoch_size"),
    ):
        with pytest.raises(ConfigError, match=re.escape(named)):
            MixtureOrder(parts, [1.0] * len(parts), batch_size=4, epoch_size=size)
