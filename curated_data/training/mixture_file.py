"""The mixture that the YAML of a training describes, opened without the training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from curated_data.config import read_yaml
from curated_data.errors import ConfigError, first_line
from curated_data.training.datamodule import CuratedDataModule

_OF_TRAINING = ("views", "eval_transform", "val_pool", "test_pool", "device")
"""What a look at the components needs nothing of; in YAML some are classes, which only the training makes."""


def open_mixture(
    files: Sequence[str | Path], *, embedder: str | None = None, cache_dir: str | Path | None = None
) -> CuratedDataModule:
    """The data module of a training's YAML, to curate and look at its mixture.

    Args:
        files: with the fields of a data module, below `data:` or at the top; later ones override earlier.
        embedder: the name of one, for files that name none.
        cache_dir: for files that name none.

    Raises:
        ConfigError: a file cannot be read, or has no mixture, or fields that do not exist; or an embedder
            that is a class.

    Examples:
        >>> from pathlib import Path
        >>> from curated_data.training.mixture_file import open_mixture
        >>> parts = "{name: a, pool: pool-000000.tar, weight: 1}, {name: b, pool: pool-000001.tar, weight: 1}"
        >>> _ = Path("halves.yaml").write_text(f"data: {{mixture: {{components: [{parts}]}}}}")
        >>> open_mixture(["halves.yaml"]).mixture
        Mixture(a, b)
    """
    named = ", ".join(map(str, files))
    try:
        merged: Any = OmegaConf.merge(*(read_yaml(Path(file)) for file in files))
        part = merged.get("data") or merged  # resolved by itself: the rest may ask for what is not there yet
        fields: Any = OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part
    except (OmegaConfBaseException, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{named}: {first_line(error)}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("mixture"), dict):
        raise ConfigError(f"{named}: no `mixture` of components; give the YAML of a training with one")
    fields = {name: value for name, value in fields.items() if name not in _OF_TRAINING}
    components = fields["mixture"].get("components")
    for component in components if isinstance(components, list) else ():
        if isinstance(component, dict):
            component.pop("views", None)
            _check_embedder(component.get("embedder"), f"component {component.get('name', '?')!r}, ")
    _check_embedder(fields.get("embedder"), "")
    for name, value in (("embedder", embedder), ("cache_dir", cache_dir)):
        if fields.get(name) is None:
            fields[name] = value
    try:
        return CuratedDataModule(**fields)
    except TypeError as error:  # a field that does not exist
        raise ConfigError(f"{named}: {first_line(error)}") from error


def _check_embedder(value: Any, where: str) -> None:
    if value is not None and not isinstance(value, str):
        raise ConfigError(
            f"{where}embedder: expected a name, found {value!r}; only the training makes classes"
        )
