"""The commands that select: `curate`, with its dry run, and `extend`."""

import argparse
from typing import Any

from curated_data.cli import common
from curated_data.errors import ConfigError


def add(commands: Any) -> None:
    """Add the commands of this file."""
    command = common.add_pool_command(
        commands, "curate", "select a balanced subset: index, embed, cluster, sample", _curate
    )
    common.add_curation(command)
    common.add_rows(command)
    command.add_argument("--ids", metavar="FILE", help="also write the selected ids to this .npy file")
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="only check the settings and print sizes, memory, and hours of embedding and clustering by a "
        "small probe",
    )

    command = common.add_pool_command(
        commands, "extend", "select from a pool that has grown, with an existing tree", _extend
    )
    common.add_curation(command)
    command.add_argument("--tree", required=True, metavar="FOLDER", help="the tree, as printed by `curate`")


def _curate(parsed: argparse.Namespace) -> None:
    from curated_data.report.summary import summary_table

    if parsed.dry_run:
        if parsed.embeddings:
            raise ConfigError("--dry-run: plans the work on shards; there is nothing to embed here")
        _plan(parsed)
        return
    from curated_data.stages.filtering import filter_rows

    if parsed.ids is not None:
        common.check_output(parsed.ids, parsed)
    _, curation = common.run_curation(parsed)
    report = curation.report
    common.print_table(summary_table(report))
    for name, value in filter_rows(report.get("filters")):
        print(f"{name}: {value}")
    if report["failed"]:
        print(f"{report['failed']:,} samples could not be embedded: see {curation.folders['embeddings']}")
    if report["excluded"]:
        print(f"{report['excluded']:,} samples could not be clustered: their embeddings are zero")
    print(f"tree: {curation.folders['tree']}")
    print(f"ids: {curation.folders['selection'] / 'ids.npy'}")
    if parsed.ids is not None:
        from curated_data.pool.encode import encode_member
        from curated_data.pool.out import write_file

        print(f"ids: {write_file(parsed.ids, encode_member(curation.ids), common.storage_of(parsed))}")


def _plan(parsed: argparse.Namespace) -> None:
    config = common.config_of(parsed)  # before what takes seconds to import
    from curated_data.pipeline.plan import plan, plan_tables

    pool = common.pool_of(parsed)
    print(f"{len(pool):,} samples in {len(pool.urls):,} shards; would select {config.target_size:,}")
    found = plan(pool, config, embedder=parsed.embedder, cache_dir=parsed.cache_dir, device=parsed.device)
    for table in plan_tables(found):
        common.print_table(table)


def _extend(parsed: argparse.Namespace) -> None:
    config = common.config_of(parsed)
    from curated_data.pipeline.extend import extend

    curation = extend(
        common.pool_of(parsed),
        config,
        tree=parsed.tree,
        embedder=parsed.embedder,
        cache_dir=parsed.cache_dir,
        device=parsed.device,
    )
    drift = curation.report["drift"]
    if curation.report.get("removed_new"):
        print(f"{curation.report['removed_new']:,} new samples left out as near-duplicates")
    print(f"{drift['n_new']:,} new samples, {drift['outlying']:.1%} of them outlying")
    print("a rebuild is due: run curate" if drift["rebuild_due"] else "no rebuild is due")
    print(f"ids: {curation.folders['selection'] / 'ids.npy'}")
