"""A rank that is killed, under each launcher: the run ends within a minute and its log says why."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = [str(ROOT / "tests" / "dying_rank.py")]
TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
SECONDS = 60


def srun(arguments: list[str], environment: dict[str, str], folder: Path) -> tuple[int, str]:
    """Two tasks as `srun --kill-on-bad-exit` starts and ends them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    of_job = {"JOB_ID": "77", "JOB_NAME": "test", "NTASKS": "2", "NTASKS_PER_NODE": "2", "NNODES": "1"}
    of_job |= {"NODEID": "0", "NODELIST": "localhost"}
    tasks = []
    for task in range(2):
        slurm = {f"SLURM_{k}": v for k, v in (of_job | {"PROCID": str(task), "LOCALID": str(task)}).items()}
        settings = environment | slurm | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        log = open(folder / f"task-{task}.log", "w")  # noqa: SIM115
        tasks.append(subprocess.Popen([sys.executable, *arguments], env=settings, stdout=log, stderr=log))
    codes: list[int | None] = [None, None]
    while any(code is None for code in codes):
        codes = [task.poll() for task in tasks]
        for task in tasks if any(codes) else ():
            task.kill()  # which follows SIGTERM after `KillWait` seconds
        time.sleep(0.2)
    said = [(folder / f"task-{task}.log").read_text() for task in range(2)]
    said += [f"srun: error: localhost: task {task}: {code}" for task, code in enumerate(codes)]
    return max(abs(code or 0) for code in codes), "".join(said)


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
@pytest.mark.parametrize("launcher", ["torchrun", "lightning", "srun"])
def test_a_killed_rank_ends_the_run_within_a_minute(launcher, dies, write_pool, tmp_path):
    write_pool([64, 64, 64, 64])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    arguments = [*PROGRAM, str(tmp_path), str(dies)]
    if launcher == "srun":
        code, said = srun(arguments, environment, tmp_path)
    else:
        command = TORCHRUN if launcher == "torchrun" else [sys.executable]
        done = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, timeout=600
        )
        code, said = done.returncode, done.stdout + done.stderr
    assert time.time() - (tmp_path / "died").stat().st_mtime < SECONDS, said[-2000:]
    assert code != 0
    by_launcher = {
        "torchrun": "Signal 9 (SIGKILL)",
        "lightning": "terminated with code -9",
        "srun": f"task {dies}: -9",
    }
    told = ["another rank has ended", by_launcher[launcher]]
    if launcher != "lightning" or dies == 1:  # otherwise the launcher itself was killed
        assert any(word in said for word in told), said[-2000:]
