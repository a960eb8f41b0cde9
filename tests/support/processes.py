"""Two gloo processes for tests, forked so that nothing is imported again."""

import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(
    function: Callable[..., None], world_size: int, *arguments: Any, seconds: float = 120.0
) -> None:
    """Call `function(rank, *arguments)` in each process of a gloo group; fails if one of them fails or
    hangs.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_rank, args=(function, rank, world_size, port, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, f"{len(hanging)} of {world_size} ranks did not end within {seconds} s"
    assert [process.exitcode for process in processes] == [0] * world_size


def _rank(
    function: Callable[..., None], rank: int, world_size: int, port: int, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()
