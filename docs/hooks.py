"""mkdocs: links from pages to files of the repository outside docs/ lead to the repository."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """The page with `](../benchmarks/RESULTS.md)` as a link into the repository."""

    def absolute(found: re.Match[str]) -> str:
        assert (ROOT / found[1]).exists(), f"a link leads to ../{found[1]}, which is not there"
        return f"]({config['repo_url']}/blob/main/{found[1]}"

    return re.sub(r"\]\(\.\./([^)#]+)", absolute, markdown)
