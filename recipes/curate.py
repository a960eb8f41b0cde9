r"""Curate a pool from YAML settings: index, embed, cluster, select; then export the selection and report on
it.

    uv run recipes/curate.py --config configs/curation/base.yaml --config configs/curation/fashion.yaml
    torchrun --nproc-per-node 8 recipes/curate.py --config configs/curation/base.yaml \
        --config configs/curation/web_paper.yaml 'pool=s3://bucket/pool-{000000..074299}.tar'

Later --config files override earlier ones, FIELD=VALUE overrides both, ${...} refers to other values. Fields:

    pool         shards: a path or URL with braces or a glob, or a list of these
    embedder     torchvision:MODEL, timm:MODEL, hub:ENTRY, checkpoint:FILE, ...
    curation     fields of CurationConfig: target_size, levels, metric, strategy, near_duplicates, seed, ...
    cache_dir    for the results of all stages; a second run only reads them     (default: runs/cache)
    device       cpu, cuda, cuda:1, ...                                          (default: auto)
    export       folder to write the selection to as shards                      (default: none)
    report       HTML file with a report on the curation                         (default: none)

Prints the balance of the pool, of a random selection and of the curated one, over clusters and, if there are
labels, over classes. The command line tool `curated-data` does the same stage by stage.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from curated_data import CurationConfig, ShardPool, curate
from curated_data.clustering.kmeans import METRICS
from curated_data.config import load_config, read_yaml, structured
from curated_data.embedding import Embedder
from curated_data.errors import ConfigError, CuratedDataError, first_line
from curated_data.export import export
from curated_data.parallel import rank
from curated_data.progress import log_to_terminal
from curated_data.report.comparison import Row, compare_with_random, comparison_table
from curated_data.report.page import write_report
from curated_data.selection.metrics import read_labels
from curated_data.stages.curation import Curation


@dataclass
class Settings:
    """The merged content of the YAML files."""

    pool: Any = MISSING
    embedder: str = MISSING
    curation: dict[str, Any] = field(default_factory=dict)
    cache_dir: str = "runs/cache"
    device: str = "auto"
    export: str | None = None
    report: str | None = None
    storage_options: dict[str, Any] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the settings, curate, print; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", action="append", default=[], metavar="YAML", help="may be given again")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="as curation.target_size=5000")
    options = parser.parse_args(arguments)
    return report_errors("curate", lambda: run(read_settings(options.config, options.overrides)))


def read_settings(paths: Sequence[str], overrides: Sequence[str] = ()) -> Settings:
    """The settings from YAML files, later ones overriding earlier ones, and from `FIELD=VALUE` items.

    Raises:
        ConfigError: an unreadable file, an unknown or missing field, or an unresolved reference.
    """
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"{item}: expected FIELD=VALUE")
    try:
        parts = [read_yaml(Path(path)) for path in paths]
        merged = OmegaConf.merge(*parts, OmegaConf.from_dotlist(list(overrides)))
        content: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {first_line(error)}") from error
    return structured(Settings, content)


def run(settings: Settings) -> None:
    """Curate by the settings, and print the table."""
    config = load_config(settings.curation)
    pool = ShardPool(settings.pool, cache_dir=settings.cache_dir, storage_options=settings.storage_options)
    with process_group():
        rows = walk(
            pool,
            settings.embedder,
            config,
            cache_dir=settings.cache_dir,
            device=settings.device,
            export_to=settings.export,
            report_to=settings.report,
        )
        if rank() == 0:
            print_comparison(rows)


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


def labels_of(pool: ShardPool) -> np.ndarray:
    """(n,) int64 classes of a pool's samples, -1 for none: of all where they are no integers."""
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


def print_comparison(rows: dict[str, Row], what: str = "samples") -> None:
    """Print the table of `compare_with_random`."""
    table = comparison_table(rows, title="Balance, before and after", what=what)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def report_errors(name: str, work: Callable[[], None]) -> int:
    """Call `work` and return the exit status: 0, or 2 after one line about an error in the input."""
    log_to_terminal()
    try:
        work()
    except CuratedDataError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
