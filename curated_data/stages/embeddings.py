"""The stage that gives a pool its embeddings: by an embedder, or as rows that exist already.

Its artifact is a pair of files per shard, each built, checked and found on its own (`embedding.store`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from curated_data.cache.artifacts import fingerprint
from curated_data.cache.checksums import load_npy
from curated_data.cache.layout import EMBEDDINGS
from curated_data.cache.removal import is_fingerprint
from curated_data.config import CurationConfig, EmbeddingConfig
from curated_data.embedding.contents import Contents
from curated_data.embedding.embedders import Embedder
from curated_data.embedding.existing import EmbeddedPool
from curated_data.embedding.extract import embed_pool, embeddings_name
from curated_data.embedding.precomputed import Precomputed
from curated_data.embedding.resolve import resolve_embedder
from curated_data.embedding.shard_files import ShardFiles
from curated_data.embedding.store import EmbeddingStore
from curated_data.errors import CacheError, ConfigError, PoolError
from curated_data.pool import ShardPool
from curated_data.pool.decode import Decoders
from curated_data.selection.filters import Filtered
from curated_data.stages.cost import Cost, Rates
from curated_data.stages.index import AnyPool

AnyEmbedder = str | nn.Module | Callable[[Tensor], Tensor] | Embedder | Precomputed


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of a pool, or of some of its samples. Made by `Embeddings.of`.

    Attributes:
        root: an opened cache.
        pool: to embed.
        embedder: None for pools of rows; files of rows for `precomputed:`.
        settings: of the embedding.
        decoders: of pool members by extension.
        fields: that training will ask for, see `embed_pool`.
        ids: (m,) of the samples to embed, ascending; None: all.
        keep: (n,) bool, the samples that a filter keeps, which alone are embedded; None: all.
    """

    root: Path
    pool: AnyPool
    embedder: Embedder | Precomputed | None
    settings: EmbeddingConfig
    decoders: Decoders | None = None
    fields: Sequence[str] | None = None
    ids: np.ndarray | None = None
    keep: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        root: Path,
        pool: AnyPool,
        embedder: AnyEmbedder | None,
        config: CurationConfig,
        decoders: Decoders | None = None,
        fields: Sequence[str] | None = None,
    ) -> "Embeddings":
        """Of a pool; the embedder is resolved now, before anything takes long.

        Raises:
            ConfigError: shards without an embedder, or rows with one.
            EmbedderError: the embedder cannot be found.
        """
        if isinstance(pool, EmbeddedPool):
            if embedder is not None:
                raise ConfigError("embedder: the pool already holds embeddings; leave it out")
            return cls(root, pool, None, config.embedding)
        if embedder is None:
            raise ConfigError("embedder: missing, and the pool has shards; give the network's name")
        if isinstance(embedder, str):
            embedder = Precomputed.parse(embedder) or embedder
        if isinstance(embedder, Precomputed):
            embedder.embeddings  # opened before anything takes long  # noqa: B018
            return cls(root, pool, embedder, config.embedding)
        return cls(root, pool, resolve_embedder(embedder), config.embedding, decoders, fields)

    def of_pool(self, pool: AnyPool) -> "Embeddings":
        """Of another pool by the same embedder, such as a held-out set, whose fields nobody asks for."""
        fields = self.fields if isinstance(pool, EmbeddedPool) else []
        return dataclasses.replace(self, pool=pool, fields=fields, keep=None)

    def of_shards(self, shards: str | Sequence[str], where: str) -> "Embeddings":
        """Of other shards, opened as the pool's own are, and indexed now.

        Args:
            where: the setting that names them, for errors, which would read as if they were of the pool.

        Raises:
            PoolError: no shard matches, one cannot be read, or they are empty.
        """
        assert not isinstance(self.pool, EmbeddedPool), "which has no shards"
        try:
            pool = ShardPool(shards, cache_dir=self.root, storage_options=self.pool.storage_options)
            pool.images = self.pool.images
            pool.index()
        except PoolError as error:
            raise PoolError(f"{where}: {error}") from error
        return self.of_pool(pool)

    @property
    def dimension(self) -> int:
        """Of the rows."""
        source = self.pool if isinstance(self.pool, EmbeddedPool) else self.embedder
        assert source is not None, "checked when the stage was made"
        return source.dimension

    def of_kept(self, filtered: Filtered | None) -> "Embeddings":
        """Of what a filter keeps of the pool; its other samples are not embedded."""
        return self if filtered is None else dataclasses.replace(self, keep=filtered.keep)

    @property
    def name(self) -> str:
        """Of the folder; it depends on the embedder and the settings, not on the shards."""
        if isinstance(self.pool, EmbeddedPool):
            return self.pool.name
        if isinstance(self.embedder, Precomputed):
            return self.embedder.name
        settings = dataclasses.asdict(self.settings)
        return embeddings_name(
            self.pool, self._embedder, decoders=self.decoders, fields=self.fields, ids=self.ids, **settings
        )

    @property
    def folder(self) -> Path:
        return self.root / EMBEDDINGS / self.name

    @property
    def _embedder(self) -> Embedder:
        assert self.embedder is not None, "checked when the stage was made"
        assert not isinstance(self.embedder, Precomputed), "which embeds nothing"
        return self.embedder

    def build(self, device: str | torch.device) -> EmbeddingStore:
        """Embed what is not in the cache yet. The ranks divide the shards among themselves."""
        if isinstance(self.pool, EmbeddedPool):
            return self._without_dropped(self.pool.store(self.root))
        if isinstance(self.embedder, Precomputed):
            if self.ids is not None:
                raise ConfigError("embedder: a re-curation needs a network, not existing rows")
            return self._without_dropped(self.embedder.store(self.pool, self.root))
        return embed_pool(
            self.pool,
            self._embedder,
            self.root,
            device=device,
            decoders=self.decoders,
            fields=self.fields,
            ids=self.ids,
            keep=self.keep,
            **dataclasses.asdict(self.settings),
        )

    def _without_dropped(self, store: EmbeddingStore) -> EmbeddingStore:
        store.left_out = None if self.keep is None else ~self.keep
        return store

    def open(self) -> tuple[EmbeddingStore | None, int]:
        """The embeddings if all that are needed are cached, else None; and how many samples are still to be
        embedded.
        """
        assert not isinstance(self.pool, EmbeddedPool), "which have no embedder, and nothing to plan"
        assert self.ids is None, "of the whole pool"
        contents = Contents(self.root, self.pool).recognise()
        files = ShardFiles(self.folder, self.pool.shard_ranges(), self.keep)
        missing = files.missing(contents)
        if missing:
            return None, int(sum(files.to_embed(number, contents[number]).sum() for number in missing))
        names = [name for name in contents if name is not None]
        dtype, found = self.settings.dtype, files.names(contents)
        store = EmbeddingStore(self.folder, names, self.dimension, dtype, urls=self.pool.urls, files=found)
        return self._without_dropped(store), 0

    def cost(self, n_missing: int, dimension: int, rates: Rates, ranks: int = 1, beside: int = 0) -> Cost:
        """Of embedding the samples that are missing, and those beside the pool: held-out ones, and seeds."""
        seconds = (n_missing + beside) / rates.samples / ranks if rates.samples else None
        note = f"{n_missing:,} samples to embed, length {dimension}"
        if beside:
            note += f"; and {beside:,} held-out samples or seeds"
            n_missing += beside
        return Cost("embed", not n_missing, seconds if n_missing else 0.0, note)

    def disk_bytes(self, n: int, dimension: int) -> int:
        """Of the embeddings of n samples."""
        return n * dimension * np.dtype(self.settings.dtype).itemsize


def inputs_of(store: EmbeddingStore) -> dict[str, str]:
    """What is made from embeddings has these among its inputs."""
    filters = {} if store.left_out is None else {"filters": fingerprint(left_out=np.packbits(store.left_out))}
    return {"embedder": store.folder.name, "embeddings": store.fingerprint} | filters


def check_any(store: EmbeddingStore, of: str) -> None:
    """Check that a sample was embedded at all.

    Raises:
        PoolError: none was; names the first and the reason.
    """
    if not store.valid.any():
        first = next(store.iterate_failures())
        raise PoolError(
            f"none of {of} could be embedded; the first: {first['shard']}, key {first['key']!r}: "
            f"{first['reason']}"
        )


def open_embeddings(
    folder: Path, shards: Sequence[str], ranges: np.ndarray, keep: np.ndarray
) -> EmbeddingStore:
    """The embeddings of some shards by the names of their contents, without a pool or an embedder.

    Args:
        ranges: (shards + 1,) the first row of each shard, then the number of rows.
        keep: (n,) bool, the rows that are needed.

    Raises:
        ValueError: names that are not ours, which are refused before they become paths.
        CacheError: a file is missing or damaged.
    """
    if not shards or not all(map(is_fingerprint, shards)):
        raise ValueError("its shards are not named as ours are")
    files = ShardFiles(folder, ranges, keep)
    names = [files.find(number, shard) or shard for number, shard in enumerate(shards)]
    for shard in names:
        remedy = "run the curation again to embed its shard, after removing it where it is damaged"
        rows = load_npy(folder / f"{shard}.npy", remedy, map_mode="r")
        if rows.ndim != 2:
            raise CacheError(f"{folder / shard}.npy: damaged (its shape is {rows.shape}); {remedy}")
        if len(rows):
            break
    return EmbeddingStore(folder, shards, rows.shape[1], rows.dtype.name, files=names)
