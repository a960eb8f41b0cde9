"""What to keep of a pool: balanced samples of a cluster tree, near-duplicates left out, labels from
captions.
"""

from curated_data.selection.sampling import flat_sample, hierarchical_sample

__all__ = ["flat_sample", "hierarchical_sample"]
