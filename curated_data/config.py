"""The settings of a curation, as a structured config that is validated once, before any long work starts."""

import dataclasses
import io
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from curated_data.cache.checksums import open_regular
from curated_data.cache.paths import local_path
from curated_data.checks import check_choice
from curated_data.errors import ConfigError, first_line, nearest
from curated_data.levels import Level, choose_levels
from curated_data.processes import check_context
from curated_data.sections import (
    EmbeddingConfig,
    NearDuplicateConfig,
    QuotaConfig,
    RetrievalConfig,
    check_quotas,
    check_retrieval,
)

__all__ = [
    "CurationConfig",
    "EmbeddingConfig",
    "NearDuplicateConfig",
    "QuotaConfig",
    "RetrievalConfig",
    "levels_for",
    "load_config",
    "read_yaml",
    "structured",
]

T = TypeVar("T")


@dataclass
class CurationConfig:
    """What to select, and how.

    Where neither `levels` nor `sampling` nor a `strategy` says otherwise, the selection is "sparse": it takes
    more of the samples that lie alone among their neighbours. `preset: paper`, or levels of your own, gives
    hierarchical k-means. `docs/settings.md` has what each setting then means.

    Attributes:
        target_size: number of samples to select.
        preset: "default", or "paper" for the settings of arXiv 2405.15613: derived levels with resampling,
            hierarchical sampling, l2. Settings that are given count in either.
        levels: of the cluster tree, bottom up, with fewer clusters at each; None (or "auto") derives them
            from the size of the pool.
        strategy: which samples to take from a lowest cluster: "random", "closest" to its centroid, or
            "furthest".
        sampling: "hierarchical" divides the target from the top of the tree down, "flat" only among the
            lowest clusters, "sparse" draws by how alone a sample lies, "greedy" takes samples so that
            every other has one near it; None takes what the preset says.
        max_repeats: how often one sample may be selected.
        nested_sizes: smaller targets, for which selections are drawn too, each inside the next larger one;
            they are in `Curation.nested`.
        quotas: see `QuotaConfig`.
        retrieval: see `RetrievalConfig`.
        resample: which members of each cluster a resampling step takes: "closest" or "random".
        metric: "l2" or "cosine"; None takes cosine for "sparse" and "greedy" sampling, else l2. Neither is
            better everywhere: try both (`docs/how_it_works.md` has figures).
        init: how k-means is seeded: "k-means++" (greedy), or "random", with which the paper's method fails.
        n_init: k-means runs per level; the best one is kept.
        n_iter: maximum number of Lloyd iterations of a k-means.
        tol: a k-means stops when an iteration lowers its inertia by less than this share.
        seed: for everything random in clustering and sampling.
        max_memory_gb: memory that clustering may use for embeddings; what exceeds it is read again, in
            blocks, at every pass.
        where: a condition in SQL over the columns of the pool, as `similarity > 0.28 AND NOT json.nsfw`;
            samples for which it is not true are dropped, and not embedded.
        exclude: samples to leave out: ids, keys, `.npy` files of ids, `.txt` files of a key in each line.
        include: samples to select whatever other settings say, in the same forms; they count in the quotas of
            their clusters.
        embedding: see `EmbeddingConfig`.
        near_duplicates: see `NearDuplicateConfig`.

    Examples:
        >>> from curated_data import CurationConfig
        >>> config = CurationConfig(target_size=100_000, preset="paper", seed=1)
    """

    target_size: int
    preset: str = "default"
    levels: list[Level] | None = None
    strategy: str = "random"
    sampling: str | None = None
    max_repeats: int = 1
    nested_sizes: list[int] = field(default_factory=list)
    quotas: QuotaConfig = field(default_factory=QuotaConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    resample: str = "closest"
    metric: str | None = None
    init: str = "k-means++"
    n_init: int = 1
    n_iter: int = 50
    tol: float = 1e-4
    seed: int = 0
    max_memory_gb: float = 8.0
    where: str | None = None
    exclude: list[Any] = field(default_factory=list)
    include: list[Any] = field(default_factory=list)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    near_duplicates: NearDuplicateConfig = field(default_factory=NearDuplicateConfig)

    def __post_init__(self) -> None:
        if isinstance(self.levels, str):
            if self.levels != "auto":
                raise ConfigError(f"levels: expected a list of levels or 'auto', got {self.levels!r}")
            self.levels = None


IN_CELLS = ("sparse", "greedy")
"""Ways to sample that compare samples with each other in cells, not with centroids."""
ROWS_PER_CELL = 300
"""Samples per cluster where these derive them."""

_CHOICES = {
    "preset": ("default", "paper"),
    "strategy": ("random", "closest", "furthest"),
    "sampling": ("hierarchical", "flat", "sparse", "greedy"),
    "resample": ("closest", "random"),
    "metric": ("l2", "cosine"),
    "init": ("k-means++", "random"),
    "embedding.dtype": ("float16", "float32"),
    "embedding.precision": ("auto", "32", "bf16"),
    "retrieval.method": ("nearest", "clusters", "weights"),
    "near_duplicates.prefer": ("connected", "largest"),
}
_LEAST = {
    "target_size": 1,
    "max_repeats": 1,
    "n_init": 1,
    "n_iter": 1,
    "tol": 0,
    "seed": 0,
    "max_memory_gb": 1e-3,
    "embedding.batch_size": 1,
    "embedding.num_workers": 0,
    "retrieval.n": 1,
    "retrieval.level": 1,
    "retrieval.least_seeds": 1,
    "retrieval.per_cluster": 1,
    "near_duplicates.threshold": -1,
    "near_duplicates.n_neighbours": 1,
}


def load_config(source: "CurationConfig | Mapping[str, Any] | DictConfig | str | Path") -> CurationConfig:
    """A validated configuration from an object, a mapping, an OmegaConf node, or the path of a YAML file.

    Raises:
        ConfigError: an unknown field (suggests the nearest valid name), a value of the wrong type or out of
            range, a level with more clusters than the one below, or a file that cannot be read.
    """
    if isinstance(source, CurationConfig):
        content: Any = _plain(dataclasses.asdict(source))
    elif isinstance(source, str | Path):
        content = read_yaml(Path(source))
    elif isinstance(source, DictConfig):
        content = source
    elif isinstance(source, Mapping):
        content = _plain(source)
    else:
        kind = type(source).__name__
        raise ConfigError(f"curation: expected a CurationConfig, a mapping or a YAML file, got {kind}")
    _check_containers(CurationConfig, content)
    if content.get("levels", None) == "auto":
        content = {**content, "levels": None}
    config = _with_preset(structured(CurationConfig, content))
    _check(config)
    return config


def _with_preset(config: CurationConfig) -> CurationConfig:
    """With what the preset says where nothing is given; levels are derived later, from the pool's size."""
    is_sparse = config.preset == "default" and config.levels is None and config.strategy == "random"
    sampling = config.sampling or ("sparse" if is_sparse else "hierarchical")
    metric = config.metric or ("cosine" if sampling in IN_CELLS else "l2")
    return dataclasses.replace(config, sampling=sampling, metric=metric)


def levels_for(config: CurationConfig, n_samples: int) -> list[Level]:
    """The levels of a configuration that `load_config` gave, derived for so many samples if it has none."""
    if config.levels:
        return config.levels
    if config.sampling in IN_CELLS:
        k = max(1, n_samples // ROWS_PER_CELL)
        return [Level(k // 100, n_splits=100) if k > 1_000_000 else Level(k)]
    return choose_levels(n_samples)


def structured(schema: type[T], content: dict[str, Any] | DictConfig) -> T:
    """A dataclass object from a mapping, typed by OmegaConf; errors name the field by its dotted path.

    Raises:
        ConfigError: an unknown or missing field, an unresolved interpolation, or a value of the wrong type.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(content))
        filled: Any = OmegaConf.to_object(merged)
        return filled
    except ConfigKeyError as error:
        owner: Any = error.object_type or schema
        valid = [item.name for item in dataclasses.fields(owner)]
        hint = nearest(error.key, valid) or f"; fields are {', '.join(valid)}"
        raise ConfigError(f"{error.full_key}: {owner.__name__} has no such field{hint}") from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: missing; it has no default") from error
    except OmegaConfBaseException as error:
        name = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{name}{first_line(error)}") from error
    except ValueError as error:  # a dataclass's own check
        raise ConfigError(str(error)) from error


def _check_containers(schema: type, content: Any, above: str = "") -> None:
    """Check that sections are mappings and lists are lists: OmegaConf's errors do not name the field."""
    if isinstance(content, DictConfig):
        content = OmegaConf.to_container(content, resolve=False)
    for item in dataclasses.fields(schema):
        value, name = content.get(item.name), f"{above}{item.name}"
        if value is None or (isinstance(value, str) and value.startswith(("${", "???"))):
            continue
        section = item.default_factory
        if dataclasses.is_dataclass(section) or section is dict:
            if not isinstance(value, Mapping | DictConfig):
                raise ConfigError(f"{name}: expected fields and values, got {value!r}")
            if dataclasses.is_dataclass(section):
                _check_containers(section, value, f"{name}.")
        elif item.default_factory is list and isinstance(value, str):
            raise ConfigError(f"{name}: expected a list, got {value!r}; write [{value}]")
        elif "list" in str(item.type) and isinstance(value, bool | int | float):
            raise ConfigError(f"{name}: expected a list, got {value!r}")
        elif item.name == "where" and isinstance(value, bool | int | float):
            raise ConfigError(f"{name}: expected a condition in SQL, got {value!r}")
        elif item.type is not Any and isinstance(value, Mapping | DictConfig):
            kind = "list" if "list" in str(item.type) else "plain value"
            raise ConfigError(f"{name}: expected a {kind}, got fields and values {dict(value)!r}")


def _check(config: CurationConfig) -> None:
    for path, choices in _CHOICES.items():
        check_choice(path, attrgetter(path)(config), choices)
    if config.sampling in IN_CELLS and config.strategy != "random":
        raise ConfigError(
            f"strategy: {config.strategy!r} takes samples by their place in a cluster, and sampling "
            f"{config.sampling!r} by their neighbours; leave one of them out"
        )
    if config.sampling == "greedy" and (config.max_repeats > 1 or config.quotas != QuotaConfig()):
        given = "max_repeats" if config.max_repeats > 1 else "quotas"
        raise ConfigError(
            f"{given}: sampling 'greedy' takes a sample once, by what it adds, whatever its cluster gives; "
            "leave it out, or take sampling 'sparse'"
        )
    for path, least in _LEAST.items():
        value = attrgetter(path)(config)
        if not value >= least:
            raise ConfigError(f"{path}: expected at least {least}, got {value!r}")
    for size in config.nested_sizes:
        if not 1 <= size < config.target_size:
            most = config.target_size
            raise ConfigError(f"nested_sizes: expected sizes of 1 to below target_size, {most}, got {size}")
    check_quotas(config.quotas)
    check_retrieval(config.retrieval)
    is_by_weights = config.retrieval.seeds and config.retrieval.method == "weights"
    if is_by_weights and (config.sampling in ("hierarchical", "greedy") or config.quotas.weights is not None):
        raise ConfigError(
            "retrieval.method: 'weights' are quotas of one level; take sampling 'flat' or 'sparse', and no "
            "quotas.weights"
        )
    check_context(config.embedding.multiprocessing_context, "embedding.multiprocessing_context")
    if config.near_duplicates.threshold > 1:
        raise ConfigError(
            f"near_duplicates.threshold: a cosine is at most 1, got {config.near_duplicates.threshold}"
        )
    if config.near_duplicates.threshold == -1:
        raise ConfigError("near_duplicates.threshold: at -1 all samples are copies; give more than -1")
    if config.levels is not None:
        if not config.levels:
            raise ConfigError("levels: empty; give at least one level, or leave it out to have them derived")
        totals = [level.n_clusters * level.n_splits for level in config.levels]
        for number, (below, above) in enumerate(itertools.pairwise(totals), 1):
            if above > below:
                raise ConfigError(
                    f"levels[{number}].n_clusters: {above} clusters over the {below} of the level below; "
                    "levels are listed bottom up and must not grow"
                )


def _plain(value: Any) -> Any:
    """A copy with Python scalars instead of numpy's, which OmegaConf rejects."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(dataclasses.asdict(item) if isinstance(item, Level) else item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def read_yaml(path: Path) -> DictConfig:
    """The fields and values of a YAML file.

    Raises:
        ConfigError: it cannot be read, is not YAML, or is a list.
    """
    path = local_path(path, "a YAML file")
    try:
        with open_regular(path) as file:
            content = OmegaConf.load(io.TextIOWrapper(file, encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror or error}); give the path of a YAML file"
        ) from error
    except Exception as error:  # PyYAML's own errors, which OmegaConf does not wrap
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path}: expected fields and values, found a list")
    return content
