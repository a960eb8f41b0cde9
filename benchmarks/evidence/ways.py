"""Ways to select from a pool, each a function of `Asked` to ids. `retrieval` and `labels` use labels."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.evidence.pools import Evidence
from curated_data import curate_embeddings, retrieve
from curated_data.selection.quotas import water_fill

SEEDS_PER_CLASS = 5


@dataclass(frozen=True)
class Asked:
    """What a way is given; `rows` embeds the pool, `bank_rows` images of the bank by their places."""

    pool: Evidence
    size: int
    seed: int
    rows: Callable[[], np.ndarray]
    bank_rows: Callable[[np.ndarray], np.ndarray]


def drawn(asked: Asked) -> np.ndarray:
    """At random."""
    return np.random.default_rng(asked.seed).choice(len(asked.pool.labels), asked.size, replace=False)


def default(asked: Asked) -> np.ndarray:
    """What `curate` does when nothing is set."""
    return curate_embeddings(asked.rows(), {"target_size": asked.size, "seed": asked.seed}).ids


def paper(asked: Asked) -> np.ndarray:
    """Hierarchical k-means with resampling, as published."""
    config = {"target_size": asked.size, "seed": asked.seed, "preset": "paper"}
    return curate_embeddings(asked.rows(), config).ids


def retrieval(asked: Asked) -> np.ndarray:
    """The nearest to five labelled images of every class, which are not in the pool: as many of each rank as
    it takes, the last rank by cosine.
    """
    rng = np.random.default_rng(asked.seed)
    labels = asked.pool.bank_labels
    chosen = [rng.choice(np.flatnonzero(labels == c), SEEDS_PER_CLASS, False) for c in np.unique(labels)]
    seeds = asked.bank_rows(np.concatenate(chosen))
    n = -(-asked.size // len(seeds))
    while len((found := retrieve(asked.rows(), {"examples": seeds}, n=n)).ids) < asked.size:
        n = min(2 * n, len(asked.pool.labels))
    return found.ids[np.lexsort((-found.cosine, found.rank))[: asked.size]]


def labels(asked: Asked) -> np.ndarray:
    """As balanced as the pool's true labels allow: the ceiling of balance."""
    counts = np.bincount(asked.pool.labels, minlength=asked.pool.n_classes)
    rng = np.random.default_rng(asked.seed)
    quotas = water_fill(np.array([asked.size]), counts, np.zeros(len(counts), np.int64), rng)
    members = [np.flatnonzero(asked.pool.labels == c) for c in range(len(counts))]
    return np.concatenate([rng.choice(rows, n, replace=False) for rows, n in zip(members, quotas)])


def whole(asked: Asked) -> np.ndarray:
    """All of the pool, for as many steps."""
    return np.arange(len(asked.pool.labels))


UNTRAINED = "untrained"
"""Its features are those of the initial weights."""
WAYS: dict[str, Callable[[Asked], np.ndarray]] = {
    "random": drawn,
    "labels": labels,
    "default": default,
    "paper": paper,
    "retrieval": retrieval,
    "whole": whole,
    UNTRAINED: drawn,
}
