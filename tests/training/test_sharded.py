"""Modules whose parameters lie in pieces on the ranks embed as whole ones do, and no rank waits for
another.
"""

import numpy as np
import pytest
import torch
from torch import nn

from curated_data.embedding.sharded import is_sharded, unsharded
from tests.support.programs import run_python
from tests.support.ranks import on_ranks
from tests.support.recuration_runs import SIZES, by_epoch, seen
from tests.support.sharded_runs import embed_sharded


def run(folder, accelerator, shards):
    run_python("-m", "tests.support.sharded_runs", folder, accelerator, *shards)


def test_two_ranks_embed_unlike_numbers_of_batches(write_pool, tmp_path):
    on_ranks(2, embed_sharded, tmp_path, write_pool(SIZES))
    plain = np.load(tmp_path / "plain.npy")
    assert np.abs(plain).max(axis=0).min() > 0
    for kind in ("fsdp", "fsdp-flat", "fully_shard"):
        np.testing.assert_allclose(np.load(tmp_path / f"{kind}.npy"), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_sharded_training_recurates_to_what_ddp_does(write_pool, tmp_path):
    run(tmp_path, "cpu", write_pool(SIZES))
    for rank in (0, 1):
        assert seen(tmp_path / "sharded", rank) == seen(tmp_path / "ddp", rank)
    epochs = [by_epoch(seen(tmp_path / "sharded", rank)) for rank in (0, 1)]
    selections = {tuple(sorted(epochs[0][epoch] + epochs[1][epoch])) for epoch in range(3)}
    assert len(selections) == 3
    assert all(len(set(ids)) == 32 for ids in selections)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fsdp_strategy_on_gpus(write_pool, tmp_path):
    run(tmp_path, "cuda", write_pool(SIZES))
    epochs = by_epoch(seen(tmp_path / "fsdp"))
    assert sorted(epochs) == [0, 1, 2]
    assert len({tuple(sorted(ids)) for ids in epochs.values()}) == 3


def test_a_whole_module_is_left_as_it_is():
    module = nn.Sequential(nn.Linear(3, 2))
    assert not is_sharded(module)
    assert unsharded(module) is module
