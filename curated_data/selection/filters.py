"""Filters of a pool: a condition in SQL over its columns, and lists of samples to leave out or to select.

DuckDB evaluates conditions. It is opened without access to files, networks and extensions, its settings are
locked, and what it is given is one expression of columns, constants, and functions that depend on nothing
else: a condition that says more is refused before it runs.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np

from curated_data.cache.checksums import load_given, read_bytes
from curated_data.cache.paths import local_path
from curated_data.errors import ConfigError, PoolError, first_line

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

_LOCKED: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",
    "autoload_known_extensions": "false",
    "autoinstall_known_extensions": "false",
    "memory_limit": "4GB",
    "threads": "2",
    "max_temp_directory_size": "0B",
}
_EXAMPLES = 5  # of dropped samples in a report
_REFUSED = ("SUBQUERY", "WINDOW", "STAR", "PARAMETER", "LAMBDA_REF", "POSITIONAL_REFERENCE", "DEFAULT")


@dataclass(frozen=True)
class Condition:
    """One of the conditions that `AND` joins, and what it alone would do.

    Attributes:
        text: as SQL.
        drops: samples for which it is not true.
        nulls: those of them of which a value is missing, so that it is neither true nor false.
    """

    text: str
    drops: int
    nulls: int


@dataclass(frozen=True)
class Filtered:
    """What a filter keeps of n samples.

    Attributes:
        keep: (n,) bool.
        conditions: in the order in which they were written.
        nulls: dropped samples of which no condition is false, but a value is missing.
        excluded: samples that were named.
        examples: ids of some dropped samples.
    """

    keep: np.ndarray
    conditions: list[Condition] = field(default_factory=list)
    nulls: int = 0
    excluded: int = 0
    examples: list[int] = field(default_factory=list)

    def report(self, keys: Callable[[np.ndarray], list[str]]) -> dict[str, Any]:
        """As plain numbers and texts."""
        return {
            "dropped": int((~self.keep).sum()),
            "nulls": self.nulls,
            "excluded": self.excluded,
            "conditions": [vars(condition) for condition in self.conditions],
            "examples": [
                [number, key] for number, key in zip(self.examples, keys(np.array(self.examples, np.int64)))
            ],
        }


class Where:
    """A condition in SQL, checked: an expression over columns, which is true, false or NULL of a sample.

    Args:
        text: as `similarity > 0.28 AND least(width, height) >= 200 AND NOT json.nsfw`.

    Attributes:
        columns: the names in it, in order.

    Raises:
        ConfigError: it is not an expression of SQL, or does something that a condition must not.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        with _connected() as connection, _evaluating(text):
            found = json.loads(_one(connection, "json_serialize_sql", _statement(text)))
            if found.get("error"):
                raise ConfigError(
                    f"where: {text!r} is not a condition in SQL ({found.get('error_message')}); give one "
                    "as 'similarity > 0.28 AND NOT json.nsfw'"
                )
            self._tree = found
            expression = _expression(found, text)
            nodes = list(_nodes(expression))
            for node in nodes:
                _check_node(node, text)
            self.columns = list(
                dict.fromkeys(".".join(n["column_names"]) for n in nodes if n.get("class") == "COLUMN_REF")
            )
            if not self.columns:
                raise ConfigError(f"where: {text!r} names no column, so it does not depend on the sample")
            self.parts = [self._sql(connection, part) for part in _conjuncts(expression)]

    def apply(self, table: "pa.Table") -> Filtered:
        """Evaluate it over the columns of n samples.

        Raises:
            ConfigError: a value or a type does not fit, or a part is neither true nor false.
        """
        n = len(table)
        with _connected() as connection:
            connection.register("samples", _nested(table, self.columns))
            asked = ", ".join(f"({part}) AS c{number}" for number, part in enumerate(self.parts))
            with _evaluating(self.text):
                relation = connection.sql(f"SELECT {asked} FROM samples")
                for part, kind in zip(self.parts, relation.types, strict=True):
                    if str(kind) not in ("BOOLEAN", '"NULL"', "NULL"):
                        raise ConfigError(
                            f"where: {part!r} is a {str(kind).lower()}, expected a comparison, as {part} > 0"
                        )
                found = relation.fetchnumpy()
        keep, is_false = np.ones(n, bool), np.zeros(n, bool)
        conditions = []
        for number, part in enumerate(self.parts):
            null, true = _truth(found[f"c{number}"], n)
            text = part.replace('"json".', "json.")  # which DuckDB quotes
            conditions.append(Condition(text, int((~true).sum()), int(null.sum())))
            keep &= true
            is_false |= ~true & ~null
        dropped = np.flatnonzero(~keep)
        nulls = int((~keep & ~is_false).sum())
        return Filtered(keep, conditions, nulls, examples=dropped[:_EXAMPLES].tolist())

    def _sql(self, connection: duckdb.DuckDBPyConnection, expression: dict[str, Any]) -> str:
        """An expression as text."""
        statement = json.loads(json.dumps(self._tree))
        statement["statements"][0]["node"]["select_list"] = [expression | {"alias": ""}]
        text = _one(connection, "json_deserialize_sql", json.dumps(statement))
        text = text.removeprefix("SELECT ").removesuffix(" FROM samples")
        return text[1:-1] if _is_wrapped(text) else text


def sample_filter(
    n: int,
    where: str | None,
    exclude: np.ndarray,
    include: np.ndarray,
    columns: Callable[[Sequence[str]], "pa.Table"],
    keys: Callable[[np.ndarray], list[str]],
) -> Filtered:
    """What is left of n samples. Samples that are to be included stay, whatever a condition says of them.

    Args:
        where: see `Where`.
        exclude, include: int64 ids, see `named_ids`.
        columns: gives columns by their names.
        keys: gives keys by ids, for messages.

    Raises:
        ConfigError: the condition cannot be evaluated, or a sample is both excluded and included.
        PoolError: nothing is left.
    """
    both = np.intersect1d(exclude, include)
    if len(both):
        raise ConfigError(
            f"include: sample {both[0]} ({keys(both[:1])[0]!r}) is also excluded; remove it from one"
        )
    found = Filtered(np.ones(n, bool))
    if where is not None:
        condition = Where(where)
        found = condition.apply(columns(condition.columns))
    keep = found.keep
    keep[include] = True
    dropped_by_name = int(keep[exclude].sum())
    keep[exclude] = False
    examples = np.flatnonzero(~keep)[:_EXAMPLES].tolist()
    found = Filtered(keep, found.conditions, found.nulls, dropped_by_name, examples)
    for part in found.conditions:
        log.info(
            "where: %s alone drops %d of %d samples, %d of them as NULL", part.text, part.drops, n, part.nulls
        )
    log.info("filters: %d of %d samples stay", int(keep.sum()), n)
    if not keep.any():
        drops = "; ".join(f"{part.text} alone drops {part.drops}" for part in found.conditions)
        raise PoolError(
            f"where, exclude: none of the {n} samples is left ({drops or 'all are excluded'}); drop fewer"
        )
    return found


def named_ids(
    given: Sequence[Any], name: str, n: int, of_keys: Callable[[list[str]], np.ndarray]
) -> np.ndarray:
    """The samples that a list names: by ids, by keys, and by files of either.

    Args:
        given: integers are ids; texts that end in `.npy` are files of ids, in `.txt` files of keys, one in
            each line; all other texts are keys.
        name: of the setting, for errors.
        n: samples in the pool.
        of_keys: gives ids by keys, -1 for those that are not in the pool.

    Returns:
        (m,) int64, ascending.

    Raises:
        ConfigError: something else, an id or a key that is not in the pool, or a file that cannot be read.
    """
    ids: list[np.ndarray] = []
    keys: list[str] = []
    for one in given:
        if isinstance(one, bool) or not isinstance(one, int | str | Path):
            raise ConfigError(f"{name}: expected ids, keys and files of them, found {one!r}")
        if isinstance(one, int):
            ids.append(np.array([one]))
        elif str(one).endswith(".npy"):
            ids.append(_ids_in(one, name))
        elif str(one).endswith(".txt"):
            keys += _lines_of(one, name)
        else:
            keys.append(str(one))
    found = np.concatenate([*ids, np.empty(0, np.int64)]).astype(np.int64)
    if len(found) and not 0 <= found.min() <= found.max() < n:
        outside = found[(found < 0) | (found >= n)][0]
        raise ConfigError(f"{name}: id {outside} is not in the pool, whose ids go from 0 to {n - 1}")
    by_key = of_keys(keys) if keys else np.empty(0, np.int64)
    if (by_key < 0).any():
        missing = np.flatnonzero(by_key < 0)
        raise ConfigError(
            f"{name}: key {keys[missing[0]]!r} is not in the pool ({len(missing)} of {len(keys)} are not)"
        )
    return np.unique(np.concatenate([found, by_key]))


def _ids_in(path: str | Path, name: str) -> np.ndarray:
    ids = load_given(path, name)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ConfigError(f"{name}: {path} holds {ids.dtype} {ids.shape}, expected a list of integer ids")
    return ids


def _lines_of(path: str | Path, name: str) -> list[str]:
    try:
        text = read_bytes(local_path(path, name)).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise ConfigError(f"{name}: {path} cannot be read ({error.strerror or error})") from error
    return [line for line in text.splitlines() if line]


def _statement(text: str) -> str:
    return f"SELECT ({text}\n) FROM samples"


def _connected() -> duckdb.DuckDBPyConnection:
    """A database in memory that can reach nothing else.

    Raises:
        ConfigError: the working directory is gone, in which DuckDB would abort the process.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError(
            "where: the working directory does not exist any more; change to another"
        ) from error
    connection = duckdb.connect(":memory:", config=_LOCKED)
    connection.execute("SET lock_configuration = true")
    return connection


@contextmanager
def _evaluating(text: str) -> Iterator[None]:
    """Turn DuckDB's errors about a condition into one that names it."""
    try:
        yield
    except duckdb.Error as error:
        raise ConfigError(f"where: {text!r} cannot be evaluated ({first_line(error)}); correct it") from error


def _one(connection: duckdb.DuckDBPyConnection, function: str, argument: str) -> str:
    row = connection.execute(f"SELECT {function}(?)", [argument]).fetchone()
    assert row is not None, "a SELECT without FROM has one row"
    return str(row[0])


def _expression(found: dict[str, Any], text: str) -> dict[str, Any]:
    """The one expression of a statement that is `SELECT (expression) FROM samples` and nothing more.

    Raises:
        ConfigError: it says more.
    """
    expected = json.loads(_plain_statement())
    node = found["statements"][0]["node"]
    own = {name: value for name, value in node.items() if name != "select_list"}
    plain = {
        name: value for name, value in expected["statements"][0]["node"].items() if name != "select_list"
    }
    if (
        len(found["statements"]) != 1
        or len(node.get("select_list", ())) != 1
        or _without_places(own) != _without_places(plain)
    ):
        raise ConfigError(f"where: {text!r} is more than a condition; give one expression over columns")
    expression: dict[str, Any] = node["select_list"][0]
    return expression


@cache
def _plain_statement() -> str:
    with _connected() as connection:
        return _one(connection, "json_serialize_sql", _statement("a"))


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_places(item) for name, item in value.items() if name != "query_location"}
    return [_without_places(item) for item in value] if isinstance(value, list) else value


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """All nodes of an expression."""
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _nodes(item)
    elif isinstance(value, list):
        for item in value:
            yield from _nodes(item)


def _check_node(node: dict[str, Any], text: str) -> None:
    kind = node.get("class")
    if kind in _REFUSED:
        raise ConfigError(
            f"where: {text!r} has a {kind.lower()}; a condition is of the columns of one sample"
        )
    if kind == "FUNCTION" and node["function_name"].lower() not in _functions():
        raise ConfigError(
            f"where: {text!r} calls {node['function_name']!r}, which is not a function of values alone; see "
            "DuckDB's scalar functions"
        )


@cache
def _functions() -> frozenset[str]:
    """The functions whose results depend on their arguments alone."""
    with _connected() as connection:
        rows = connection.execute(
            "SELECT function_name FROM duckdb_functions() WHERE function_type = 'scalar' "
            "GROUP BY function_name HAVING bool_and(stability = 'CONSISTENT' AND NOT has_side_effects "
            "IS TRUE)"
        ).fetchall()
    refused = {
        "getenv",
        "current_setting",
        "getvariable",
        "json_deserialize_sql",
        "json_execute_serialized_sql",
    }
    return frozenset(row[0].lower() for row in rows) - refused


def _conjuncts(expression: dict[str, Any]) -> list[dict[str, Any]]:
    if expression.get("type") != "CONJUNCTION_AND":
        return [expression]
    return [part for child in expression["children"] for part in _conjuncts(child)]


def _is_wrapped(text: str) -> bool:
    """Whether the first bracket of a text closes at its end."""
    depth = 0
    quote = ""
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter == "(") - (letter == ")")
            if depth == 0:
                return letter == ")" and place == len(text) - 1
    return False


def _nested(table: "pa.Table", names: Sequence[str]) -> "pa.Table":
    """Columns with dotted names as fields of structs, as SQL writes them.

    Raises:
        ConfigError: a name is both a column and the beginning of another.
    """
    import pyarrow as pa

    groups: dict[str, Any] = {}
    for name in names:
        at, parts = groups, name.split(".")
        for part in parts[:-1]:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise ConfigError(f"where: {name!r} is within a column that is used by itself too")
        if isinstance(at.get(parts[-1]), dict):
            raise ConfigError(f"where: {name!r} is used by itself, and fields of it are too")
        at[parts[-1]] = table.column(name)

    def joined(value: Any) -> Any:
        if not isinstance(value, dict):
            return value.combine_chunks() if isinstance(value, pa.ChunkedArray) else value
        arrays = [joined(item) for item in value.values()]
        arrays = [pa.concat_arrays(a.chunks) if isinstance(a, pa.ChunkedArray) else a for a in arrays]
        return pa.StructArray.from_arrays(arrays, list(value))

    return pa.table({name: joined(value) for name, value in groups.items()})


def _truth(values: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(n,) bool, which are NULL, and which are true."""
    null = np.ma.getmaskarray(values) if np.ma.isMaskedArray(values) else np.zeros(n, bool)
    plain = np.ma.getdata(values)
    if plain.dtype != bool:
        null = null | np.array([value is None for value in plain])
        plain = np.array([value is True for value in plain])
    return null, plain & ~null
