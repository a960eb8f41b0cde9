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
    from curated_data.callbacks import RecurationCallback
    from curated_data.clustering.hierarchy import hierarchical_kmeans
    from curated_data.clustering.kmeans import kmeans
    from curated_data.clustering.tree import ClusterTree
    from curated_data.config import CurationConfig
    from curated_data.datamodule import CuratedDataModule
    from curated_data.embedding.existing import EmbeddedPool
    from curated_data.levels import Level
    from curated_data.logging_callback import CurationLogger
    from curated_data.mixture import Component, Mixture
    from curated_data.options import DecodingOptions, DeviceOptions, LoaderOptions
    from curated_data.pipeline import curate, curate_embeddings
    from curated_data.pool.shards import ShardPool
    from curated_data.pool.writer import ShardWriter
    from curated_data.selection.retrieval import retrieve
    from curated_data.selection.sampling import flat_sample, hierarchical_sample
    from curated_data.stages.curation import Curation

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
    "Component": "mixture",
    "CuratedDataModule": "datamodule",
    "Curation": "stages.curation",
    "CurationConfig": "config",
    "CurationLogger": "logging_callback",
    "DecodingOptions": "options",
    "DeviceOptions": "options",
    "EmbeddedPool": "embedding.existing",
    "Level": "levels",
    "LoaderOptions": "options",
    "Mixture": "mixture",
    "RecurationCallback": "callbacks",
    "ShardPool": "pool.shards",
    "ShardWriter": "pool.writer",
    "curate": "pipeline",
    "curate_embeddings": "pipeline",
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
