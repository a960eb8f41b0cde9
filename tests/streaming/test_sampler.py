"""What ranks are given, wherever training begins, ends, or begins again."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from curated_data.errors import CacheError, ConfigError
from curated_data.streaming import (
    BatchRequest,
    EpochOrder,
    GlobalBatchSampler,
    StreamPosition,
    TrainingStream,
)

quick = settings(max_examples=80, deadline=None)


def cut(order: EpochOrder, world_size: int, **arguments) -> list[list[BatchRequest]]:
    """What each rank is given, rank by rank."""
    return [
        list(GlobalBatchSampler(None, 1, True, order=order, rank=rank, world_size=world_size, **arguments))
        for rank in range(world_size)
    ]


def joined(batches: tuple[BatchRequest, ...]) -> list[int]:
    """A global batch from its slices: sample i was given to rank i modulo the number of ranks."""
    whole = np.full(sum(map(len, batches)), -1)
    for rank, batch in enumerate(batches):
        whole[rank :: len(batches)] = batch.ids
    return whole.tolist()


@quick
@given(
    n=st.integers(1, 200),
    per_rank=st.integers(1, 9),
    world_size=st.integers(1, 5),
    shuffle=st.sampled_from(["full", "none"]),
    seed=st.integers(0, 9),
)
def test_ranks_share_every_global_batch(n, per_rank, world_size, shuffle, seed):
    batch_size = per_rank * world_size
    if n < batch_size:
        n += batch_size
    order = EpochOrder(n, seed=seed, batch_size=batch_size, shuffle=shuffle)
    by_rank = cut(order, world_size)
    assert [len(batches) for batches in by_rank] == [n // batch_size] * world_size
    stream = [joined(batches) for batches in zip(*by_rank, strict=True)]
    assert list(itertools.chain(*stream)) == order.ids(0, 0, n // batch_size * batch_size).tolist()
    one = cut(order, 1)[0]
    assert [batch.ids for batch in one] == stream
    assert all(batch.padding is None for batch in one)


@quick
@given(
    n=st.integers(1, 200),
    per_rank=st.integers(1, 9),
    world_size=st.integers(1, 5),
    last_batch=st.sampled_from(["short", "pad"]),
)
def test_with_padding_every_sample_is_given_once_and_ranks_stay_even(n, per_rank, world_size, last_batch):
    order = EpochOrder(n, seed=0, batch_size=per_rank * world_size, shuffle="none", last_batch=last_batch)
    by_rank = cut(order, world_size)
    sizes = [[len(batch) for batch in batches] for batches in by_rank]
    assert all(size == sizes[0] for size in sizes)
    real = [
        sample
        for batches in by_rank
        for batch in batches
        for sample, padded in zip(batch.ids, batch.padding, strict=True)
        if not padded
    ]
    assert sorted(real) == list(range(n))
    padded = sum(int(batch.padding.sum()) for batches in by_rank for batch in batches)
    if last_batch == "short":
        assert padded < world_size  # no more than evenness takes, so none on one rank
        assert all(len(batch) <= per_rank for batch in by_rank[0])
    else:
        assert all(len(batch) == per_rank for batch in by_rank[0])


class Loop:
    """A training loop as the position sees it: it counts what it trained on, and fetches more than that."""

    def __init__(self, order: EpochOrder, state: dict | None = None, endless: bool = True):
        self.order = order
        self.endless = endless
        self.trained: list[tuple[int, tuple[int, ...]]] = []
        self.count = 0 if state is None else state["n_trained"]
        self.stream = TrainingStream(lambda: self.count, None)
        if state is not None:
            self.stream.load_state_dict(state, self)

    def train(self, n_batches: int, prefetched: int = 0) -> None:
        """One epoch of the loop's own: begin to read, train on so many batches, stop there."""
        order = self.stream.prepare(self, "settings", lambda ids: self.order)
        place = {"order": order, "rank": 0, "world_size": 1, "position": self.stream.position}
        sampler = GlobalBatchSampler(None, 1, True, **place, endless=self.endless)
        batches = iter(sampler)
        for _ in range(n_batches):
            batch = next(batches)
            self.trained.append((batch.epoch, tuple(batch.ids)))
            self.count += 1
        for _ in range(prefetched):
            next(batches, None)


@quick
@given(
    n=st.integers(4, 60),
    batch_size=st.integers(1, 4),
    runs=st.lists(
        st.lists(st.tuples(st.integers(0, 100), st.integers(0, 4)), min_size=1, max_size=4), max_size=5
    ),
)
def test_interrupted_anywhere_the_stream_goes_on_with_the_next_sample(n, batch_size, runs):
    """Runs are lists of the loop's own epochs; each run resumes from the state that the last one saved."""
    order = EpochOrder(n, seed=1, batch_size=batch_size)
    state, trained = None, []
    for epochs in runs:
        loop = Loop(order, state)
        for length, prefetched in epochs:
            loop.train(min(length, order.n_batches), prefetched)
        state = loop.stream.state_dict()
        trained += loop.trained
    expected = [
        (epoch, tuple(order.batches(epoch, number, number + 1)[1].tolist()))
        for epoch in range(len(trained) // order.n_batches + 1)
        for number in range(order.n_batches)
    ]
    assert trained == expected[: len(trained)]
    if state is not None:
        assert (state["epoch"], state["batch"]) == divmod(len(trained), order.n_batches)


def test_a_loader_read_twice_before_training_gives_the_same():
    order = EpochOrder(20, seed=0, batch_size=4)
    position = StreamPosition(lambda: 0)
    sampler = GlobalBatchSampler(None, 4, True, order=order, rank=0, world_size=1, position=position)
    assert [batch.ids for batch in sampler] == [batch.ids for batch in sampler]
    assert len(sampler) == 5


def test_while_a_checkpoint_is_being_restored_the_loops_count_is_behind():
    """For `estimated_stepping_batches` a loader is made between the data module's state and the loop's."""
    order = EpochOrder(40, seed=0, batch_size=4)
    first = Loop(order)
    first.train(7)
    resumed = Loop(order, first.stream.state_dict())
    resumed.count = 0
    resumed.stream.prepare(resumed, "settings", lambda ids: order)
    assert resumed.stream.position.begin(order.n_batches) == (0, 7)
    resumed.count = 7
    resumed.train(3)
    assert [epoch for epoch, _ in resumed.trained] == [0, 0, 0]
    assert resumed.trained[0][1] == tuple(order.batches(0, 7, 8)[1])


def test_a_new_owner_starts_over_and_the_same_one_goes_on():
    order = EpochOrder(40, seed=0, batch_size=4)
    loop = Loop(order)
    loop.train(3)
    assert loop.stream.state_dict()["batch"] == 3
    loop.stream.prepare("another trainer", "settings", lambda ids: order)
    assert loop.stream.state_dict()["batch"] == 0


def test_without_a_trainer_an_epoch_ends_where_it_ends():
    order = EpochOrder(40, seed=0, batch_size=4)
    state = Loop(order)
    state.train(7)
    resumed = Loop(order, state.stream.state_dict(), endless=False)
    resumed.train(3)
    with pytest.raises(StopIteration):
        Loop(order, state.stream.state_dict(), endless=False).train(4)


@pytest.mark.parametrize("cached", [False, True])
def test_a_new_selection_takes_over_when_an_epoch_begins(tmp_path, cached):
    def build(ids):
        return EpochOrder(ids, seed=0, batch_size=2)

    count = 0
    stream = TrainingStream(lambda: count, tmp_path if cached else None)
    stream.start_with(np.arange(10))
    order = stream.prepare("trainer", "settings", build)
    stream.position.begin(order.n_batches)
    count = 3
    stream.replace(np.arange(100, 120))
    assert stream.waiting
    assert stream.selection[0] == 100
    state = stream.state_dict()

    for resumed_count in (0, 3):  # before and after the loop's count is restored
        restored = TrainingStream(lambda count=resumed_count: count, tmp_path if cached else None)
        restored.load_state_dict(state, "other trainer")
        restored.start_with(np.arange(10))
        order = restored.prepare("other trainer", "settings", build)
        assert order.n_samples == 10
        assert restored.position.begin(5) == (0, 3)

    count = 5
    order = stream.prepare("trainer", "settings", build)
    assert not stream.waiting
    assert (order.n_samples, order.n_batches) == (20, 10)
    assert stream.position.begin(10) == (1, 0)
    state = stream.state_dict()
    restored = TrainingStream(lambda: count, tmp_path if cached else None)
    restored.start_with(np.arange(10))
    restored.load_state_dict(state, "third")
    assert restored.prepare("third", "settings", build).fingerprint == order.fingerprint
    if cached:
        with pytest.raises(CacheError, match=r"elsewhere/.*cache_dir"):
            TrainingStream(lambda: 0, tmp_path / "elsewhere").load_state_dict(state, None)
        (path,) = (tmp_path / "streaming").glob(f"{state['selection']}.npy")
        for damaged in (np.load(path)[::-1].copy(), None):
            path.write_bytes(b"") if damaged is None else np.save(path, damaged)
            with pytest.raises(CacheError, match=f"{path.name}: .*set_selection"):
                TrainingStream(lambda: 0, tmp_path).load_state_dict(state, None)


@pytest.mark.parametrize(
    ("changed", "named"), [({"batch_size": 5}, "batch_size"), ({"seed": 1}, "another order"), ({}, None)]
)
def test_an_epoch_is_not_resumed_in_another_order(changed, named):
    first = Loop(EpochOrder(40, **{"seed": 0, "batch_size": 4}))
    first.train(3)
    resumed = Loop(EpochOrder(40, **{"seed": 0, "batch_size": 4, **changed}), first.stream.state_dict())
    if named is None:
        resumed.train(1)
        return
    with pytest.raises(ConfigError, match=named):
        resumed.train(1)
    first.train(7)  # at an epoch's end anything may change
    Loop(EpochOrder(40, **{"seed": 0, "batch_size": 4, **changed}), first.stream.state_dict()).train(1)


def test_what_lightning_does_to_batch_samplers_leaves_the_order_alone():
    order = EpochOrder(40, seed=0, batch_size=4)
    sampler = GlobalBatchSampler(None, 2, True, order=order, rank=1, world_size=2)
    assert isinstance(sampler, BatchSampler)
    rebuilt = GlobalBatchSampler(range(3), 2, False, order=order, rank=1, world_size=2)
    assert [batch.ids for batch in rebuilt] == [batch.ids for batch in sampler]


def test_requests_reach_workers_whole_and_small():
    order = EpochOrder(10**6, seed=0, batch_size=256, last_batch="pad")
    position = StreamPosition(lambda: 0)
    request = next(
        iter(
            GlobalBatchSampler(
                None, 256, True, order=order, rank=0, world_size=1, position=position, n_spares=6
            )
        )
    )
    sent = pickle.dumps(request)
    received = pickle.loads(sent)
    assert received.ids == request.ids
    assert received.epoch == 0
    for name in ("positions", "spares", "padding"):
        assert np.array_equal(getattr(received, name), getattr(request, name))
    assert len(sent) < 20_000
