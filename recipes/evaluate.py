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
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from curated_data.cache.artifacts import open_cache
from curated_data.cache.paths import local_path
from curated_data.cache.publishing import atomic_path
from curated_data.cache.removal import remove
from curated_data.datasets import EmbeddedDataset, Features, load_suite, open_suite
from curated_data.devices import resolve_device
from curated_data.embedding import resolve_embedder
from curated_data.errors import ConfigError
from curated_data.programs import described_parser, report_errors
from lightning_modules.evaluation.suite import EVALUATIONS, suite
from lightning_modules.evaluation.suite_result import SuiteResult, compared_with_first


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; returns 0, 1 if something could not be evaluated, or 2 for bad input."""
    parser = described_parser(__doc__)
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
    options = parser.parse_args(arguments)
    if options.suite is None:  # found from any folder
        home = Path(__file__).parents[1]
        options.suite, options.root = str(home / "configs/suites/small.yaml"), options.root or str(home)
    options.root = options.root or "."
    return report_errors("evaluate", lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Evaluate every embedder on every dataset that exists; write and print the table."""
    names = list(dict.fromkeys(options.embedders))
    if options.compare and len(names) < 2:
        raise ConfigError("--compare: give two embedders or more; the first one is the reference")
    if options.workers < 0:
        raise ConfigError(f"--workers: expected 0 or more, got {options.workers}")
    device = resolve_device(options.device, name="--device")
    datasets = load_suite(options.suite, EVALUATIONS)
    cache, out = open_cache(options.cache_dir), local_path(options.out, "--out")
    parts, missing = open_suite(datasets, local_path(options.root, "--root"), cache)
    figures = {}
    for name in names:
        features = Features(resolve_embedder(name), cache, workers=options.workers, device=device)
        embedded = {each: EmbeddedDataset(datasets[each], parts[each], features) for each in parts}
        figures[name], failures = suite(embedded, device=device)
        missing += [f"{name}, {line}" for line in failures]
    result = compared_with_first(figures) if options.compare else SuiteResult(figures)
    files = {
        "table.md": lambda path: path.write_text(result.table() + "\n"),
        "results.json": result.to_json,
        "results.csv": result.to_csv,
        "samples.npz": result.samples_to_npz,
    }
    if result.details():
        files["duplicates.csv"] = result.details_to_csv
    else:
        remove(out / "duplicates.csv", below=out)
    if result.rows():
        files["results.png"] = result.plot
    out.mkdir(parents=True, exist_ok=True)
    for file, write in files.items():
        with atomic_path(out / file) as path:
            write(path)
    Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False).print(table(result))
    for line in missing:
        print(f"not evaluated, {line}", file=sys.stderr)
    print(", ".join(str(out / file) for file in files))
    return 1 if missing else 0


def table(result: SuiteResult) -> Table:
    """The table for a terminal. Long names are folded, not cut: only their ends may tell embedders apart."""
    header, *rows = result.cells()
    columns = [
        Column(name, overflow="fold", justify="right" if place > 1 else "left")
        for place, name in enumerate(header)
    ]
    found = Table(*columns, caption=result.note or None)
    for row in rows:
        found.add_row(*row)
    return found


if __name__ == "__main__":
    sys.exit(main())
