"""`curated-data recipe`: the programs in `recipes`, run or copied from wherever they are installed."""

import argparse
import ast
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from curated_data.cache.paths import local_path
from curated_data.cli.common import add_command
from curated_data.errors import ConfigError, nearest

PARTS = ("recipes", "configs")


def add(commands: Any) -> None:
    """Add the command, and `demo`, which runs one recipe."""
    add_command(commands, "demo", "run the quickstart: `recipe quickstart`")
    command = add_command(
        commands, "recipe", "run a recipe, or copy recipes and settings; without a name: list them"
    )
    command.add_argument("--copy", metavar="FOLDER", help="copy recipes and their settings there")
    command.add_argument("name", nargs="?", help="of the recipe, as quickstart")
    command.add_argument("arguments", nargs=argparse.REMAINDER, help="the recipe's own; try --help")
    command.set_defaults(run=recipe)


def home() -> Path:
    """The folder that has `recipes` and `configs`: inside the package of a wheel, else the checkout."""
    package = Path(__file__).parents[1]
    shipped = package / "shipped"
    return shipped if shipped.is_dir() else package.parent


def recipe(parsed: argparse.Namespace) -> None:
    """List the recipes, copy them, or become one.

    Raises:
        ConfigError: no recipe has that name, or the folder of a copy has recipes or settings already.
    """
    if parsed.copy is not None:
        copy(local_path(parsed.copy, "--copy"))
    elif parsed.name is None:
        for name, path in recipes().items():
            print(f"{name:20} {_summary(path)}")
    else:
        run(parsed.name, parsed.arguments)


def recipes() -> dict[str, Path]:
    """The programs by name."""
    return {path.stem: path for path in sorted((home() / "recipes").glob("*.py")) if _is_program(path)}


def run(name: str, arguments: list[str]) -> None:
    """Replace this process by the recipe's, so that signals, workers and launched ranks are its own."""
    found = recipes()
    if name not in found:
        known = f"(there are {', '.join(found)})"
        raise ConfigError(f"recipe {name}: there is no such recipe{nearest(name, found)} {known}")
    paths = [str(home()), *filter(None, [os.environ.get("PYTHONPATH")])]  # recipes import from each other
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, str(found[name]), *arguments], environment)


def copy(folder: Path) -> None:
    """Copy recipes, their data and settings into a folder, where paths in the settings then lead somewhere.

    Raises:
        ConfigError: it has a part of them already.
    """
    for part in PARTS:
        if (folder / part).exists():
            raise ConfigError(
                f"--copy {folder}: has {part} already, which may be changed; give another folder"
            )
    for part in PARTS:
        shutil.copytree(home() / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    print(f"{folder}: {' and '.join(PARTS)}; there, `curated-data recipe NAME …` runs one as it was shipped,")
    print("and `python -m recipes.NAME …` the copy, which is yours to change")


def _is_program(path: Path) -> bool:
    return "__main__" in path.read_text(encoding="utf-8")


def _summary(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())
