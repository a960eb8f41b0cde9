"""Whose code something is: the user's, this package's or a library's. That decides how it is identified."""

import functools
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

CODE_VERSIONS = {"curated_data": 1, "lightning_modules": 1}
"""Increase one when code of that package gives other embeddings by the same weights and settings."""

# The repr of these libraries' networks contains their settings.
_PRINTED_WHOLE = ("torch", "torchvision", "timm")
_OWN_NAMES = frozenset(vars(nn.Module()))


def is_ours(module: str | None) -> bool:
    """Whether a module is of this package, wherever that is installed."""
    return _root(module or "") in CODE_VERSIONS


@functools.cache
def is_library(module: str) -> bool:
    """Whether a module is of Python itself or of an installed package, but not of this one."""
    if _root(module) == "__main__" or is_ours(module):
        return False
    if _root(module) in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def is_users(value: Any) -> bool:
    """Whether a value is, or contains, the user's code."""
    if isinstance(value, list | tuple):
        return any(map(is_users, value))
    if isinstance(value, dict):
        return any(map(is_users, value.values()))
    if isinstance(value, nn.Module):
        return any(
            not (is_library(type(part).__module__) or is_ours(type(part).__module__))
            or any(is_users(item) for _, item in own_attributes(part))
            for part in value.modules()
        )
    if isinstance(value, functools.partial):
        return any(map(is_users, (value.func, value.args, value.keywords)))
    if not isinstance(value, types.FunctionType | types.MethodType | type):
        value = type(value)
    return not is_library(value.__module__ or "") and not is_ours(value.__module__)


def code_version(module: str) -> int | None:
    """The constant that counts for code of this package; None for other code."""
    return CODE_VERSIONS.get(_root(module))


def class_name(kind: type) -> str:
    """A class's name; that of a user's class without its module, which is `__main__` in a script."""
    if is_library(kind.__module__) or is_ours(kind.__module__):
        return f"{kind.__module__}.{kind.__qualname__}"
    return kind.__qualname__


def overrides(kind: type, name: str) -> bool:
    """Whether a class overrides a library's method, which other methods of the library may call."""
    return not name.startswith("__") and any(name in vars(base) for base in library_bases(kind))


def library_bases(kind: type) -> list[type]:
    """A class's base classes from libraries, except those that play no part in embedding."""
    return [
        base
        for base in kind.__mro__
        if base not in (object, nn.Module)
        and is_library(base.__module__)
        and _root(base.__module__) not in ("lightning", "pytorch_lightning")
    ]


def own_attributes(part: nn.Module) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in sorted(vars(part).items()) if name not in _OWN_NAMES]


def is_untold(part: nn.Module, value: Any) -> bool:
    """Whether code of a library may read an attribute that the module's repr does not show."""
    if not library_bases(type(part)):
        return False
    kind = type(part).__module__
    return is_users(value) or (is_library(kind) and _root(kind) not in _PRINTED_WHOLE and _is_plain(value))


def is_data(value: Any) -> bool:
    """Whether a value is plain, or made of plain ones, arrays and tensors."""
    if isinstance(value, dict):
        return all(map(is_data, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_data, value))
    return value is None or isinstance(
        value, bool | int | float | complex | str | bytes | np.ndarray | torch.Tensor
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _root(module: str) -> str:
    return module.partition(".")[0]
