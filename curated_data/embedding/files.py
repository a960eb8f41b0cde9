"""Files of embeddings that exist: `.npy`, parquet, folders of their parts, and clip-retrieval's folders."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from curated_data.cache.checksums import load_npy
from curated_data.cache.paths import local_path
from curated_data.errors import ConfigError, PoolError
from curated_data.matrix import Matrix

if TYPE_CHECKING:
    import pyarrow as pa

Source = str | Path | Matrix
PARQUET = (".parquet", ".pq")

_FLOATS = ("float16", "float32", "float64", "bfloat16")
_FOLDERS = ("img_emb", "metadata")  # of clip-retrieval: the embeddings, and their keys


@dataclass(frozen=True)
class Part:
    """Some rows of embeddings.

    Attributes:
        name: where they come from, for messages.
        rows: (n, d).
        table: the parquet file with a row for each of them, which may hold keys and columns; None if there
            is none.
    """

    name: str
    rows: Matrix
    table: Path | None = None


class EmbeddingFiles:
    """Embeddings in parts that follow each other. Files are mapped, or read when they are asked for.

    Args:
        source: see `EmbeddedPool`.
        column: of a parquet file, see `ParquetRows`.

    Attributes:
        parts: at least one, and none of them empty.
        starts: (parts + 1,) int64, the first row of each part, then the number of rows.
        dimension: of a row.
        dtype: in which they are kept, "float16" or "float32".

    Raises:
        PoolError: a file is missing or damaged, a folder holds no embeddings, or there are no rows.
        ConfigError: rows that are not a matrix of floating-point numbers, or differ in length.
    """

    def __init__(self, source: Source | Sequence[Source], column: str | None = None) -> None:
        given: list[Any] = list(source) if isinstance(source, list | tuple) else [source]
        parts = [part for number, one in enumerate(given) for part in _opened(one, number, column)]
        if not parts:
            raise PoolError("embeddings: an empty list; give an array, a file, or a folder of files")
        self.parts = [part for part in parts if len(part.rows)]
        if not self.parts:
            raise PoolError(f"{parts[0].name}: has no rows")
        first = self.parts[0]
        self.dimension = int(first.rows.shape[1])
        for part in self.parts:
            if part.rows.shape[1] != self.dimension:
                raise ConfigError(
                    f"{part.name}: its rows have length {part.rows.shape[1]}, those of {first.name} "
                    f"{self.dimension}; give embeddings of one network"
                )
        self.starts = np.cumsum([0, *(len(part.rows) for part in self.parts)])
        self.dtype = "float16" if all(_dtype(part.rows) == "float16" for part in self.parts) else "float32"

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def are_mapped(self) -> bool:
        """Whether rows can be read in any order at once. Those of parquet files are decoded in sequence."""
        return all(hasattr(part.rows, "strides") or hasattr(part.rows, "stride") for part in self.parts)

    def keys(self, given: str | None = None) -> "pa.Array | None":
        """The key of each row, as an array of bytes; None if there are none.

        Args:
            given: the name of their column; None takes one with a usual name.

        Raises:
            ConfigError: some parts have keys, and others have not.
            PoolError: a row has no key.
        """
        import pyarrow as pa

        from curated_data.parquet import column_names, key_column, open_parquet, read_keys

        found, without = [], ""
        for part in self.parts:
            if part.table is None:
                without = without or f"{part.name} has none"
                continue
            file = open_parquet(part.table)
            name = key_column(file, part.table, given)
            if name is not None:
                keys = read_keys(file, part.table, name)
                if len(keys) != len(part.rows):
                    raise PoolError(
                        f"{part.table}: damaged ({len(keys)} keys of {len(part.rows)} rows); write it again"
                    )
                found.append(keys)
            elif not without:
                names = ", ".join(column_names(file, part.table))
                without = f"{part.table} has none (its columns: {names})"
        if found and without:
            raise ConfigError(f"embeddings: some parts have a column of keys, but {without}")
        return pa.concat_arrays(found) if found else None

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """All rows in sequence: the number of the first, and copies of up to `size` rows."""
        for part, first in zip(self.parts, self.starts, strict=False):
            for start in range(0, len(part.rows), size):
                yield int(first) + start, as_array(part.rows, start, start + size, self.dtype)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows by their numbers, in any order if they are mapped, else ascending, (m, d)."""
        out = np.empty((len(rows), self.dimension), self.dtype)
        owner = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(owner):
            here = np.flatnonzero(owner == number)
            wanted = rows[here] - self.starts[number]
            matrix: Any = self.parts[number].rows
            low, high = int(wanted.min()), int(wanted.max()) + 1
            if not self.are_mapped or high - low <= 2 * len(wanted):
                out[here] = as_array(matrix, low, high, self.dtype)[wanted - low]
                continue
            order = np.argsort(wanted, kind="stable")  # files are read from front to back
            which = wanted[order] if isinstance(matrix, np.ndarray) else torch.from_numpy(wanted[order])
            out[here[order]] = converted(matrix[which], self.dtype)
        return out


def as_array(matrix: Any, start: int, stop: int, dtype: str) -> np.ndarray:
    """A copy of some rows, contiguous and in the machine's byte order."""
    return converted(matrix[start:stop], dtype)


def converted(block: Any, dtype: str) -> np.ndarray:
    """A copy of rows as a numpy array."""
    if isinstance(block, torch.Tensor):
        block = block.detach().to(torch.float32 if dtype == "float32" else torch.float16).cpu().numpy()
    with np.errstate(over="ignore"):  # what is too large for float32 is infinite, and counts as failed
        return np.array(block, dtype=dtype, order="C")


def _opened(source: Source, number: int, column: str | None) -> Iterator[Part]:
    """The parts of one source."""
    if not isinstance(source, str | Path):
        yield Part(f"embeddings {number}", _checked(f"embeddings {number}", source))
        return
    path = local_path(source, "embeddings")
    if path.is_dir() and all((path / name).is_dir() for name in _FOLDERS):
        yield from _clip_retrieval(path)
        return
    files = [path]
    if path.is_dir():
        from curated_data.parquet import in_order

        arrays = in_order(list(path.glob("*.npy")))
        tables = in_order([file for end in PARQUET for file in path.glob(f"*{end}")])
        if arrays and tables:
            raise PoolError(
                f"{path}: holds both .npy and parquet files ({arrays[0].name}, {tables[0].name}); give a "
                "folder of either, or a list of the files that hold the embeddings"
            )
        files = arrays or tables
        if not files:
            raise PoolError(
                f"{path}: no .npy file and no parquet file in this folder; give the folder of the parts"
            )
    for file in files:
        yield _part(file, column)


def _part(file: Path, column: str | None) -> Part:
    if file.suffix.lower() in PARQUET:
        from curated_data.parquet import ParquetRows

        rows = ParquetRows(file, column)
        return Part(str(file), _checked(str(file), rows) if len(rows) else rows, file)
    if not file.is_file():
        raise PoolError(f"{file}: no such file; give a .npy or parquet file, or a folder of them")
    if file.suffix.lower() != ".npy":
        raise PoolError(f"{file}: holds no embeddings; give a .npy or parquet file, or a folder of them")
    try:
        matrix = load_npy(file, "write it again by numpy.save", map_mode="r")
    except ValueError as error:
        raise PoolError(f"embeddings: {error}") from error
    return Part(str(file), _checked(str(file), matrix))


def _clip_retrieval(folder: Path) -> Iterator[Part]:
    """The parts of a folder of clip-retrieval: `img_emb/img_emb_0.npy` and `metadata/metadata_0.parquet`.

    Raises:
        PoolError: one has no counterpart, or another number of rows.
    """
    from curated_data.parquet import in_order, open_parquet

    arrays = {_number(path): path for path in (folder / _FOLDERS[0]).glob("*.npy")}
    tables = {_number(path): path for path in (folder / _FOLDERS[1]).glob("*.parquet")}
    if not arrays:
        raise PoolError(f"{folder / _FOLDERS[0]}: no .npy file in this folder")
    for number in sorted(arrays.keys() ^ tables.keys()):
        there = arrays.get(number) or tables[number]
        raise PoolError(f"{there}: has no counterpart in {folder}; embed that part again, or move it away")
    for path in in_order(list(arrays.values())):
        part, table = _part(path, None), tables[_number(path)]
        n = open_parquet(table).metadata.num_rows
        if n != len(part.rows):
            raise PoolError(f"{table}: has {n} rows, {path} {len(part.rows)}; they belong to different runs")
        yield Part(part.name, part.rows, table)


def _number(path: Path) -> str:
    """The number at the end of a file's name, as it is written."""
    return path.stem.rpartition("_")[2]


def _checked(name: str, rows: Any) -> Matrix:
    if not isinstance(rows, torch.Tensor) and not hasattr(rows, "starts"):
        rows = np.asanyarray(rows)
    if rows.ndim != 2 or not rows.shape[1]:
        raise ConfigError(f"{name}: expected a matrix (n, d), found shape {tuple(rows.shape)}")
    if _dtype(rows) not in _FLOATS:
        raise ConfigError(f"{name}: expected floating-point rows, found {_dtype(rows)}")
    return rows


def _dtype(rows: Any) -> str:
    return str(rows.dtype).removeprefix("torch.") if isinstance(rows, torch.Tensor) else rows.dtype.name
