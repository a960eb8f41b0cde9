r"""Evaluate embedders on a suite of datasets: each is embedded once, and all evaluations use these features.

    uv run recipes/evaluate.py efficientnet_lite0:64 pixels:28 --suite configs/suites/small.yaml --compare
    uv run recipes/evaluate.py checkpoint:a.ckpt checkpoint:b.ckpt --suite configs/suites/paper.yaml \
        --root /datasets --compare

Prints one column per embedder and one row per figure. With --compare, the difference of each other embedder
to the first has a 95 % interval (paired bootstrap over the test images). Writes table.md, results.json,
results.csv and results.png to --out, the result of each test image to samples.npz, and, for datasets with the
evaluation `duplicates`, the test images that are also in train to duplicates.csv. For a missing dataset it
says what to put where, and for an evaluation that a dataset does not allow (with only one class, say) why;
the others are run.
"""

import argparse
import csv
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure as Drawing
from rich.console import Console
from rich.table import Column, Table

from curated_data.cache import atomic_path, atomic_write_json, open_cache
from curated_data.embedding import resolve_embedder
from curated_data.errors import ConfigError, CuratedDataError, first_line
from curated_data.paths import local_path
from curated_data.progress import log_to_terminal
from curated_data.removal import remove
from lightning_modules.evaluation.comparison import ComparisonResult, comparison
from recipes.evaluations import Features, Figures, evaluate, evaluate_shifted
from recipes.suite import Dataset, Part, load_suite, open_suite

log = logging.getLogger("evaluate")

Results = dict[str, dict[str, Figures]]  # by embedder and dataset
Comparisons = dict[tuple[str, str, str], ComparisonResult]  # by embedder, dataset and figure

INTERVALS = "In brackets: 95 % intervals, by paired bootstrap over the test images; * excludes 0."


def main() -> int:
    """Run the suite; returns 0, 1 if something could not be evaluated, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("embedders", nargs="+", help="names, such as checkpoint:FILE or timm:MODEL")
    parser.add_argument("--suite", help="(default: configs/suites/small.yaml with its data, as shipped)")
    parser.add_argument(
        "--root", help="folder of the suite's paths (default: ., or that of the default suite)"
    )
    parser.add_argument("--compare", action="store_true", help="intervals for the differences to the first")
    parser.add_argument("--cache-dir", default="runs/cache", help="(default: %(default)s)")
    parser.add_argument("--out", default="runs/evaluation", help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="of embedder and heads (default: %(default)s)")
    options = parser.parse_args()
    if options.suite is None:  # found from any folder
        home = Path(__file__).parents[1]
        options.suite, options.root = str(home / "configs/suites/small.yaml"), options.root or str(home)
    options.root = options.root or "."
    log_to_terminal()
    try:
        return run(options)
    except CuratedDataError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Evaluate every embedder on every dataset that exists; write and print the table."""
    names = list(dict.fromkeys(options.embedders))
    if options.compare and len(names) < 2:
        raise ConfigError("--compare: give two embedders or more; the first one is the reference")
    if options.workers < 0:
        raise ConfigError(f"--workers: expected 0 or more, got {options.workers}")
    options.device = usable_device(options.device)
    suite = load_suite(options.suite)
    cache, out = open_cache(options.cache_dir), local_path(options.out, "--out")
    parts, missing = open_suite(suite, local_path(options.root, "--root"), cache)
    results: Results = {}
    for name in names:
        features = Features(resolve_embedder(name), cache, options.workers, options.device)
        results[name], failures = evaluate_all(suite, parts, features)
        missing += [f"{name}, {line}" for line in failures]
    compared = compare(results) if options.compare else {}
    write(results, compared, out)
    rows = table_rows(results, compared)
    note = INTERVALS if compared else ""
    with atomic_path(out / "table.md") as path:
        path.write_text(as_markdown(rows, note) + "\n")
    Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False).print(
        for_terminal(rows, note)
    )
    for line in missing:
        print(f"not evaluated, {line}", file=sys.stderr)
    print(f"{out / 'table.md'}, {out / 'results.json'}, {out / 'results.csv'}, {out / 'results.png'}")
    return 1 if missing else 0


def usable_device(device: str) -> str:
    """The device, or for "auto" the GPU if there is one.

    Raises:
        ConfigError: it cannot be used.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch that was built without it asserts
        raise ConfigError(f"--device {device}: cannot be used ({first_line(error)})") from error
    return device


def evaluate_all(
    suite: Mapping[str, Dataset], parts: Mapping[str, Mapping[str, Part]], features: Features
) -> tuple[dict[str, Figures], list[str]]:
    """The figures of every dataset, in the suite's order, and one line for each evaluation that failed. Sets
    with the same base share its head.
    """
    found: dict[str, Figures] = {}
    failures = []
    for name in parts:
        found[name], own_failures = evaluate(suite[name], parts[name], features)
        failures += [f"{name}, {line}" for line in own_failures]
    shifted = [name for name in parts if {"robustness", "fairness"} & set(suite[name].evaluations)]
    for base in dict.fromkeys(suite[name].base for name in shifted):
        own = {name: suite[name] for name in shifted if suite[name].base == base}
        try:
            for name, figures in evaluate_shifted(own, parts, parts[base]["train"], features).items():
                found[name] |= figures
        except ValueError as error:
            failures.append(f"{', '.join(own)}: {first_line(error)}")
    return found, failures


def compare(results: Results) -> Comparisons:
    """Compare each embedder with the first, by the results of the test images."""
    first, *others = results
    compared: Comparisons = {}
    for other in others:
        for dataset, figures in results[first].items():
            for name, figure in figures.items():
                own = results[other][dataset].get(name)
                if own is None or own.samples is None or figure.samples is None:
                    continue
                if len(own.samples) == len(figure.samples):
                    compared[other, dataset, name] = comparison(
                        figure.samples, own.samples, statistic=figure.statistic
                    )
    return compared


def write(results: Results, compared: Comparisons, out: Path) -> None:
    """Write all result files, each atomically."""
    out.mkdir(parents=True, exist_ok=True)
    values = {
        name: {
            dataset: {title: f.value for title, f in figures.items()} for dataset, figures in found.items()
        }
        for name, found in results.items()
    }
    atomic_write_json(out / "results.json", values)
    rows: list[dict[str, Any]] = [
        {"embedder": name, "dataset": dataset, "figure": title, "value": value}
        for name, found in values.items()
        for dataset, figures in found.items()
        for title, value in figures.items()
    ]
    for row in rows:
        against = compared.get((row["embedder"], row["dataset"], row["figure"]))
        if against is not None:
            row |= {"difference": against.difference, "low": against.low, "high": against.high,
                    "p_value": against.p_value, "n": against.n}  # fmt: skip
    _write_csv(out / "results.csv", rows)
    twins = [
        {"embedder": name, "dataset": dataset, **row}
        for name, found in results.items()
        for dataset, figures in found.items()
        for figure in figures.values()
        for row in figure.details
    ]
    if twins:
        _write_csv(out / "duplicates.csv", twins)
    else:
        remove(out / "duplicates.csv", below=out)
    samples: dict[str, Any] = {
        f"{name}|{dataset}|{title}": figure.samples
        for name, found in results.items()
        for dataset, figures in found.items()
        for title, figure in figures.items()
        if figure.samples is not None
    }
    with atomic_path(out / "samples.npz") as path, open(path, "wb") as file:
        np.savez_compressed(file, **samples)
    if rows:
        with atomic_path(out / "results.png") as path:
            draw(results).savefig(path, dpi=150, format="png")


def table_rows(results: Results, compared: Comparisons) -> list[list[str]]:
    """The header, then one row per figure: one column per embedder, then differences to the first."""
    first, *others = results
    rows = [["dataset", "figure", *results, *(f"{name} − {first}" for name in others)]]
    titles = {
        (dataset, title): None
        for found in results.values()
        for dataset, figures in found.items()
        for title in figures
    }
    for dataset, title in titles:
        found = [results[name][dataset].get(title) for name in results]
        cells = ["-" if figure is None else f"{figure.value:.3f}" for figure in found]
        for name, figure in zip(others, found[1:]):
            if figure is None or found[0] is None:
                cells.append("-")
                continue
            cell = f"{figure.value - found[0].value:+.3f}"
            against = compared.get((name, dataset, title))
            if against is not None:
                cell += f" [{against.low:+.3f}, {against.high:+.3f}]" + (" *" if against.significant else "")
            cells.append(cell)
        rows.append([dataset, title, *cells])
    return rows


def as_markdown(rows: Sequence[Sequence[str]], note: str = "") -> str:
    """A Markdown table of a header and rows; columns from the third on hold numbers."""
    header, *rest = ("| " + " | ".join(row) + " |" for row in rows)
    lines = [header, "|---|---|" + "---:|" * (len(rows[0]) - 2), *rest]
    return "\n".join([*lines, "", note] if note else lines)


def for_terminal(rows: Sequence[Sequence[str]], note: str = "") -> Table:
    """The same for a terminal. Long names are folded, not cut: only their ends may tell embedders apart."""
    header, *rest = rows
    columns = [
        Column(name, overflow="fold", justify="right" if place > 1 else "left")
        for place, name in enumerate(header)
    ]
    table = Table(*columns, caption=note or None)
    for row in rest:
        table.add_row(*row)
    return table


def draw(results: Results) -> Drawing:
    """A bar chart of all figures in 0..1, grouped by embedder."""
    rows = list(dict.fromkeys(
        (dataset, title) for found in results.values() for dataset, figures in found.items()
        for title, figure in figures.items() if figure.is_share
    ))  # fmt: skip
    drawing = Drawing(figsize=(8, 0.9 + 0.22 * len(rows) * (len(results) + 0.6)), layout="constrained")
    axes = drawing.subplots()
    height = 0.8 / len(results)
    for number, (name, found) in enumerate(results.items()):
        places = np.arange(len(rows)) + (number - (len(results) - 1) / 2) * height
        values = [found[d][title].value if title in found[d] else np.nan for d, title in rows]
        bars = axes.barh(places, values, height, label=name)
        axes.bar_label(bars, fmt="%.3f", padding=2, fontsize=7)
    axes.set_yticks(np.arange(len(rows)), [f"{d}: {title}" for d, title in rows], fontsize=8)
    axes.set_xlim(0, 1.08)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    drawing.legend(
        *axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False, fontsize=8
    )
    return drawing


def _write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
