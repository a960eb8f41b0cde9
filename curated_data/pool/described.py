"""Labels and captions of samples from columns of their pool, in place of `.cls` and `.txt` members."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curated_data.errors import ConfigError
from curated_data.pool.decode import TEXT_EXTENSIONS

if TYPE_CHECKING:
    from curated_data.pool.shards import ShardPool


class Described:
    """What columns say about the samples of a pool, in memory: 8 bytes per label, and the captions' texts.

    Args:
        pool: of n samples.
        labels: the column of their classes: integers, or names, which are numbered from 0 in the
            order of their code points. None: they have their `.cls` members.
        captions: the column of their texts. None: they have their `.txt` members.

    Attributes:
        numbers: (n,) int64, -1 for none; None without a column.
        names: of the classes in the order of their numbers; None if they are integers.

    Raises:
        ConfigError: there is no such column, or it holds something else.
    """

    def __init__(self, pool: "ShardPool", labels: str | None, captions: str | None) -> None:
        table = pool.columns([name for name in (labels, captions) if name is not None])
        self.numbers: np.ndarray | None = None
        self.names: tuple[str, ...] | None = None
        if labels is not None:
            self.numbers, self.names = numbered_classes(table.column(labels), labels)
        self._captions = None if captions is None else _texts(table.column(captions), captions)

    def captions(self, ids: Sequence[int] | np.ndarray) -> list[str | None]:
        """The caption of each sample, None for those without one."""
        assert self._captions is not None, "there is a column of captions"
        texts: list[str | None] = self._captions.take(pa.array(np.asarray(ids, np.int64))).to_pylist()
        return texts

    def describe(self, ids: Sequence[int] | np.ndarray, samples: Sequence[dict[str, Any]]) -> None:
        """Put what columns say in the place of the samples' members, or take those away."""
        if self.numbers is not None:
            for sample, number in zip(samples, self.numbers[np.asarray(ids, np.int64)].tolist(), strict=True):
                text = str(number) if self.names is None or number < 0 else self.names[number]
                _replace(sample, {"cls": text.encode() if number >= 0 else None})
        if self._captions is not None:
            for sample, caption in zip(samples, self.captions(ids), strict=True):
                text = None if caption is None else caption.encode("utf-8", "replace")
                _replace(sample, dict.fromkeys(TEXT_EXTENSIONS) | {TEXT_EXTENSIONS[0]: text})


def _replace(sample: dict[str, Any], members: Mapping[str, bytes | None]) -> None:
    for name, content in members.items():
        sample.pop(name, None)
        if content is not None:
            sample[name] = content


def numbered_classes(column: pa.ChunkedArray, name: str) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Classes as integers, -1 for none, and their names, in the order of code points, if they have some.

    Args:
        column: of integers, or of texts, which are names unless all are digits.
        name: of the column, for errors.

    Raises:
        ConfigError: it holds something else.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        return numbered_classes(column.cast(kind.value_type), name)
    if pa.types.is_null(kind):
        return np.full(len(column), -1, np.int64), None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        unique = sorted(value for value in pc.unique(column).to_pylist() if value is not None)
        if all(value.isascii() and value.isdigit() for value in unique):
            return numbered_classes(column.cast(pa.int64()), name)
        places = pc.index_in(column, pa.array(unique, kind))
        return _filled(places), tuple(unique)
    try:
        numbers = column.cast(pa.int64())  # which refuses floating-point numbers with a fraction
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ConfigError(
            f"labels: column {name!r} holds {kind}, expected integers or names ({error}); give another"
        ) from error
    found = _filled(numbers)
    negative = np.flatnonzero((found < 0) & ~np.asarray(column.is_null()))
    if len(negative):
        raise ConfigError(
            f"labels: column {name!r} holds {found[negative[0]]} for sample {negative[0]}; classes are "
            "numbered from 0, and samples without one are NULL"
        )
    return found, None


def _filled(numbers: pa.ChunkedArray | pa.Array) -> np.ndarray:
    found: np.ndarray = pc.fill_null(numbers.cast(pa.int64()), -1).to_numpy()
    return found


def _texts(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _texts(column.cast(kind.value_type), name)
    if not any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)):
        raise ConfigError(f"captions: column {name!r} holds {kind}, expected texts; give another")
    return column.cast(pa.large_string())  # of any length in all
