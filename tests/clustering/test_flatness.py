"""The flatness of centroids on the pool of the paper's notebook, beside the notebook's own figures."""

import pytest
from sklearn.cluster import AgglomerativeClustering

from curated_data import Level, hierarchical_kmeans
from curated_data.selection.metrics import kl_to_uniform
from tests.oracles.clustering import lloyd_step, two_dimensional


@pytest.mark.long
def test_flatness_on_the_papers_data():
    """Figures of the paper's notebook: 0.363-0.374 agglomerative, 0.33-0.37 k-means, of 300 clusters each."""
    x = two_dimensional(0)
    agglomerative = lloyd_step(x, AgglomerativeClustering(300).fit_predict(x), 300)
    assert 0.34 < kl_to_uniform(agglomerative, -3, 3) < 0.40
    assert 0.30 < kl_to_uniform(hierarchical_kmeans(x, [Level(300)]).centroids[1], -3, 3) < 0.42
