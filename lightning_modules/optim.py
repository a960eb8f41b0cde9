"""Optimisers by name, and LARS."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer


def build_optimizer(
    name: str,
    groups: Iterable[Mapping[str, Any]],
    *,
    learning_rate: float,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
) -> Optimizer:
    """An optimiser over parameter groups as `parameter_groups` gives them.

    Args:
        name: "sgd", "lars", "adam" or "adamw".
    """
    own = [dict(group) for group in groups]
    if name == "lars":
        return LARS(own, lr=learning_rate, momentum=momentum)
    for group in own:
        group.pop("adapt", None)
    if name == "sgd":
        return SGD(own, lr=learning_rate, momentum=momentum)
    if name == "adam":
        return Adam(own, lr=learning_rate, betas=betas)
    if name == "adamw":
        return AdamW(own, lr=learning_rate, betas=betas)
    raise ValueError(f"optimizer {name!r}: expected 'sgd', 'lars', 'adam' or 'adamw'")


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights, with decay and LARS adaptation; biases and normalisation without.

    Parameters that need no gradient are left out; a parameter that several modules share appears once.
    """
    parameters = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}.values()
    weights = [p for p in parameters if not _is_vector(p)]
    vectors = [p for p in parameters if _is_vector(p)]
    groups = [
        {"params": weights, "weight_decay": weight_decay, "adapt": True},
        {"params": vectors, "weight_decay": 0.0, "adapt": False},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("nothing to train: every parameter is frozen")
    return groups


def mark_vectors(module: nn.Module) -> None:
    """Note of each parameter whether it is a vector, before FSDP makes vectors of them all."""
    for parameter in module.parameters():
        parameter.is_vector = parameter.ndim <= 1  # type: ignore[attr-defined]  # our own note


def _is_vector(parameter: Tensor) -> bool:
    return getattr(parameter, "is_vector", parameter.ndim <= 1)


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888), as SimCLR uses it.

    For a weight w with gradient g: u = g + weight_decay * w; u *= trust * |w| / |u| where both norms are
    positive; v = momentum * v + u; w -= lr * v. Groups with `adapt=False` (biases, normalisation) skip the
    scaling.

    Args:
        params: parameters, or groups that may set `lr`, `weight_decay`, `adapt`.
        trust: the trust coefficient.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust": trust,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            updates = torch._foreach_add([p.grad for p in weights], weights, alpha=group["weight_decay"])
            if group["adapt"]:
                weight_norms = torch.stack(torch._foreach_norm(weights))
                update_norms = torch.stack(torch._foreach_norm(updates))
                ratios = group["trust"] * weight_norms / update_norms
                ratios = torch.where((weight_norms > 0) & (update_norms > 0), ratios, 1.0)
                torch._foreach_mul_(updates, list(ratios.unbind()))
            for p in weights:
                if "velocity" not in self.state[p]:
                    self.state[p]["velocity"] = torch.zeros_like(p)
            velocities = [self.state[p]["velocity"] for p in weights]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, updates)
            torch._foreach_add_(weights, velocities, alpha=-group["lr"])
        return loss
