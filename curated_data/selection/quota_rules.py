"""The quotas of a configuration, as what sampling takes."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from curated_data.cache.checksums import load_given
from curated_data.clustering.tree import ClusterTree
from curated_data.config import CurationConfig, QuotaConfig
from curated_data.errors import ConfigError
from curated_data.selection.quotas import Quotas


def with_weights(config: CurationConfig) -> CurationConfig:
    """The settings with the content of a file of weights in place of its name.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    path = config.quotas.weights
    if not isinstance(path, str):
        return config
    weights = load_given(path, "quotas.weights")
    if weights.ndim != 1 or weights.dtype.kind not in "iuf":
        raise ConfigError(
            f"quotas.weights: {path} holds {weights.dtype} {weights.shape}, expected a number per cluster"
        )
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ConfigError(f"quotas.weights: {path} holds numbers that are negative or not finite")
    quotas = dataclasses.replace(config.quotas, weights=weights.tolist())
    return dataclasses.replace(config, quotas=quotas)


def are_set(config: CurationConfig) -> bool:
    """Whether the settings say anything of quotas."""
    return config.quotas != QuotaConfig()


def check_clusters(config: CurationConfig) -> None:
    """Check, before anything is clustered, that the levels have what quotas name.

    Args:
        config: with levels.

    Raises:
        ConfigError: they do not.
    """
    levels = config.levels or []
    if are_set(config):
        _check_level(config, len(levels))
        level = levels[config.quotas.level - 1]
        _weights(config, level.n_clusters * level.n_splits, at_most=True)


def quotas_of(
    config: CurationConfig, tree: ClusterTree, retrieved: np.ndarray | None = None
) -> Quotas | None:
    """The quotas for a tree; None if neither the settings nor a retrieval say anything of them.

    Args:
        retrieved: (k,) weights of the clusters of the retrieval's level; the settings then give none.

    Raises:
        ConfigError: a level or a cluster that the tree does not have.
    """
    given, quotas = config.quotas, None
    if are_set(config):
        _check_level(config, tree.n_levels)
        weights = _weights(config, len(tree.centroids[given.level]))
        quotas = Quotas(given.temperature, given.cap, weights, given.level)
    if retrieved is None:
        return quotas
    quotas = quotas or Quotas()
    return Quotas(quotas.temperature or 0.0, quotas.cap, retrieved, config.retrieval.level)


def _check_level(config: CurationConfig, n_levels: int) -> None:
    if config.quotas.level > n_levels:
        raise ConfigError(f"quotas.level: the tree has levels 1 to {n_levels}, got {config.quotas.level}")


def _weights(config: CurationConfig, k: int, at_most: bool = False) -> np.ndarray | None:
    """(k,) float64; with `at_most`, fewer clusters than k are no error, as derived levels may shrink."""
    given, level = config.quotas.weights, config.quotas.level
    if given is None:
        return None
    if isinstance(given, Mapping):
        numbers = np.array([int(cluster) for cluster in given], np.int64)
        if len(numbers) and numbers.max() >= k:
            raise ConfigError(
                f"quotas.weights: level {level} has clusters 0 to {k - 1}, got {numbers.max()}; numbers of "
                "clusters are those of one tree, see its report"
            )
        weights = np.ones(k)
        weights[numbers] = list(given.values())
    else:
        weights = np.array(given, np.float64)
        if len(weights) > k or (len(weights) < k and not at_most):
            raise ConfigError(f"quotas.weights: level {level} has {k} clusters, got {len(weights)} numbers")
    if not weights.any():
        raise ConfigError("quotas.weights: all are 0, so nothing can be selected")
    return weights
