"""What programs that curate share: options, the curation and its table, and errors as one line."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console

from curated_data.clustering.rows import METRICS
from curated_data.config import CurationConfig, load_config
from curated_data.embedding import Embedder
from curated_data.errors import CuratedDataError
from curated_data.parallel import rank
from curated_data.pipeline.curate import curate
from curated_data.pipeline.export import export
from curated_data.pool import ShardPool
from curated_data.progress import log_to_terminal
from curated_data.report.comparison import Row, compare_with_random, comparison_table
from curated_data.report.page import write_report
from curated_data.selection.metrics import read_labels
from curated_data.stages.curation import Curation


def walk(
    pool: ShardPool,
    embedder: str | Embedder,
    config: CurationConfig,
    *,
    cache_dir: str | Path,
    device: str = "auto",
    export_to: str | None = None,
    report_to: str | None = None,
) -> dict[str, Row]:
    """Curate, export and report if asked to, and compare with a random selection of the same size."""
    curation = curate(pool, config, embedder=embedder, cache_dir=cache_dir, device=device)
    if rank() == 0:
        write(curation, pool, export_to, report_to)
    return compare_with_random(curation, labels_of(pool), seed=config.seed)


def walk_by_options(pool: ShardPool, embedder: Embedder, options: argparse.Namespace) -> dict[str, Row]:
    """`walk` with the options of `add_selection_options`."""
    config = load_config(
        {
            "target_size": options.target_size,
            "preset": options.preset,
            "metric": options.metric,
            "seed": options.seed,
            "embedding": {"num_workers": options.workers},
        }
    )
    return walk(pool, embedder, config, cache_dir=options.cache_dir, export_to=options.export)


def labels_of(pool: ShardPool) -> np.ndarray:
    """(n,) int64 classes of a pool's samples, -1 for none: of all where they are not integers."""
    labels = read_labels(pool)
    return np.full(len(pool), -1) if labels is None else labels


def write(curation: Curation, pool: ShardPool, export_to: str | None, report_to: str | None) -> None:
    """Write shards and report if asked to; prints where everything is."""
    seed = curation.config.seed
    if export_to:
        shards = export(pool, curation.ids, export_to, tree=curation.tree, seed=seed, overwrite=True)
        print(f"{len(curation.ids):,} samples in {len(shards):,} shards: {export_to}")
    if report_to:
        print(f"report: {write_report(curation, pool, report_to, seed=seed)}")
    print(f"ids: {curation.folders['selection'] / 'ids.npy'}")


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Under `torchrun`, a group of all its processes, which then share the work; otherwise nothing."""
    if not dist.is_torchelastic_launched():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def described_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of options by their whole names, whose help has the lines of the description as they are."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def add_selection_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the command line options of recipes that build their own pool and embedder."""
    parser.add_argument("--target-size", type=int, required=True, help=f"{what} to select")
    parser.add_argument(
        "--cache-dir", default="runs/cache", help="for the results of all stages (default: %(default)s)"
    )
    parser.add_argument("--export", metavar="FOLDER", help="write the selection there as shards")
    parser.add_argument(
        "--preset",
        choices=("default", "paper"),
        default="default",
        help="how to select (default: %(default)s)",
    )
    parser.add_argument("--metric", choices=METRICS, help="of the clustering (default: the preset's)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")


def print_comparison(rows: dict[str, Row], what: str = "samples") -> None:
    """Print the table of `compare_with_random`."""
    table = comparison_table(rows, title="Balance, before and after", what=what)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def report_errors(name: str, work: Callable[[], int | None]) -> int:
    """Call `work` and return the exit status: its own (0 for None), or 2 after one line about bad input."""
    log_to_terminal()
    try:
        return work() or 0
    except CuratedDataError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
