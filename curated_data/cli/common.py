"""What commands share: their options, and what is made of them."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from yaml import YAMLError

from curated_data.cache.checksums import load_npy
from curated_data.cache.paths import local_path
from curated_data.errors import CacheError, ConfigError, printable


def add_command(commands: Any, name: str, what: str) -> argparse.ArgumentParser:
    """Add a command that does `what`."""
    return commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")


def add_pool_command(commands: Any, name: str, what: str, run: Any) -> argparse.ArgumentParser:
    """Add a command on a pool, which `run` runs by its parsed arguments."""
    command = add_command(commands, name, what)
    command.add_argument(
        "pool", nargs="+", help="shards: 'pool-{000..099}.tar', a glob in quotes, paths, or URLs"
    )
    command.add_argument(
        "--cache-dir",
        default=".curated_data",
        metavar="FOLDER",
        help="for the results of all stages, so that nothing is done twice (default: %(default)s)",
    )
    command.add_argument(
        "--strict", action="store_true", help="refuse shards that are cut, or hold samples in parts"
    )
    command.add_argument(
        "--background",
        type=_colour,
        default=128,
        metavar="0..255",
        help="under transparent pixels: a grey, or red,green,blue (default: 128)",
    )
    command.add_argument(
        "--columns",
        action="append",
        metavar="PATH",
        help="a parquet file, or a folder of them, with more about the samples, joined by key (default: "
        "those beside the shards)",
    )
    command.add_argument(
        "--label-column",
        metavar="NAME",
        help="of the samples' classes, as json.class, in place of .cls members",
    )
    command.add_argument(
        "--caption-column", metavar="NAME", help="of the samples' texts, in place of .txt members"
    )
    command.add_argument(
        "--ignore-exif", action="store_true", help="do not turn images as their EXIF data say"
    )
    add_storage_options(command)
    command.set_defaults(run=run)
    return command


def add_storage_options(command: argparse.ArgumentParser) -> None:
    """Add the options of fsspec, see `storage_of`."""
    command.add_argument(
        "--storage-options",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for fsspec, to reach remote shards and outputs, as client_kwargs.endpoint_url=http://HOST, or "
        "a JSON object; --config takes them, too, as `storage_options`",
    )


def add_embedder(command: argparse.ArgumentParser) -> None:
    """Add the options on embedding."""
    command.add_argument(
        "--embedder",
        default="hub:dinov2_vitl14_reg",
        metavar="NAME",
        help="torchvision:MODEL, timm:MODEL, hub:ENTRY, checkpoint:FILE, precomputed:PATH, … "
        "(default: %(default)s)",
    )
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: %(default)s)")


def add_rows(command: argparse.ArgumentParser) -> None:
    """Add the option that embeddings are given in place of shards, see `pool_of`."""
    command.add_argument(
        "--embeddings",
        action="store_true",
        help="what is given are embeddings, not shards: .npy or parquet files, folders of them, or one that "
        "clip-retrieval wrote; ids are rows; '?key=NAME&column=NAME' after the path names columns of parquet",
    )


def add_curation(command: argparse.ArgumentParser) -> None:
    """Add the options of a curation, see `config_of`."""
    add_embedder(command)
    command.add_argument("--config", metavar="YAML", help="fields of CurationConfig")
    command.add_argument("--target-size", type=int, metavar="N", help="samples to select")
    command.add_argument(
        "--where",
        metavar="CONDITION",
        help="in SQL over the columns of the pool, as in 'similarity > 0.28 AND NOT json.nsfw'; other "
        "samples are dropped",
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field, as in --set strategy=closest 'levels=[{n_clusters: 1000}, {n_clusters: 100}]'",
    )


def config_of(parsed: argparse.Namespace) -> Any:
    """The settings of a curation: those of the YAML file, and over them those of the command line."""
    from curated_data.config import load_config, read_yaml

    config = read_yaml(Path(parsed.config)) if parsed.config else OmegaConf.create({})
    config.pop("storage_options", None)  # which are the pool's, and may be secret
    merged: Any = config
    for item in parsed.set:
        if "=" not in item:
            raise ConfigError(f"--set {item}: expected FIELD=VALUE")
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([item]))
        except (YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"--set {item}: {' '.join(str(error).split())}") from error
    assert isinstance(merged, DictConfig), "both are mappings"
    if parsed.target_size is not None:
        merged.target_size = parsed.target_size
    if parsed.where is not None:
        merged.where = parsed.where
    return load_config(merged)


def storage_of(parsed: argparse.Namespace) -> dict[str, Any]:
    """The options for fsspec, of the command line over those of the YAML file."""
    from curated_data.config import read_yaml

    file = getattr(parsed, "config", None)
    parts: list[Any] = [read_yaml(Path(file)).get("storage_options") or {}] if file else []
    for item in parsed.storage_options:
        try:
            is_json = item.lstrip().startswith("{")
            part = OmegaConf.create(json.loads(item)) if is_json else OmegaConf.from_dotlist([item])
        except (ValueError, YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(
                f"--storage-options: no KEY=VALUE or JSON object ({printable(error)})"
            ) from None
        if not is_json and "=" not in item:
            raise ConfigError(f"--storage-options {item}: expected KEY=VALUE, or a JSON object")
        parts.append(part)
    try:
        merged: Any = OmegaConf.to_container(OmegaConf.merge({}, *parts), resolve=True)
    except (ValueError, OmegaConfBaseException) as error:
        raise ConfigError(f"storage_options: expected keys and values ({printable(error)})") from None
    return merged


def pool_of(parsed: argparse.Namespace) -> Any:
    """The pool of shards, or with `--embeddings` the embeddings given."""
    if getattr(parsed, "embeddings", False):
        from curated_data.embedding.existing import EmbeddedPool
        from curated_data.embedding.precomputed import with_options

        if len(parsed.pool) > 1:
            return EmbeddedPool(parsed.pool, columns=parsed.columns)
        path, options = with_options(parsed.pool[0], ("key", "column"))
        return EmbeddedPool(path, columns=parsed.columns, **options)
    from curated_data.cache.artifacts import open_cache
    from curated_data.pool import ShardPool

    return ShardPool(
        parsed.pool,
        cache_dir=open_cache(parsed.cache_dir),
        storage_options=storage_of(parsed),
        background=parsed.background,
        exif_orientation=not parsed.ignore_exif,
        strict=parsed.strict,
        columns=parsed.columns,
        labels=parsed.label_column,
        captions=parsed.caption_column,
    )


def embeddings_of(parsed: argparse.Namespace, pool: Any) -> Any:
    """The stage that embeds a pool, with the settings that `curate` has by default."""
    from curated_data.cache.artifacts import open_cache
    from curated_data.config import CurationConfig
    from curated_data.stages.embeddings import Embeddings

    return Embeddings.of(open_cache(parsed.cache_dir), pool, parsed.embedder, CurationConfig(target_size=1))


def run_curation(parsed: argparse.Namespace) -> tuple[Any, Any]:
    """The pool, or the embeddings given, and its curation, from the cache if it is there."""
    config = config_of(parsed)  # before what takes seconds to import
    from curated_data.pipeline.curate import curate
    from curated_data.pool import ShardPool

    pool = pool_of(parsed)
    embedder = parsed.embedder if isinstance(pool, ShardPool) else None
    return pool, curate(pool, config, embedder=embedder, cache_dir=parsed.cache_dir, device=parsed.device)


def check_output(place: str, parsed: argparse.Namespace) -> None:
    """Check that a file can be written, before anything takes long."""
    from curated_data.pool.out import open_file

    open_file(place, storage_of(parsed))[0].check()


def load_array(path: str | None, name: str) -> Any:
    """The array of the file that the option `name` gives, None without one."""
    if path is None:
        return None
    try:
        return load_npy(local_path(path, f"--{name}"), "give another")
    except CacheError as error:
        raise ConfigError(f"--{name} {path}: cannot be read as a .npy file ({error})") from error


def print_table(table: Table) -> None:
    """Print a table over the width of the terminal, or of 140 characters to a file."""
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _colour(text: str) -> int | list[int]:
    """A grey, or red,green,blue, for argparse; `ShardPool` checks their range."""
    values = [int(value) for value in text.split(",")]
    return values[0] if len(values) == 1 else values
