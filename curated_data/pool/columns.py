"""Columns of a pool: what is known of each sample beside its content, as one Arrow table in the pool's order.

| column | where it comes from |
|---|---|
| `id`, `key`, `shard` | the index |
| `label` | the `.cls` member |
| `json.a.b` | a field of the `.json` member, by its dotted path |
| `width`, `height`, `aspect`, `bytes`, `sharpness`, `brightness`, `entropy`, `flat` | the image |
| `text_length` | characters of the `.txt` member |
| any other | parquet: the files given as `columns`, or `00000.parquet` beside `00000.tar` |

A column of parquet goes before a measure of the same name. What is read from the shards is kept in the
cache, one parquet file for each shard.
"""

import copy
import json
import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curated_data.cache.artifacts import fingerprint
from curated_data.cache.locks import locked
from curated_data.cache.publishing import atomic_path
from curated_data.errors import ConfigError, PoolError, printable
from curated_data.parallel import rank, world_size
from curated_data.parquet import (
    check_unique,
    column_names,
    join,
    key_column,
    nearest_of,
    open_parquet,
    packed_keys,
    parquet_files,
    read_keys,
    reading_parquet,
    text_of_key,
)
from curated_data.pool.decode import TEXT_EXTENSIONS
from curated_data.pool.each import each, workers_of
from curated_data.pool.measures import MEASURES, OF_HEADER, OF_PIXELS, measure_image
from curated_data.pool.urls import is_remote

if TYPE_CHECKING:
    from curated_data.pool.shards import ShardPool

log = logging.getLogger(__name__)

VERSION = 2
_OWN = ("id", "key", "shard", "label")
_OF_MEMBERS = (*MEASURES, "text_length")
_BATCH = 256  # samples that are read at once
_WORTH_PROCESSES = 20_000  # samples from which parallel processes are worth starting
_WORTH_OF_PIXELS = 1_000  # the same where images are decoded
_JSON = "json."


def read_columns(pool: "ShardPool", names: Sequence[str], tables: Sequence[Path] = ()) -> pa.Table:
    """Columns of a pool's n samples, in the order of ids.

    Args:
        pool: to read.
        names: see the table at the top of this module.
        tables: parquet files with a column of keys, or with a row for every sample in the pool's order.

    Raises:
        ConfigError: an unknown column; suggests the nearest name.
        PoolError: a parquet file cannot be read, or holds a key twice.
    """
    beside = _Beside(pool, tables)
    columns: dict[str, Any] = {}
    of_members, of_tables = [], []
    for name in dict.fromkeys(names):
        if name in _OWN:
            columns[name] = _own(pool, name)
        elif name in beside.names:
            of_tables.append(name)
        elif name in _OF_MEMBERS or (name.startswith(_JSON) and "json" in pool.index().extensions):
            of_members.append(name)
        else:
            raise _unknown(name, [*_OWN, *_OF_MEMBERS, *beside.names], pool)
    if of_tables:
        table = beside.read(of_tables)
        columns |= {name: table.column(name) for name in of_tables}
    if of_members:
        table, seen = _of_shards(pool, of_members)
        for name in of_members:
            if table.column(name).null_count == len(table) and name.startswith(_JSON) and name not in seen:
                raise _unknown(name, sorted(seen), pool)
            columns[name] = table.column(name)
    return pa.table({name: columns[name] for name in dict.fromkeys(names)})


def columns_of_tables(n: int, names: Sequence[str], tables: Sequence[Path | None]) -> pa.Table:
    """Columns of n rows of embeddings, from the parquet files that have a row for each of them.

    Raises:
        ConfigError: an unknown column; suggests the nearest name.
        PoolError: a file cannot be read.
    """
    parts = []
    for path in tables:
        there = [] if path is None else column_names(open_parquet(path), path)
        for name in names:
            if name not in (*there, "id"):
                if path is None:
                    where = "no file says more about the rows; give one as columns (--columns PATH)"
                else:
                    where = f"{path} has none{nearest_of(name, there)}"
                raise ConfigError(f"column {name!r}: {where}")
        if path is not None:
            with reading_parquet(path):
                parts.append(open_parquet(path).read([name for name in names if name in there]))
    table = pa.concat_tables(parts, promote_options="permissive") if parts else pa.table({})
    if "id" in names and "id" not in table.column_names:
        table = table.append_column("id", pa.array(np.arange(n)))
    return table.select(list(dict.fromkeys(names)))


def columns_of_rows(n: int, keys: pa.Array | None, names: Sequence[str], tables: Sequence[Path]) -> pa.Table:
    """Columns of n rows of embeddings from parquet files that say more about them.

    Args:
        keys: of the rows; None: they have none, and the files have a row for each, in their order.

    Raises:
        ConfigError: an unknown column; suggests the nearest name.
        PoolError: a file cannot be read, or holds a key twice.
    """
    if keys is None and any(key_column(open_parquet(path), path) is not None for path in tables):
        log.warning("%s: has keys, and the rows have none, so that its rows are taken in order", tables[0])
    wanted = list(dict.fromkeys(names))
    of_tables = [name for name in wanted if name != "id"]
    found = _joined(tables, of_tables, keys, n) if of_tables else pa.table({})
    if "id" in wanted:
        found = found.append_column("id", pa.array(np.arange(n)))
    return found.select(wanted)


def _unknown(name: str, known: Sequence[str], pool: "ShardPool") -> ConfigError:
    if name.startswith(_JSON) and "json" not in pool.index().extensions:
        return ConfigError(f"column {name!r}: the pool's samples have no .json member")
    return ConfigError(f"column {name!r}: the pool has none{nearest_of(name, list(dict.fromkeys(known)))}")


def _own(pool: "ShardPool", name: str) -> Any:
    index = pool.index()
    if name == "id":
        return pa.array(np.arange(len(pool)))
    if name == "key":
        return packed_keys(index.key_start, index.key_bytes).cast(pa.large_string())
    if name == "shard":
        return pa.array(index.shard_of(np.arange(len(pool))))
    labels = pool.labels(np.arange(len(pool)))
    return pa.array(labels, mask=labels < 0)


class _Beside:
    """Columns of parquet files, given or beside the shards, joined by key.

    Attributes:
        names: of the columns.
    """

    def __init__(self, pool: "ShardPool", tables: Sequence[Path]) -> None:
        self.pool = pool
        self.tables = list(tables)
        self.of_shards: list[Path | None] = []
        if not self.tables:
            self.of_shards = [_beside(url) for url in pool.urls]
        first = next((path for path in (*self.tables, *self.of_shards) if path is not None), None)
        self.names = [] if first is None else column_names(open_parquet(first), first)

    def read(self, names: Sequence[str]) -> pa.Table:
        """Columns in the pool's order; NULL for samples without a row."""
        index = self.pool.index()
        keys = packed_keys(index.key_start, index.key_bytes)
        twice = str(index.duplicate_example) if index.n_duplicate_keys else ""
        if self.tables:
            return _joined(self.tables, names, keys, len(index), twice)
        parts, paths = [], []
        for path, (first, last) in zip(self.of_shards, pairwise(index.shard_start.tolist()), strict=True):
            if path is None:
                parts.append(pa.table({name: pa.nulls(last - first) for name in names}))
            else:
                of_shard = keys.slice(first, last - first)
                is_only = last - first == len(index)
                parts.append(_joined([path], names, of_shard, last - first, twice if is_only else ""))
                paths.append(path)
        return _stacked(parts, paths)


def _stacked(tables: Sequence[pa.Table], paths: Sequence[Path]) -> pa.Table:
    """Tables one below the other.

    Raises:
        ConfigError: their types do not go together.
    """
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ConfigError(
            f"{paths[0]}: a column has other types in other files ({printable(error)}); give it one"
        ) from error


def _joined(
    paths: Sequence[Path], names: Sequence[str], wanted: pa.Array | None, n: int, twice: str = ""
) -> pa.Table:
    """Columns of n samples from parquet files; NULL for samples without a row.

    Args:
        wanted: the keys of the samples; None if they have none, and rows are taken in order.
        twice: an example of the keys that several samples have; empty if there are none.
    """
    values, keys = [], []
    for path in paths:
        file = open_parquet(path)
        there = column_names(file, path)
        missing = next((name for name in names if name not in there), None)
        if missing is not None:
            raise ConfigError(f"column {missing!r}: {path} has none{nearest_of(missing, there)}")
        column = None if wanted is None else key_column(file, path)
        if column is not None:
            keys.append(read_keys(file, path, column))
        with reading_parquet(path):
            values.append(file.read(list(names)))
    table = _stacked(values, paths)
    if len(keys) < len(paths) or wanted is None:
        if keys or len(table) != n:
            raise ConfigError(
                f"{paths[0]}: has {len(table)} rows and no column of keys (key, __key__ or image_path), "
                f"and there are {n} samples; add their keys, or a row for each in order"
            )
        return table
    every = pa.concat_arrays(keys)
    check_unique(every, paths[0])
    if twice:
        raise PoolError(
            f"the pool has key {twice!r} more than once, so rows of {paths[0]} cannot be told apart by their "
            "keys"
        )
    places = join(wanted, every)
    if len(places) and (places < 0).all():
        raise PoolError(
            f"{paths[0]}: has no key of the pool (one of its keys is {text_of_key(every[0].as_py())!r}, one "
            f"of the pool's {text_of_key(wanted[0].as_py())!r}); give the table of this pool, or name its "
            f"keys as the pool does, in a column key" if len(every) else
            f"{paths[0]}: has no rows; give a table with a row for each sample"
        )  # fmt: skip
    return table.take(pa.array(places, mask=places < 0))


def _beside(url: str) -> Path | None:
    if is_remote(url) or not url.endswith(".tar"):
        return None
    path = Path(url).with_suffix(".parquet")
    return path if path.is_file() else None


def _of_shards(pool: "ShardPool", names: Sequence[str]) -> tuple[pa.Table, set[str]]:
    """Columns that are read from the shards' members, and all dotted paths of JSON seen in them.

    They are computed by worker processes. Ranks, and other runs with the same cache, divide the shards.
    """
    found: dict[int, pa.Table] = {}
    if pool.cache_dir is not None:
        kept = ((number, _kept(pool, number, names)) for number in range(len(pool.urls)))
        found = {number: table for number, table in kept if table is not None}
    missing = [number for number in range(len(pool.urls)) if number not in found]
    begin = rank() * len(missing) // world_size()
    of_workers = copy.copy(pool)  # without its open files, which forked processes would share

    def of_shard(number: int, wait: bool = False) -> pa.Table | None:
        return _of_shard(of_workers, number, names, wait)

    n_samples = int(np.diff(pool.shard_ranges())[missing].sum())
    is_long = n_samples >= (_WORTH_OF_PIXELS if {*OF_PIXELS} & {*names} else _WORTH_PROCESSES)
    workers = workers_of(pool.num_workers) if is_long else 1
    turned = missing[begin:] + missing[:begin]
    for number, table in each(of_shard, turned, title="columns", workers=workers):
        if table is not None:
            found[number] = table
    for number in sorted({*missing} - found.keys()):  # locked by others so far
        table = of_shard(number, wait=True)
        assert table is not None, "it was waited for"
        found[number] = table
    parts = [found[number] for number in range(len(pool.urls))]
    seen = set().union(*map(_seen, parts))
    try:
        plain = [part.select(list(names)).replace_schema_metadata() for part in parts]
        return pa.concat_tables(plain, promote_options="permissive"), seen
    except pa.ArrowInvalid as error:
        raise ConfigError(
            f"columns {', '.join(names)}: one is text in some shards and a number in others ({error}); "
            "name another, or correct its values"
        ) from error


def _of_shard(pool: "ShardPool", number: int, names: Sequence[str], wait: bool) -> pa.Table | None:
    """The columns of one shard, which are in the cache then, if there is one; None if another process is at
    it.
    """
    if pool.cache_dir is None:
        table, seen = _computed(pool, number, names)
        return table.replace_schema_metadata({"paths": json.dumps(sorted(seen))})
    path = _path(pool, number)
    with locked(path, wait=wait) as held:
        if not held:
            return None
        kept = _kept(pool, number)
        missing = [name for name in names if kept is None or name not in kept.column_names]
        if missing or kept is None:
            table, seen = _computed(pool, number, missing)
            if kept is not None:
                seen |= _seen(kept)
                for column in kept.column_names:
                    table = table.append_column(column, kept.column(column))
            kept = table.replace_schema_metadata({"name": path.stem, "paths": json.dumps(sorted(seen))})
            with atomic_path(path) as temporary:
                pq.write_table(kept, temporary, write_page_checksum=True)
    return kept.select(list(names))


def _path(pool: "ShardPool", number: int) -> Path:
    """Where a cache keeps the columns of a shard."""
    assert pool.cache_dir is not None, "asked before"
    name = fingerprint(
        stage="columns",
        shard=pool.shards[number].fingerprint,
        images=pool.images._asdict(),
        extensions=pool.image_extensions,
        version=VERSION,
    )
    return Path(pool.cache_dir) / "columns" / f"{name}.parquet"


def _kept(pool: "ShardPool", number: int, names: Sequence[str] | None = None) -> pa.Table | None:
    """The columns of a shard in the cache, or the named ones; None if one of them is not there."""
    path = _path(pool, number)
    if not path.exists():
        return None
    table = None
    with reading_parquet(path):
        file = open_parquet(path)
        if names is not None and not {*names} <= {*file.schema_arrow.names}:
            return None
        table = file.read(None if names is None else list(names))
    first, last = pool.shard_ranges()[number : number + 2].tolist()
    if len(table) != last - first:
        raise PoolError(
            f"{path}: damaged ({len(table)} rows, expected {last - first}); remove it, and it is rebuilt"
        )
    if (table.schema.metadata or {}).get(b"name") != path.stem.encode():
        raise PoolError(f"{path}: damaged (holds the columns of another shard); remove it, and it is rebuilt")
    return table


def _seen(table: pa.Table) -> set[str]:
    try:
        return set(map(str, json.loads((table.schema.metadata or {}).get(b"paths", b"[]"))))
    except ValueError:
        return set()


def _computed(pool: "ShardPool", number: int, names: Sequence[str]) -> tuple[pa.Table, set[str]]:
    """Columns of the samples of one shard, read from their members."""
    first, last = pool.shard_ranges()[number : number + 2].tolist()
    present = pool.index().extensions
    images = [e for e in pool.image_extensions if e in present]
    texts = [e for e in TEXT_EXTENSIONS if e in present]
    of_json = [name for name in names if name.startswith(_JSON)]
    of_image = [name for name in names if name in MEASURES]
    wanted = [
        *(images if of_image else ()),
        *(texts if "text_length" in names else ()),
        *(["json"] if of_json else ()),
    ]
    values: dict[str, list[Any]] = {name: [] for name in names}
    seen: set[str] = set()
    pixels = any(name not in OF_HEADER for name in of_image)
    for start in range(first, last, _BATCH):
        ids = np.arange(start, min(start + _BATCH, last))
        for sample in pool.read(ids, wanted) if wanted else [{}] * len(ids):
            if of_image:
                data = next((sample[e] for e in images if e in sample), None)
                found = {} if data is None else measure_image(data, pixels=pixels, settings=pool.images)
                for name in of_image:
                    values[name].append(found.get(name))
            if "text_length" in names:
                text = next((sample[e] for e in texts if e in sample), None)
                values["text_length"].append(None if text is None else len(text.decode("utf-8", "replace")))
            if of_json:
                fields = _fields(sample)
                seen.update(fields)
                for name in of_json:
                    values[name].append(fields.get(name))
    kinds: dict[str, Any] = {"width": pa.int64(), "height": pa.int64(), "bytes": pa.int64()}
    kinds |= {"text_length": pa.int64()} | dict.fromkeys(set(MEASURES) - kinds.keys(), pa.float64())
    return pa.table({name: _array(values[name], kinds.get(name)) for name in names}), seen


def _fields(sample: dict[str, Any]) -> dict[str, Any]:
    """The fields of a sample's `.json` by their dotted paths; none if it is no JSON object."""
    try:
        content = json.loads(sample["json"])
    except (KeyError, ValueError, RecursionError):
        return {}
    found: dict[str, Any] = {}
    stack = [("json", content)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, dict):
            stack += [(f"{path}.{name}", inner) for name, inner in value.items()]
        elif path != "json":
            found[path] = json.dumps(value) if isinstance(value, list) else value
    return found


def _array(values: list[Any], kind: Any) -> pa.Array:
    """Values as a column; of several types as numbers, if they are, or else as texts."""
    for tried in (kind, pa.float64()):
        try:
            return pa.array(values, tried)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
            continue
    return pa.array(
        [None if v is None else v.encode("utf-8", "replace").decode() if isinstance(v, str) else json.dumps(v)
         for v in values], pa.string(),
    )  # fmt: skip


def checked_tables(columns: str | Path | Sequence[str | Path]) -> list[Path]:
    """The parquet files that `columns` of a pool names: files, or folders of them.

    Raises:
        PoolError: one is missing.
    """
    found = parquet_files(columns, "columns")
    for path in found:
        open_parquet(path)
    return found
