"""Gain over random against imbalance and against the share kept."""

from typing import Any

from matplotlib.figure import Figure

from benchmarks.evidence.gains import FIGURES, by_setting, gains, half_interval

COLOURS = {
    "labels": "black",
    "default": "tab:blue",
    "paper": "tab:orange",
    "retrieval": "tab:green",
    "whole": "tab:red",
}
NAMES = {"labels": "balanced by labels (ceiling)", "retrieval": "retrieval (5 labels per class)"}
NAMES |= {"whole": "whole pool, as many steps", "paper": "preset: paper"}


def draw(lines: list[dict[str, Any]], shown: tuple[str, ...] = ("linear", "linear_rare")) -> Figure:
    """A row per pool; columns: each figure against the ratio and the share. Bars are 95 % of Student's t."""
    table = by_setting(lines)
    names = list(dict.fromkeys(setting[0] for setting in table))
    figure = Figure(figsize=(4 * len(shown) * 2, 3.2 * len(names) + 0.4), layout="constrained")
    grid = figure.subplots(len(names), 2 * len(shown), squeeze=False, sharey="row")
    labelled: dict[str, Any] = {}
    for row, name in zip(grid, names):
        for place, axes in enumerate(row):
            column, measure = place % 2, shown[place // 2]
            of_pool = [setting for setting in table if setting[0] == name]
            common = most_common([setting[3 if column == 0 else 2] for setting in of_pool])
            for number, (way, colour) in enumerate(COLOURS.items()):
                points = []
                for setting in of_pool:
                    if setting[4] == way and setting[3 if column == 0 else 2] == common:
                        values = gains(table, setting, measure)
                        if len(values) > 1:
                            points.append((setting[2 + column], values.mean(), half_interval(values)))
                if points:
                    x, y, bars = zip(*sorted(points))
                    x = [value * (1 + 0.03 * (number - 2)) for value in x]  # bars beside each other
                    labelled[way] = axes.errorbar(
                        x, y, bars, color=colour, marker="o", capsize=3, markersize=4
                    )
            axes.axhline(0, color="grey", linewidth=0.8)
            axes.set_xscale("log")
            ticks = sorted({setting[2 + column] for setting in of_pool})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
            axes.set_xlabel(
                f"largest / smallest class ({common:.0%} kept)"
                if column == 0
                else f"share kept (imbalance {common:g})"
            )
            axes.set_title(f"{name}: {FIGURES[measure]}", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("gain over random, points")
    figure.legend(
        labelled.values(),
        [NAMES.get(way, way) for way in labelled],
        loc="outside lower center",
        ncols=5,
        frameon=False,
    )
    return figure


def most_common(values: list[float]) -> float:
    """The value that most settings have."""
    return max(dict.fromkeys(values), key=values.count)
