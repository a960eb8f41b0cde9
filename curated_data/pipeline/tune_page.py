"""A page about settings that were compared: their intervals, the classes of the best, and its YAML."""

import html
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from curated_data.pipeline.tune import Tried, verdict
from curated_data.report.plain import filled, plain_page, table

_TEMPLATE = Path(__file__).with_name("tune.html")
_MOST = 40  # classes that are shown


def tune_page(
    rows: Sequence[Tried], labels: np.ndarray, target_size: int, *, class_names: Sequence[str] | None = None
) -> str:
    """One HTML page that needs nothing else.

    Args:
        rows: from `tune`.
        labels: (n,) those that it was given.
        target_size: of the selections.
        class_names: of the classes 0, 1, …; None shows their numbers.
    """
    best, why = verdict(list(rows))
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    names = [class_names[c] if class_names is not None and c < len(class_names) else str(c) for c in classes]
    figures = (
        (f"{len(labels):,}", "samples in the pool"),
        (f"{target_size:,}", "to select"),
        (f"{counts.sum():,}", f"labels of {len(classes):,} classes"),
        (f"{rows[0].entropy:.3f}", f"entropy by the default, of {np.log(len(classes)):.3f} nats"),
        *([] if best is rows[0] else [(f"{best.entropy:.3f}", f"entropy by “{html.escape(best.name)}”")]),
    )
    body = filled(
        _TEMPLATE,
        why=html.escape(why),
        figures="".join(f"<div><b>{value}</b><span>{what}</span></div>" for value, what in figures),
        intervals=_intervals(rows, best),
        table=_table(rows),
        classes=_classes(names, counts / counts.sum(), rows[0], best, target_size),
        yaml=html.escape(_yaml({"target_size": target_size} | best.settings)),
    )
    return plain_page("Settings compared by labels", body)


def _intervals(rows: Sequence[Tried], best: Tried) -> str:
    """A line per setting, from the low to the high end of its interval, on one scale with a mark at 0."""
    low, high = min(0.0, *(row.low for row in rows)), max(0.0, *(row.high for row in rows))
    width = high - low or 1.0

    def place(value: float) -> float:
        return round(100 * (value - low) / width, 2)

    lines = []
    for row in rows:
        colour = "chosen" if row is best else "pool"
        bar = ""
        if row is not rows[0]:
            bar = f'<b style="left:{place(row.low)}%;width:{place(row.high) - place(row.low):.2f}%"></b>'
        lines.append(
            f'<div class="change"><span title="{html.escape(row.name)}">{html.escape(row.name)}</span>'
            f'<div><u style="left:{place(0)}%"></u>{bar}'
            f'<i style="left:{place(row.gain)}%;background:var(--{colour})"></i></div>'
            f"<em>{row.gain:+.3f}</em></div>"
        )
    return "".join(lines)


def _table(rows: Sequence[Tried]) -> str:
    lines = [
        (html.escape(row.name), f"{row.entropy:.3f}", f"{row.gain:+.3f}",
         f"{row.low:+.3f} to {row.high:+.3f}", html.escape(json.dumps(row.settings) if row.settings else ""))
        for row in rows
    ]  # fmt: skip
    return table(("settings", "entropy", "gain", "interval", "as YAML"), lines, "last-is-text")


def _classes(names: Sequence[str], pool: np.ndarray, default: Tried, best: Tried, target_size: int) -> str:
    """Bars of the estimated numbers of samples of each class, the largest class of the pool first."""
    series = [("pool", pool), ("chance", default.shares), ("chosen", best.shares)]
    if best is default:
        del series[1]
    order = np.argsort(-pool, kind="stable")[:_MOST]
    most = max(float(shares[order].max()) for _, shares in series)
    lines = []
    for c in order:
        bars = "".join(
            f'<div style="width:{100 * shares[c] / most:.2f}%;background:var(--{colour})">'
            f"<em>{target_size * shares[c]:,.0f}</em></div>"
            for colour, shares in series
        )
        name = html.escape(names[c])
        lines.append(f'<div class="bar"><span title="{name}">{name}</span><div>{bars}</div></div>')
    texts = {"pool": "as the pool", "chance": "default", "chosen": html.escape(best.name)}
    legend = "".join(f'<span><i style="background:var(--{c})"></i>{texts[c]}</span>' for c, _ in series)
    rest = len(names) - len(order)
    more = f'<p class="soft">And {rest:,} smaller classes.</p>' if rest else ""
    return f'<div class="legend">{legend}</div>{"".join(lines)}{more}'


def _yaml(settings: dict[str, object]) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(settings))
