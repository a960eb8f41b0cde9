"""A curation at a glance: its figures as a table, and as what a notebook shows of it."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from curated_data.pool import ShardPool
from curated_data.progress import is_notebook
from curated_data.report.claim import opening
from curated_data.report.examples import cluster_rows
from curated_data.report.figures import contact_sheet, size_curves
from curated_data.report.page import class_names_beside
from curated_data.selection.metrics import class_balance, read_labels

if TYPE_CHECKING:
    from curated_data.stages.curation import Curation
    from curated_data.stages.index import AnyPool

HEADINGS = ("level", "clusters", "covered", "perplexity, pool", "perplexity, selection")


def headline(report: Mapping[str, Any]) -> str:
    """What was selected, and what was left out, of a curation's report."""
    parts = [f"{report['selected']:,} of {report['samples']:,} samples selected"]
    if report.get("distinct", report["selected"]) < report["selected"]:
        parts.append(f"{report['distinct']:,} different ones")
    left_out = {"failed": "failed", "near_duplicates": "near-duplicates", "excluded": "without a direction"}
    parts += [f"{report[name]:,} {text}" for name, text in left_out.items() if report.get(name)]
    for name, found in report.get("retrieval", {}).items():
        if "selected" in found:
            parts.append(f"{found['selected']:,} retrieved for {name}")
    return ", ".join(parts)


def level_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """A row for each level of the tree, under `HEADINGS`."""
    return [
        [
            str(level["level"]),
            f"{level['n_clusters']:,}",
            f"{level['covered']:.1%}",
            f"{level['perplexity']:,.1f}",
            f"{level['selected_perplexity']:,.1f}",
        ]
        for level in report["levels"]
    ]


def summary_table(report: Mapping[str, Any]) -> Table:
    """The figures of a curation as a table to print."""
    table = Table(title=headline(report))
    for name in HEADINGS:
        table.add_column(name, justify="right")
    for row in level_rows(report):
        table.add_row(*row)
    return table


def as_html(curation: "Curation") -> str:
    """The headline, the table and the sizes of clusters, in HTML for a notebook."""
    head = "".join(f"<th>{name}</th>" for name in HEADINGS)
    body = "".join(
        f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in level_rows(curation.report)
    )
    picture = _image(size_curves(curation.tree, curation.ids))
    return f"<b>{html.escape(headline(curation.report))}</b><table><tr>{head}</tr>{body}</table>{picture}"


def show(curation: "Curation", pool: "AnyPool | None" = None) -> None:
    """Print what a curation changed and its figures; in a notebook, with pictures.

    Args:
        pool: of shards that was curated, for classes, and for examples of what was kept and dropped.
    """
    shards = pool if isinstance(pool, ShardPool) else None
    print(claim(curation, shards))
    if not is_notebook():
        Console().print(summary_table(curation.report))
        return
    from IPython.display import HTML, display

    display(HTML(as_html(curation)))
    if shards is not None and any(name in shards.index().extensions for name in shards.image_extensions):
        rows = cluster_rows(curation.tree, curation.ids, choose="largest", n_clusters=6, least=2)
        display(HTML(_image(contact_sheet(shards, rows))))


def claim(curation: "Curation", pool: ShardPool | None) -> str:
    """What the selection changed, in a sentence: of classes, if there is a pool that has them."""
    labels = None if pool is None else read_labels(pool)
    balance = None if labels is None else class_balance(labels, curation.ids)
    classes: Sequence[str] | None = None
    if pool is not None and balance is not None:
        classes = balance.names(class_names_beside(pool))
    return str(opening(curation, balance, classes, [{}] * curation.tree.n_levels)["claim"])


def _image(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="" style="max-width:100%" src="data:image/png;base64,{data}">'
