"""`curated-data recipe` and `demo`: what is run and copied are the files of `recipes` and `configs`."""

import filecmp
import subprocess
import sys
from pathlib import Path

import pytest

from curated_data import __version__
from curated_data.cli import main

ROOT = Path(__file__).parents[2]


def test_the_list_names_every_program_and_no_other_file(capsys):
    assert main(["recipe"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    programs = [path.stem for path in (ROOT / "recipes").glob("*.py") if "__main__" in path.read_text()]
    assert sorted(names) == sorted(programs)


def test_a_copy_has_the_same_files_and_replaces_none(tmp_path, capsys):
    assert main(["recipe", "--copy", str(tmp_path)]) == 0
    for part in ("recipes", "configs"):
        files = [
            str(path.relative_to(ROOT / part))
            for path in (ROOT / part).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        ]
        assert files
        same, different, unread = filecmp.cmpfiles(ROOT / part, tmp_path / part, files, shallow=False)
        assert (sorted(same), different, unread) == (sorted(files), [], [])
    (tmp_path / "configs" / "base.yaml").write_text("mine: true\n")
    assert main(["recipe", "--copy", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert (tmp_path / "configs" / "base.yaml").read_text() == "mine: true\n"


def test_an_unknown_recipe_names_the_nearest(capsys):
    assert main(["recipe", "quickstrt"]) == 2
    assert "did you mean 'quickstart'" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("arguments", [["demo", "--pool"], ["recipe", "quickstart", "--pool"]])
def test_arguments_are_the_recipe_s_own(arguments, tmp_path):
    """From a folder that is no checkout; the recipe's parser says what is wrong with them."""
    command = [sys.executable, "-m", "curated_data.cli", *arguments]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "quickstart.py: error: argument --pool: expected at least one argument" in ended.stderr


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"curated-data {__version__}"
