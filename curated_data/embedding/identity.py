"""Fingerprints of networks and functions: equal where they would give equal embeddings, as far as can be
told.
"""

import functools
import hashlib
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from curated_data.cache import fingerprint
from curated_data.errors import EmbedderError

# Their networks are told by their printed form and weights: an upgrade should not embed a whole pool again.
_LIBRARIES = ("torch", "torchvision", "timm", "numpy", "builtins")


def module_fingerprint(*parts: Callable[..., Any]) -> str:
    """A name for networks and functions together: their code, their settings, every weight and buffer.

    Functions count with what they hold (defaults, closures) and with the globals that their code names.

    Raises:
        EmbedderError: a part holds something whose identity cannot be told; says to give it a `fingerprint`.
    """
    return fingerprint(parts=[_identity(part, ()) for part in parts])


def _identity(value: Any, above: tuple[int, ...]) -> Any:
    """A value as something that `fingerprint` takes. `above`: ids of the callables being described, against
    cycles.
    """
    if value is None or isinstance(value, bool | int | float | str | bytes | np.ndarray | np.generic):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, torch.dtype | torch.device | torch.Size):
        return str(value)
    if isinstance(value, list | tuple):
        return [_identity(item, above) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(item) for item in value)
    if isinstance(value, dict):
        return {str(key): _identity(item, above) for key, item in value.items()}
    if isinstance(value, types.ModuleType):
        return ["python module", value.__name__]
    if id(value) in above:
        return ["itself"]
    above = (*above, id(value))
    own = getattr(value, "fingerprint", None)
    if isinstance(own, str):
        return ["own", own]
    if isinstance(value, nn.Module):
        return ["module", _class_name(type(value)), repr(value), _forward_code(value), _weights_digest(value)]
    if isinstance(value, functools.partial):
        return ["partial", *(_identity(part, above) for part in (value.func, value.args, value.keywords))]
    if isinstance(value, types.MethodType):
        return ["method", _identity(value.__func__, above), _identity(value.__self__, above)]
    if isinstance(value, types.FunctionType):
        return ["function", *_function_identity(value, above)]
    if isinstance(value, types.BuiltinFunctionType | type):
        return ["named", str(value.__module__), value.__qualname__]
    if hasattr(value, "__dict__"):
        call = type(value).__call__ if callable(value) else None
        code = _code(call.__code__) if isinstance(call, types.FunctionType) else []
        return ["object", _class_name(type(value)), code, _identity(vars(value), above)]
    raise EmbedderError(
        f"the embedder holds a {type(value).__name__}, whose identity its value does not tell; give the "
        "embedder an attribute `fingerprint` (a string that changes whenever its output would)"
    )


def _function_identity(function: types.FunctionType, above: tuple[int, ...]) -> list[Any]:
    if function.__module__.partition(".")[0] in _LIBRARIES:
        return [function.__module__, function.__qualname__]
    code = function.__code__
    named = {name: function.__globals__[name] for name in _names(code) if name in function.__globals__}
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    parts = (held, function.__defaults__, function.__kwdefaults__, named)
    return [function.__qualname__, _code(code), *(_identity(part, above) for part in parts)]


def _names(code: types.CodeType) -> list[str]:
    inner = [name for item in code.co_consts if isinstance(item, types.CodeType) for name in _names(item)]
    return sorted({*code.co_names, *inner})


def _code(code: types.CodeType) -> list[Any]:
    constants = [
        _code(item)
        if isinstance(item, types.CodeType)
        else (sorted(map(repr, item)) if isinstance(item, frozenset) else repr(item))
        for item in code.co_consts
    ]
    return [code.co_code, list(code.co_names), constants]


def _forward_code(module: nn.Module) -> list[Any]:
    classes = {_class_name(type(part)): type(part) for part in module.modules()}
    return [
        [name, _code(kind.forward.__code__)]
        for name, kind in sorted(classes.items())
        if kind.__module__.partition(".")[0] not in _LIBRARIES
        and isinstance(kind.forward, types.FunctionType)
    ]


def _weights_digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):  # extra state of a module: plain settings
            digest.update(f"{name}:{tensor!r};".encode())
            continue
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(raw.view(torch.uint8).numpy().data if raw.numel() else b"")
    return digest.hexdigest()


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
