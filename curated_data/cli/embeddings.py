"""The commands on embeddings alone: `embed` and `duplicates`."""

import argparse
from typing import Any

from rich.table import Table

from curated_data.cli.common import (
    add_embedder,
    add_pool_command,
    check_output,
    embeddings_of,
    pool_of,
    print_table,
)
from curated_data.errors import ConfigError


def add(commands: Any) -> None:
    """Add the commands of this file."""
    command = add_pool_command(commands, "embed", "embed every sample of a pool", _embed)
    add_embedder(command)
    command.add_argument("--out", metavar="FOLDER", help="also write keys and embeddings to this new folder")
    command.add_argument(
        "--format",
        choices=("parquet", "npy"),
        default="parquet",
        help="of --out: parquet files, or .npy with keys beside them, as of clip-retrieval "
        "(default: %(default)s)",
    )

    command = add_pool_command(
        commands,
        "duplicates",
        "show pairs of near-duplicates, to choose their threshold by looking",
        _duplicates,
    )
    add_embedder(command)
    command.add_argument(
        "--examples",
        default="duplicates.html",
        metavar="PAGE",
        help="the HTML page to write (default: %(default)s)",
    )
    command.add_argument(
        "--least",
        type=float,
        default=0.85,
        metavar="COSINE",
        help="the lowest cosine to show (default: %(default)s)",
    )
    command.add_argument(
        "--pairs", type=int, default=12, metavar="N", help="to show from each band (default: %(default)s)"
    )


def _embed(parsed: argparse.Namespace) -> None:
    from curated_data.embedding.out import check_folder, write_embeddings

    if parsed.out is not None:
        check_folder(parsed.out, parsed.format)
    pool = pool_of(parsed)
    store = embeddings_of(parsed, pool).build(parsed.device)
    count = store.n_failures
    print(f"{len(store):,} embeddings of length {store.shape[1]}, {count:,} failed: {store.folder}")
    if parsed.out is not None:
        print(f"embeddings: {write_embeddings(store, pool.keys, parsed.out, form=parsed.format)}")


def _duplicates(parsed: argparse.Namespace) -> None:
    from curated_data.report.duplicates import band_edges, write_pairs

    band_edges(parsed.least)  # before anything takes long
    if parsed.pairs < 1:
        raise ConfigError(f"--pairs {parsed.pairs}: give at least 1")
    check_output(parsed.examples, parsed)
    pool = pool_of(parsed)
    store = embeddings_of(parsed, pool).build(parsed.device)
    bands = write_pairs(pool, store, parsed.examples, least=parsed.least, n_pairs=parsed.pairs)
    table = Table(title=f"{len(store) - store.n_failures:,} samples")
    for name in ("threshold", "pairs at or above it", "samples that would be left out"):
        table.add_column(name, justify="right")
    for band in bands:
        table.add_row(f"{band.least:g}", f"{band.n_pairs_above:,}", f"{band.n_left_out:,}")
    print_table(table)
    print(f"pairs to look at: {parsed.examples}")
