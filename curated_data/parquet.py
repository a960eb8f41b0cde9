"""Parquet files: their columns, read a row group at a time, with one error for whatever is wrong."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curated_data.cache.checksums import open_regular
from curated_data.cache.paths import local_path
from curated_data.errors import ConfigError, CuratedDataError, PoolError, nearest, printable

KEYS = ("key", "__key__", "image_path")
"""Names by which a column of keys is known; the last is clip-retrieval's."""

_VECTORS = ("embedding", "embeddings", "vector", "image_embedding")
_READ = 1 << 16  # rows that are decoded at once


@contextlib.contextmanager
def reading_parquet(path: Path | str) -> Iterator[None]:
    """Turn whatever reading a parquet file raises into one error that names it.

    Raises:
        PoolError: the file is missing, damaged, or is not a parquet file.
    """
    try:
        yield
    except CuratedDataError:
        raise
    except FileNotFoundError as error:
        raise PoolError(f"{path}: no such file; give a parquet file") from error
    except Exception as error:  # pyarrow's own, and what damaged bytes make of it
        raise PoolError(
            f"{path}: cannot be read as parquet ({printable(error)}); write it again, or give another file"
        ) from error


def open_parquet(path: Path) -> pq.ParquetFile:
    """A parquet file that is a regular file, its footer read and its checksums, if any, verified on reading.

    Raises:
        PoolError: it is missing, damaged, or is not a parquet file.
    """
    with reading_parquet(path):
        open_regular(path).close()
        file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        check_row_groups(file)
        return file


def check_row_groups(file: pq.ParquetFile) -> None:
    """Check that the rows of a file's groups are all of its rows.

    Raises:
        ValueError: they are not.
    """
    n_rows, groups = file.metadata.num_rows, row_groups(file)
    if min(groups, default=0) < 0 or sum(groups) != n_rows:
        raise ValueError(f"row groups of {groups[:10]} rows, of {n_rows} in all")


def row_groups(file: pq.ParquetFile) -> list[int]:
    """The number of rows of each row group."""
    return [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]


def column_names(file: pq.ParquetFile, path: Path | str) -> list[str]:
    """The names of a file's columns.

    Raises:
        PoolError: two have the same.
    """
    names = list(file.schema_arrow.names)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise PoolError(f"{path}: has two columns {twice!r}; rename one")
    return names


def check_column(name: str, names: Sequence[str], path: Path | str, what: str) -> str:
    """The name itself, if it is one of a file's columns.

    Raises:
        ConfigError: it is not; suggests the nearest.
    """
    if name in names:
        return name
    raise ConfigError(f"{path}: has no column {name!r} of {what}{nearest_of(name, names)}")


def nearest_of(name: str, names: Sequence[str]) -> str:
    """The end of an error about a name that is none of these."""
    listed = ", ".join(map(repr, names[:20])) + (", …" if len(names) > 20 else "")
    return nearest(name, names) or f"; there are {listed or 'none'}"


def key_column(file: pq.ParquetFile, path: Path, given: str | None = None) -> str | None:
    """The name of the column that holds keys: the one given, or one with a usual name; None if there is none.

    Raises:
        ConfigError: there is none of the given name, or it holds neither texts nor integers.
    """
    names = column_names(file, path)
    name = next((name for name in KEYS if name in names), None) if given is None else given
    if name is None:
        return None
    kind = file.schema_arrow.field(check_column(name, names, path, "keys")).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_integer(kind) or _is_text(kind)):
        raise ConfigError(f"{path}: its column {name!r} holds {kind}, expected keys: texts or integers")
    return name


def read_keys(file: pq.ParquetFile, path: Path, name: str) -> pa.Array:
    """A column of keys as one array of bytes.

    Raises:
        PoolError: a key is missing, or the file is damaged.
    """
    with reading_parquet(path):
        column = file.read([name]).column(name)
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy())[0])
            raise PoolError(f"{path}: row {row} has no {name!r}; every row needs a key")
        return as_keys(column)


def as_keys(column: Any) -> pa.Array:
    """Texts or integers as one array of bytes, for comparison with the keys of a pool."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    column = column.cast(pa.large_binary())
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def bytes_of_keys(keys: Sequence[str]) -> pa.Array:
    """Keys as an array of bytes."""
    return pa.array([key.encode("utf-8", "surrogateescape") for key in keys], pa.large_binary())


def packed_keys(starts: np.ndarray, content: np.ndarray) -> pa.Array:
    """Keys that lie one after the other in memory as an array of bytes, without a copy.

    Args:
        starts: (n + 1,) int64, where each begins.
        content: uint8.
    """
    buffers = [None, *(pa.py_buffer(np.ascontiguousarray(array)) for array in (starts, content))]
    return pa.Array.from_buffers(pa.large_binary(), len(starts) - 1, buffers)


def check_unique(keys: pa.Array, path: Path | str) -> None:
    """Check that no key occurs twice.

    Raises:
        PoolError: names one that does.
    """
    if len(pc.unique(keys)) == len(keys):
        return
    counts = pc.value_counts(keys)
    twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))[0].as_py()
    raise PoolError(f"{path}: key {text_of_key(twice)!r} occurs more than once; keep one row for each key")


def text_of_key(key: bytes) -> str:
    """A key for messages."""
    return key.decode("utf-8", "surrogateescape")


def join(wanted: pa.Array, keys: pa.Array) -> np.ndarray:
    """The place of each wanted key among the keys, (n,) int64; -1 for those that are not there."""
    return pc.index_in(wanted, value_set=keys).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


class ParquetRows:
    """A column of vectors of a parquet file as a matrix (n, d), decoded a row group at a time.

    Args:
        path: of the file.
        column: of lists or fixed-size lists of floating-point numbers; None takes the only one, or the one
            with a usual name.

    Raises:
        PoolError: the file cannot be read.
        ConfigError: there is no such column, or its rows differ in length.
    """

    def __init__(self, path: Path, column: str | None = None) -> None:
        self.path = path
        self.file = open_parquet(path)
        self.column = self._vectors() if column is None else column
        kind = self.file.schema_arrow.field(
            check_column(self.column, column_names(self.file, path), path, "embeddings")
        ).type
        if not is_vector(kind):
            raise ConfigError(
                f"{path}: its column {self.column!r} holds {kind}, expected lists of floating-point numbers"
            )
        self.dtype = np.dtype(f"float{kind.value_type.bit_width}")
        self.starts = np.cumsum([0, *row_groups(self.file)])
        self._held: tuple[int, np.ndarray] = (-1, np.empty((0, 0)))
        width = kind.list_size if pa.types.is_fixed_size_list(kind) else self._first_length()
        self.shape = (int(self.starts[-1]), width)
        self.ndim = 2

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: slice) -> np.ndarray:
        """The rows of a slice, which is read group by group."""
        start, stop, _ = which.indices(len(self))
        first, last = np.searchsorted(self.starts, (start, max(start, stop - 1)), side="right") - 1
        parts = [
            self._group(number)[max(start - self.starts[number], 0) : stop - self.starts[number]]
            for number in range(first, last + 1)
            if stop > start
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.shape[1]), self.dtype)

    def _group(self, number: int) -> np.ndarray:
        if self._held[0] != number:
            rows = np.empty((int(self.starts[number + 1] - self.starts[number]), self.shape[1]), self.dtype)
            at = 0
            with reading_parquet(self.path):
                for batch in self.file.iter_batches(_READ, row_groups=[number], columns=[self.column]):
                    part = self._matrix(batch.column(0), int(self.starts[number]) + at)
                    rows[at : at + len(part)] = part
                    at += len(part)
            self._held = (number, rows)
        return self._held[1]

    def _matrix(self, column: pa.Array, first: int) -> np.ndarray:
        """Lists as a matrix; lists that are missing become NaN."""
        width = self.shape[1]
        lengths = pc.fill_null(pc.list_value_length(column), width).to_numpy(zero_copy_only=False)
        if (lengths != width).any():
            row = int(np.flatnonzero(lengths != width)[0])
            raise ConfigError(
                f"{self.path}: row {first + row} of {self.column!r} has length {lengths[row]}, the first one "
                f"{width}; give embeddings of one network"
            )
        values = pc.list_flatten(column)
        if values.null_count:
            values = values.fill_null(float("nan")) if self.dtype.itemsize > 2 else _nan_halves(values)
        flat = values.to_numpy(zero_copy_only=False)
        rows = np.full((len(column), width), np.nan, self.dtype)
        rows[column.is_valid().to_numpy(zero_copy_only=False)] = flat.reshape(-1, width)
        return rows

    def _first_length(self) -> int:
        with reading_parquet(self.path):
            for batch in self.file.iter_batches(1024, columns=[self.column]):
                lengths = pc.drop_null(pc.list_value_length(batch.column(0)))
                if len(lengths):
                    return int(lengths[0].as_py())
        return 0

    def _vectors(self) -> str:
        names = [field.name for field in self.file.schema_arrow if is_vector(field.type)]
        if len(names) == 1:
            return str(names[0])
        usual = [name for name in _VECTORS if name in names]
        if len(usual) == 1:
            return usual[0]
        there = ", ".join(map(repr, names or self.file.schema_arrow.names))
        raise ConfigError(
            f"{self.path}: several columns hold lists of floating-point numbers: {there}; name that of the "
            "embeddings: column=NAME, or '?column=NAME' after the path"
            if names
            else f"{self.path}: no column holds lists of floating-point numbers (its columns: {there}); give "
            "the file with the embeddings"
        )


def is_vector(kind: pa.DataType) -> bool:
    """Whether a column holds vectors."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and pa.types.is_floating(kind.value_type))


def parquet_files(given: str | Path | Sequence[str | Path], name: str) -> list[Path]:
    """The files that an argument names: files, or folders of them.

    Raises:
        PoolError: a folder holds none.
    """
    found: list[Path] = []
    for one in [given] if isinstance(given, str | Path) else given:
        path = local_path(one, name)
        files = in_order(list(path.glob("*.parquet"))) if path.is_dir() else [path]
        if not files:
            raise PoolError(f"{name}: {path} holds no parquet file; give another folder, or files")
        found += files
    return found


def in_order(paths: Sequence[Path]) -> list[Path]:
    """Paths by their names, in which numbers count by their value: `img_emb_10` comes after `img_emb_2`."""

    def parts(path: Path) -> list[Any]:
        return [(0, int(part), part) if part.isdigit() else (1, 0, part)
                for part in re.split(r"([0-9]+)", path.name)]  # fmt: skip

    return sorted(paths, key=parts)


def _nan_halves(values: pa.Array) -> pa.Array:
    return values.cast(pa.float32()).fill_null(float("nan")).cast(pa.float16())


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_string_view(kind)
    )
