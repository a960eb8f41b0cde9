"""The command `curated-data inspect`: what a cache holds, if it is whole, and why a sample was selected."""

import argparse
import json
from typing import Any

from rich.markup import escape
from rich.table import Table

from curated_data.cache.layout import INDEX
from curated_data.cli.common import add_command, print_table
from curated_data.errors import CacheError, ConfigError

_FEW = 20  # indexes of shards that are listed one by one


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands,
        "inspect",
        "show what a cache holds and what determined it, or why a sample was or was not selected",
    )
    command.add_argument("cache_dir", metavar="CACHE", help="the --cache-dir of earlier commands")
    command.add_argument("--json", action="store_true", help="print everything as JSON")
    command.add_argument(
        "--verify", action="store_true", help="read everything and compare it with its checksums"
    )
    command.add_argument(
        "--sample", type=int, metavar="ID", help="explain why this sample was or was not selected"
    )
    command.add_argument(
        "--selection", metavar="NAME", help="with --sample: the selection (default: the newest)"
    )
    command.set_defaults(run=inspect)


def inspect(parsed: argparse.Namespace) -> None:
    """Run the command, by its parsed arguments.

    Raises:
        CacheError: no cache, or files of it are damaged (`--verify`).
        ConfigError: options that do not fit each other or the cache.
    """
    from curated_data.pipeline.inspect import age, inspect_cache, verify_cache

    if parsed.sample is not None:
        _explain(parsed)
        return
    if parsed.selection is not None:
        raise ConfigError("--selection: goes with --sample")
    if parsed.verify:
        problems = verify_cache(parsed.cache_dir)
        if parsed.json:
            print(json.dumps({"damaged": problems}, indent=2))
        if problems:
            raise CacheError("\n".join(["damaged:", *problems]))
        if not parsed.json:
            print(f"{parsed.cache_dir}: everything is as it was written")
        return
    artifacts = inspect_cache(parsed.cache_dir)
    if parsed.json:
        print(json.dumps([vars(artifact) for artifact in artifacts], indent=2))
        return
    table = Table(title=str(parsed.cache_dir))
    for name in ("stage", "artifact", "MB", "age"):
        table.add_column(name, no_wrap=True)
    table.add_column("what it is, and what determined it", overflow="fold")
    indexes = [artifact for artifact in artifacts if artifact.stage == INDEX and artifact.complete]
    if len(indexes) > _FEW:  # one for every shard, of which a pool may have a hundred thousand
        artifacts = [artifact for artifact in artifacts if artifact.stage != INDEX or not artifact.complete]
        table.add_row(
            "index",
            f"{len(indexes):,} shards",
            f"{sum(artifact.size for artifact in indexes) / 1e6:,.1f}",
            age(max(artifact.modified for artifact in indexes)),
            f"{sum(artifact.details['n_samples'] for artifact in indexes):,} samples; --json lists each",
        )
    for artifact in artifacts:
        details = ", ".join(f"{name}: {_short(value)}" for name, value in artifact.details.items())
        table.add_row(
            artifact.stage,
            artifact.name,
            f"{artifact.size / 1e6:,.1f}",
            age(artifact.modified),
            escape(details) if artifact.complete else "incomplete: being written, or its run was stopped",
        )
    print_table(table)


def _explain(parsed: argparse.Namespace) -> None:
    from curated_data.cache.artifacts import absolute
    from curated_data.pipeline.inspect import check_is_cache
    from curated_data.pipeline.reopen import reopen, selections
    from curated_data.report.explain import explain

    check_is_cache(absolute(parsed.cache_dir))  # before anything is created there
    found = selections(parsed.cache_dir)
    if not found:
        raise ConfigError(f"{parsed.cache_dir}: no selection in it yet; run curate")
    name = parsed.selection or found[0]
    lines = explain(reopen(parsed.cache_dir, name), parsed.sample)
    if parsed.json:
        print(json.dumps({"selection": name, "sample": parsed.sample, "why": lines}, indent=2))
        return
    print(f"selection {name}")
    for line in lines:
        print(line)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name}={_short(item)}" for name, item in value.items()) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(_short(item) for item in value[:6]) + (", …]" if len(value) > 6 else "]")
    return str(value)
