"""The forms in which a recipe is started, each as a user types it: python, torchrun, fabric run, and Slurm.

Real images, two processes over gloo; slow, as every process imports everything again.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SECONDS = 600
SETTINGS = """
model:
  class_path: lightning_modules.SimCLR
  init_args: {backbone: resnet10, backbone_options: {width: 4}, image_size: 28, small_images: true,
              optimizer: sgd, learning_rate: 0.1, warmup_epochs: 1}
data:
  pool: %s
  curation: {target_size: 128, embedding: {num_workers: 0}}
  embedder: pixels:4
  loader: {num_workers: 0}
trainer: {accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
"""


@pytest.fixture
def arguments(tmp_path, fashion_train) -> list[str]:
    """Of `recipes/pretrain.py`, for a run in `tmp_path`."""
    (tmp_path / "small.yaml").write_text(SETTINGS % fashion_train[0])
    recipe, base = ROOT / "recipes" / "pretrain.py", ROOT / "configs" / "base.yaml"
    return [str(recipe), "fit", "--config", str(base), "--config", "small.yaml"]


def environment(**more: str) -> dict[str, str]:
    """This process's, without what a launcher of the tests may have set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "LT_"))}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def start(command: list[str], folder: Path, **more: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment(**more), capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def checkpoint(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("runs/pretrain/version_*/checkpoints/epoch=*.ckpt")
    return torch.load(path, weights_only=True, map_location="cpu")


@pytest.mark.slow
def test_two_ranks_by_torchrun_and_by_fabric_run_do_what_one_process_does(arguments, tmp_path):
    two = ["--data.batch_size", "8", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    forms = {
        "python": [sys.executable, *arguments, "--data.batch_size", "16"],
        "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", *arguments, *two],
        "fabric": [str(BIN / "fabric"), "run", "--devices", "2", "--accelerator", "cpu", *arguments, *two],
    }
    selections, streams = [], []
    for name, command in forms.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "small.yaml").write_text((tmp_path / "small.yaml").read_text())
        shown = start([*command, "--trainer.max_epochs", "2"], folder)
        assert ("MEMBER: 2/2" in shown) == (name != "python")
        saved = checkpoint(folder)
        assert saved["global_step"] == 16
        (path,) = folder.glob("runs/cache/selection/*/ids.npy")
        selections.append(np.load(path))
        streams.append(
            {key: value for key, value in saved["CuratedDataModule"].items() if key != "selection"}
        )
    for other in selections[1:]:
        np.testing.assert_array_equal(other, selections[0])
    assert streams[1] == streams[0]
    assert streams[2] == streams[0]


def wait_until(holds: Callable[[], bool], process: subprocess.Popen) -> None:
    limit = time.monotonic() + SECONDS
    while not holds():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < limit
        time.sleep(0.2)


@pytest.mark.slow
def test_under_slurm_a_signal_requeues_and_the_next_start_resumes(arguments, tmp_path):
    """One process as `srun` starts it; `scontrol` is a script that notes what it was asked for."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tools / "scontrol").chmod(0o755)
    slurm = {"JOB_ID": "77", "JOB_NAME": "pretrain", "NTASKS": "1", "NTASKS_PER_NODE": "1", "NNODES": "1",
             "PROCID": "0", "LOCALID": "0", "NODEID": "0", "NODELIST": "localhost"}  # fmt: skip
    more = {f"SLURM_{name}": value for name, value in slurm.items()}
    more["PATH"] = f"{tools}:{os.environ['PATH']}"
    command = [
        sys.executable,
        *arguments,
        "--trainer.default_root_dir",
        "runs/slurm/77",
        "--trainer.devices",
        "1",
    ]
    command += ["--data.batch_size", "16", "--trainer.log_every_n_steps", "1"]
    root = tmp_path / "runs" / "slurm" / "77"

    process = subprocess.Popen(
        [*command, "--trainer.max_epochs", "100000"],
        cwd=tmp_path,
        env=environment(**more),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: any(tmp_path.glob("runs/pretrain/version_0/checkpoints/*.ckpt")), process)
    process.send_signal(signal.SIGUSR1)
    wait_until((tmp_path / "asked").exists, process)
    process.kill()  # what Slurm does when the job's time is over
    process.communicate()
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    saved = torch.load(root / "hpc_ckpt_1.ckpt", weights_only=True)
    done = saved["global_step"]
    assert done > 0

    epochs = done // 8 + 2
    shown = start([*command, "--trainer.max_epochs", str(epochs)], tmp_path, **more)
    assert "hpc_ckpt_1.ckpt" in shown
    assert "Restored all states from the checkpoint" in shown
    last = max(tmp_path.glob("runs/pretrain/version_1/checkpoints/*.ckpt"), key=os.path.getmtime)
    assert torch.load(last, weights_only=True)["global_step"] == 8 * epochs
    steps = (tmp_path / "runs" / "pretrain" / "version_1" / "metrics.csv").read_text().splitlines()
    place = steps[0].split(",").index("step")
    logged = [int(line.split(",")[place]) for line in steps[1:]]
    # Each step once. Lightning counts one on for its loggers when it resumes within a batch.
    assert logged == list(range(logged[0], logged[0] + 8 * epochs - done))
    assert logged[0] in (done, done + 1)


def test_the_sbatch_script_is_sound():
    script = ROOT / "configs" / "slurm" / "pretrain.sbatch"
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    if shutil.which("shellcheck"):
        found = subprocess.run(["shellcheck", script], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout
    text = script.read_text()
    for line in ("--requeue", "--signal=SIGUSR1@120", "--open-mode=append"):
        assert f"#SBATCH {line}" in text
    assert '--trainer.default_root_dir "runs/slurm/$SLURM_JOB_ID"' in text


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (138, True)])
def test_the_sbatch_script_requeues_what_a_signal_ended(status, requeued, tmp_path):
    """138 is SIGUSR1 to a run that does not train yet, which ends it."""
    for name, content in (
        ("srun", f"echo $SRUN_CPUS_PER_TASK > {tmp_path}/cpus; exit {status}"),
        ("scontrol", f'echo "$@" >> {tmp_path}/asked'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{content}\n")
        (tmp_path / name).chmod(0o755)
    more = {
        "SLURM_JOB_ID": "77", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "12",
    }  # fmt: skip
    more["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    script = ROOT / "configs" / "slurm" / "pretrain.sbatch"
    done = subprocess.run(["bash", script, "--config", "x.yaml"], env=environment(**more))
    assert done.returncode == status
    assert (tmp_path / "asked").exists() == requeued
    assert (tmp_path / "cpus").read_text() == "12\n"
