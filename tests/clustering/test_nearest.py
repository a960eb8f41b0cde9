"""The nearest centroids as an accelerator finds them, in float32 and in reduced precision, run on the CPU."""

import numpy as np
import pytest
import torch

from curated_data.clustering import kmeans
from curated_data.clustering.nearest import Centroids
from tests.oracles.clustering import clouds, squared_distances

N, K, D = 4000, 1500, 64


def hard_data(kind):
    """Rows and centroids that are hard to tell apart in few bits."""
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


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("products", ["bf16", "tf32", "bf16x3"])
def test_reduced_precision_decides_as_float32(kind, products):
    x, centroids = hard_data(kind)
    plain, reduced = Centroids(centroids), Centroids(centroids, products=products)
    index, best, second = plain.two_nearest(x)
    found, low, next_low = reduced.two_nearest(x)
    agree = found == index
    # Float32's own rounding decides between the nearest and what is as near to all its digits.
    gaps = squared_distances(x.numpy(), centroids.numpy())
    rounding = 2e-6 * (x.square().sum(1).numpy() + centroids.square().sum(1).max().item())
    as_near = gaps[np.arange(len(x)), found] <= gaps.min(1) + rounding
    assert (agree | as_near).mean() >= 0.9999
    np.testing.assert_allclose(low, best, rtol=1e-5, atol=rounding.max())
    assert (next_low <= second + rounding).mean() >= 0.9999  # a lower bound, and Lloyd's bounds rest on it
    assert (np.isinf(next_low) == np.isinf(second)).all()
    if kind == "duplicates":
        assert (found % 2 == 0).all()  # the lowest of equal ones
        assert reduced.n_rechecked == len(x)
    if kind == "clusters":
        assert reduced.n_rechecked < {"bf16": 0.4, "tf32": 0.2, "bf16x3": 0.15}[products] * len(x)


def test_reduced_products_alone_would_not_do():
    """What the check is for: without it one row in twenty goes to the wrong centroid."""
    x, centroids = hard_data("near ties")
    ready = Centroids(centroids, products="bf16")
    rough = torch.cat([tile for _, tile in ready.reduced_scores(x)], dim=1).argmin(1).numpy()
    assert (rough == Centroids(centroids).nearest(x)).mean() < 0.95


@pytest.mark.parametrize("products", ["float32", "bf16", "tf32", "bf16x3"])
@pytest.mark.parametrize("k", [1, 2, 1500])
def test_the_devices_search_is_the_cpus(products, k):
    """With a centroid to leave out for each row, where there is one."""
    x, centroids = hard_data("clusters")
    centroids = centroids[:k]
    skip = np.random.default_rng(0).integers(-1, k, len(x))
    expected = Centroids(centroids).two_nearest(x, skip)
    ready = Centroids(centroids, products=products)
    found = ready._search_on_device(x, skip, True)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found[3], expected[3], rtol=1e-4, atol=1e-3)
    assert (found[2] <= expected[2] + 1e-3).all()
    if products == "float32":
        np.testing.assert_allclose(found[2], expected[2], rtol=1e-5)
    np.testing.assert_array_equal(ready.nearest(x), Centroids(centroids).nearest(x))


@pytest.mark.parametrize("products", ["bf16", "tf32", "bf16x3"])
def test_kmeans_in_reduced_precision_is_as_good(products, monkeypatch):
    x = clouds(6000, 32, 150, seed=0)
    plain = kmeans(x, 200, seed=0)
    made = Centroids.__init__

    def reduced(self, centroids, small=False, products=products):
        made(self, centroids, small, products)

    monkeypatch.setattr(Centroids, "__init__", reduced)
    result = kmeans(x, 200, seed=0)
    assert result.inertia == pytest.approx(plain.inertia, rel=2e-3)
    gaps = squared_distances(x, result.centroids)
    own = gaps[np.arange(len(x)), result.assignment]
    assert (own - gaps.min(1) <= 1e-5 * gaps.max()).mean() >= 0.9999


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("products", ["float32", "bf16", "tf32", "bf16x3"])
def test_the_gpu_decides_as_the_cpu(kind, products):
    x, centroids = hard_data(kind)
    index = Centroids(centroids).nearest(x)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    found = Centroids(centroids.cuda(), products=products).nearest(x.cuda())
    torch.set_float32_matmul_precision(before)
    gaps = squared_distances(x.numpy(), centroids.numpy())
    rounding = 2e-6 * (x.square().sum(1).numpy() + centroids.square().sum(1).max().item())
    as_near = gaps[np.arange(len(x)), found] <= gaps.min(1) + rounding
    assert ((found == index) | as_near).mean() >= 0.9999
