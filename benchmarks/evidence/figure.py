"""Gain over random against imbalance or the share kept."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.evidence.gains import FIGURES, KEY, by_setting, gains, half_interval

LOOKS = {  # colour, name
    "labels": ("black", "balanced by labels: the ceiling"),
    "default": ("tab:blue", "default"),
    "retrieval": ("tab:green", "retrieval from 5 labelled images per class"),
    "paper": ("tab:orange", "preset: paper"),
    "whole": ("tab:red", "whole pool, as many steps"),
}
SHOWN = ("linear", "knn", "own")
AXES = {"ratio": "largest / smallest class", "share": "share of the pool kept"}


def draw(lines: list[dict[str, Any]], against: str = "ratio") -> Figure:
    """A row per pool, a column per figure, ways beside each other at every ratio, or share.

    Of the other of the two, that with most lines is shown. Dots are single seeds, bars 95 % of Student's t.
    """
    other = "share" if against == "ratio" else "ratio"
    kept = [line[other] for line in lines]
    lines = [line for line in lines if line[other] == max(kept, key=kept.count)]
    table = by_setting(lines)
    pools = list(dict.fromkeys(line["pool"] for line in lines))
    ticks = sorted({line[against] for line in lines})
    ways = [way for way in LOOKS if any(line["way"] == way for line in lines)]
    figure = Figure(figsize=(4 * len(SHOWN), 2.6 * len(pools) + 0.8), layout="constrained")
    grid = figure.subplots(len(pools), len(SHOWN), squeeze=False, sharex=True)
    named: dict[str, Any] = {}
    for row, pool in zip(grid, pools):
        for axes, measure in zip(row, SHOWN):
            for setting in table:
                cell = dict(zip(KEY, setting))
                found = gains(table, setting, measure) if cell["way"] in ways else np.array([])
                if cell["pool"] != pool or len(found) < 2:
                    continue
                offset = 0.14 * (ways.index(cell["way"]) - (len(ways) - 1) / 2)
                place, colour = ticks.index(cell[against]) + offset, LOOKS[cell["way"]][0]
                axes.plot([place] * len(found), found, ".", color=colour, alpha=0.35, markersize=4)
                named[cell["way"]] = axes.errorbar(
                    place, found.mean(), half_interval(found), color=colour, fmt="o", capsize=3, markersize=5
                )
            axes.axhline(0, color="grey", linewidth=0.8)
            axes.set_xlim(-0.5, len(ticks) - 0.5)
            axes.set_xticks(range(len(ticks)), [f"{tick:g}" for tick in ticks])
            axes.set_title(f"{pool}: {FIGURES[measure]}", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("gain over random, points")
    for axes in grid[-1]:
        axes.set_xlabel(AXES[against])
    figure.legend(
        [named[way] for way in ways if way in named],
        [LOOKS[way][1] for way in ways if way in named],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    return figure
