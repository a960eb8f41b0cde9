"""Baselines as trees: scikit-learn's labels, the paper's figures of flatness, and what cannot be
clustered.
"""

import numpy as np
import pytest
from sklearn.cluster import DBSCAN, AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score

from curated_data import hierarchical_sample
from curated_data.clustering.baselines import agglomerative, dbscan, flat_kmeans
from curated_data.selection.metrics import kl_to_uniform
from tests.oracles.clustering import two_dimensional


def test_trees_hold_scikit_learns_clusters():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(c, 0.3, (60, 3)) for c in (0, 3, 6)] + [rng.uniform(-20, 20, (10, 3))])
    valid = np.ones(len(x), bool)
    valid[:5] = False
    for tree, labels in (
        (dbscan(x, eps=0.5, valid=valid), DBSCAN(eps=0.5).fit_predict(x[5:])),
        (agglomerative(x, 4, valid=valid), AgglomerativeClustering(4).fit_predict(x[5:])),
    ):
        assert (tree.parent[1][:5] == -1).all()
        assert adjusted_rand_score(tree.parent[1][5:], labels) == 1
        np.testing.assert_array_equal(tree.parent[1][5:] == -1, labels == -1)
        for cluster in range(len(tree.centroids[1])):
            members = x[tree.members(1, cluster)]
            np.testing.assert_allclose(tree.centroids[1][cluster], members.mean(0), atol=1e-5)
            far = np.linalg.norm(members - members.mean(0), axis=1)
            np.testing.assert_allclose(tree.distance[tree.members(1, cluster)], far, atol=1e-5)
        ids = hierarchical_sample(tree, 20)
        assert (tree.parent[1][ids] >= 0).all()


@pytest.mark.long
def test_flatness_on_the_papers_data():
    """Figures of the paper's notebook: 0.363-0.374 agglomerative, 0.33-0.37 k-means, of 300 clusters each."""
    x = two_dimensional(0)
    assert 0.34 < kl_to_uniform(agglomerative(x, 300).centroids[1], -3, 3) < 0.40
    assert 0.30 < kl_to_uniform(flat_kmeans(x, 300).centroids[1], -3, 3) < 0.42


def test_cosine_and_what_cannot_be_clustered():
    x = np.random.default_rng(1).normal(size=(40, 4))
    scaled = x * np.random.default_rng(2).uniform(0.1, 10, (40, 1))
    builders = [
        lambda rows: agglomerative(rows, 5, metric="cosine"),
        lambda rows: dbscan(rows, eps=0.9, metric="cosine"),
    ]
    for build in builders:
        assert adjusted_rand_score(build(x).parent[1], build(scaled).parent[1]) == 1
    with pytest.raises(ValueError, match="found no cluster at eps=1e-09"):
        dbscan(x, eps=1e-9)
    with pytest.raises(ValueError, match=r"n_clusters=41: needs 1\.\.40"):
        agglomerative(x, 41)
