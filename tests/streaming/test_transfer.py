"""What leaves a worker arrives unchanged."""

import numpy as np
import torch

from curated_data.pool import ShardPool
from curated_data.streaming import EpochOrder, GlobalBatchSampler, PoolDataset, StreamLoader, collate


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
