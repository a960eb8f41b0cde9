"""Two gloo processes give the tree that one gives."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from curated_data.clustering import ClusterTree, Level, hierarchical_kmeans, kmeans
from curated_data.clustering.kmeans import prepare
from curated_data.clustering.seeding import greedy_kmeans_plus_plus
from tests.oracles.clustering import clouds

N = 9000  # more than two blocks of rows, so that both ranks have some


def runs(folder, world):
    """Every distributed path, by name; each rank computes all of them."""
    x = np.load(folder / "x.npy", mmap_mode="r")
    small = np.array(x[:700])
    broken = np.array(x[:5000])
    broken[[4, 4500]] = np.nan
    islands = np.array(x)  # whose neighbourhoods hold all that is within reach
    islands[np.arange(N), np.arange(N) % 7] += 40
    flat = {
        "l2": kmeans(x, 50, seed=1),
        "cosine": kmeans(x, 50, seed=1, metric="cosine", n_init=2),
        "many": kmeans(x, 1100, seed=2),
        "few rows": kmeans(small, 20, seed=3),  # one block: the second rank has none
        "repairs": kmeans(np.repeat(small, 8, axis=0), 500, init="random", seed=0),
        "excluded": kmeans(broken, 30, seed=0),
        "streamed": kmeans(x, 50, seed=1, max_memory=300_000),
    }
    trees = {
        "islands": hierarchical_kmeans(islands, [Level(1100, 2, 4), Level(20)], seed=4),
        "resampled": hierarchical_kmeans(x, [Level(300, 2, 8), Level(30, 1, 4)], seed=1, resample="random"),
        "splits": hierarchical_kmeans(x, [Level(20, n_splits=8), Level(12)], seed=1),
        "kept": hierarchical_kmeans(
            x, [Level(20, n_splits=4), Level(15, 2, 3)], seed=1, checkpoint=folder / f"checkpoint-{world}"
        ),
    }
    trees["kept again"] = hierarchical_kmeans(
        x, [Level(20, n_splits=4), Level(15, 2, 3)], seed=1, checkpoint=folder / f"checkpoint-{world}"
    )
    return flat, trees


def seeds(folder, rank, world):
    """Of the form that works by cells, which ranks share among them."""
    x = np.load(folder / "x.npy", mmap_mode="r")
    rows = prepare(x, metric="l2", device="cpu", valid=None, nonfinite="raise", max_memory=None)
    return greedy_kmeans_plus_plus(rows, 1500, np.random.default_rng(0), rank=rank, world=world)


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    flat, trees = runs(folder, 2)
    for name, result in flat.items():
        np.savez(folder / f"{name}-{rank}.npz", **{k: getattr(result, k) for k in vars(result)})
    for name, tree in trees.items():
        tree.save(folder / f"{name}-{rank}")
    np.save(folder / f"seeds-{rank}.npy", seeds(folder, rank, 2))
    with pytest.raises(ValueError, match=r"another run"):  # on every rank, and none hangs
        hierarchical_kmeans(
            np.zeros((50, 3), np.float32), [Level(1)], seed=9, checkpoint=folder / "checkpoint-2"
        )
    dist.destroy_process_group()


@pytest.mark.long
def test_two_processes_give_the_same_as_one(tmp_path):
    np.save(tmp_path / "x.npy", clouds(N, 12, 80, seed=0))
    mp.spawn(worker, (tmp_path,), nprocs=2)
    flat, trees = runs(tmp_path, 1)
    for rank in range(2):
        np.testing.assert_array_equal(np.load(tmp_path / f"seeds-{rank}.npy"), seeds(tmp_path, 0, 1))
    for name, alone in flat.items():
        for rank in range(2):
            together = np.load(tmp_path / f"{name}-{rank}.npz")
            np.testing.assert_array_equal(together["assignment"], alone.assignment, err_msg=name)
            np.testing.assert_allclose(
                together["centroids"], alone.centroids, rtol=1e-6, atol=1e-6, err_msg=name
            )
            assert together["inertia"] == pytest.approx(alone.inertia, rel=1e-9)
            assert together["n_iter"] == alone.n_iter
    for name, alone in trees.items():
        for rank in range(2):
            together = ClusterTree.load(tmp_path / f"{name}-{rank}")
            for level in alone.centroids:
                np.testing.assert_array_equal(together.parent[level], alone.parent[level], err_msg=name)
                np.testing.assert_allclose(
                    together.centroids[level], alone.centroids[level], rtol=1e-6, atol=1e-6
                )
            np.testing.assert_allclose(together.distance, alone.distance, rtol=1e-5, atol=1e-6)
