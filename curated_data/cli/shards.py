"""The commands that make and index shards: `import`, `export`, `index`."""

import argparse
import os
from pathlib import Path
from typing import Any

from curated_data.cache.paths import spelled
from curated_data.cli import common
from curated_data.errors import ConfigError


def add(commands: Any) -> None:
    """Add the commands of this file."""
    command = common.add_command(
        commands, "import", "turn a folder of class folders of images, or other archives, into shards"
    )
    command.add_argument(
        "source",
        nargs="+",
        help="a folder as for ImageFolder: one sub-folder per class; parquet files with images as the Hub "
        "stores them, a folder of these, or hf://datasets/OWNER/NAME; or tar archives, compressed or with "
        "the parts of samples apart: 'old-{000..099}.tar.gz', a glob in quotes, paths, URLs, 'pipe:COMMAND', "
        "or a .txt or the .json of wids that lists them",
    )
    command.add_argument("out", help="where the shards go")
    _shard_options(command)
    common.add_storage_options(command)
    command.set_defaults(run=_import)

    command = common.add_pool_command(commands, "export", "write the selection as new shards", _export)
    common.add_curation(command)
    command.add_argument("--out", required=True, help="where the shards go")
    _shard_options(command)
    command.add_argument(
        "--order", choices=("pool", "shuffled"), default="shuffled", help="(default: %(default)s)"
    )
    command.add_argument(
        "--to",
        metavar="hf://datasets/OWNER/NAME",
        help="then upload the export as one commit to the Hugging Face Hub; a new data set is private",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="with --to: export, and only list what would be uploaded"
    )

    command = common.add_pool_command(
        commands, "index", "index a pool: find the place of every sample", _index
    )


def _shard_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max-samples", type=int, default=10_000, help="samples per shard (default: %(default)s)"
    )
    command.add_argument(
        "--overwrite", action="store_true", help="replace the shards that an earlier run wrote there"
    )


def _import(parsed: argparse.Namespace) -> None:
    from curated_data.pool import import_archives, import_folder

    options = {
        "max_samples": parsed.max_samples,
        "overwrite": parsed.overwrite,
        "storage_options": common.storage_of(parsed),
    }
    sources = [spelled(source) for source in parsed.source]
    if all(
        source.startswith("hf://") or source.endswith(".parquet") or _holds_parquet(source)
        for source in sources
    ):
        from curated_data.pool.tables import import_tables

        shards = import_tables(sources, parsed.out, **options)
    elif len(sources) == 1 and os.path.isdir(sources[0]):
        shards = import_folder(parsed.source[0], parsed.out, **options)
    else:
        shards = import_archives(parsed.source, parsed.out, **options)
    print(f"{len(shards)} shards in {parsed.out}")


def _holds_parquet(source: str) -> bool:
    """Whether a folder holds parquet files and no folders, as a downloaded data set of the Hub."""
    return os.path.isdir(source) and {Path(name).suffix for name in os.listdir(source)} == {".parquet"}


def _export(parsed: argparse.Namespace) -> None:
    common.config_of(parsed)
    from curated_data.cache.paths import is_url
    from curated_data.pipeline.export import check_export, export, exported_files
    from curated_data.pool.hub_upload import hub_client, hub_place, upload

    place = None if parsed.to is None else hub_place(parsed.to)
    if place is None and parsed.dry_run:
        raise ConfigError("--dry-run: lists what --to would upload; give that, too")
    if place is not None and is_url(parsed.out):
        raise ConfigError(f"--to: uploads from a folder of this machine, and --out is {parsed.out}")
    if place is not None and not parsed.dry_run:
        hub_client()  # before anything takes long
    options = {"max_samples": parsed.max_samples, "overwrite": parsed.overwrite}
    check_export(common.pool_of(parsed), parsed.out, described=True, **options)
    pool, curation = common.run_curation(parsed)
    shards = export(pool, curation.ids, parsed.out, curation=curation, order=parsed.order, **options)
    print(f"{len(curation.ids):,} samples in {len(shards):,} shards in {parsed.out}")
    if place is None:
        return
    folder = Path(spelled(parsed.out))
    names = exported_files(folder)
    for name in names:
        print(f"{(folder / name).stat().st_size:>15,} bytes  {place.path(name)}")
    if parsed.dry_run:
        print(f"nothing was uploaded; without --dry-run: {len(names)} files to {place.url}")
    else:
        message = f"{len(curation.ids):,} of {len(pool):,} samples, selected by curated-data"
        print(f"uploaded: {upload(folder, names, place, message=message)}")


def _index(parsed: argparse.Namespace) -> None:
    pool = common.pool_of(parsed)
    print(f"{len(pool):,} samples in {len(pool.urls):,} shards")
