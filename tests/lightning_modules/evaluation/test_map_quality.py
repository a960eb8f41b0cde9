"""Maps judged by their classes: maps whose quality is known, splits, bad input."""

import numpy as np
import pytest
from sklearn.cluster import HDBSCAN
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestNeighbors

from lightning_modules.evaluation.map_quality import map_quality
from lightning_modules.maps import embed_2d


def islands(spread: float, n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), n)
    angle = 2 * np.pi * labels / 5
    centres = 10 * np.stack([np.cos(angle), np.sin(angle)], 1)
    return centres + spread * rng.normal(size=(5 * n, 2)), labels


def test_islands_are_perfect_and_noise_is_not():
    quality = map_quality(*islands(0.3))
    assert (quality.knn, quality.logistic, quality.n_clusters) == (1, 1, 5)
    assert min(quality.ari, quality.ami, quality.silhouette) > 0.9
    noise = map_quality(*islands(100))
    assert max(noise.knn, noise.logistic) < 0.4
    assert max(noise.ari, noise.ami, noise.silhouette) < 0.1
    x, labels = islands(0.3)
    turned = map_quality(x @ [[0.6, -0.8], [0.8, 0.6]] * 7 + 100, labels * 3)
    assert turned.rows()[0] == pytest.approx(quality.rows()[0], abs=1e-4)  # no scale, no direction


def test_figures_of_real_digits_are_scikit_learns():
    x, labels = load_digits(return_X_y=True)
    coordinates = embed_2d(x.astype(np.float32), epochs=15, seed=0)
    train, test = np.arange(1200), np.arange(1200, len(x))
    quality = map_quality(coordinates[train], labels[train], coordinates[test], labels[test])
    near = NearestNeighbors(n_neighbors=15).fit(coordinates[train]).kneighbors(coordinates[test])[1]
    votes = np.stack([np.bincount(labels[train][row], minlength=10) for row in near])
    assert quality.knn == pytest.approx((votes.argmax(1) == labels[test]).mean(), abs=0.01)  # ties
    assert quality.knn > quality.logistic > 0.3
    clusters = HDBSCAN(min_cluster_size=12, copy=True).fit_predict(coordinates[train].astype(np.float64))
    assert quality.ari == pytest.approx(adjusted_rand_score(labels[train], clusters), abs=0.02)
    assert map_quality(coordinates, labels, seed=1).knn == pytest.approx(quality.knn, abs=0.06)


def test_bad_input_is_named():
    x, labels = islands(1)
    with pytest.raises(ValueError, match="two classes"):
        map_quality(x, np.zeros_like(labels))
    with pytest.raises(ValueError, match="class 7 "):
        map_quality(x, np.where(np.arange(len(x)) == 0, 7, labels))
    with pytest.raises(ValueError, match="k=241"):
        map_quality(x, labels, k=241)
    with pytest.raises(ValueError, match="belong together"):
        map_quality(x, labels, x)
    with pytest.raises(ValueError, match="not finite"):
        map_quality(np.where(np.arange(len(x))[:, None] == 3, np.nan, x), labels)
    with pytest.raises(ValueError, match=r"2 .* 3"):
        map_quality(x, labels, np.ones((4, 3)), np.zeros(4, int))
