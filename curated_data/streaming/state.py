"""The state of a stream as a checkpoint has it, checked before anything is made of it."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from curated_data.errors import CacheError

_NAME = re.compile(r"[0-9a-f]{20}")  # a fingerprint
_MOST = 1 << 48  # epochs or batches; what is above is damage


def is_state(value: Any) -> bool:
    """Whether a part of a checkpoint is the state of a stream, by the names of its fields."""
    return isinstance(value, Mapping) and _CHECKS.keys() - _LATER.keys() <= value.keys()


def checked_state(state: Any) -> dict[str, Any]:
    """A stream's state whose fields all have the right types and ranges, and no others.

    Raises:
        CacheError: names the field, and what it holds.
    """
    if not isinstance(state, Mapping):
        raise CacheError(f"the checkpoint's stream: expected a mapping, found {_shown(state)}; {_REMEDY}")
    found = _LATER | dict(state)
    for name, (is_right, expected) in _CHECKS.items():
        if name not in found:
            raise CacheError(f"the checkpoint's stream: lacks {name!r}; {_REMEDY}")
        if not is_right(found[name]):
            raise CacheError(
                f"the checkpoint's stream, {name}: expected {expected}, found {_shown(found[name])}; "
                f"{_REMEDY}"
            )
    return {name: found[name] for name in _CHECKS}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _is_name(value: Any) -> bool:
    return value is None or (type(value) is str and _NAME.fullmatch(value) is not None)


def _is_selection(value: Any) -> bool:
    if isinstance(value, Tensor):
        plain = value.layout is torch.strided and value.device.type == "cpu"
        return plain and value.dtype == torch.int64 and value.ndim == 1 and len(value) > 0
    return _is_name(value)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}, {tuple(value.shape)}"
    return f"{type(value).__name__} {str(value)[:80]!r}"


_REMEDY = "the file is damaged or not a checkpoint of this data module, resume from another one"
_LATER: dict[str, Any] = {"between_epochs": False}  # fields that early checkpoints lack
_COUNT = (_is_count, "a whole number")
_IDS = (_is_selection, "None, a fingerprint, or int64 ids")
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "selection": _IDS,
    "next_selection": _IDS,
    "epoch": _COUNT,
    "batch": _COUNT,
    "global_batch_size": (
        lambda value: value is None or (_is_count(value) and value > 0),
        "None or a number",
    ),
    "order": (_is_name, "None or a fingerprint"),
    "n_trained": _COUNT,
    "between_epochs": (lambda value: type(value) is bool, "True or False"),
}
