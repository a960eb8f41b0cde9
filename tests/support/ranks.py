"""Run a function on several processes joined by gloo."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 120


def on_ranks(n: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(rank, *arguments)` on n forked processes; their results in rank order.

    Forked, because importing torch and lightning again costs seconds. One thread each: OpenMP does not
    survive a fork.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ends = [context.Pipe(duplex=False) for _ in range(n)]
        processes = [
            context.Process(target=_work, args=(rank, n, folder, ends[rank][1], function, arguments))
            for rank in range(n)
        ]
        for process in processes:
            process.start()
        results = []
        for rank, (receive, send) in enumerate(ends):
            send.close()  # so that the end of a rank that died ends the wait for it
            if not receive.poll(SECONDS):
                for process in processes:
                    process.kill()
                raise TimeoutError(f"rank {rank} gave no result in {SECONDS} s")
            try:
                results.append(receive.recv())
            except EOFError:
                results.append(f"Traceback: rank {rank} died")
        for process in processes:
            process.join(10)
    for result in results:
        if isinstance(result, str) and result.startswith("Traceback"):
            raise AssertionError(result)
    return results


def on_two_ranks(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`on_ranks` with two of them."""
    return on_ranks(2, function, *arguments)


def _work(
    rank: int, n: int, folder: str, end: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n)
        result = function(rank, *arguments)
        dist.barrier()
    except Exception:
        result = traceback.format_exc()
    # Arrays travel by value: a tensor's shared memory would go with its process.
    end.send(_by_value(result))
    os._exit(0)  # the group is not destroyed, which now and then never returns in torch 2.7


def _by_value(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result.detach().numpy().copy()
    if isinstance(result, dict):
        return {key: _by_value(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [_by_value(value) for value in result]
    return result
