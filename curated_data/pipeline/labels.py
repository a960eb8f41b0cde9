"""Classes of some samples of a pool, from a file: an array, or a table that names samples by key or id."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from curated_data.cache.checksums import load_npy, open_regular
from curated_data.cache.paths import local_path
from curated_data.errors import CacheError, ConfigError, PoolError, printable
from curated_data.parquet import (
    KEYS,
    as_keys,
    check_unique,
    column_names,
    key_column,
    nearest_of,
    open_parquet,
    reading_parquet,
)
from curated_data.pool import ShardPool
from curated_data.pool.described import numbered_classes
from curated_data.stages.filtering import AnyPool, ids_of_keys

log = logging.getLogger(__name__)

COLUMNS = ("label", "labels", "cls", "class")
"""Names by which a column of classes is known."""


@dataclass(frozen=True)
class GivenLabels:
    """What is given of the classes of n samples.

    Attributes:
        numbers: (n,) int64, -1 for none.
        names: of the classes in the order of their numbers; None if the file has numbers.
        n_unknown: rows whose key is not in the pool.
    """

    numbers: np.ndarray
    names: tuple[str, ...] | None = None
    n_unknown: int = 0


def read_label_file(path: str | Path, pool: AnyPool) -> GivenLabels:
    """Read the classes of some samples of a pool.

    Args:
        path: of a `.npy` file, (n,) integers, -1 for none; or of a table, `.parquet`, `.csv`, or text with
            tabs (`.tsv`, `.txt`), with a column `label` of numbers or names and one of keys (`key`, `__key__`
            or `image_path`) or, without keys, `id`. Rows without a label are left out, as are keys that the
            pool does not have, which are counted.
        pool: of n samples.

    Raises:
        ConfigError: the file cannot be read or has no such columns, an id is not in the pool, or no row is.
        PoolError: a sample is named twice, or several samples have one key.

    Examples:
        >>> import numpy as np
        >>> from pathlib import Path
        >>> from curated_data import EmbeddedPool
        >>> from curated_data.pipeline.labels import read_label_file
        >>> _ = Path("labels.csv").write_text("id,label\\n7,cat\\n3,dog\\n")
        >>> found = read_label_file("labels.csv", EmbeddedPool(np.zeros((10, 4))))
        >>> found.numbers.tolist(), found.names
        ([-1, -1, -1, 1, -1, -1, -1, 0, -1, -1], ('cat', 'dog'))
    """
    file = local_path(path, "--labels")
    kind = file.suffix.lower()
    if kind == ".npy":
        return GivenLabels(_of_array(file, len(pool)))
    if kind == ".parquet":
        where, labels, is_key = _of_parquet(file)
    elif kind in (".csv", ".tsv", ".txt"):
        where, labels, is_key = _of_text(file, "," if kind == ".csv" else "\t")
    else:
        raise ConfigError(f"--labels {file}: give a .npy, .parquet, .csv, .tsv or .txt file")
    stays = pc.is_valid(labels)
    where, labels = where.filter(stays), labels.filter(stays)
    check_unique(where, file)
    if is_key:
        _check_keys(pool, file)
        places = ids_of_keys(pool, where)
    else:
        places = _ids(where, file, len(pool))
    if not (places >= 0).any():
        example = f" (one of its keys is {_text(where[0])!r})" if len(where) else ""
        raise ConfigError(
            f"--labels {file}: no row is of a sample of the pool{example}; give that of this pool"
        )
    numbers = np.full(len(pool), -1, np.int64)
    known = places >= 0
    times = np.bincount(places[known])
    if times.max() > 1:  # as by ids "7" and "07"
        raise PoolError(f"--labels {file}: sample {int(times.argmax())} is named twice; keep one row of it")
    found, names = numbered_classes(labels.filter(pa.array(known)), f"{file}: label")
    numbers[places[known]] = found
    n_unknown = int((~known).sum())
    if n_unknown:
        log.warning(
            "--labels %s: %d of %d keys are not in the pool, such as %r",
            file, n_unknown, len(known), _text(where[int(np.argmin(known))]),
        )  # fmt: skip
    return GivenLabels(numbers, names, n_unknown)


def _of_array(file: Path, n: int) -> np.ndarray:
    try:
        labels: np.ndarray = load_npy(file, "give another")
    except CacheError as error:
        raise ConfigError(f"--labels {file}: cannot be read as a .npy file ({error})") from error
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise ConfigError(
            f"--labels: {labels.dtype} of shape {labels.shape}, expected {n} integers, -1 for none"
        )
    return labels.astype(np.int64)


def _of_parquet(file: Path) -> tuple[Any, Any, bool]:
    opened = open_parquet(file)
    key = key_column(opened, file)
    where, label = _columns(column_names(opened, file), file)
    with reading_parquet(file):
        table = opened.read([where, label])
    return _cleaned(table.column(where), table.column(label), file, key is not None)


def _of_text(file: Path, delimiter: str) -> tuple[Any, Any, bool]:
    try:
        with open_regular(file) as opened:
            header = opened.readline(1 << 16).decode("utf-8-sig").strip("\r\n")
        names = [name.strip().strip('"') for name in header.split(delimiter)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"--labels {file}: has two columns {twice!r}; rename one")
        where, label = _columns(names, file)
        with open_regular(file) as opened:
            table = pyarrow.csv.read_csv(
                opened,
                # Keys stay as they are written: "0007" is no number.
                read_options=pyarrow.csv.ReadOptions(column_names=names, skip_rows=1),
                parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=pyarrow.csv.ConvertOptions(
                    include_columns=[where, label],
                    column_types={name: pa.string() for name in (where, label)},
                ),
            )
    except OSError as error:
        raise ConfigError(f"--labels {file}: cannot be read ({error.strerror or error})") from error
    except (UnicodeDecodeError, pa.ArrowException) as error:
        raise ConfigError(f"--labels {file}: not a table of text in UTF-8 ({printable(error)})") from error
    return _cleaned(table.column(where), table.column(label), file, where in KEYS)


def _columns(names: list[str], file: Path) -> tuple[str, str]:
    """The names of what samples are named by, and of their classes."""
    where = next((name for name in (*KEYS, "id") if name in names), None)
    label = next((name for name in COLUMNS if name in names), None)
    for name, found in (("key", where), ("label", label)):
        if found is None:
            both = "key or id" if name == "key" else name
            raise ConfigError(f"--labels {file}: has no column {both}{nearest_of(name, names)}")
    assert where is not None, "checked"
    assert label is not None, "checked"
    return where, label


def _cleaned(where: Any, labels: Any, file: Path, is_key: bool) -> tuple[Any, Any, bool]:
    """The samples as bytes, and classes of which those that say none are NULL."""
    if labels.null_count < len(labels) and pa.types.is_dictionary(labels.type):
        labels = labels.cast(labels.type.value_type)
    if pa.types.is_integer(labels.type):
        labels = pc.if_else(pc.equal(labels, -1), None, labels)
    elif pa.types.is_string(labels.type) or pa.types.is_large_string(labels.type):
        text = pc.utf8_trim_whitespace(labels)
        labels = pc.if_else(pc.is_in(text, pa.array(["", "-1"], text.type)), None, text)
    if where.null_count:
        row = int(np.flatnonzero(where.is_null().to_numpy())[0])
        raise PoolError(f"{file}: row {row} names no sample; every row needs a key or an id")
    return as_keys(where), labels, is_key


def _check_keys(pool: AnyPool, file: Path) -> None:
    if not isinstance(pool, ShardPool):
        if pool.key_array is not None:
            check_unique(pool.key_array, "the pool")
        return
    index = pool.index()
    if index.n_duplicate_keys:
        raise PoolError(
            f"the pool has key {index.duplicate_example!r} more than once, so rows of {file} cannot be told "
            "apart by their keys; name samples by a column id"
        )


def _ids(where: Any, file: Path, n: int) -> np.ndarray:
    try:
        ids = where.cast(pa.string()).cast(pa.int64()).to_numpy()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ConfigError(f"--labels {file}: its column 'id' is not of ids ({printable(error)})") from error
    if len(ids) and not 0 <= ids.min() <= ids.max() < n:
        outside = ids[(ids < 0) | (ids >= n)][0]
        raise ConfigError(f"--labels {file}: id {outside} is not in the pool, whose ids go from 0 to {n - 1}")
    found: np.ndarray = ids
    return found


def _text(key: Any) -> str:
    found: str = key.as_py().decode("utf-8", "surrogateescape")
    return found
