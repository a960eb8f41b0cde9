"""Python programs in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_python(
    *arguments: Any, cwd: Path = ROOT, status: int = 0, seconds: float = 900, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python *arguments`, on one thread per process, and check the status with which it ends."""
    # Without the address of an earlier test's process group, which Lightning leaves there.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, env=kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip
    assert done.returncode == status, done.stderr[-4000:]
    return done
