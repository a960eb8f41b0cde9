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
import tomllib
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from curated_data.cli import _parser, main

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FURTHER = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md"))]
REPOSITORY = "https://github.com/curated-data/curated-data/blob/main/"  # links that PyPI follows, too
PAGES = sorted(DOCS.glob("*.md"))


FENCE = re.compile(r"^(<!-- not run: .* -->\n)?```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks of a page, but for those marked `<!-- not run: why -->`."""
    return [(language, content) for mark, language, content in FENCE.findall(text) if not mark]


def commands(content: str) -> list[list[str]]:
    """The words of each line of a block of bash, continued lines joined."""
    lines = content.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line and not line.startswith("#")]


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
            for program, *arguments in commands(content):
                assert program == "curated-data", f"{page}, block {number}: {program} is not run"
                assert main(arguments) == 0, arguments
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


@pytest.mark.parametrize("page", ["i_have_embeddings.md", "i_have_scores.md"])
def test_pages_about_what_comes_in_print_what_they_show(page, tmp_path, monkeypatch):
    names = run_page(page, tmp_path, monkeypatch)
    assert len(names["curation"].ids) in (100, 200)


def test_answers_to_questions_run(tmp_path, monkeypatch):
    names = run_page("questions.md", tmp_path, monkeypatch)
    perplexity = list(names["sizes"].values())
    assert perplexity[-1] == min(perplexity[1:])  # falls back towards the pool's, as the page says


def test_names_of_timm_have_weights():
    import timm

    text = re.sub(r"```.*?```", "", (DOCS / "embedders.md").read_text(), flags=re.DOTALL)
    names = set(re.findall(r"`timm:([a-z]\w*\.\w+)`", text))
    assert len(names) > 10
    assert names <= set(timm.list_pretrained())


@pytest.mark.parametrize("page", [*PAGES, *FURTHER], ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        target = target.removeprefix(REPOSITORY) if page.parent == ROOT else target
        if "://" in target:
            continue
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor and path.parent != DOCS:  # the site's own are checked when it is built
            assert anchor in github_anchors(path), f"{page.name}: {target}#{anchor}"
    for path in re.findall(r"\b(?:recipes|configs|benchmarks|tests)/[\w/]+\.\w+", text):
        assert (ROOT / path).exists() or "NAME" in path, f"{page.name}: {path}"


def github_anchors(page: Path) -> set[str]:
    """The names by which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_generated_pages_are_those_of_the_code():
    make_api = runpy.run_path(str(DOCS / "make_api.py"))
    for name, page in (("api.md", "page"), ("settings.md", "settings_page")):
        assert (DOCS / name).read_text() == make_api[page](), f"docs/{name} is stale: python docs/make_api.py"


def test_every_exported_name_is_on_the_api_page():
    import curated_data
    import lightning_modules
    import lightning_modules.evaluation

    text = (DOCS / "api.md").read_text()
    for package in (curated_data, lightning_modules, lightning_modules.evaluation):
        for name in package.__all__:
            assert f"### `{package.__name__}.{name}`\n" in text


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.stem)
def test_the_help_of_recipes_is_as_wide_as_a_terminal(path):
    """`--help` is the docstring: a backslash at a line's end, not in a raw string, joins two lines of it."""
    for line in ast.get_docstring(ast.parse(path.read_text()), clean=False).splitlines():
        assert len(line) <= 110, line
        assert "   --" not in line.lstrip(), line


IN_OTHER_TESTS = {"tutorial.md", "i_have_embeddings.md", "i_have_scores.md", "questions.md"}
GENERATED = {"api.md", "settings.md"}
RUN = [
    page.name
    for page in PAGES
    if page.name not in IN_OTHER_TESTS | GENERATED
    and {"python", "bash"} & {name for name, _ in blocks(page.read_text())}
]


@pytest.mark.parametrize("page", RUN)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    """Python and commands of `curated-data`, in the order of the page."""
    run_page(page, tmp_path, monkeypatch)


@pytest.mark.parametrize("page", [DOCS.parent / "README.md", *PAGES], ids=lambda page: page.name)
def test_blocks_that_are_not_run_are_valid(page):
    """Python compiles, YAML and TOML parse, options of commands exist; no other language hides a block."""
    for mark, language, content in FENCE.findall(page.read_text()):
        assert language in ("python", "bash", "text", "yaml", "toml"), (
            f"{page.name}: a block of {language or 'no language'}"
        )
        if language == "yaml":
            OmegaConf.create(content)
        elif language == "toml":
            tomllib.loads(content)
        elif language == "python" and mark:
            compile(content, page.name, "exec")
        elif language == "bash" and mark:
            for words in commands(content):
                if words[0] == "curated-data" and words[1] != "recipe":
                    _parser().parse_args(words[1:])


def test_the_site_is_built_without_a_warning(tmp_path):
    # Not --quiet, which lets warnings pass.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "curated_data.curate" in (tmp_path / "reference" / "index.html").read_text()
