"""k-means, hierarchical k-means with resampling, and the tree they build."""

from curated_data.clustering.hierarchy import Level
from curated_data.clustering.tree import ClusterTree

__all__ = ["ClusterTree", "Level"]
