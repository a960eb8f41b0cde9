"""Gathering a module whose parameters are sharded over ranks (FSDP), so that each rank can embed by itself.

Ranks embed different shards of a pool, and so different numbers of batches. The forward of a sharded module
is a collective call, which all ranks must make equally often, or it waits forever. So each rank gets a full
copy.
"""

import collections
import contextlib
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks",
          "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")  # fmt: skip

Module = TypeVar("Module", bound=nn.Module)


def is_sharded(module: nn.Module, root: nn.Module | None = None) -> bool:
    """Whether a module's parameters are sharded, by FSDP or as DTensors; `root` as for `unsharded`."""
    parts = [*module.modules(), *(() if root is None else root.modules())]
    return any(isinstance(part, FullyShardedDataParallel) for part in parts) or any(
        isinstance(parameter, DTensor) for parameter in module.parameters()
    )


def unsharded(module: Module, root: nn.Module | None = None) -> Module:
    """The module itself or, if its parameters are sharded, a copy with the full parameters.

    Every rank calls it, and needs memory for the full module beside its shard. Attributes of modules are
    copied by reference: a sharded network in a plain list or a closure is not found.

    Args:
        module: to copy, such as a LightningModule.
        root: the outermost FSDP module around it, such as `trainer.model`; None if there is none.
    """
    if not is_sharded(module, root):
        return module
    outermost = module if root is None else root
    is_fsdp1 = any(isinstance(part, FullyShardedDataParallel) for part in outermost.modules())
    whole = (
        FullyShardedDataParallel.summon_full_params(outermost, writeback=False)
        if is_fsdp1
        else contextlib.nullcontext()
    )
    with torch.no_grad(), whole:
        return _copied(module, {})


def _copied(module: nn.Module, memo: dict[int, Any]) -> Any:
    while isinstance(module, FullyShardedDataParallel):
        module = module.module
    if id(module) in memo:
        return memo[id(module)]
    kind = _plain_class(type(module))
    copy = memo[id(module)] = kind.__new__(kind)
    copy.__dict__.update(module.__dict__)
    for name in _HOOKS:
        hooks = collections.OrderedDict(
            (key, hook) for key, hook in module.__dict__.get(name, {}).items() if not _shards(hook)
        )
        copy.__dict__[name] = hooks
    copy.__dict__["_parameters"] = {
        name: None if value is None else nn.Parameter(_whole(value, memo), requires_grad=False)
        for name, value in module._parameters.items()
    }
    copy.__dict__["_buffers"] = {
        name: None if value is None else _whole(value, memo) for name, value in module._buffers.items()
    }
    copy.__dict__["_modules"] = {
        name: None if child is None else _copied(child, memo) for name, child in module._modules.items()
    }
    return copy


def _whole(value: Tensor, memo: dict[int, Any]) -> Tensor:
    if id(value) not in memo:
        memo[id(value)] = value.full_tensor() if isinstance(value, DTensor) else value.detach().clone()
    return memo[id(value)]


def _plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a module without the subclass that `fully_shard` has put in its place."""
    while kind.__module__.startswith("torch.distributed.") and len(kind.__mro__) > 2:
        kind = kind.__mro__[2]
    return kind


def _shards(hook: Any) -> bool:
    """Whether a hook gathers or frees parameters."""
    function = getattr(hook, "hook", hook)
    function = getattr(function, "func", function)
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.")
