"""Rows of any offset, scale and type are clustered as they lie; what float32 cannot resolve is said."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from curated_data.clustering import Level, hierarchical_kmeans, kmeans
from tests.oracles.clustering import clouds


def blobs(n=600, d=4, k=6, seed=0):
    rng = np.random.default_rng(seed)
    middle = 20 * rng.normal(size=(k, d))
    return middle[rng.integers(0, k, n)] + rng.normal(size=(n, d))


def same_partition(a, b):
    pairs = len(np.unique(np.stack([a, b]), axis=1).T)
    return pairs == len(np.unique(a)) == len(np.unique(b))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(-300, 290), st.floats(-1, 1), st.sampled_from(["l2", "cosine"]), st.integers(0, 3),
)  # fmt: skip
def test_any_offset_and_scale_of_float64_gives_the_same_partition(exponent, side, metric, seed):
    """10^exponent as the scale, and offsets up to 1e10 times the range."""
    x = blobs(seed=seed)
    if metric == "cosine":
        x, offset = x, 0.0
    else:
        offset = side * 1e10
    scale = 10.0**exponent
    moved = (x + offset) * scale
    expected = kmeans(x, 6, n_init=3, seed=1, metric=metric)
    result = kmeans(moved, 6, n_init=3, seed=1, metric=metric)
    assert same_partition(result.assignment, expected.assignment)
    unit = 1.0 if metric == "cosine" else scale
    np.testing.assert_allclose(result.distance / unit, expected.distance, rtol=1e-3, atol=1e-3)
    if abs(exponent) < 150 or metric == "cosine":
        assert result.inertia / unit / unit == pytest.approx(expected.inertia, rel=1e-4)
    if metric == "l2":
        found = np.array([moved[result.assignment == c].mean(0) for c in range(6)])
        np.testing.assert_allclose(
            (result.centroids - offset * scale) / scale, (found - offset * scale) / scale, atol=1e-3 * 20
        )


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e7, 1e10])
def test_inertia_at_an_offset_is_scikit_learns(offset):
    x = blobs(2000, 8, 40, seed=1)
    theirs = KMeans(40, n_init=3, random_state=0).fit(x)
    result = kmeans(x + offset, 40, n_init=3, seed=0)
    assert result.inertia == pytest.approx(theirs.inertia_, rel=0.05)
    own = np.square(x + offset - result.centroids[result.assignment]).sum()
    assert own == pytest.approx(result.inertia, rel=1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_large_and_small_rows_are_finite(scale, dtype, caplog):
    x = clouds(600, 4, 6, seed=0, dtype=np.float64)
    expected = kmeans(x, 6, seed=0)
    given_rows = (x * scale).astype(dtype)
    result = kmeans(given_rows, 6, seed=0, nonfinite="raise")
    assert same_partition(result.assignment, expected.assignment)
    np.testing.assert_allclose(result.centroids / scale, expected.centroids, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(result.distance / scale, expected.distance, rtol=1e-3, atol=1e-4)
    tree = hierarchical_kmeans(given_rows, [Level(30, 1, 5), Level(6)], seed=0, nonfinite="raise")
    plain = hierarchical_kmeans(x, [Level(30, 1, 5), Level(6)], seed=0)
    assert same_partition(tree.parent[1], plain.parent[1])
    assert same_partition(tree.parent[2], plain.parent[2])
    np.testing.assert_allclose(tree.distance / scale, plain.distance, rtol=1e-3, atol=1e-4)
    assert not caplog.records


def test_a_tree_at_an_offset_is_that_without():
    x = clouds(3000, 6, 50, seed=0, dtype=np.float64)
    levels = [Level(100, 2, 5), Level(10, 2, 3), Level(3)]
    plain, far = (hierarchical_kmeans(rows, levels, seed=2) for rows in (x, x + 1e7))
    for level in (1, 2, 3):
        agree = np.mean(plain.parent[level] == far.parent[level])
        assert agree > 0.99


@pytest.mark.parametrize("kind", ["numpy", "tensor", "streamed", "memmap"])
def test_offset_rows_of_any_kind(kind, tmp_path):
    x = blobs(3000, 8, 30, seed=2) + 1e9
    expected = kmeans(x, 30, seed=0)
    if kind == "memmap":
        np.save(tmp_path / "x.npy", x)
        result = kmeans(np.load(tmp_path / "x.npy", mmap_mode="r"), 30, seed=0)
    else:
        result = kmeans(
            torch.from_numpy(x) if kind == "tensor" else x, 30, seed=0,
            max_memory=1000 if kind == "streamed" else None,
        )  # fmt: skip
    np.testing.assert_array_equal(result.assignment, expected.assignment)
    np.testing.assert_array_equal(result.centroids, expected.centroids)


def test_directions_in_a_narrow_cone():
    """Under cosine rows far from zero differ by small angles, by which they are clustered."""
    rng = np.random.default_rng(0)
    direction = rng.normal(size=8) * 1e5
    x = direction + blobs(1200, 8, 5, seed=3)
    unit_rows = x / np.linalg.norm(x, axis=1, keepdims=True)
    theirs = KMeans(5, n_init=5, random_state=0).fit((unit_rows - unit_rows.mean(0)) * 1e5)
    result = kmeans(x, 5, metric="cosine", n_init=5, seed=0)
    assert same_partition(result.assignment, theirs.labels_)
    np.testing.assert_allclose(np.linalg.norm(result.centroids, axis=1), 1, atol=1e-6)
    nearer = kmeans(
        (direction / 100 + blobs(1200, 8, 5, seed=3)).astype(np.float32), 5, metric="cosine", n_init=5
    )
    assert same_partition(nearer.assignment, theirs.labels_)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_two_scales_in_one_pool_are_said(dtype, caplog):
    """Most rows lie in blobs that are tiny beside their distance from the others."""
    tiny = 1e-3 if dtype == np.float64 else 0.1  # which the type itself can tell apart
    far = np.concatenate([blobs(1000, 4, 6, seed=0) * 1e3, blobs(3000, 4, 6, seed=1) * tiny + 1e5])
    kmeans(far.astype(dtype), 12, seed=0)
    messages = [r.getMessage() for r in caplog.records if "float32 cannot tell" in r.getMessage()]
    assert len(messages) == 1
    share = float(messages[0].split("tell ")[1].split(" %")[0])
    assert 65 <= share <= 85
    caplog.clear()
    hierarchical_kmeans(far.astype(dtype), [Level(40, 1, 5), Level(5)], seed=0)
    assert sum("float32 cannot tell" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize(
    "x",
    [
        clouds(3000, 8, 60, seed=0),
        np.random.default_rng(0).random((2000, 1)),
        np.random.default_rng(0).normal(size=(3000, 2)).astype(np.float32),
        np.repeat(clouds(40, 4, 5, seed=0), 50, axis=0),
        np.ones((30, 3)) * 0.1,
        blobs() + 1e10,
    ],
)
def test_rows_that_float32_resolves_are_not_warned_of(x, caplog):
    for metric in ("l2", "cosine"):
        kmeans(x, 20, seed=0, metric=metric, nonfinite="raise")
    assert not [r for r in caplog.records if "float32 cannot tell" in r.getMessage()]
