"""Collectives that losses need, with gradients; without a process group they do nothing.

Losses here are means over a rank's own samples, of terms that may depend on every rank's samples. DDP
averages the ranks' gradients, so training minimises the mean over the global batch, exactly as one process
does on the joined batch. Every rank gives the same number of samples.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's place in the group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(x: Tensor) -> Tensor:
    """Every rank's (B, ...) joined in rank order; gradients flow back to the rank they belong to."""
    if world_size() == 1:
        return x
    return _Gather.apply(x)


@torch.no_grad()
def all_reduce(x: Tensor, op: str = "sum") -> Tensor:
    """The elementwise "sum" or "max" over ranks, without gradient."""
    if world_size() == 1:
        return x
    shared = _on_backend(x.clone())
    dist.all_reduce(shared, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return shared.to(x.device)


@torch.no_grad()
def all_gather_rows(x: Tensor) -> Tensor:
    """Every rank's rows joined in rank order, without gradient; ranks may give different numbers of rows."""
    if world_size() == 1:
        return x
    own = torch.zeros(world_size(), dtype=torch.int64, device=x.device)
    own[rank()] = len(x)
    counts = all_reduce(own).tolist()
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x
    padded = _on_backend(padded)
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts)]).to(x.device)


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """If the block fails on one rank, it does on all, which would otherwise wait for that one.

    For checks of what each rank was given: without a collective call, and entered by all ranks.

    Raises:
        ValueError: the block failed on another rank, which is named, with the reason.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if not int(all_reduce(torch.tensor([failure is not None], dtype=torch.int32))):
        return
    if failure is None:
        told = next((at, reason) for at, reason in enumerate(_gathered("")) if reason)
        raise ValueError(f"on rank {told[0]}: {told[1]}")
    if world_size() > 1:
        _gathered(f"{type(failure).__name__}: {failure}")
    raise failure


def _gathered(text: str) -> list[str]:
    texts = [""] * world_size()
    dist.all_gather_object(texts, text)
    return texts


def _on_backend(x: Tensor) -> Tensor:
    """`x` on a device that the process group takes: nccl only takes CUDA tensors."""
    return x.cuda() if dist.get_backend() == "nccl" else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        ctx.length = len(x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Every rank's loss depends on these rows: their gradients add up before the owner takes its share.
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.narrow(0, rank() * ctx.length, ctx.length)
