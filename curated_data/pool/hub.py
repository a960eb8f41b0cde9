"""Parquet files in stores, as of data sets of the Hub: `hf://datasets/OWNER/NAME`, read through fsspec."""

import logging
import posixpath
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fsspec
import pyarrow.parquet as pq

from curated_data.errors import ConfigError, PoolError, printable
from curated_data.parquet import check_row_groups, reading_parquet

log = logging.getLogger(__name__)

_HUB = "hf://"
_BUFFER = 1 << 20  # bytes of a column that are in memory at once, besides the blocks that fsspec reads
_PART = re.compile(r"-\d+-of-\d+|\d+")  # what names of the files of one split differ in
_SHOWN = 6


def remote_tables(url: str, storage_options: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The parquet files that a URL names: a file, a glob, or a folder or data set with those of one split.

    Args:
        url: as `hf://datasets/OWNER/NAME`, if wanted with `@REVISION` after the name, and a path or glob in
            it; or of any file system of fsspec.
        storage_options: for fsspec, as `token`.

    Returns:
        Their URLs, in the order of their names, each with what the store says of its state.

    Raises:
        ConfigError: a package that reads such URLs is not installed, or there are files of several splits.
        PoolError: there is no such data set or file, or none of parquet, or the store cannot be reached.
    """
    system, path = _opened(url, storage_options)
    with _reaching(url):
        if any(letter in path for letter in "*?["):
            found = system.glob(path, detail=True)
        elif path.endswith(".parquet"):
            found = {path: system.info(path)} if system.exists(path) else {}
        else:
            found = system.find(path, detail=True)
    tables = sorted(str(name) for name in found if str(name).endswith(".parquet"))
    if not tables:
        ends = sorted({posixpath.splitext(str(name))[1] or str(name) for name in found})[:_SHOWN]
        has = f"it has {', '.join(ends)}" if ends else "there is no such file, or it is empty"
        hint = (
            f"; try the Hub's own copy: {url.rstrip('/')}@~parquet/default/train" if _is_data_set(url) else ""
        )
        raise PoolError(f"{url}: no parquet file to import ({has}){hint}")
    splits = {_PART.sub("*", name): name for name in reversed(tables)}
    if len(splits) > 1 and not any(letter in path for letter in "*?["):
        root = url.rstrip("/")
        listed = ", ".join(f"{root}{name.removeprefix(path.rstrip('/'))}" for name in sorted(splits)[:_SHOWN])
        raise ConfigError(f"{url}: holds several splits; give the one to import: {listed}")
    log.info("%s: %d parquet files", url, len(tables))
    return {system.unstrip_protocol(name): str(found[name]) for name in tables}


@contextmanager
def remote_table(url: str, storage_options: Mapping[str, Any] | None = None) -> Iterator[pq.ParquetFile]:
    """A parquet file in a store, whose columns are read in small pieces as rows are asked for.

    Raises:
        PoolError: it cannot be read, or is no parquet.
    """
    system, path = _opened(url, storage_options)
    with reading_parquet(url):
        source = system.open(path, "rb")
    with source:
        with reading_parquet(url):
            file = pq.ParquetFile(source, buffer_size=_BUFFER, page_checksum_verification=True)
            check_row_groups(file)
        yield file


def _opened(url: str, storage_options: Mapping[str, Any] | None) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        system, path = fsspec.core.url_to_fs(url, **dict(storage_options or {}))
    except ImportError as error:
        what = "pip install 'curated-data[hub]'" if url.startswith(_HUB) else f"install it ({error})"
        raise ConfigError(f"{url}: needs a package that is not installed; {what}") from error
    except Exception as error:  # of a file system, about its options or the URL
        raise PoolError(f"{url}: cannot be opened ({printable(error)})") from error
    return system, str(path)


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise PoolError(
            f"{url}: there is none, or it is private ({printable(error)}); correct the name, or log in with "
            "`huggingface-cli login`"
            if url.startswith(_HUB)
            else f"{url}: there is none ({printable(error)})"
        ) from error
    except Exception as error:  # of a client library
        raise PoolError(f"{url}: cannot be listed ({printable(error)})") from error


def _is_data_set(url: str) -> bool:
    return re.fullmatch(r"hf://datasets/[^/@*]+/[^/@*]+/?", url) is not None
