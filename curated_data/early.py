"""Misspelt keys of a training's YAML, found before the seconds that importing Lightning and torch takes.

What a class takes is read from its source, which is parsed and not run. What cannot be told so, such as a
class that passes its options on, is left to the program's own parser, which checks all of it again.
"""

import ast
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from curated_data.config import CurationConfig, read_yaml
from curated_data.errors import ConfigError, nearest

Homes = Mapping[str, str]

_TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
_DATA = "curated_data.training.datamodule.CuratedDataModule"


def check_keys(arguments: Sequence[str], also: Sequence[str] = ()) -> None:
    """Check the keys of the files that `--config` or `-c` names on the command line of a training.

    Args:
        arguments: of the process.
        also: sections that the program adds to those of LightningCLI.

    Raises:
        ConfigError: the first key that nothing takes: its file, the key, and the nearest valid one.
    """
    sections = (
        "seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler", "ckpt_path",
        "weights_only", "verbose", "dry_run", "fit", "validate", "predict", *also,
    )  # fmt: skip
    for path in _files(arguments):
        if not path.is_file():
            continue  # a name of a setting's default or a URL: the parser's to judge
        content: Any = OmegaConf.to_container(read_yaml(path), resolve=False)
        _check(path, "", content, sections)
        _check(path, "trainer.", content.get("trainer"), parameters(_TRAINER))
        data = content.get("data")
        _check(path, "data.", data, parameters(_DATA))
        if isinstance(data, Mapping):
            curation = CurationConfig.__dataclass_fields__
            _check(path, "data.curation.", data.get("curation"), tuple(curation))
        model = content.get("model")
        if isinstance(model, Mapping) and isinstance(model.get("class_path"), str):
            taken = parameters(model["class_path"])
            _check(path, "model.init_args.", model.get("init_args"), taken)


def parameters(name: str) -> tuple[str, ...]:
    """The parameters of a class's `__init__`, own and inherited, or nothing where that cannot be told.

    Args:
        name: the class with its module, as in YAML; a package may import it from elsewhere.
    """
    return _parameters(name, depth=8) or ()


def _files(arguments: Sequence[str]) -> Iterator[Path]:
    for number, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in ("--config", "-c"):
            if equals:
                yield Path(value)
            elif number + 1 < len(arguments):
                yield Path(arguments[number + 1])


def _check(path: Path, place: str, content: Any, taken: Sequence[str]) -> None:
    if not isinstance(content, Mapping) or not taken:
        return
    for key in content:
        if key not in taken:
            raise ConfigError(f"{path}: {place}{key}: there is no such setting{nearest(key, taken)}")


def _parameters(name: str, depth: int) -> tuple[str, ...] | None:
    module, _, class_name = name.rpartition(".")
    source = _source(module)
    if source is None or depth == 0:
        return None
    tree = ast.parse(source.read_text(encoding="utf-8"))
    homes = _imports(tree, module, source.name == "__init__.py")
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return _of_class(node, module, homes, depth)
    return _parameters(homes[class_name], depth - 1) if class_name in homes else None


def _of_class(
    node: ast.ClassDef, module: str, homes: Mapping[str, str], depth: int
) -> tuple[str, ...] | None:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            given = item.args
            own = tuple(a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs))[1:]
            if given.kwarg is None:
                return own
            if isinstance(given.kwarg.annotation, ast.Subscript):  # Unpack[…], whose fields are named
                fields = given.kwarg.annotation.slice
                assert isinstance(fields, ast.Name), "a class of its own"
                return *own, *_fields(homes.get(fields.id, f"{module}.{fields.id}"))
            base = _of_base(node, module, homes, depth)
            return None if base is None else (*own, *base)
    return _of_base(node, module, homes, depth)


def _fields(name: str) -> tuple[str, ...]:
    """The fields of a typed dictionary."""
    module, _, class_name = name.rpartition(".")
    source = _source(module)
    tree = ast.parse("" if source is None else source.read_text(encoding="utf-8"))
    body = next((n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name), [])
    return tuple(n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name))


def _of_base(node: ast.ClassDef, module: str, homes: Homes, depth: int) -> tuple[str, ...] | None:
    if len(node.bases) != 1 or not isinstance(node.bases[0], ast.Name):
        return None
    base = node.bases[0].id
    return _parameters(homes.get(base, f"{module}.{base}"), depth - 1)


def _imports(tree: ast.Module, module: str, is_package: bool) -> dict[str, str]:
    """Where the names come from that a module takes from others, also for type checkers alone."""
    homes: dict[str, str] = {}
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            homes |= {alias.asname or alias.name: f"{origin}.{alias.name}" for alias in node.names}
    return homes


def _source(module: str) -> Path | None:
    """The file of a module. Only its outermost package is looked for, as Python imports all further ones."""
    top, *inner = module.split(".")
    found = importlib.util.find_spec(top) if top else None
    if found is None or not found.submodule_search_locations:
        return None
    for folder in found.submodule_search_locations:
        path = Path(folder, *inner)
        for candidate in (path / "__init__.py", path.with_suffix(".py")):
            if candidate.is_file():
                return candidate
    return None
