"""Compare settings of a curation by a few hundred labels: how balanced the classes of a selection would be.

A selection holds few of the labelled samples, so its own count of classes says little. Instead every labelled
sample counts with the share of draws that select it, over several seeds of the sampling on one tree: the
classes of the selection are estimated from all labels. Intervals are by bootstrap over the labelled samples,
which should be a random sample of the pool, and hold for all settings at once. They do not cover the
randomness of the clustering.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from curated_data.config import CurationConfig
from curated_data.errors import ConfigError
from curated_data.selection.quota_rules import quotas_of
from curated_data.selection.sampling import flat_sample, hierarchical_sample
from curated_data.selection.sparse import find_neighbours, sparse_sample
from curated_data.stages.curation import Curation

_LEAST = 30  # labelled samples, and two classes, below which nothing can be said
_DRAWS = 20

SETTINGS: Mapping[str, dict[str, Any]] = {
    "default": {},
    "sparse, l2": {"metric": "l2"},
    "sparse, clusters even": {"quotas": {"temperature": 0.0}},
    "sparse, by size ** 0.5": {"quotas": {"temperature": 0.5}},
    "even clusters, cosine": {"sampling": "flat", "metric": "cosine", "levels": "one"},
    "even clusters, l2": {"sampling": "flat", "metric": "l2", "levels": "one"},
    "clusters by size ** 0.5, cosine": {
        "sampling": "flat", "metric": "cosine", "levels": "one", "quotas": {"temperature": 0.5},
    },
    "clusters by size ** 0.25, cosine": {
        "sampling": "flat", "metric": "cosine", "levels": "one", "quotas": {"temperature": 0.25},
    },
    "two levels, cosine": {"sampling": "hierarchical", "metric": "cosine", "levels": "two"},
    "two levels, l2": {"sampling": "hierarchical", "metric": "l2", "levels": "two"},
    "paper": {"preset": "paper"},
    "as the pool": {"sampling": "flat", "metric": "cosine", "levels": "one", "quotas": {"temperature": 1.0}},
}  # fmt: skip
"""What is tried: changes of the settings; "one" level has n / 20 clusters, "two" a tenth of that too."""


@dataclass(frozen=True)
class Tried:
    """One row of the comparison.

    Attributes:
        name: from `SETTINGS`.
        settings: as they are written in YAML.
        entropy: of the classes of the selection, in nats, estimated.
        gain: of entropy over the default.
        low, high: the interval of the gain.
        shares: (k,) of the classes that occur among the labels, in the selection, estimated.
    """

    name: str
    settings: dict[str, Any]
    entropy: float
    gain: float
    low: float
    high: float
    shares: np.ndarray = field(compare=False)


def tune(
    curate: Callable[[CurationConfig], Curation], config: CurationConfig, labels: np.ndarray, *, seed: int = 0
) -> list[Tried]:
    """Compare `SETTINGS`, the default first and then the best first.

    Args:
        curate: a curation of the pool with certain settings.
        config: what all of them share, such as `target_size`; see `load_config`.
        labels: (n,) integers, the class of every sample; -1 for none.
        seed: of the bootstrap.

    Raises:
        ConfigError: too few labels, or labels of another pool.
    """
    _check_labels(labels)
    return compare(chances(curate, config, len(labels)), labels, seed=seed)


class Chances(NamedTuple):
    """What one of `SETTINGS` selects.

    Attributes:
        settings: as they are written in YAML.
        chance: (n,) float64, how often a draw selects each sample.
    """

    settings: dict[str, Any]
    chance: np.ndarray


def chances(
    curate: Callable[[CurationConfig], Curation], config: CurationConfig, n: int
) -> dict[str, Chances]:
    """What each of `SETTINGS` selects of n samples, by name; arguments as for `tune`.

    Raises:
        ConfigError: the pool has another number of samples.
    """
    found = {}
    for name, changes in SETTINGS.items():
        settings = _spelled(changes, n)
        curation = curate(_changed(config, settings))
        if curation.tree.n_samples != n:
            raise ConfigError(
                f"labels: {n} of them, the pool has {curation.tree.n_samples} samples; give one each"
            )
        found[name] = Chances(settings, _chance_of(curation))
    return found


def compare(tried: Mapping[str, Chances], labels: np.ndarray, *, seed: int = 0) -> list[Tried]:
    """`tune` by what `chances` has found, of which the first is the default.

    Raises:
        ConfigError: too few labels.
    """
    _check_labels(labels)
    known = np.flatnonzero(labels >= 0)
    classes, label = np.unique(labels[known], return_inverse=True)
    weight = np.array([one.chance[known] for one in tried.values()])  # (settings, labelled)
    own = _entropies(weight, label, len(classes), np.ones((1, len(known))))[:, 0]
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(known), np.full(len(known), 1 / len(known)), size=1000)
    gains = _entropies(weight, label, len(classes), times)
    gains -= gains[:1]
    gain = own - own[0]
    deviation = gains.std(axis=1)
    off = np.abs(gains - gain[:, None]) / np.where(deviation > 0, deviation, 1)[:, None]
    wide = np.quantile(off.max(axis=0), 0.95) * deviation  # holds for all at once
    shares = weight @ np.eye(len(classes))[label]
    shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1e-300)
    figures = np.stack([own, gain, gain - wide, gain + wide], axis=1).tolist()
    rows = [
        Tried(name, tried[name].settings, mine, more, low, high, of_classes)
        for name, (mine, more, low, high), of_classes in zip(tried, figures, shares, strict=True)
    ]
    return [rows[0], *sorted(rows[1:], key=lambda row: -row.gain)]


def verdict(rows: list[Tried]) -> tuple[Tried, str]:
    """The settings to take, and why, in a sentence."""
    best = max(rows, key=lambda row: row.gain)
    if best is rows[0] or best.low <= 0:
        return rows[0], "No setting is better than the default by more than its interval: leave the default."
    return (
        best,
        f"{best.name!r} is better than the default: {best.gain:+.3f} ({best.low:+.3f} to {best.high:+.3f}).",
    )


def _check_labels(labels: np.ndarray) -> None:
    known = labels[labels >= 0]
    n_classes = len(np.unique(known))
    if len(known) < _LEAST or n_classes < 2:
        raise ConfigError(
            f"labels: {len(known)} samples of {n_classes} classes; give at least {_LEAST} of at least 2"
        )


def _spelled(changes: Mapping[str, Any], n: int) -> dict[str, Any]:
    levels = {"one": [max(1, n // 20)], "two": [max(1, n // 20), max(1, n // 200)]}
    settings = dict(changes)
    if "levels" in settings:
        settings["levels"] = [{"n_clusters": k} for k in levels[settings["levels"]]]
    return settings


def _changed(config: CurationConfig, settings: Mapping[str, Any]) -> CurationConfig:
    from curated_data.config import load_config

    plain = dataclasses.asdict(config)
    # What is compared is as if it were not given.
    plain |= {"preset": "default", "levels": None, "strategy": "random", "sampling": None, "metric": None}
    plain |= {"quotas": {}, "include": [], "nested_sizes": [], "retrieval": {}}
    return load_config(plain | dict(settings))


def _chance_of(curation: Curation) -> np.ndarray:
    """(n,) float64: how often a draw selects each sample."""
    config, tree = curation.config, curation.tree
    how: dict[str, Any] = {"max_repeats": config.max_repeats, "quotas": quotas_of(config, tree)}
    draw: Callable[..., np.ndarray]
    if config.sampling == "sparse":
        draw = partial(sparse_sample, tree, find_neighbours(curation.embeddings, tree))
    else:
        draw = partial(flat_sample if config.sampling == "flat" else hierarchical_sample, tree)
    total = np.zeros(tree.n_samples)
    for seed in range(_DRAWS):
        total += np.bincount(draw(config.target_size, seed=seed, **how), minlength=tree.n_samples)
    return total / _DRAWS


def _entropies(weight: np.ndarray, label: np.ndarray, k: int, times: np.ndarray) -> np.ndarray:
    """(settings, resamplings) entropies of classes, in nats.

    Args:
        weight: (settings, m).
        label: (m,) in 0..k - 1.
        times: (resamplings, m) how often each labelled sample counts.
    """
    is_of = np.eye(k)[label]
    found = np.empty((len(weight), len(times)))
    for number, chance in enumerate(weight):
        counts = times @ (chance[:, None] * is_of)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-300)
        found[number] = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=1)
    return found
