"""Where each stage keeps its artifacts in a cache. No other file spells one of these folders out."""

INDEX = "index"  # where the samples of a shard lie, one artifact per shard
POOL = "pool"  # the joined indexes of a pool
EMBEDDINGS = "embeddings"  # a folder per embedder, with two files per shard
NEAR_DUPLICATES = "near_duplicates"
TREE = "tree"
RETRIEVAL = "retrieval"  # what is like seed sets
SELECTION = "selection"

STAGES = (INDEX, POOL, EMBEDDINGS, NEAR_DUPLICATES, TREE, RETRIEVAL, SELECTION)
"""In the order of the work."""

REMOVABLE = (EMBEDDINGS, NEAR_DUPLICATES, RETRIEVAL, SELECTION, TREE)
"""Those that a program may remove by an artifact's name."""

CHECKPOINTS = "checkpoints"  # of clusterings that are under way
STREAMING = "streaming"  # ids and strata that checkpoints of training refer to
