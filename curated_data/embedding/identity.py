"""Fingerprints of networks and functions, equal if they give equal embeddings, as far as can be determined.

They are equal in every version of Python, and wherever this package is installed:

- The user's own code counts by its source (see `curated_data.embedding.source`): all that can be reached by
  name from the entry point, that is methods, the globals and closures that they name, and the attributes of
  their objects. Code without a source, typed at a prompt or made by `exec`, counts by its bytecode, which
  holds for this version of Python only; a warning says so.
- Code of this package counts by its name and by `CODE_VERSIONS` (`curated_data.embedding.origin`).
- Code of other installed packages counts by its name, so that an upgrade does not cause a whole pool to be
  embedded again.
- Weights, buffers and settings count by their values.
"""

import enum
import functools
import hashlib
import logging
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import nn

from curated_data.cache.artifacts import fingerprint
from curated_data.embedding.origin import (
    class_name,
    code_version,
    is_data,
    is_library,
    is_ours,
    is_untold,
    is_users,
    overrides,
    own_attributes,
)
from curated_data.embedding.source import class_source, source_of
from curated_data.errors import EmbedderError

log = logging.getLogger(__name__)

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def module_fingerprint(*parts: Callable[..., Any]) -> str:
    """A name for networks and functions together, by their code, settings, weights and buffers.

    Functions include their defaults, closures and the globals that their code names; networks include the
    methods and attributes that their `forward` reaches.

    Raises:
        EmbedderError: a part contains something whose identity cannot be determined; says to give it a
            `fingerprint`.
    """
    walk = _Walk()
    return fingerprint(parts=[walk.identity(part) for part in parts])


class _Walk:
    """Turns values into plain values for `fingerprint`. A value met before is replaced by the number of that
    meeting, so that the walk ends if functions name each other.
    """

    def __init__(self) -> None:
        self.met: dict[int, tuple[int, Any]] = {}  # by id; keeps the values alive, so that no id is reused

    def identity(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str | bytes | np.generic):
            return value
        if isinstance(value, np.ndarray):
            return value if not value.dtype.hasobject else [self.identity(item) for item in value.tolist()]
        if isinstance(value, torch.Tensor):
            return [str(value.dtype), list(value.shape), bytes(_tensor_bytes(value))]
        if isinstance(value, torch.dtype | torch.device | torch.Size | complex | range | slice):
            return str(value)
        if isinstance(value, list | tuple):
            return [type(value).__name__, *(self.identity(item) for item in value)]
        if isinstance(value, set | frozenset):
            return sorted(_printed(item) for item in value)
        if isinstance(value, dict):
            return {_printed(key): self.identity(item) for key, item in value.items()}
        if isinstance(value, enum.Enum):
            return ["enum", class_name(type(value)), value.name, self._leniently(value.value)]
        if isinstance(value, PurePath):
            return ["path", str(value)]
        if isinstance(value, re.Pattern):
            return ["pattern", value.pattern, value.flags]
        if isinstance(value, types.ModuleType):
            return ["python module", value.__name__]
        if isinstance(value, logging.Logger):
            return ["logger"]
        if id(value) in self.met:
            return ["met", self.met[id(value)][0]]
        self.met[id(value)] = len(self.met), value
        own = getattr(value, "fingerprint", None)
        if isinstance(own, str):
            return ["own", own]
        if isinstance(value, nn.Module):
            return self._network(value)
        if isinstance(value, functools.partial):
            return ["partial", *(self.identity(part) for part in (value.func, value.args, value.keywords))]
        if isinstance(value, types.MethodType):
            return ["method", self.identity(value.__func__), self._object(value.__self__, {value.__name__})]
        if isinstance(value, types.FunctionType):
            return ["function", *self._function(value)]
        if isinstance(value, type):
            return ["class", class_name(value), *self._class(value)]
        if isinstance(value, functools._lru_cache_wrapper):
            return ["cached", self.identity(value.__wrapped__)]
        if isinstance(value, types.BuiltinMethodType) and is_data(value.__self__):
            return ["bound", value.__name__, self.identity(value.__self__)]
        if hasattr(value, "__qualname__") or isinstance(value, np.ufunc):  # of C code
            return ["named", str(getattr(value, "__module__", "")), value.__name__]
        if hasattr(value, "__dict__") and _is_python_class(type(value)):
            return self._object(value, {"__call__"})
        raise EmbedderError(
            f"the embedder holds a {type(value).__name__}, whose identity cannot be determined; give the "
            "embedder an attribute `fingerprint` (a string that changes whenever its output does)"
        )

    def _network(self, module: nn.Module) -> list[Any]:
        parts = dict(module.named_modules())
        hooks = [
            [name, self.identity(hook)]
            for name, part in parts.items()
            for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
        ]
        return [
            *("module", class_name(type(module)), _printed(module), _weights_digest(module), hooks),
            # A scripted or traced network has its own code, not that of its class.
            [[name, str(part.code)] for name, part in parts.items() if _has_own_code(part)],
            self._reached(parts, {"forward", *getattr(type(module), "_entries", ())}),
        ]

    def _object(self, value: Any, entries: set[str]) -> Any:
        if isinstance(value, nn.Module):
            return [self.identity(value), self._reached(dict(value.named_modules()), entries)]
        kept = vars(value) if hasattr(value, "__dict__") else {}
        return [
            *("object", class_name(type(value)), self._reached({"": value}, entries)),
            {name: self.identity(item) for name, item in kept.items()},
        ]

    def _reached(self, parts: dict[str, Any], entries: Iterable[str]) -> list[Any]:
        """The methods of the parts' own classes that can be reached from `entries`, and the attributes that
        they name.
        """
        kinds = list(
            dict.fromkeys(
                kind
                for part in parts.values()
                for kind in type(part).__mro__
                if not is_library(kind.__module__)
            )
        )
        names = set(entries)
        names |= {name for kind in kinds for name in vars(kind) if overrides(kind, name)}
        done: dict[tuple[int, str], Any] = {}
        todo = True
        while todo:
            todo = False
            for number, kind in enumerate(kinds):
                for name in sorted(names & _unmangled(kind).keys()):
                    if (number, name) not in done:
                        attribute = _unmangled(kind)[name]
                        functions = list(_functions(attribute))
                        for function in functions:
                            names |= _reads(function)
                        done[number, name] = self._attribute(kind, attribute, functions)
                        todo = True
        code = [[class_name(kinds[number]), name, done[number, name]] for number, name in sorted(done)]
        attributes = {
            f"{path}.{name}": self.identity(value)
            for path, part in parts.items()
            if isinstance(part, nn.Module)
            for name, value in own_attributes(part)
            if is_untold(part, value)
            or (_plain_name(part, name, names) and not is_library(type(part).__module__))
        }
        return [code, attributes]

    def _attribute(self, kind: type, attribute: Any, functions: list[types.FunctionType]) -> Any:
        """What a class has under a name: a method, a property, or a value."""
        if is_ours(kind.__module__):
            return code_version(kind.__module__)
        if functions:
            return [self._function(function) for function in functions]
        return self._leniently(attribute)

    def _function(self, function: types.FunctionType) -> list[Any]:
        code = function.__code__
        module = str(function.__globals__.get("__name__", ""))  # `functools.wraps` copies `__module__`
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        # The class of a method is known already.
        closure = {name: _content(cell) for name, cell in cells if name != "__class__"}
        if is_library(module) or is_ours(module):
            held = {
                name: self.identity(value)
                for name, value in closure.items()
                if is_data(value) or isinstance(value, types.FunctionType) or is_users(value)
            }
            return [module, code.co_qualname, code_version(module), held]
        source = source_of(function)
        if source is None:
            log.warning(
                "%s: its source is not available, so its fingerprint holds for this version of Python only; "
                "give the embedder an attribute `fingerprint` (a string that changes whenever its output "
                "would)",
                function.__qualname__,
            )
            written: Any = [sys.implementation.cache_tag, _code(code)]
            wanted, attributes = set(_names(code)), set(_names(code))
        else:
            written = list(source.tokens)
            wanted, attributes = set(source.globals), set(source.attributes)
        named = self._named(function.__globals__, wanted - set(code.co_freevars), attributes)
        parts = (closure, function.__defaults__, function.__kwdefaults__)
        return [written, *(self.identity(part) for part in parts), named]

    def _named(self, globals_: dict[str, Any], names: set[str], attributes: set[str]) -> dict[str, Any]:
        """The globals of some names, and of the user's modules among them what these attributes name."""
        return {
            name: self._module(globals_[name], attributes)
            if isinstance(globals_[name], types.ModuleType)
            else self.identity(globals_[name])
            for name in sorted(names)
            if name in globals_
        }

    def _module(self, module: types.ModuleType, attributes: set[str]) -> list[Any]:
        if is_library(module.__name__) or is_ours(module.__name__) or id(module) in self.met:
            return ["python module", module.__name__]
        self.met[id(module)] = len(self.met), module
        held = {
            name: self._module(value, attributes)
            if isinstance(value, types.ModuleType)
            else self.identity(value)
            for name in sorted(attributes)
            if not name.startswith("__") and (value := getattr(module, name, None)) is not None
        }
        return ["python module", module.__name__, held]

    def _class(self, kind: type) -> list[Any]:
        """The code of a class that is the user's, with what it names as far as that can be determined."""
        if is_library(kind.__module__) or is_ours(kind.__module__):
            return [code_version(kind.__module__)]
        bases = [self.identity(base) for base in kind.__bases__]
        source = class_source(kind)
        if source is None:
            members = {
                name: [self._function(function) for function in _functions(attribute)]
                for name, attribute in sorted(vars(kind).items())
                if any(_functions(attribute))
            }
            values = {name: value for name, value in vars(kind).items() if name[:2] != "__"}
            values |= {name: member.value for name, member in getattr(kind, "__members__", {}).items()}
            return [bases, members, {n: self.identity(v) for n, v in sorted(values.items()) if is_data(v)}]
        globals_ = vars(sys.modules.get(kind.__module__, types.ModuleType("")))
        named = {
            name: self._leniently(globals_[name])
            for name in source.globals
            if name in globals_ and not isinstance(globals_[name], types.ModuleType)
        }
        return [bases, list(source.tokens), named]

    def _leniently(self, value: Any) -> Any:
        """The identity of a value that may play no part in embedding; of its type if it has none."""
        try:
            return self.identity(value)
        except EmbedderError:
            return ["of type", class_name(type(value))]


def _reads(function: types.FunctionType) -> set[str]:
    """The names of attributes that a function reads, unless it is a library's."""
    if is_library(str(function.__globals__.get("__name__", ""))):
        return set()
    source = source_of(function)
    return set(_names(function.__code__) if source is None else source.attributes)


def _unmangled(kind: type) -> dict[str, Any]:
    """What a class has, with private names as they are written in it."""
    prefix = f"_{kind.__name__.lstrip('_')}__"
    return {
        f"__{name.removeprefix(prefix)}" if name.startswith(prefix) else name: value
        for name, value in vars(kind).items()
    }


def _plain_name(part: Any, name: str, names: set[str]) -> bool:
    """Whether an attribute is among the names, as they are written in one of the part's classes."""
    prefixes = [f"_{kind.__name__.lstrip('_')}__" for kind in type(part).__mro__]
    return name in names or any(
        name.startswith(prefix) and f"__{name.removeprefix(prefix)}" in names for prefix in prefixes
    )


def _has_own_code(part: nn.Module) -> bool:
    return isinstance(part, torch.jit.ScriptModule | torch.fx.GraphModule)


def _functions(attribute: Any) -> Iterator[types.FunctionType]:
    """The Python functions behind a class's attribute."""
    found: tuple[Any, ...]
    if isinstance(attribute, property):
        found = (attribute.fget,)
    elif isinstance(attribute, functools.cached_property):
        found = (attribute.func,)
    else:
        found = (getattr(attribute, "__wrapped__", None), getattr(attribute, "__func__", attribute))
    for function in found:
        if isinstance(function, types.FunctionType):
            yield function


def _is_python_class(kind: type) -> bool:
    """Whether a class was made by a class statement, so that attributes are all that its objects hold.

    Classes of C code have the same flag since Python 3.12, but their objects are larger than those of their
    base by more than pointers to attributes.
    """
    slots = vars(kind).get("__slots__", ())
    n_pointers = 2 + (1 if isinstance(slots, str) else len(slots))  # also to a dict and to weak references
    added = kind.__basicsize__ - (kind.__base__ or object).__basicsize__
    return bool(kind.__flags__ & _HEAP_TYPE) and added <= n_pointers * tuple.__itemsize__


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # still empty: a function that refers to itself
        return None


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


def _weights_digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    state = module.state_dict()
    state |= {name: tensor for name, tensor in module.named_buffers() if name not in state}
    for name, tensor in sorted(state.items()):
        if not isinstance(tensor, torch.Tensor):  # extra state of a module: plain settings
            digest.update(f"{name}:{tensor!r};".encode())
            continue
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(_tensor_bytes(tensor))
    return digest.hexdigest()


def _tensor_bytes(tensor: torch.Tensor) -> bytes | memoryview:
    if tensor.is_meta:
        raise EmbedderError(
            "the embedder has weights on the meta device, which hold no values; load them first, as with "
            "`load_state_dict(..., assign=True)`"
        )
    raw = tensor.detach().cpu().contiguous().reshape(-1)
    return raw.view(torch.uint8).numpy().data if raw.numel() else b""


def _printed(value: Any) -> str:
    """The repr without memory addresses, which differ in every process."""
    return _ADDRESS.sub("", repr(value))
