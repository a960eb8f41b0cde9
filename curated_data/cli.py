"""The command line: `curated-data demo | recipe | import | curate | …`."""

import argparse
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table
from yaml import YAMLError

from curated_data import __version__, cli_search
from curated_data.cache.checksums import read_bytes
from curated_data.cache.paths import local_path, spelled
from curated_data.cli_inspect import inspect, print_table
from curated_data.cli_recipe import recipe
from curated_data.errors import CacheError, ConfigError, printable
from curated_data.progress import log_to_terminal

_OVERVIEW = """Balanced subsets of long-tailed pools of WebDataset shards.

see it work
  demo         the quickstart: curate, pretrain, compare, on images that are included
  recipe       run one of the recipes, or copy them and their settings: pretraining, evaluation, …

make shards
  import       of a folder of class folders of images, or of other archives
  export       of a selection

select
  curate       index, embed, cluster, sample; with --dry-run what that would take
  extend       from a pool that has grown, with an existing tree
  duplicates   show pairs of near-duplicates, to choose their threshold by looking

look at what was done
  report       one HTML page on a curation
  table        all that is known of each sample, as parquet
  search       the samples nearest to an image, a text or a vector
  inspect      what a cache holds and what determined it, or why a sample was selected

stage by stage, ahead of `curate`
  index        find the place of every sample
  embed        embed every sample"""
_REPEATED = ("--set", "--storage-options")
_SETTING = re.compile(r"[A-Za-z_][\w.\[\]]*=|\{")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 2 after an error in the input, or 130 after Ctrl-C.

    SIGTERM is cleaned up after, too, and exits with 143.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["demo"]:
        given[:1] = ["recipe", "quickstart"]
    parsed = _parser().parse_args(given if given[:1] == ["recipe"] else _one_each(given))
    log_to_terminal(logging.WARNING if parsed.quiet else logging.INFO)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)
    try:
        parsed.run(parsed)
    except KeyboardInterrupt:
        print(f"curated-data {parsed.command}: stopped; run it again to go on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if parsed.traceback:
            raise
        print(f"curated-data {parsed.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _one_each(arguments: Sequence[str]) -> list[str]:
    """The arguments, with `--set A=1 B=2 POOL` as `--set A=1 --set B=2 POOL`, so that it takes no shards."""
    spread: list[str] = []
    option = None
    for number, argument in enumerate(arguments):
        if argument == "--":
            return [*spread, *arguments[number:]]
        if option is not None and (spread[-1] == option or _SETTING.match(argument)):
            if spread[-1] != option:
                spread.append(option)
            spread[-1] = f"{option}={argument}"
        else:
            option = argument if argument in _REPEATED else None
            spread.append(argument)
            continue
    return spread


def _end(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="curated-data",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [-h] [--version] [-q] [--traceback] COMMAND …",
        description=_OVERVIEW,
        epilog="`curated-data COMMAND --help` lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("-q", "--quiet", action="store_true", help="log only warnings")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(
        dest="command", required=True, prog="curated-data", metavar="COMMAND", help=argparse.SUPPRESS
    )

    command = _command(commands, "demo", "run the quickstart: `recipe quickstart`")
    command = _command(
        commands, "recipe", "run a recipe, or copy recipes and settings; without a name: list them"
    )
    command.add_argument("--copy", metavar="FOLDER", help="copy recipes and their settings there")
    command.add_argument("name", nargs="?", help="of the recipe, as quickstart")
    command.add_argument("arguments", nargs=argparse.REMAINDER, help="the recipe's own; try --help")
    command.set_defaults(run=recipe)

    command = _command(
        commands, "import", "turn a folder of class folders of images, or other archives, into shards"
    )
    command.add_argument(
        "source",
        nargs="+",
        help="a folder as for ImageFolder: one sub-folder per class; parquet files with images as the Hub "
        "stores them, or a folder of these; or tar archives, compressed or with the parts of samples apart: "
        "'old-{000..099}.tar.gz', a glob in quotes, paths, URLs, 'pipe:COMMAND', or a .txt or the .json of "
        "wids that lists them",
    )
    command.add_argument("out", help="where the shards go")
    _shard_options(command)
    _storage_options(command)
    command.set_defaults(run=_import)

    command = _pool_command(commands, "index", "index a pool: find the place of every sample", _index)

    command = _pool_command(commands, "embed", "embed every sample of a pool", _embed)
    _embedder_option(command)
    command.add_argument("--out", metavar="FOLDER", help="also write keys and embeddings to this new folder")
    command.add_argument(
        "--format",
        choices=("parquet", "npy"),
        default="parquet",
        help="of --out: parquet files, or .npy with keys beside them, as of clip-retrieval "
        "(default: %(default)s)",
    )

    command = _pool_command(
        commands,
        "duplicates",
        "show pairs of near-duplicates, to choose their threshold by looking",
        _duplicates,
    )
    _embedder_option(command)
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

    command = _pool_command(
        commands, "curate", "select a balanced subset: index, embed, cluster, sample", _curate
    )
    _curation_options(command)
    _rows_option(command)
    command.add_argument("--ids", metavar="FILE", help="also write the selected ids to this .npy file")
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="only check the settings and print sizes, memory, and hours of embedding and clustering by a "
        "small probe",
    )

    command = _pool_command(commands, "export", "write the selection as new shards", _export)
    _curation_options(command)
    command.add_argument("--out", required=True, help="where the shards go")
    _shard_options(command)
    command.add_argument(
        "--order", choices=("pool", "shuffled"), default="shuffled", help="(default: %(default)s)"
    )

    command = _pool_command(
        commands, "extend", "select from a pool that has grown, with an existing tree", _extend
    )
    _curation_options(command)
    command.add_argument("--tree", required=True, metavar="FOLDER", help="the tree, as printed by `curate`")

    command = _pool_command(
        commands, "table", "write all that is known of each sample as one parquet table", _table
    )
    _curation_options(command)
    command.add_argument("--out", metavar="FILE.parquet", help="the table to write")
    command.add_argument("--keys", metavar="FILE.csv", help="write ids, shards and keys alone, as text")
    command.add_argument("--selected", action="store_true", help="only the selected samples")
    command.add_argument("--add", nargs="+", default=[], metavar="COLUMN", help="the pool's own, as width")
    command.add_argument("--images", type=int, metavar="PIXELS", help="add thumbnails of this side")
    command.add_argument("--coordinates", metavar="FILE.npy", help="(n, 2) place of every sample on a map")

    command = _pool_command(
        commands, "search", "find the samples nearest to an image, a text or a vector", _search
    )
    _embedder_option(command)
    cli_search.add_options(command)

    command = _pool_command(commands, "report", "write one HTML page about a curation", _report)
    _curation_options(command)
    _rows_option(command)
    command.add_argument("--out", default="report.html", help="the page to write (default: %(default)s)")
    command.add_argument("--title", default="Curation report", help="of the page (default: %(default)s)")
    command.add_argument(
        "--coordinates",
        metavar="FILE.npy",
        help="(n, 2) position of every sample on the map, for example from t-SimCNE (default: the first two "
        "principal components of the embeddings)",
    )
    command.add_argument(
        "--labels",
        metavar="FILE.npy",
        help="(n,) class of every sample, -1 for none (default: the .cls members)",
    )
    command.add_argument(
        "--class-names",
        metavar="FILE",
        help="a JSON list, or one name per line (default: classes.json beside the first shard, or numbers)",
    )

    command = _command(
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
    return parser


def _pool_command(commands: Any, name: str, what: str, run: Any) -> argparse.ArgumentParser:
    command = _command(commands, name, what)
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
        "--ignore-exif", action="store_true", help="do not turn images as their EXIF data say"
    )
    _storage_options(command)
    command.set_defaults(run=run)
    return command


def _command(commands: Any, name: str, what: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")


def _storage_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--storage-options",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for fsspec, to reach remote shards and outputs, as client_kwargs.endpoint_url=http://HOST, or "
        "a JSON object; --config takes them, too, as `storage_options`",
    )


def _shard_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max-samples", type=int, default=10_000, help="samples per shard (default: %(default)s)"
    )
    command.add_argument(
        "--overwrite", action="store_true", help="replace the shards that an earlier run wrote there"
    )


def _embedder_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--embedder",
        default="hub:dinov2_vitl14_reg",
        metavar="NAME",
        help="torchvision:MODEL, timm:MODEL, hub:ENTRY, checkpoint:FILE, precomputed:PATH, … "
        "(default: %(default)s)",
    )
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: %(default)s)")


def _rows_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--embeddings",
        action="store_true",
        help="what is given are embeddings, not shards: .npy or parquet files, folders of them, or one that "
        "clip-retrieval wrote; ids are rows",
    )


def _curation_options(command: argparse.ArgumentParser) -> None:
    _embedder_option(command)
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


def _config(parsed: argparse.Namespace) -> Any:
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


def _import(parsed: argparse.Namespace) -> None:
    from curated_data.pool import import_archives, import_folder

    options = {
        "max_samples": parsed.max_samples,
        "overwrite": parsed.overwrite,
        "storage_options": _storage(parsed),
    }
    sources = [spelled(source) for source in parsed.source]
    if all(source.endswith(".parquet") or _holds_parquet(source) for source in sources):
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


def _pool(parsed: argparse.Namespace) -> Any:
    from curated_data.cache.artifacts import open_cache
    from curated_data.pool import ShardPool

    return ShardPool(
        parsed.pool,
        cache_dir=open_cache(parsed.cache_dir),
        storage_options=_storage(parsed),
        background=parsed.background,
        exif_orientation=not parsed.ignore_exif,
        strict=parsed.strict,
        columns=parsed.columns,
    )


def _rows(parsed: argparse.Namespace) -> Any:
    from curated_data.embedding.existing import EmbeddedPool

    return EmbeddedPool(parsed.pool)


def _colour(text: str) -> int | list[int]:
    """A grey, or red,green,blue, for argparse; `ShardPool` checks their range."""
    values = [int(value) for value in text.split(",")]
    return values[0] if len(values) == 1 else values


def _storage(parsed: argparse.Namespace) -> dict[str, Any]:
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


def _index(parsed: argparse.Namespace) -> None:
    pool = _pool(parsed)
    print(f"{len(pool):,} samples in {len(pool.urls):,} shards")


def _embed(parsed: argparse.Namespace) -> None:
    from curated_data.cache.artifacts import open_cache
    from curated_data.embedding import embed_pool, resolve_embedder
    from curated_data.embedding.out import check_folder, write_embeddings

    if parsed.out is not None:
        check_folder(parsed.out, parsed.format)
    pool = _pool(parsed)
    store = embed_pool(
        pool, resolve_embedder(parsed.embedder), open_cache(parsed.cache_dir), device=parsed.device
    )
    count = store.n_failures
    print(f"{len(store):,} embeddings of length {store.shape[1]}, {count:,} failed: {store.folder}")
    if parsed.out is not None:
        print(f"embeddings: {write_embeddings(store, pool.keys, parsed.out, form=parsed.format)}")


def _duplicates(parsed: argparse.Namespace) -> None:
    from curated_data.cache.artifacts import open_cache
    from curated_data.embedding import embed_pool, resolve_embedder
    from curated_data.report.duplicates import band_edges, write_pairs

    band_edges(parsed.least)  # before anything takes long
    if parsed.pairs < 1:
        raise ConfigError(f"--pairs {parsed.pairs}: give at least 1")
    _check_output(parsed.examples, parsed)
    pool = _pool(parsed)
    store = embed_pool(
        pool, resolve_embedder(parsed.embedder), open_cache(parsed.cache_dir), device=parsed.device
    )
    bands = write_pairs(pool, store, parsed.examples, least=parsed.least, n_pairs=parsed.pairs)
    table = Table(title=f"{len(store) - store.n_failures:,} samples")
    for name in ("threshold", "pairs at or above it", "samples that would be left out"):
        table.add_column(name, justify="right")
    for band in bands:
        table.add_row(f"{band.least:g}", f"{band.n_pairs_above:,}", f"{band.n_left_out:,}")
    print_table(table)
    print(f"pairs to look at: {parsed.examples}")


def _run_curation(parsed: argparse.Namespace) -> tuple[Any, Any]:
    config = _config(parsed)  # before what takes seconds to import
    from curated_data.pipeline.curate import curate

    if getattr(parsed, "embeddings", False):
        rows = _rows(parsed)
        return rows, curate(rows, config, embedder=None, cache_dir=parsed.cache_dir, device=parsed.device)
    pool = _pool(parsed)
    curation = curate(
        pool, config, embedder=parsed.embedder, cache_dir=parsed.cache_dir, device=parsed.device
    )
    return pool, curation


def _curate(parsed: argparse.Namespace) -> None:
    from curated_data.report.summary import summary_table

    if parsed.dry_run:
        if parsed.embeddings:
            raise ConfigError("--dry-run: plans the work on shards; there is nothing to embed here")
        _plan(parsed)
        return
    from curated_data.stages.filtering import filter_rows

    if parsed.ids is not None:
        _check_output(parsed.ids, parsed)
    _, curation = _run_curation(parsed)
    report = curation.report
    print_table(summary_table(report))
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

        print(f"ids: {write_file(parsed.ids, encode_member(curation.ids), _storage(parsed))}")


def _check_output(place: str, parsed: argparse.Namespace) -> None:
    """Check that a file can be written, before anything takes long."""
    from curated_data.pool.out import open_file

    open_file(place, _storage(parsed))[0].check()


def _plan(parsed: argparse.Namespace) -> None:
    config = _config(parsed)  # before what takes seconds to import
    from curated_data.pipeline.plan import plan, plan_tables

    pool = _pool(parsed)
    print(f"{len(pool):,} samples in {len(pool.urls):,} shards; would select {config.target_size:,}")
    found = plan(
        pool,
        config,
        embedder=parsed.embedder,
        cache_dir=parsed.cache_dir,
        device=parsed.device,
    )
    for table in plan_tables(found):
        print_table(table)


def _extend(parsed: argparse.Namespace) -> None:
    config = _config(parsed)
    from curated_data.pipeline.extend import extend

    curation = extend(
        _pool(parsed),
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


def _export(parsed: argparse.Namespace) -> None:
    _config(parsed)
    from curated_data.pipeline.export import check_export, export

    options = {"max_samples": parsed.max_samples, "overwrite": parsed.overwrite}
    check_export(_pool(parsed), parsed.out, described=True, **options)
    pool, curation = _run_curation(parsed)
    shards = export(pool, curation.ids, parsed.out, curation=curation, order=parsed.order, **options)
    print(f"{len(curation.ids):,} samples in {len(shards):,} shards in {parsed.out}")


def _table(parsed: argparse.Namespace) -> None:
    from curated_data.report.table import CurationTable

    if parsed.out is None and parsed.keys is None:
        raise ConfigError("table: nothing to write; give --out FILE.parquet or --keys FILE.csv, or both")
    for place in filter(None, (parsed.out, parsed.keys)):
        _check_output(place, parsed)
    coordinates = _array(parsed.coordinates, "coordinates")
    pool, curation = _run_curation(parsed)
    table = CurationTable(
        curation,
        pool,
        selected=parsed.selected,
        images=parsed.images,
        coordinates=coordinates,
        columns=parsed.add,
    )
    for place, write in ((parsed.out, table.write), (parsed.keys, table.write_keys)):
        if place is not None:
            print(f"{len(table):,} samples: {write(place, _storage(parsed))}")


def _search(parsed: argparse.Namespace) -> None:
    from curated_data.pool.out import write_file

    for place in filter(None, (parsed.out, parsed.ids, parsed.table)):
        _check_output(place, parsed)
    vectors = _array(parsed.vectors, "vectors")
    options = _storage(parsed)
    cli_search.search(
        parsed, _pool(parsed), vectors, lambda place, content: write_file(place, content, options)
    )


def _report(parsed: argparse.Namespace) -> None:
    _config(parsed)
    from curated_data.report.page import check_arrays, write_report

    _check_output(parsed.out, parsed)
    arrays = {name: _array(getattr(parsed, name), name) for name in ("coordinates", "labels")}
    names = _class_names(parsed.class_names)
    check_arrays(len(_rows(parsed) if parsed.embeddings else _pool(parsed)), **arrays)
    pool, curation = _run_curation(parsed)
    print(write_report(curation, pool, parsed.out, title=parsed.title, class_names=names, **arrays))


def _array(path: str | None, name: str) -> Any:
    if path is None:
        return None
    from curated_data.cache.checksums import load_npy

    try:
        return load_npy(local_path(path, f"--{name}"), "give another")
    except CacheError as error:
        raise ConfigError(f"--{name} {path}: cannot be read as a .npy file ({error})") from error


def _class_names(path: str | None) -> list[str] | None:
    if path is None:
        return None
    try:
        text = read_bytes(local_path(path, "--class-names")).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--class-names {path}: cannot be read ({error})") from error
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise ConfigError(f"--class-names {path}: no JSON list ({error})") from error
        return text.splitlines()
    if isinstance(names, dict):
        raise ConfigError(
            f"--class-names {path}: holds a JSON object; give a list of the names in order of their numbers"
        )
    return [str(name) for name in names] if isinstance(names, list) else text.splitlines()


if __name__ == "__main__":
    sys.exit(main())
