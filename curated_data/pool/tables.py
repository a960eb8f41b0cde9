"""Importing parquet in which images are stored, as data sets of the Hub are: a struct of bytes and path."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curated_data.cache.artifacts import fingerprint
from curated_data.cache.paths import spelled
from curated_data.errors import ConfigError, PoolError
from curated_data.parquet import (
    check_column,
    column_names,
    open_parquet,
    parquet_files,
    reading_parquet,
    row_groups,
)
from curated_data.pool.decode import IMAGE_EXTENSIONS
from curated_data.pool.hub import remote_table, remote_tables
from curated_data.pool.urls import is_remote
from curated_data.pool.writer import ShardWriter
from curated_data.progress import progress

log = logging.getLogger(__name__)

VERSION = 1
_LABELS = ("label", "labels", "cls")
_TEXTS = ("text", "caption", "txt")
_BATCH = 64  # rows in memory at once
_MAGIC = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
}


def import_tables(
    tables: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    image: str | None = None,
    max_samples: int = 10_000,
    max_bytes: int = 1 << 30,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Turn parquet files with images into shards, as the Hub stores them.

    A row becomes a sample whose key is its number. The image's bytes are written as they are; an integer
    `label` becomes `.cls`, a text in `text` or `caption` `.txt`, and all other plain values, with the path of
    the image, `.json`. Rows without an image are left out and counted. An import that was stopped goes on
    after the shards that it had written when it is run again, if neither the files nor the settings have
    changed; with `overwrite` it starts over.

    Args:
        tables: files, or folders of them, in the order of their names; or URLs, as
            `hf://datasets/OWNER/NAME`, see `remote_tables`. They are read as they come, not downloaded first.
        out: a folder for the shards, or a pattern, as for `ShardWriter`.
        image: the column of images: a struct with `bytes`, or bytes; None takes the only struct, or `image`.
        max_samples, max_bytes: per shard.
        overwrite: replace the shards of an earlier run.
        storage_options: for fsspec, to read tables from a store, and to write to one.

    Returns:
        The shards, as paths, or as URLs in a store.

    Raises:
        PoolError: a file is missing or damaged, or no row has an image.
        ConfigError: there is no column of images, or several.
        CacheError: the shards cannot be written.

    Examples:
        >>> import_tables("train-00000-of-00001.parquet", "shards")  # doctest: +SKIP
    """
    given = [tables] if isinstance(tables, str | Path) else list(tables)
    places: list[Path | str] = []
    states: list[str] = []
    for one in map(spelled, given):
        if is_remote(one):
            remote = remote_tables(one, storage_options)
            places += remote
            states += remote.values()
        else:
            local = parquet_files(one, "tables")
            places += local
            states += map(_state, local)
    total: int | None = 0
    for place in places[:1] if isinstance(places[0], str) else places:  # of a store one is enough
        with _opened(place, storage_options) as file:
            _image_column(file, place, image)
            total = None if isinstance(place, str) else (total or 0) + file.metadata.num_rows
    options: dict[str, Any] = {
        "max_samples": max_samples,
        "max_bytes": max_bytes,
        "overwrite": overwrite,
        "storage_options": storage_options,
    }
    resume = fingerprint(stage="tables", files=places, states=states, image=image, version=VERSION)
    n = 0  # rows of the files so far
    with (
        ShardWriter(out, **options, resume=resume) as writer,
        progress("import", total, "rows") as advance,
    ):
        for place in places:
            with _opened(place, storage_options) as file:
                name = _image_column(file, place, image)
                first = min(max(writer.place - n, 0), file.metadata.num_rows)  # later than 0 of a stopped run
                advance(first)
                for row, values in enumerate(_rows(file, place, first), n + first):
                    sample = _sample(values, name)
                    if sample is not None:
                        writer.write({"__key__": f"{row:09d}"} | sample)
                    writer.place = row + 1
                    advance()
                n += file.metadata.num_rows
        if not writer.n_samples:
            raise PoolError(f"{places[0]}: none of {n} rows has the bytes of an image in {name!r}")
        if writer.place != n:
            raise PoolError(
                f"{writer.out}: the marker of the stopped import says {writer.place} of {n} rows; pass "
                "overwrite=True (--overwrite) to start over"
            )
    if n > writer.n_samples:
        log.warning("left out %d of %d rows that have no bytes of an image", n - writer.n_samples, n)
    log.info("imported %d images of %d files to %d shards", writer.n_samples, len(places), len(writer.shards))
    return writer.shards


def _opened(
    place: Path | str, storage_options: Mapping[str, Any] | None
) -> contextlib.AbstractContextManager[pq.ParquetFile]:
    if isinstance(place, Path):
        return contextlib.nullcontext(open_parquet(place))
    return remote_table(place, storage_options)


def _state(path: Path) -> str:
    """By which a changed file is known."""
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"


def _rows(file: pq.ParquetFile, path: Path | str, first: int) -> Iterator[dict[str, Any]]:
    """The rows of a file from the given one on; row groups before it are not read."""
    for group, size in enumerate(row_groups(file)):  # of several at once, more than one would be read ahead
        if first >= size:
            first -= size
            continue
        with reading_parquet(path):
            batches = file.iter_batches(_BATCH, row_groups=[group])
        while True:
            with reading_parquet(path):
                batch = next(batches, None)
                if batch is None:
                    break
                rows = batch.slice(min(first, len(batch))).to_pylist()
                first -= len(batch) - len(rows)
            yield from rows


def _image_column(file: pq.ParquetFile, path: Path | str, given: str | None) -> str:
    names = column_names(file, path)
    if given is not None:
        check_column(given, names, path, "images")
    images = [field.name for field in file.schema_arrow if _is_image(field.type)]
    wanted = given or next((name for name in ("image", "img") if name in images), None)
    if wanted is None and len(images) == 1:
        wanted = images[0]
    if wanted not in images or wanted is None:
        raise ConfigError(
            f"{path}: {'several columns' if len(images) > 1 else 'no column'} could be that of images (a "
            f"struct with bytes, or bytes): {', '.join(map(repr, images or names))}; name it"
        )
    return wanted


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _sample(values: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The members of a row's sample; None if it has no image."""
    image = values.pop(name)
    path = image.get("path") if isinstance(image, dict) else None
    data = image.get("bytes") if isinstance(image, dict) else image
    if not data:
        return None
    members: dict[str, Any] = {_extension(data, path): data}
    for column in _LABELS:
        if isinstance(values.get(column), int) and not isinstance(values[column], bool):
            members["cls"] = values.pop(column)
            break
    for column in _TEXTS:
        if isinstance(values.get(column), str):
            members["txt"] = values.pop(column)
            break
    more = {column: value for column, value in values.items() if isinstance(value, str | int | float | bool)}
    if path is not None:
        more["path"] = path
    if more:
        members["json"] = more
    return members


def _extension(data: bytes, path: str | None) -> str:
    """That of an image, by its first bytes, or its path."""
    for magic, extension in _MAGIC.items():
        if data.startswith(magic):
            return extension
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    end = Path(path or "").suffix[1:].lower()
    return end if end in IMAGE_EXTENSIONS else "image" if "image" in IMAGE_EXTENSIONS else "jpg"
