"""Gains over random selections, paired by seed, with standard errors."""

from collections import defaultdict
from typing import Any

import numpy as np
from scipy import stats

KEY = ("pool", "largest", "ratio", "share", "way", "steps", "seed")
"""What a line is of."""
FIGURES = {
    "knn": "k-NN",
    "knn_rare": "k-NN, rarest third",
    "own": "k-NN, selection as bank",
    "own_rare": "selection as bank, rarest third",
    "linear": "linear",
    "linear_rare": "linear, rarest third",
}
Setting = tuple[Any, ...]
"""Pool, largest class, ratio, share, way, steps."""


def by_setting(lines: list[dict[str, Any]]) -> dict[Setting, dict[int, dict[str, Any]]]:
    """Lines by setting and seed, settings sorted."""
    found: dict[Setting, dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in lines:
        found[tuple(line[name] for name in KEY[:-1])][line["seed"]] = line
    return dict(sorted(found.items(), key=str))


def gains(table: dict[Setting, dict[int, dict[str, Any]]], setting: Setting, figure: str) -> np.ndarray:
    """Of each seed that the random selection was trained with as well."""
    base = table.get((*setting[:4], "random", *setting[5:]), {})
    seeds = sorted(set(table[setting]) & set(base))
    return np.array([table[setting][seed][figure] - base[seed][figure] for seed in seeds])


def standard_error(values: np.ndarray) -> float:
    """Of the mean; infinite for a single value."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("inf")


def half_interval(values: np.ndarray, level: float = 0.95) -> float:
    """Half of Student's interval of the mean."""
    return standard_error(values) * float(stats.t.ppf((1 + level) / 2, max(1, len(values) - 1)))


def print_table(lines: list[dict[str, Any]]) -> None:
    """A row per setting as Markdown: the figures of random, and the gains of the others ± standard error."""
    table = by_setting(lines)
    print("\n| pool | ratio | kept | steps | way | seeds | images | of the rarest third | entropy | "
          + " | ".join(FIGURES.values()) + " |")  # fmt: skip
    print("|---" * (9 + len(FIGURES)) + "|")
    for setting, seeds in table.items():
        name, _, ratio, share, way, steps = setting
        some = list(seeds.values())
        cells = []
        for figure in FIGURES:
            is_random = way == "random"
            values = np.array([line[figure] for line in some]) if is_random else gains(table, setting, figure)
            if not len(values):
                cells.append("")
                continue
            sign = "" if is_random else "+"
            cells.append(f"{values.mean():{sign}.1f} ± {standard_error(values):.1f}")
        of = [np.mean([line[column] for line in some]) for column in ("selected", "rare", "entropy")]
        means = [f"{of[0]:,.0f}", f"{of[1]:.0f}", f"{of[2]:.2f}"]
        first = [name, f"{ratio:g}", f"{share:g}", str(steps), way, str(len(some))]
        print("| " + " | ".join([*first, *means, *cells]) + " |")
