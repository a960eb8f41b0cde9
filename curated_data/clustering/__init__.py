"""k-means, hierarchical k-means with resampling, and the resulting cluster tree."""

from curated_data.clustering.hierarchy import hierarchical_kmeans
from curated_data.clustering.kmeans import KMeansResult, kmeans
from curated_data.clustering.tree import ClusterTree
from curated_data.levels import Level, choose_levels

__all__ = ["ClusterTree", "KMeansResult", "Level", "choose_levels", "hierarchical_kmeans", "kmeans"]
