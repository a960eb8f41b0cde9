"""Balanced subsets of long-tailed pools of tar shards, streamed into Lightning.

The public names load on first use, so that a loader worker or a short command does not pay for importing
Lightning.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if os.name == "nt":
    raise ImportError(
        "curated_data runs on Linux and macOS: Windows lacks the positioned reads and file locks that it "
        "needs; use it in WSL"
    )

__version__ = "0.2.0"

if TYPE_CHECKING:
    from curated_data.clustering.hierarchy import hierarchical_kmeans
    from curated_data.clustering.kmeans import kmeans
    from curated_data.clustering.tree import ClusterTree
    from curated_data.config import CurationConfig
    from curated_data.embedding.existing import EmbeddedPool
    from curated_data.levels import Level
    from curated_data.pipeline.curate import curate, curate_embeddings
    from curated_data.pool.shards import ShardPool
    from curated_data.pool.writer import ShardWriter
    from curated_data.selection.retrieval import retrieve
    from curated_data.selection.sampling import flat_sample, hierarchical_sample
    from curated_data.stages.curation import Curation
    from curated_data.training.callbacks import RecurationCallback
    from curated_data.training.datamodule import CuratedDataModule
    from curated_data.training.logging_callback import CurationLogger
    from curated_data.training.mixture import Component, Mixture
    from curated_data.training.options import DecodingOptions, DeviceOptions, LoaderOptions

__all__ = [
    "ClusterTree",
    "Component",
    "CuratedDataModule",
    "Curation",
    "CurationConfig",
    "CurationLogger",
    "DecodingOptions",
    "DeviceOptions",
    "EmbeddedPool",
    "Level",
    "LoaderOptions",
    "Mixture",
    "RecurationCallback",
    "ShardPool",
    "ShardWriter",
    "curate",
    "curate_embeddings",
    "flat_sample",
    "hierarchical_kmeans",
    "hierarchical_sample",
    "kmeans",
    "retrieve",
]

_HOMES = {
    "ClusterTree": "clustering.tree",
    "Component": "training.mixture",
    "CuratedDataModule": "training.datamodule",
    "Curation": "stages.curation",
    "CurationConfig": "config",
    "CurationLogger": "training.logging_callback",
    "DecodingOptions": "training.options",
    "DeviceOptions": "training.options",
    "EmbeddedPool": "embedding.existing",
    "Level": "levels",
    "LoaderOptions": "training.options",
    "Mixture": "training.mixture",
    "RecurationCallback": "training.callbacks",
    "ShardPool": "pool.shards",
    "ShardWriter": "pool.writer",
    "curate": "pipeline.curate",
    "curate_embeddings": "pipeline.curate",
    "flat_sample": "selection.sampling",
    "hierarchical_kmeans": "clustering.hierarchy",
    "hierarchical_sample": "selection.sampling",
    "kmeans": "clustering.kmeans",
    "retrieve": "selection.retrieval",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'curated_data' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"curated_data.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
