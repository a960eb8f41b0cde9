"""The command `curated-data tune`: which settings balance a pool best, by a few hundred labels."""

import argparse
from typing import Any

from omegaconf import OmegaConf
from rich.table import Table

from curated_data.cli import common
from curated_data.errors import ConfigError


def add(commands: Any) -> None:
    """Add the command."""
    command = common.add_pool_command(
        commands, "tune", "compare a dozen settings by a few hundred labels of random samples", _tune
    )
    common.add_curation(command)
    common.add_rows(command)
    command.add_argument(
        "--labels",
        metavar="FILE",
        help=".npy: (n,) class of every sample, -1 for none; or .parquet, .csv, or text with tabs, with "
        "columns key or id, and label (default: the .cls members)",
    )
    command.add_argument("--out", metavar="PAGE.html", help="write a page: intervals, classes, YAML to copy")


def _tune(parsed: argparse.Namespace) -> None:
    config = common.config_of(parsed)
    from curated_data.embedding.existing import EmbeddedPool
    from curated_data.pipeline.curate import curate
    from curated_data.pipeline.labels import GivenLabels, read_label_file
    from curated_data.pipeline.tune import tune, verdict
    from curated_data.pipeline.tune_page import tune_page
    from curated_data.pool.out import write_file
    from curated_data.report.page import class_names_beside
    from curated_data.selection.metrics import read_labels

    if parsed.out is not None:
        common.check_output(parsed.out, parsed)
    pool = common.pool_of(parsed)
    if parsed.labels is not None:
        given = read_label_file(parsed.labels, pool)
    else:
        read = None if isinstance(pool, EmbeddedPool) else read_labels(pool)
        if read is None:
            raise ConfigError("tune: the pool has no labels; give --labels FILE")
        beside = class_names_beside(pool)
        given = GivenLabels(read, None if beside is None else tuple(beside))
    labels = given.numbers
    embedder = None if isinstance(pool, EmbeddedPool) else parsed.embedder
    rows = tune(
        lambda settings: curate(
            pool, settings, embedder=embedder, cache_dir=parsed.cache_dir, device=parsed.device
        ),
        config,
        labels,
    )
    table = Table(
        title=f"{config.target_size:,} of {len(pool):,} samples, {int((labels >= 0).sum()):,} labels"
    )
    for name in ("settings", "entropy of classes", "more than the default", "interval (95 %, all at once)"):
        table.add_column(name, justify="left" if name == "settings" else "right")
    for row in rows:
        table.add_row(
            row.name, f"{row.entropy:.3f}", f"{row.gain:+.3f}", f"{row.low:+.3f} to {row.high:+.3f}"
        )
    common.print_table(table)
    best, why = verdict(rows)
    print(why)
    if best.settings:
        print(OmegaConf.to_yaml(OmegaConf.create(best.settings)), end="")
    if parsed.out is not None:
        page = tune_page(rows, labels, config.target_size, class_names=given.names)
        print(f"page: {write_file(parsed.out, page.encode(), common.storage_of(parsed))}")
