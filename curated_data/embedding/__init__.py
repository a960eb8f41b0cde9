"""From samples to vectors: embedders, embedding a pool, and the store of the embeddings."""

from curated_data.embedding.embedders import Embedder, ImagePreprocess, ModuleEmbedder
from curated_data.embedding.extract import embed_pool
from curated_data.embedding.precomputed import Precomputed
from curated_data.embedding.resolve import resolve_embedder
from curated_data.embedding.store import EmbeddingStore

__all__ = [
    "Embedder",
    "EmbeddingStore",
    "ImagePreprocess",
    "ModuleEmbedder",
    "Precomputed",
    "embed_pool",
    "resolve_embedder",
]
