"""Checks of single values, with one form of error."""

import numbers
from collections.abc import Sequence
from typing import Any

from curated_data.errors import ConfigError, nearest


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """An integer of any type, such as numpy's, as a plain one.

    Raises:
        ConfigError: it is none, or less than `least`.
    """
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or (least is not None and value < least):
        of_least = "" if least is None else f" of at least {least}"
        raise ConfigError(f"{name}: expected an integer{of_least}, found {value!r}")
    return int(value)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that a value is one of those that there are.

    Raises:
        ConfigError: it is not; suggests the nearest.
    """
    if value not in choices:
        hint = nearest(value, choices)
        raise ConfigError(f"{name}: expected one of {', '.join(choices)}, found {value!r}{hint}")
