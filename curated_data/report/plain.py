"""Pages without a script in the style of the report page: pairs, what a search found, mixtures, settings."""

import html
import re
from collections.abc import Sequence
from pathlib import Path

_FOLDER = Path(__file__).with_name("page")


def plain_page(title: str, body: str) -> str:
    """A page that needs nothing else, of a body that is HTML."""
    return filled(_FOLDER / "plain.html", title=html.escape(title), style=style(), body=body)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML; on a phone each row becomes a list of headings and cells."""
    top = "".join(f"<th>{name}</th>" for name in head)
    lines = [
        "".join(f'<td data-label="{name}">{cell}</td>' for name, cell in zip(head, row, strict=True))
        for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def style() -> str:
    """The style of the report page."""
    return (_FOLDER / "page.css").read_text(encoding="utf-8")


def filled(template: Path, **parts: str) -> str:
    """A template with its `{{parts}}` in their places."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template.read_text(encoding="utf-8"))
