"""What leaves a worker arrives unchanged, and no unread byte is written over."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curated_data.pool import ShardPool
from curated_data.streaming import EpochOrder, GlobalBatchSampler, PoolDataset, StreamLoader, collate
from curated_data.streaming.transfer import Ring


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 400),
    st.lists(st.one_of(st.lists(st.integers(0, 90), max_size=4), st.none()), max_size=60),
)
def test_a_ring_gives_back_what_was_written(capacity, steps):
    """Lists are sizes to write, None is a read of the longest unread."""
    ring, unread = Ring(capacity), []
    for number, step in enumerate(steps):
        if step is not None:
            pieces = [bytes([(number + place) % 256]) * size for place, size in enumerate(step)]
            start = ring.write(pieces)
            if start is not None:
                unread.append((start, pieces))
            else:  # refused only where it would not fit, or something is unread
                assert unread or sum(step) > capacity
        elif unread:
            start, pieces = unread.pop(0)
            assert ring.read(start, list(map(len, pieces))) == pieces
    for start, pieces in unread:
        assert ring.read(start, list(map(len, pieces))) == pieces


def loader(pool: ShardPool, num_workers: int, **options) -> StreamLoader:
    order = EpochOrder(len(pool), seed=0, batch_size=5, last_batch="pad")
    sampler = GlobalBatchSampler(None, 5, True, order=order, rank=0, world_size=1)
    dataset = PoolDataset(pool, decode=False)
    return StreamLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers, **options
    )


def test_undecoded_batches_are_the_same_through_workers(write_pool, tmp_path):
    pool = ShardPool(write_pool([9, 0, 8]), cache_dir=tmp_path / "cache")
    reference = list(loader(pool, 0))
    kept = loader(pool, 2, persistent_workers=True)
    next(iter(kept))  # broken off: what its workers had fetched ahead is thrown away
    for batches in (list(kept), list(kept), list(loader(pool, 1))):
        assert len(batches) == len(reference) == 4
        for batch, expected in zip(batches, reference, strict=True):
            assert list(batch) == list(expected)
            assert batch["members"] == expected["members"]
            assert [type(v) for m in batch["members"] for v in m.values()] == [
                type(v) for m in expected["members"] for v in m.values()
            ]
            for name in ("sample_id", "padding"):
                assert torch.equal(batch[name], expected[name])
                assert batch[name].dtype == expected[name].dtype


def test_two_iterators_of_one_loader_do_not_meet(write_pool):
    pool = ShardPool(write_pool([20]))
    both = loader(pool, 1)
    ids = [[batch["sample_id"].numpy() for batch in pair] for pair in zip(both, both, strict=True)]
    assert len(ids) == 4
    assert all(np.array_equal(a, b) for a, b in ids)
