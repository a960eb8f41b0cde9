"""The commands of benchmarks in docs, settings and docstrings exist, with the options that they name."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"python -m (benchmarks(?:\.[a-z]\w*)+)([^`\n]*)")
FOLDERS = ("benchmarks", "configs", "curated_data", "docs", "lightning_modules", "recipes")


def test_every_command_of_a_benchmark_exists() -> None:
    pages = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.*"))]
    found: set[str] = set()
    for page in (page for page in pages if page.suffix in (".md", ".py", ".yaml")):
        for module, words in COMMAND.findall(page.read_text()):
            path = ROOT.joinpath(*module.split("."))
            files = list(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
            assert {file.exists() for file in files} == {True}, f"{page}: python -m {module}"
            program = "".join(file.read_text() for file in files)
            assert "__main__" in program or (path / "__main__.py").exists(), f"{page}: python -m {module}"
            for option in re.findall(r"(?<!\S)--[a-z-]+", words):
                assert f'"{option}"' in program, f"{page}: python -m {module} {option}"
            found.add(module)
    assert {"benchmarks.balance", "benchmarks.evidence", "benchmarks.kmeans"} <= found
