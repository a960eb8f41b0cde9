"""The nearest centroids as an accelerator finds them, run on the CPU."""

import numpy as np
import pytest
import torch

from curated_data.clustering.nearest import Centroids
from tests.oracles.clustering import clouds, squared_distances

N, K, D = 4000, 1500, 64


def hard_data(kind):
    """Rows and centroids that are hard to tell apart."""
    rng = np.random.default_rng(0)
    x = clouds(N, D, 200, seed=0)
    centroids = x[rng.choice(N, K, replace=False)] + 0.1 * rng.normal(size=(K, D)).astype(np.float32)
    if kind == "near ties":  # pairs of centroids a thousandth apart
        centroids[1::2] = centroids[::2] * (1 + 1e-3 * rng.normal(size=(K // 2, D)))
    elif kind == "duplicates":
        centroids[1::2] = centroids[::2]
    elif kind == "large mean":
        x, centroids = x + 30, centroids + 30
    elif kind == "one value":  # every coordinate alike: rounding errors all go one way
        x = np.repeat(rng.normal(size=(N, 1)), D, axis=1) * 10 + 1e-2 * rng.normal(size=(N, D))
        centroids = np.repeat(rng.normal(size=(K, 1)), D, axis=1) * 10
    elif kind == "one large coordinate":
        x[:, 3] *= 1000
        centroids[:, 3] *= 1000
    elif kind == "noise":
        x, centroids = rng.normal(size=(N, D)), rng.normal(size=(K, D))
    elif kind == "one dimension":
        x, centroids = rng.normal(size=(N, 1)), rng.normal(size=(K, 1))
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(centroids.astype(np.float32))


KINDS = [
    "clusters", "near ties", "duplicates", "large mean", "one value", "one large coordinate", "noise",
    "one dimension",
]  # fmt: skip


@pytest.mark.parametrize("k", [1, 2, 1500])
@pytest.mark.parametrize("kind", KINDS)
def test_the_devices_search_is_the_cpus(kind, k):
    """With a centroid to leave out for each row, where there is one."""
    x, centroids = hard_data(kind)
    x, centroids = x[:1000], centroids[:k]  # of one block, whose products round alike
    skip = np.random.default_rng(0).integers(-1, k, len(x))
    ready = Centroids(centroids)
    both = zip(ready._search_on_device(x, skip, True), ready.two_nearest(x, skip), strict=True)
    for found, expected in both:
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(ready._search_on_device(x, None, False)[0], ready.nearest(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_the_gpu_decides_as_the_cpu(kind):
    x, centroids = hard_data(kind)
    index = Centroids(centroids).nearest(x)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    found = Centroids(centroids.cuda()).nearest(x.cuda())
    torch.set_float32_matmul_precision(before)
    # Float32's own rounding decides between the nearest and what is as near to all its digits.
    gaps = squared_distances(x.numpy(), centroids.numpy())
    rounding = 2e-6 * (x.square().sum(1).numpy() + centroids.square().sum(1).max().item())
    as_near = gaps[np.arange(len(x)), found] <= gaps.min(1) + rounding
    assert ((found == index) | as_near).mean() >= 0.9999
