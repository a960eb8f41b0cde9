"""The settings of a curation, as a structured config that is checked once, before anything long starts."""

import dataclasses
import difflib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from curated_data.clustering.hierarchy import Level
from curated_data.errors import ConfigError


@dataclass
class EmbeddingConfig:
    """How the pool is embedded; which network does it is the `embedder` argument.

    Attributes:
        batch_size: samples a forward pass.
        num_workers: processes that read and decode.
        dtype: of the stored rows, "float16" or "float32".
        precision: "32", "bf16", or "auto" for bf16 where a CUDA device has it.
    """

    batch_size: int = 256
    num_workers: int = 2
    dtype: str = "float16"
    precision: str = "auto"


@dataclass
class NearDuplicateConfig:
    """Whether copies leave the pool before it is clustered, so that they do not fill the selection.

    Attributes:
        enabled: look for them at all.
        threshold: cosine similarity from which two samples are copies of each other.
        n_neighbours: how many nearest samples of each are compared with it.
        prefer: which of a group stays: the one nearest its "centroid", or the "largest" image; the latter
            reads every image once, and takes equal bytes for copies whatever their embeddings say.
        held_out: shards of evaluation sets; samples within the threshold of one of theirs leave the pool too.
    """

    enabled: bool = False
    threshold: float = 0.95
    n_neighbours: int = 16
    prefer: str = "centroid"
    held_out: list[str] = field(default_factory=list)


@dataclass
class CurationConfig:
    """What to select, and how.

    Attributes:
        target_size: how many samples the selection should have.
        levels: of the cluster tree, bottom up, fewer clusters at each; None (or "auto") derives them from the
            pool's size.
        strategy: which samples a lowest cluster gives: "random", "closest" to its centroid, or "furthest".
        sampling: "hierarchical" shares the target from the top of the tree, "flat" over the lowest clusters
            alone.
        max_repeats: how often one sample may be selected.
        resample: which members a resampling step takes of each cluster: "closest" or "random".
        metric: "l2" or "cosine". Neither is better everywhere: try both (`docs/how_it_works.md` has figures).
        init: of k-means: "k-means++" (greedy), or "random", which the paper's method does not survive.
        n_init: k-means runs a level, of which the best is kept.
        n_iter: most Lloyd iterations of a k-means.
        tol: relative fall of the inertia below which a k-means stops.
        seed: of everything random in clustering and sampling.
        max_memory_gb: that clustering may hold; embeddings beyond it are read again, in blocks, at every
            pass.
        embedding: see `EmbeddingConfig`.
        near_duplicates: see `NearDuplicateConfig`.
    """

    target_size: int
    levels: list[Level] | None = None
    strategy: str = "random"
    sampling: str = "hierarchical"
    max_repeats: int = 1
    resample: str = "closest"
    metric: str = "l2"
    init: str = "k-means++"
    n_init: int = 1
    n_iter: int = 50
    tol: float = 1e-4
    seed: int = 0
    max_memory_gb: float = 8.0
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    near_duplicates: NearDuplicateConfig = field(default_factory=NearDuplicateConfig)

    def __post_init__(self) -> None:
        if isinstance(self.levels, str):
            if self.levels != "auto":
                raise ConfigError(f"levels: expected a list of levels or 'auto', got {self.levels!r}")
            self.levels = None


_CHOICES = {
    "strategy": ("random", "closest", "furthest"),
    "sampling": ("hierarchical", "flat"),
    "resample": ("closest", "random"),
    "metric": ("l2", "cosine"),
    "init": ("k-means++", "random"),
    "embedding.dtype": ("float16", "float32"),
    "embedding.precision": ("auto", "32", "bf16"),
    "near_duplicates.prefer": ("centroid", "largest"),
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
    "near_duplicates.threshold": -1,
    "near_duplicates.n_neighbours": 1,
}


def load_config(source: "CurationConfig | Mapping[str, Any] | DictConfig | str | Path") -> CurationConfig:
    """A checked configuration from an object, a mapping, an OmegaConf node, or the path of a YAML file.

    Raises:
        ConfigError: an unknown field (with the nearest valid name), a value of the wrong type or out of
            range, levels that do not shrink upward, or a file that cannot be read.
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
    if not isinstance(content, Mapping | DictConfig):
        raise ConfigError(f"curation: expected fields and values, got {type(content).__name__}")
    _check_containers(CurationConfig, content)
    if content.get("levels", None) == "auto":
        content = {**content, "levels": None}
    config = structured(CurationConfig, content)
    _check(config)
    return config


def structured(schema: type, content: Mapping[str, Any] | DictConfig) -> Any:
    """A dataclass object from a mapping, typed by OmegaConf; errors name the field by its dotted path.

    Raises:
        ConfigError: an unknown or missing field, an unresolved interpolation, or a value of the wrong type.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(content))
        return OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        valid = [item.name for item in dataclasses.fields(error.object_type or schema)]
        near = difflib.get_close_matches(str(error.key), valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"fields are {', '.join(valid)}"
        owner = (error.object_type or schema).__name__
        raise ConfigError(f"{error.full_key}: {owner} has no such field; {hint}") from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: missing; it has no default") from error
    except OmegaConfBaseException as error:
        name = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{name}{str(error).splitlines()[0]}") from error
    except ValueError as error:  # a dataclass's own check
        raise ConfigError(str(error)) from error


def _check_containers(schema: type, content: Any, above: str = "") -> None:
    """That sections are mappings and lists are lists: OmegaConf's own errors do not name the field."""
    if isinstance(content, DictConfig):
        content = OmegaConf.to_container(content, resolve=False)
    for item in dataclasses.fields(schema):
        value, name = content.get(item.name), f"{above}{item.name}"
        if value is None or (isinstance(value, str) and value.startswith(("${", "???"))):
            continue
        if dataclasses.is_dataclass(item.default_factory):
            if not isinstance(value, Mapping | DictConfig):
                raise ConfigError(f"{name}: expected fields and values, got {value!r}")
            _check_containers(item.default_factory, value, f"{name}.")
        elif item.default_factory is list and isinstance(value, str):
            raise ConfigError(f"{name}: expected a list, got {value!r}; write [{value}]")
        elif isinstance(value, Mapping | DictConfig):
            kind = "list" if "list" in str(item.type) else "plain value"
            raise ConfigError(f"{name}: expected a {kind}, got fields and values {dict(value)!r}")


def _check(config: CurationConfig) -> None:
    for path, choices in _CHOICES.items():
        value = _at(config, path)
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{path}: expected one of {', '.join(choices)}, got {value!r}{hint}")
    for path, least in _LEAST.items():
        value = _at(config, path)
        if not value >= least:
            raise ConfigError(f"{path}: expected at least {least}, got {value!r}")
    if config.near_duplicates.threshold > 1:
        raise ConfigError(
            f"near_duplicates.threshold: a cosine is at most 1, got {config.near_duplicates.threshold}"
        )
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
    """Numpy scalars as Python's, which are all that OmegaConf takes."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(dataclasses.asdict(item) if isinstance(item, Level) else item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ConfigError: it cannot be read, or is no YAML.
    """
    try:
        return OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give the path of a YAML file"
        ) from error
    except Exception as error:  # PyYAML's own errors, which OmegaConf does not wrap
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
