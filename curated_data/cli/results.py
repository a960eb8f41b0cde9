"""The commands that show and write what was selected: `report` and `table`."""

import argparse
import json
from typing import Any

from curated_data.cache.checksums import read_bytes
from curated_data.cache.paths import local_path
from curated_data.cli import common
from curated_data.errors import ConfigError

_OF_ONE_POOL = (
    "config", "target_size", "where", "set", "embeddings", "coordinates", "labels", "class_names",
    "vocabulary", "columns", "strict", "ignore_exif",
)  # fmt: skip


def add(commands: Any) -> None:
    """Add the commands of this file."""
    command = common.add_pool_command(
        commands,
        "report",
        "write one HTML page about a curation; or of the YAML files of a training, in place of shards, a "
        "folder of pages about its mixture",
        _report,
    )
    common.add_curation(command)
    common.add_rows(command)
    command.add_argument("--out", help="the page, or folder, to write (default: report.html, or report)")
    command.add_argument("--title", help="of the page (default: Curation report, or Mixture report)")
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
    command.add_argument(
        "--vocabulary",
        metavar="FILE",
        help="words, one per line, that clusters are called by: the nearest, for an --embedder of images and "
        "texts (transformers:, and the name of a CLIP or SigLIP) or minilm",
    )

    command = common.add_pool_command(
        commands, "table", "write all that is known of each sample as one parquet table", _table
    )
    common.add_curation(command)
    command.add_argument("--out", metavar="FILE.parquet", help="the table to write")
    command.add_argument("--keys", metavar="FILE.csv", help="write ids, shards and keys alone, as text")
    command.add_argument("--selected", action="store_true", help="only the selected samples")
    command.add_argument("--add", nargs="+", default=[], metavar="COLUMN", help="the pool's own, as width")
    command.add_argument("--images", type=int, metavar="PIXELS", help="add thumbnails of this side")
    command.add_argument("--coordinates", metavar="FILE.npy", help="(n, 2) place of every sample on a map")


def _report(parsed: argparse.Namespace) -> None:
    if all(name.endswith((".yaml", ".yml")) for name in parsed.pool):
        _report_mixture(parsed)
        return
    common.config_of(parsed)
    from curated_data.report.page import check_arrays, write_report

    out, title = parsed.out or "report.html", parsed.title or "Curation report"
    common.check_output(out, parsed)
    arrays = {name: common.load_array(getattr(parsed, name), name) for name in ("coordinates", "labels")}
    names = _class_names(parsed.class_names)
    check_arrays(len(common.pool_of(parsed)), **arrays)
    words = _vocabulary(parsed)
    pool, curation = common.run_curation(parsed)
    print(write_report(curation, pool, out, title=title, class_names=names, vocabulary=words, **arrays))


def _report_mixture(parsed: argparse.Namespace) -> None:
    for name in _OF_ONE_POOL:
        if getattr(parsed, name) not in (None, False, []):
            raise ConfigError(
                f"--{name.replace('_', '-')}: of one curation; write it into the YAML of the mixture"
            )
    from curated_data.pool.out import open_out
    from curated_data.training.mixture_file import open_mixture
    from curated_data.training.mixture_report import write_mixture_report

    out, options = parsed.out or "report", common.storage_of(parsed)
    open_out(out, options).check()
    data = open_mixture(parsed.pool, embedder=parsed.embedder, cache_dir=parsed.cache_dir)
    data.setup("fit")
    print(write_mixture_report(data, out, title=parsed.title or "Mixture report", storage_options=options))


def _table(parsed: argparse.Namespace) -> None:
    from curated_data.report.table import CurationTable

    if parsed.out is None and parsed.keys is None:
        raise ConfigError("table: nothing to write; give --out FILE.parquet or --keys FILE.csv, or both")
    for place in filter(None, (parsed.out, parsed.keys)):
        common.check_output(place, parsed)
    coordinates = common.load_array(parsed.coordinates, "coordinates")
    pool, curation = common.run_curation(parsed)
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
            print(f"{len(table):,} samples: {write(place, common.storage_of(parsed))}")


def _vocabulary(parsed: argparse.Namespace) -> tuple[list[str], Any] | None:
    """The words of `--vocabulary` and their embeddings."""
    if parsed.vocabulary is None:
        return None
    import numpy as np

    from curated_data.embedding import resolve_embedder
    from curated_data.pipeline.search import embed_queries
    from curated_data.pool import ShardPool

    pool = common.pool_of(parsed)
    if parsed.embedder is None or not isinstance(pool, ShardPool):
        raise ConfigError("--vocabulary: needs a pool of shards, and an --embedder that embeds words, too")
    words = [word.strip() for word in _text(parsed.vocabulary, "--vocabulary").splitlines() if word.strip()]
    if not words:
        raise ConfigError(f"--vocabulary {parsed.vocabulary}: holds no word; write one per line")
    embedder = resolve_embedder(parsed.embedder)
    parts = (words[first : first + 256] for first in range(0, len(words), 256))
    return words, np.concatenate([embed_queries(pool, embedder, texts=part) for part in parts])


def _text(path: str, option: str) -> str:
    try:
        return read_bytes(local_path(path, option)).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path}: cannot be read ({error})") from error


def _class_names(path: str | None) -> list[str] | None:
    if path is None:
        return None
    text = _text(path, "--class-names")
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
