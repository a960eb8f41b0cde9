"""Compare a selection with a random one of the same size and with the pool, in a table."""

from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from curated_data.selection.metrics import class_balance, cluster_balance

if TYPE_CHECKING:
    from curated_data.stages.curation import Curation

Row = dict[str, float]


def compare_with_random(curation: "Curation", labels: np.ndarray, *, seed: int = 0) -> dict[str, Row]:
    """The balance of the pool, of a random selection and of the curated one, over classes and clusters.

    Args:
        curation: of a pool of n samples.
        labels: (n,) class of each sample, -1 for none; only used for these figures.
        seed: for the random selection, which has as many distinct samples as the curated one.

    Returns:
        For `pool`, `random` and `curated`: `size`; if there are labels `classes` (how many occur), `entropy`
        (of the classes, in nats) and `ratio` (largest class divided by smallest); and `perplexity 1`, … of
        the clusters at each level.
    """
    valid = np.flatnonzero(curation.embeddings.valid)
    rng = np.random.default_rng(seed)
    chosen = {
        "pool": valid,
        "random": np.sort(rng.choice(valid, len(np.unique(curation.ids)), replace=False)),
        "curated": curation.ids,
    }
    rows = {}
    for name, ids in chosen.items():
        row: Row = {"size": len(ids)}
        if (balance := class_balance(labels, ids)) is not None:
            row |= {
                "classes": int((balance.after > 0).sum()),
                "entropy": balance.entropy_after,
                "ratio": balance.ratio_after,
            }
        for level in cluster_balance(curation.tree, ids):
            row[f"perplexity {level.level}"] = level.selected_perplexity
        rows[name] = row
    return rows


def comparison_table(rows: dict[str, Row], *, title: str, what: str = "samples") -> Table:
    """The rows of `compare_with_random` as a table to print; `what` names the samples."""
    headings = {
        "size": (what, "{:,.0f}"),
        "classes": ("classes", "{:,.0f}"),
        "entropy": ("class entropy, nats", "{:.3f}"),
        "ratio": ("head / tail", "{:,.1f}"),
    }
    table = Table(title=title)
    table.add_column("")
    columns = list(rows["pool"])
    for column in columns:
        heading = headings[column][0] if column in headings else f"cluster {column}"
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        layouts = [headings.get(column, ("", "{:,.1f}"))[1] for column in columns]
        table.add_row(name, *(layout.format(row[column]) for layout, column in zip(layouts, columns)))
    return table
