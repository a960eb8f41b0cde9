"""The first stage: a pool is opened and indexed, one artifact per shard and one that joins them."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from curated_data.cache.artifacts import open_cache
from curated_data.cache.holds import holding
from curated_data.cache.shared_build import check_shared
from curated_data.config import CurationConfig, load_config
from curated_data.embedding.existing import EmbeddedPool
from curated_data.parallel import check_same, together
from curated_data.pool import ShardPool
from curated_data.pool.index import ARRAYS
from curated_data.progress import show_log
from curated_data.selection.quota_rules import with_weights
from curated_data.stages.filtering import with_named_ids
from curated_data.stages.stage import Run

log = logging.getLogger(__name__)

AnyPool = ShardPool | EmbeddedPool
PoolSource = AnyPool | str | Path | Sequence[str | Path]
ConfigSource = CurationConfig | Mapping[str, Any] | DictConfig | str | Path


@dataclass(frozen=True)
class Index:
    """The samples of a pool. Its artifacts are the pool's own, which names, builds and opens them.

    Attributes:
        pool: with the cache that it is indexed in.
    """

    pool: AnyPool

    @classmethod
    def of(cls, pool: PoolSource, root: Path) -> "Index":
        """Of a pool, or of what `ShardPool` takes, in an opened cache."""
        if isinstance(pool, EmbeddedPool):
            return cls(pool)
        return cls(pool.with_cache(root) if isinstance(pool, ShardPool) else ShardPool(pool, cache_dir=root))

    @property
    def name(self) -> str:
        return self.pool.fingerprint

    def build(self, run: Run) -> int:
        """Index what is new; returns the number of samples. All ranks must see the same pool."""
        if isinstance(self.pool, ShardPool):
            self.pool.stat_on_all_ranks()
        with run.timed("index"):
            n = len(self.pool)
        check_same(pool=self.name)
        log.info("pool: %d samples in %d shards", n, len(self.pool.urls))
        return n

    @property
    def n_bytes(self) -> int:
        """Of the index, which is mapped."""
        if isinstance(self.pool, EmbeddedPool):
            return 0
        index = self.pool.index()
        return sum(getattr(index, name).nbytes for name in ARRAYS)


@contextlib.contextmanager
def opened(
    pool: PoolSource, config: ConfigSource, cache_dir: str | Path, device: str | torch.device = "auto"
) -> Iterator[tuple[AnyPool, CurationConfig, Run]]:
    """The inputs of a curation, for a block in which ranks work together: an error of one ends all."""
    show_log()
    with together(), holding():
        settings = with_weights(load_config(config))
        root = open_cache(cache_dir)
        found = Index.of(pool, root).pool
        check_shared(root)
        yield found, with_named_ids(settings, found), Run(root, device)
