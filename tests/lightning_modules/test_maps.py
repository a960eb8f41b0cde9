"""Maps of cached embeddings: neighbours stay neighbours, same seed same map, figure and table."""

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from lightning_modules.maps import draw_map, embed_2d, isolated, save_coordinates


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, labels = load_digits(return_X_y=True)
    return x.astype(np.float32), labels, embed_2d(x, epochs=20, seed=3)


def test_neighbours_stay_neighbours(digits):
    x, labels, coordinates = digits
    assert coordinates.shape == (len(x), 2)
    assert coordinates.dtype == np.float32
    score = cross_val_score(KNeighborsClassifier(15), coordinates, labels, cv=5).mean()
    linear = cross_val_score(KNeighborsClassifier(15), _pca(x), labels, cv=5).mean()
    assert score > 0.85 > linear + 0.2


def test_same_seed_same_map(digits):
    x = digits[0][:300]
    torch.manual_seed(9)
    state = torch.get_rng_state()
    first = embed_2d(x, epochs=2, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(first, embed_2d(torch.from_numpy(x), epochs=2, seed=1))
    assert not np.array_equal(first, embed_2d(x, epochs=2, seed=2))


def test_a_sample_of_the_rows_maps_all(digits):
    x, labels, _ = digits
    coordinates = embed_2d(x.astype(np.float16), epochs=30, max_train=600)
    assert coordinates.shape == (len(x), 2)
    assert cross_val_score(KNeighborsClassifier(15), coordinates, labels, cv=5).mean() > 0.75


def test_figure_and_table(digits, tmp_path):
    x, labels, coordinates = digits
    figure = draw_map(
        coordinates,
        labels=np.where(labels == 9, -1, labels),
        names=[f"digit {i}" for i in range(10)],
        selected=labels % 2 == 0,
        thumbnail=lambda i: np.repeat((x[i].reshape(8, 8, 1) * 15).astype(np.uint8), 3, axis=2),
    )
    drawn = sum(len(c.get_offsets()) for c in figure.axes[0].collections if isinstance(c, PathCollection))
    assert drawn == len(x) + isolated(coordinates).sum()
    assert len(figure.axes[0].artists) > 10
    assert {text.get_text() for text in figure.axes[0].texts} == {f"digit {i}" for i in range(9)}
    figure.savefig(tmp_path / "map.png")
    save_coordinates(tmp_path / "map.csv", coordinates, ids=np.arange(len(x)) + 5, labels=labels)
    table = np.genfromtxt(tmp_path / "map.csv", delimiter=",", names=True)
    np.testing.assert_allclose(table["x"], coordinates[:, 0], rtol=1e-5)
    assert table["id"][0] == 5
    assert list(table["label"][:3]) == list(labels[:3])


def test_isolated_points_are_found():
    points = np.random.default_rng(0).normal(size=(999, 2)).astype(np.float32)
    points = np.concatenate([points, [[50.0, 50.0]]]).astype(np.float32)
    assert isolated(points).nonzero()[0].tolist() == [999]


def test_bad_input():
    with pytest.raises(ValueError, match="at least 3"):
        embed_2d(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="not finite"):
        embed_2d(np.full((10, 4), np.nan))
    with pytest.raises(ValueError, match="epochs"):
        embed_2d(np.zeros((10, 4)), epochs=0)
    with pytest.raises(ValueError, match=r"^labels: 3 .*10 "):
        draw_map(np.zeros((10, 2)), labels=np.zeros(3))


def _pca(x: np.ndarray) -> np.ndarray:
    centered = x - x.mean(0)
    return centered @ np.linalg.svd(centered, full_matrices=False)[2][:2].T


def kinds(x):
    """The same rows as all that `kmeans` takes."""
    return {
        "big-endian": x.astype(">f4"), "float64": x.astype(np.float64), "fortran": np.asfortranarray(x),
        "strided": np.repeat(x, 2, axis=0)[::2], "flipped": x[::-1].copy()[::-1],
        "grad": torch.from_numpy(x).requires_grad_(),
    }  # fmt: skip


def test_every_kind_of_features_gives_the_same_map(tmp_path):
    x = load_digits(return_X_y=True)[0][:200].astype(np.float32)
    expected = embed_2d(x, epochs=2)
    np.save(tmp_path / "x.npy", x)
    for name, given in (kinds(x) | {"map": np.load(tmp_path / "x.npy", mmap_mode="r")}).items():
        # Means are taken in float64 of float64 rows.
        atol = 0.05 if name == "float64" else 0
        np.testing.assert_allclose(embed_2d(given, epochs=2), expected, atol=atol, err_msg=name)
    for dtype in (torch.bfloat16, torch.float16):  # the digits are small integers: no digit is lost
        np.testing.assert_array_equal(embed_2d(torch.from_numpy(x).to(dtype), epochs=2), expected)
    for factor in (1e-30, 1e30):
        assert np.isfinite(embed_2d(x * np.float32(factor), epochs=2)).all()


def test_rows_that_are_not_finite_are_named_wherever_they_are():
    x = np.random.default_rng(0).normal(size=(2000, 4))
    x[[3, 1999], 1] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"3, 1999"):
        embed_2d(x, epochs=1, max_train=10)


def test_copies_do_not_take_the_place_of_neighbours(digits):
    """Fifty copies of each of some digits: their neighbours are others, and the map is as good as without."""
    x, labels, _ = digits
    rng = np.random.default_rng(0)
    copied = np.repeat(rng.choice(len(x), 60, replace=False), 50)
    every = np.concatenate([np.arange(len(x)), copied])
    coordinates = embed_2d(x[every], epochs=20, seed=3, max_train=len(x))
    np.testing.assert_array_equal(coordinates[: len(x)][copied], coordinates[len(x) :])
    score = cross_val_score(KNeighborsClassifier(15), coordinates[: len(x)], labels, cv=5).mean()
    assert score > 0.85
    assert embed_2d(np.ones((50, 4)), epochs=1).shape == (50, 2)
