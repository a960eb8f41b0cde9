"""Importing parquet in which images are stored, as data sets of the Hub are: a struct of bytes and path."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curated_data.errors import ConfigError, PoolError
from curated_data.parquet import column_names, nearest_of, open_parquet, parquet_files, reading_parquet
from curated_data.pool.decode import IMAGE_EXTENSIONS
from curated_data.pool.writer import ShardWriter
from curated_data.progress import progress

log = logging.getLogger(__name__)

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
    the image, `.json`. Rows without an image are left out and counted.

    Args:
        tables: files, or folders of them, in the order of their names.
        out: a folder for the shards, or a pattern, as for `ShardWriter`.
        image: the column of images: a struct with `bytes`, or bytes; None takes the only struct, or `image`.
        max_samples, max_bytes: per shard.
        overwrite: replace the shards of an earlier run.
        storage_options: for fsspec, to write to a store.

    Returns:
        The shards, as paths, or as URLs in a store.

    Raises:
        PoolError: a file is missing or damaged, or no row has an image.
        ConfigError: there is no column of images, or several.
        CacheError: the shards cannot be written.

    Example:
        >>> import_tables("train-00000-of-00001.parquet", "shards")  # doctest: +SKIP
    """
    files = [(path, open_parquet(path)) for path in parquet_files(tables, "tables")]
    names = [_image_column(file, path, image) for path, file in files]
    total = sum(file.metadata.num_rows for _, file in files)
    options: dict[str, Any] = {
        "max_samples": max_samples,
        "max_bytes": max_bytes,
        "overwrite": overwrite,
        "storage_options": storage_options,
    }
    row = left_out = 0
    with ShardWriter(out, **options) as writer, progress("import", total, "rows") as advance:
        for (path, file), name in zip(files, names, strict=True):
            for values in _rows(file, path):
                sample = _sample(values, name)
                if sample is None:
                    left_out += 1
                else:
                    writer.write({"__key__": f"{row:09d}"} | sample)
                row += 1
                advance()
        if not writer.n_samples:
            raise PoolError(f"{files[0][0]}: none of {row} rows has the bytes of an image in {names[0]!r}")
    if left_out:
        log.warning("left out %d of %d rows that have no bytes of an image", left_out, row)
    log.info("imported %d images of %d files to %d shards", writer.n_samples, len(files), len(writer.shards))
    return writer.shards


def _rows(file: pq.ParquetFile, path: Path) -> Iterator[dict[str, Any]]:
    with reading_parquet(path):
        batches = file.iter_batches(_BATCH)
    while True:
        with reading_parquet(path):
            batch = next(batches, None)
            if batch is None:
                return
            rows = batch.to_pylist()
        yield from rows


def _image_column(file: pq.ParquetFile, path: Path, given: str | None) -> str:
    names = column_names(file, path)
    if given is not None and given not in names:
        raise ConfigError(f"{path}: has no column {given!r} of images{nearest_of(given, names)}")
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
