"""Pools of tar shards: indexed by their headers, read at offsets, written atomically."""

from curated_data.pool.access import RemoteOptions
from curated_data.pool.decode import decode_sample
from curated_data.pool.image import decode_image
from curated_data.pool.index import PoolIndex, ShardIndex, index_shard
from curated_data.pool.repack import import_archives
from curated_data.pool.shards import ShardPool
from curated_data.pool.writer import ShardWriter, import_folder

__all__ = [
    "PoolIndex",
    "RemoteOptions",
    "ShardIndex",
    "ShardPool",
    "ShardWriter",
    "decode_image",
    "decode_sample",
    "import_archives",
    "import_folder",
    "index_shard",
]
