"""The packages are typed: for a strict checker of a user's program, and for what reads hints at run time."""

import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import curated_data
import lightning_modules

PUBLIC = [
    *((curated_data, name) for name in curated_data.__all__),
    *((lightning_modules, name) for name in lightning_modules.__all__),
]


@pytest.mark.slow
def test_a_users_program_is_clean_under_strict_checks(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        Path(__file__).parents[1].joinpath("support", "typed_use.py").read_text()
        + "\n\nreveal_type(curate)\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir=cache", "program.py"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "-> curated_data.pipeline.curate.Curation" in found.stdout  # the package's own types, not Any


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=[name for _, name in PUBLIC])
def test_annotations_resolve_at_run_time(package, name):
    found = getattr(package, name)
    function = found.__init__ if inspect.isclass(found) else found
    parameters = inspect.signature(function).parameters.keys() - {"self"}
    assert typing.get_type_hints(function).keys() == parameters | {"return"}
