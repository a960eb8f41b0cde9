"""The sections of a curation's settings, and what is checked within one of them."""

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from curated_data.errors import ConfigError


@dataclass
class EmbeddingConfig:
    """How the pool is embedded; the network is the `embedder` argument.

    Attributes:
        batch_size: samples per forward pass.
        num_workers: processes that read and decode.
        dtype: of the stored embeddings, "float16" or "float32".
        precision: "32", "bf16", or "auto" for bf16 on CUDA devices that support it.
        multiprocessing_context: how those processes start, "fork", "spawn" or "forkserver"; None takes
            Python's default.
    """

    batch_size: int = 256
    num_workers: int = 2
    dtype: str = "float16"
    precision: str = "auto"
    multiprocessing_context: str | None = None


@dataclass
class NearDuplicateConfig:
    """Removal of near-duplicates before clustering, so that copies do not fill the selection.

    Attributes:
        enabled: whether to remove near-duplicates.
        threshold: cosine similarity at or above which two samples are copies of each other. What it means
            depends on the embedder: `curated-data duplicates` shows pairs to choose it by.
        n_neighbours: how many links of each sample a search finds at once; it changes the time, hardly the
            result.
        prefer: which of two copies is kept: the more "connected", that with more copies, or the "largest"
            image. The latter reads every image once, and treats equal bytes as copies whatever their
            embeddings.
        held_out: shards of evaluation sets; copies of their samples are removed from the pool too.
    """

    enabled: bool = False
    threshold: float = 0.98
    n_neighbours: int = 16
    prefer: str = "connected"
    held_out: list[str] = field(default_factory=list)


@dataclass
class QuotaConfig:
    """How much clusters give to the selection.

    Attributes:
        temperature: quotas are proportional to size ** temperature: 0 is even, 1 as in the pool; None takes
            what `sampling` does by itself: even quotas, or of "sparse" those that its samples' weights say.
        cap: the most samples that a cluster gives, repeats included; below 1, as a share of the selection.
            Fewer than the target may be selected then.
        weights: factors of the quotas: fields and values as `{17: 3, 4: 0}`, with 1 for clusters not named,
            or a list or `.npy` file with a number for each cluster. They are of one tree: the numbers of
            clusters change with its settings. Under `sampling: hierarchical` a factor counts among the
            clusters with the same parent.
        level: whose clusters `cap` and `weights` are of, from 1, the lowest. Sampling that is not
            hierarchical divides the target among these.
    """

    temperature: float | None = None
    cap: float | None = None
    weights: Any = None
    level: int = 1


@dataclass
class RetrievalConfig:
    """Samples like those of seed sets, which are selected first, and count in the quotas of their clusters.

    Attributes:
        seeds: by name, where each set lies: shards, which are embedded as the pool is, or a `.npy` file of
            (m, d) embeddings. Without any, nothing is retrieved.
        method: "nearest" takes the `n` samples nearest to each seed; "clusters" takes at most `per_cluster`
            random samples of each cluster that at least `least_seeds` seeds of a set fall into; "weights"
            takes none, but makes quotas of clusters proportional to the share of the seeds in them.
        n: nearest samples of each seed.
        least: the cosine that a nearest sample needs at least; None for no limit.
        level: of the clusters, from 1, the lowest.
        least_seeds: how many seeds of a set need to fall into a cluster.
        per_cluster: the most samples that a cluster gives to all sets together.
        limit: the most samples of each set: a number, or fields and values by set; None for no limit.
        weights: of each set under "weights", by name; equal ones where none are given.
        fill: draw what is left of the target as without retrieval. If not, only what is retrieved and
            included is selected.
    """

    seeds: dict[str, Any] = field(default_factory=dict)
    method: str = "nearest"
    n: int = 4
    least: float | None = None
    level: int = 1
    least_seeds: int = 1
    per_cluster: int = 100
    limit: Any = None
    weights: dict[str, float] = field(default_factory=dict)
    fill: bool = True


def check_retrieval(retrieval: RetrievalConfig) -> None:
    """Check the settings by themselves.

    Raises:
        ConfigError: a value out of range, or a set that is not named as a seed set.
    """
    for name, given in retrieval.seeds.items():
        texts = given if isinstance(given, list) else [given]
        if not texts or not all(isinstance(one, str) for one in texts):
            raise ConfigError(f"retrieval.seeds.{name}: expected shards or a .npy file, got {given!r}")
    if retrieval.least is not None and not -1 <= retrieval.least <= 1:
        raise ConfigError(f"retrieval.least: expected a cosine, -1 to 1, got {retrieval.least!r}")
    limits = retrieval.limit if isinstance(retrieval.limit, Mapping) else {"": retrieval.limit}
    for where, values in (("limit", limits), ("weights", retrieval.weights)):
        for name, value in values.items():
            if name and name not in retrieval.seeds:
                known = ", ".join(retrieval.seeds) or "none"
                raise ConfigError(f"retrieval.{where}: no seed set is named {name!r}; there are: {known}")
            is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if value is None and where == "limit":
                continue
            if not is_number or not 0 <= value < math.inf or (where == "limit" and value != int(value)):
                raise ConfigError(f"retrieval.{where}: expected a number of at least 0, got {value!r}")
    if retrieval.weights and set(retrieval.weights) != set(retrieval.seeds):
        raise ConfigError("retrieval.weights: expected one for each of the seed sets, or none at all")


def check_quotas(quotas: QuotaConfig) -> None:
    """Check the settings by themselves; a tree may have fewer clusters than they name.

    Raises:
        ConfigError: a value out of range, or weights in another form.
    """
    temperature, cap = quotas.temperature, quotas.cap
    if temperature is not None and not 0 <= temperature <= 8:
        raise ConfigError(f"quotas.temperature: expected an exponent of sizes, 0 to 8, got {temperature!r}")
    if cap is not None and not (0 < cap < 1 or (1 <= cap < math.inf and cap == int(cap))):
        raise ConfigError(f"quotas.cap: expected a number of samples, or a share below 1, got {cap!r}")
    if quotas.level < 1:
        raise ConfigError(f"quotas.level: expected at least 1, got {quotas.level!r}")
    weights = quotas.weights
    if weights is None or (isinstance(weights, str) and weights.endswith(".npy")):
        return
    if isinstance(weights, Mapping):
        for cluster in weights:
            if isinstance(cluster, bool) or not str(cluster).isdecimal():  # JSON has texts
                raise ConfigError(f"quotas.weights: expected numbers of clusters, got {cluster!r}")
    elif not isinstance(weights, list):
        raise ConfigError(
            f"quotas.weights: expected factors by cluster, a list, or a .npy file, got {weights!r}"
        )
    for value in weights.values() if isinstance(weights, Mapping) else weights:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not is_number or not 0 <= value < math.inf:
            raise ConfigError(f"quotas.weights: expected numbers of at least 0, got {value!r}")
