"""The stage that gives a pool its embeddings: by an embedder, or as rows that exist already."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from curated_data.config import CurationConfig, EmbeddingConfig
from curated_data.embedding.embedders import Embedder, resolve_embedder
from curated_data.embedding.existing import EmbeddedPool
from curated_data.embedding.extract import embed_pool, embeddings_name
from curated_data.embedding.precomputed import Precomputed
from curated_data.embedding.store import EmbeddingStore
from curated_data.errors import ConfigError
from curated_data.pool import ShardPool
from curated_data.pool.decode import Decoders

AnyPool = ShardPool | EmbeddedPool
AnyEmbedder = str | nn.Module | Callable[[Tensor], Tensor] | Embedder | Precomputed


@dataclass(frozen=True)
class EmbeddingStage:
    """What embeds pools, and where the result is kept. Made by `embedding_stage`.

    Attributes:
        embedder: None for pools of rows; files of embeddings for `precomputed:`.
        root: an opened cache.
        settings: of the embedding.
        device: of the embedder.
        decoders: of pool members by extension.
        fields: that training will ask for, see `embed_pool`.
    """

    embedder: Embedder | Precomputed | None
    root: Path
    settings: EmbeddingConfig
    device: str | torch.device
    decoders: Decoders | None
    fields: Sequence[str] | None

    def name(self, pool: AnyPool) -> str:
        """The folder of a pool's embeddings, before there are any."""
        if isinstance(pool, EmbeddedPool):
            return pool.name
        if isinstance(self.embedder, Precomputed):
            return self.embedder.name
        assert self.embedder is not None, "checked when the stage was made"
        settings = dataclasses.asdict(self.settings)
        return embeddings_name(pool, self.embedder, decoders=self.decoders, fields=self.fields, **settings)

    def store(
        self, pool: AnyPool, *, fields: Sequence[str] | None = None, ids: np.ndarray | None = None
    ) -> EmbeddingStore:
        """The embeddings of a pool; what is not in the cache yet is embedded.

        Args:
            fields: in place of the stage's, as for held-out sets, whose fields nobody asks for.
            ids: see `embed_pool`.
        """
        if isinstance(pool, EmbeddedPool):
            return pool.store(self.root)
        if isinstance(self.embedder, Precomputed):
            if ids is not None:
                raise ConfigError("embedder: a re-curation embeds by a network, not by rows that exist")
            return self.embedder.store(pool, self.root)
        assert self.embedder is not None, "checked when the stage was made"
        return embed_pool(
            pool,
            self.embedder,
            self.root,
            device=self.device,
            decoders=self.decoders,
            fields=self.fields if fields is None else fields,
            ids=ids,
            **dataclasses.asdict(self.settings),
        )


def embedding_stage(
    pool: AnyPool,
    embedder: AnyEmbedder | None,
    config: CurationConfig,
    root: Path,
    device: str | torch.device = "auto",
    decoders: Decoders | None = None,
    fields: Sequence[str] | None = None,
) -> EmbeddingStage:
    """The stage for a pool and pools like it; the embedder is resolved now, before anything takes long.

    Raises:
        ConfigError: shards without an embedder, or rows with one.
        EmbedderError: the embedder cannot be found.
    """
    if isinstance(pool, EmbeddedPool):
        if embedder is not None:
            raise ConfigError("embedder: the pool is of embeddings already; leave it out")
        return EmbeddingStage(None, root, config.embedding, device, None, None)
    if embedder is None:
        raise ConfigError("embedder: none was given, and the pool is of shards; give the network's name")
    if isinstance(embedder, str):
        embedder = Precomputed.parse(embedder) or embedder
    if isinstance(embedder, Precomputed):
        embedder.embeddings  # opened before anything takes long  # noqa: B018
        return EmbeddingStage(embedder, root, config.embedding, device, None, None)
    return EmbeddingStage(resolve_embedder(embedder), root, config.embedding, device, decoders, fields)
