"""The README's example runs as it stands."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_the_drop_in_example_trains(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    block = re.search(r"test_readme\.py runs this block -->\n```python\n(.*?)```", text, re.DOTALL)
    assert block, "README.md: the marked example is gone"
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "recipes", tmp_path / "recipes")
    names: dict = {"__name__": "__main__"}
    exec(compile(block.group(1), "README.md", "exec"), names)
    assert len(names["data"].selection) == 800
    assert names["trainer"].global_step == 800 // 64
    assert (tmp_path / "runs" / "cache" / "selection").is_dir()


@pytest.mark.parametrize("command", ["uv run recipes/quickstart.py", "uv run pytest"])
def test_the_first_commands_are_what_ci_runs(command):
    assert command in (ROOT / "README.md").read_text()
    assert command in (ROOT / ".ci" / "run").read_text()
