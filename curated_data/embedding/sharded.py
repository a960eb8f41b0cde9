"""A module whose parameters lie in pieces on the ranks (FSDP), made whole, so that a rank can embed alone.

Ranks embed different shards of a pool, each as many batches as it comes to. The forward of a sharded module
is a collective call, which all ranks must make equally often: it would wait for ever. So each rank takes a
whole copy.
"""

import collections
import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks",
          "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")  # fmt: skip


def is_sharded(module: nn.Module, root: nn.Module | None = None) -> bool:
    """Whether a module's parameters are in pieces, by FSDP or as DTensors; `root` as of `unsharded`."""
    parts = [*module.modules(), *(() if root is None else root.modules())]
    return any(isinstance(part, FullyShardedDataParallel) for part in parts) or any(
        isinstance(parameter, DTensor) for parameter in module.parameters()
    )


def unsharded(module: nn.Module, root: nn.Module | None = None) -> nn.Module:
    """The module itself, or, where its parameters are sharded, a copy that holds them whole.

    Every rank calls it, and each needs room for the whole module beside its piece. Module attributes are
    copied by reference: a sharded network must not hide in a plain list or a closure.

    Args:
        module: what to copy, such as a LightningModule.
        root: the outermost FSDP module around it, as `trainer.model`; None: there is none.
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


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
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


def _plain_class(kind: type) -> type:
    """`fully_shard` puts a class of torch's own in front of a module's; this is the one behind."""
    while kind.__module__.startswith("torch.distributed.") and len(kind.__mro__) > 2:
        kind = kind.__mro__[2]
    return kind


def _shards(hook: Any) -> bool:
    """Whether a hook gathers or frees parameters."""
    function = getattr(hook, "hook", hook)
    function = getattr(function, "func", function)
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.")
