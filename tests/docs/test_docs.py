"""The documentation holds: the tutorial runs and prints what it shows, links lead somewhere, names exist."""

import ast
import contextlib
import fnmatch
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from curated_data.cli import main

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FURTHER = [*sorted(ROOT.glob("*.md")), ROOT / "benchmarks" / "LEADERBOARD.md"]
REPOSITORY = "https://github.com/curated-data/curated-data/blob/main/"  # links that PyPI follows, too
PAGES = sorted(DOCS.glob("*.md"))


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run_page(page: str, folder: Path, monkeypatch) -> dict:
    """The names that a page's Python blocks leave, run one after the other, and with them commands of
    `curated-data`, from a folder like a checkout's root; each block of text is what the one before it
    printed, `…` for what may differ.
    """
    monkeypatch.chdir(folder)
    os.symlink(ROOT / "recipes", folder / "recipes")
    names: dict = {"__name__": "__main__"}
    printed = ""
    for number, (language, content) in enumerate(blocks((DOCS / page).read_text()), 1):
        if language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(content, f"{page}, block {number}", "exec"), names)
            printed = output.getvalue()
        elif language == "bash":
            for command in content.replace("\\\n", " ").splitlines():
                assert command.startswith("curated-data "), f"{page}, block {number}: {command} is not run"
                assert main(shlex.split(command, comments=True)[1:]) == 0, command
        elif language == "text":
            pattern = re.sub(r"([\[\]?*])", r"[\1]", content).replace("…", "*")
            assert fnmatch.fnmatchcase(printed, pattern), f"{page}, block {number} printed:\n{printed}"
    return names


@pytest.mark.long
def test_the_tutorial_prints_what_it_shows(tmp_path, monkeypatch):
    found = blocks((DOCS / "tutorial.md").read_text())
    assert [language for language, _ in found] == ["python", "text"] * (len(found) // 2)
    names = run_page("tutorial.md", tmp_path, monkeypatch)
    entropy = {
        name: names["class_balance"](names["labels"], ids).entropy_after
        for name, ids in (("random", names["random"]), ("curated", names["curation"].ids))
    }
    assert entropy["curated"] > entropy["random"]


@pytest.mark.parametrize("page", ["i_have_embeddings.md", "i_have_scores.md", "steer_the_selection.md"])
def test_pages_about_what_comes_in_print_what_they_show(page, tmp_path, monkeypatch):
    names = run_page(page, tmp_path, monkeypatch)
    assert len(names["curation"].ids) in (100, 200, 600)


def test_answers_to_questions_run(tmp_path, monkeypatch):
    names = run_page("questions.md", tmp_path, monkeypatch)
    perplexity = list(names["sizes"].values())
    assert perplexity[-1] == min(perplexity[1:])  # falls back towards the pool's, as the page says


@pytest.mark.parametrize("page", [*PAGES, *FURTHER], ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        target = target.removeprefix(REPOSITORY) if page.parent == ROOT else target
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"
    for path in re.findall(r"\b(?:recipes|configs|benchmarks|tests)/[\w/]+\.\w+", text):
        assert (ROOT / path).exists() or "NAME" in path, f"{page.name}: {path}"


def test_generated_pages_are_those_of_the_code():
    make_api = runpy.run_path(str(DOCS / "make_api.py"))
    for name, page in (("api.md", "page"), ("settings.md", "settings_page")):
        assert (DOCS / name).read_text() == make_api[page](), f"docs/{name} is stale: python docs/make_api.py"


def test_every_exported_name_is_on_the_api_page():
    import curated_data
    import lightning_modules

    text = (DOCS / "api.md").read_text()
    for package in (curated_data, lightning_modules):
        for name in package.__all__:
            assert f"### `{package.__name__}.{name}`\n" in text


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.stem)
def test_the_help_of_recipes_is_as_wide_as_a_terminal(path):
    """`--help` is the docstring: a backslash at a line's end, not in a raw string, joins two lines of it."""
    for line in ast.get_docstring(ast.parse(path.read_text()), clean=False).splitlines():
        assert len(line) <= 110, line
        assert "   --" not in line.lstrip(), line


RUN = ["install", "folder_of_images", "img2dataset", "notebook", "object_store", "slurm", "table_and_search"]


@pytest.mark.parametrize("page", RUN)
def test_pages_for_what_one_has_run(page, tmp_path, monkeypatch):
    """Python and commands of `curated-data`, in the order of the page."""
    run_page(f"{page}.md", tmp_path, monkeypatch)


def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "curated_data.curate" in (tmp_path / "reference" / "index.html").read_text()
