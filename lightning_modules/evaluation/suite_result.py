"""The figures of several embedders on a suite: comparisons, tables, files and a chart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator

from curated_data.colours import HUES
from lightning_modules.evaluation.comparison import ComparisonResult, comparison, interval
from lightning_modules.evaluation.result import Result, write_csv, write_json
from lightning_modules.evaluation.suite import Figure, Figures

INTERVALS = "In brackets: 95 % intervals, by paired bootstrap over the test images; * excludes 0."


@dataclass(frozen=True)
class SuiteResult(Result):
    """Figures by embedder and dataset.

    Attributes:
        figures: by embedder, dataset and title.
        compared: each other embedder's difference to the first, by embedder, dataset and title.
    """

    figures: Mapping[str, Mapping[str, Figures]]
    compared: Mapping[tuple[str, str, str], ComparisonResult] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One for each embedder, dataset and figure."""
        rows = []
        for name, found in self.figures.items():
            for dataset, figures in found.items():
                for title, figure in figures.items():
                    row = {"embedder": name, "dataset": dataset, "figure": title, "value": figure.value}
                    if against := self.compared.get((name, dataset, title)):
                        row |= {"difference": against.difference, "low": against.low, "high": against.high,
                                "p_value": against.p_value, "n": against.n}  # fmt: skip
                    rows.append(row)
        return rows

    @property
    def note(self) -> str:
        """What the table's brackets are."""
        return INTERVALS if self.compared else ""

    def cells(self) -> list[list[str]]:
        """The header, then one row per figure: one column per embedder, then differences to the first."""
        first, *others = self.figures
        rows = [["dataset", "figure", *self.figures, *(f"{name} − {first}" for name in others)]]
        titles = {
            (dataset, title): None
            for found in self.figures.values()
            for dataset, figures in found.items()
            for title in figures
        }
        for dataset, title in titles:
            found = [by_dataset[dataset].get(title) for by_dataset in self.figures.values()]
            cells = ["-" if figure is None else f"{figure.value:.3f}" for figure in found]
            for name, figure in zip(others, found[1:]):
                if figure is None or found[0] is None:
                    cells.append("-")
                    continue
                cell = f"{figure.value - found[0].value:+.3f}"
                if against := self.compared.get((name, dataset, title)):
                    star = " *" if against.significant else ""
                    cell += f" [{against.low:+.3f}, {against.high:+.3f}]{star}"
                cells.append(cell)
            rows.append([dataset, title, *cells])
        return rows

    def table(self) -> str:
        """A Markdown table; columns from the third on hold numbers."""
        header, *rest = ("| " + " | ".join(row) + " |" for row in self.cells())
        lines = [header, "|---|---|" + "---:|" * (header.count("|") - 3), *rest]
        return "\n".join([*lines, "", self.note] if self.note else lines)

    def to_json(self, path: str | Path) -> None:
        """Write the values by embedder, dataset and title."""
        write_json(
            path,
            {
                name: {
                    dataset: {t: f.value for t, f in figures.items()} for dataset, figures in found.items()
                }
                for name, found in self.figures.items()
            },
        )

    def samples_to_npz(self, path: str | Path) -> None:
        """Write the result of each test image, as arrays "embedder|dataset|title"."""
        samples: dict[str, Any] = {
            f"{name}|{dataset}|{title}": figure.samples
            for name, found in self.figures.items()
            for dataset, figures in found.items()
            for title, figure in figures.items()
            if figure.samples is not None
        }
        with open(path, "wb") as file:
            np.savez_compressed(file, **samples)

    def details(self) -> list[dict[str, str]]:
        """The figures' rows with details, such as duplicates."""
        return [
            {"embedder": name, "dataset": dataset, **row}
            for name, found in self.figures.items()
            for dataset, figures in found.items()
            for figure in figures.values()
            for row in figure.details
        ]

    def details_to_csv(self, path: str | Path) -> None:
        """Write them."""
        write_csv(path, self.details())

    def plot(self, path: str | Path) -> None:
        """Write `chart` as PNG."""
        self.chart().savefig(path, dpi=150, format="png")

    def chart(self) -> Drawing:
        """Bars of the figures in 0..1 by embedder and, apart from them, of those where lower is better.

        Lines at their ends are 95 % intervals over the test images, where the figure is made of theirs.
        """
        kinds = {
            (dataset, title): figure
            for found in self.figures.values()
            for dataset, figures in found.items()
            for title, figure in figures.items()
        }
        panels = {
            "higher is better": [k for k, f in kinds.items() if f.is_share and f.is_better == "higher"],
            "lower is better": [k for k, f in kinds.items() if f.is_better == "lower"],
        }
        panels = {title: rows for title, rows in panels.items() if rows}
        if not panels:  # as where all that was asked for is a count
            empty = Drawing(figsize=(8, 1))
            empty.text(0.5, 0.5, "no figure that can be drawn; see the tables", ha="center", va="center")
            return empty
        n = len(self.figures)
        lengths = [len(rows) + 1 for rows in panels.values()]
        drawing = Drawing(figsize=(8, 0.9 + 0.22 * sum(lengths) * (n + 0.6)), layout="constrained")
        grid = drawing.subplots(len(panels), squeeze=False, height_ratios=lengths)[:, 0]
        for axes, (title, rows) in zip(grid, panels.items()):
            self._bars(axes, rows)
            axes.set_title(title, fontsize=9, loc="left")
            if title == "higher is better":
                axes.set_xlim(0, 1.12)
            else:
                axes.set_xlim(0, max(axes.get_xlim()[1], 0.1))  # a few copies are no long bar
        drawing.legend(
            *grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False, fontsize=8
        )
        grid[-1].set_xlabel("lines: 95 % intervals over the test images", fontsize=8)
        return drawing

    def _bars(self, axes: Axes, rows: Sequence[tuple[str, str]]) -> None:
        height = 0.8 / len(self.figures)
        for number, (name, found) in enumerate(self.figures.items()):
            places = np.arange(len(rows)) + (number - (len(self.figures) - 1) / 2) * height
            shown = [found.get(dataset, {}).get(title) for dataset, title in rows]
            values = np.array([np.nan if figure is None else figure.value for figure in shown])
            ends = np.array([_ends(figure) for figure in shown])
            errors = np.nan_to_num(np.abs(ends - values[:, None])).T  # no line of length 0 is seen
            bars = axes.barh(
                places, values, height, label=name, color=HUES[number % len(HUES)],
                xerr=errors, error_kw={"elinewidth": 1, "ecolor": "#1f2937"},
            )  # fmt: skip
            axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=7)
        axes.set_yticks(np.arange(len(rows)), [f"{d}: {title}" for d, title in rows], fontsize=8)
        axes.margins(x=0.12, y=0.01)
        axes.set_xlim(left=0)
        axes.invert_yaxis()
        axes.tick_params(axis="x", labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.spines[["top", "right"]].set_visible(False)


def _ends(figure: Figure | None) -> tuple[float, float]:
    """Of its interval; NaN without one."""
    if figure is None or figure.samples is None:
        return np.nan, np.nan
    return interval(figure.samples, statistic=figure.statistic)


def compared_with_first(figures: Mapping[str, Mapping[str, Figures]]) -> SuiteResult:
    """The result with intervals of each other embedder's differences to the first, by the test images."""
    first, *others = figures
    compared = {}
    for other in others:
        for dataset, of_first in figures[first].items():
            for title, figure in of_first.items():
                own = figures[other][dataset].get(title)
                if own is None or own.samples is None or figure.samples is None:
                    continue
                if len(own.samples) == len(figure.samples):
                    compared[other, dataset, title] = comparison(
                        figure.samples, own.samples, statistic=figure.statistic
                    )
    return SuiteResult(figures, compared)
