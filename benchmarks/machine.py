"""The machine that a benchmark runs on, and the data that it reads, whole even after an interrupted run."""

import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from curated_data.cache.removal import remove


def print_machine() -> None:
    """One line: processor, cores, load, memory, GPU, and the versions that matter."""
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    processor = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        f"machine: {processor}, {cores} cores (load {os.getloadavg()[0]:.1f}), {memory:.0f} GiB, {gpu}; "
        f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}",
        flush=True,
    )


def made(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder of data, made unless it is there already. What an interrupted run left is made again.

    Args:
        folder: of the data; a file beside it says that they are whole.
        make: writes them to the folder, which does not exist when it is called; its parent does.
    """
    done = folder.with_name(f"{folder.name}.done")
    if not done.exists():
        remove(folder, below=folder.parent)
        folder.parent.mkdir(parents=True, exist_ok=True)
        make(folder)
        done.touch()
    return folder


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
