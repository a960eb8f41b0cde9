"""Collective calls on tensors in the group that trains, with gradients; on one process they do nothing.

Losses here are means over a rank's own samples, of terms that may depend on every rank's samples. DDP
averages the ranks' gradients, so training minimises the mean over the global batch, exactly as one process
does on the joined batch. Every rank gives the same number of samples.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from curated_data.parallel import rank, world_size


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
