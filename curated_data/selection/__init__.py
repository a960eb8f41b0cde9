"""Selecting from a pool: balanced sampling from a cluster tree, near-duplicates, labels from captions."""

from curated_data.selection.sampling import flat_sample, hierarchical_sample

__all__ = ["flat_sample", "hierarchical_sample"]
