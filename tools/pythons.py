"""Run the short tests in several Pythons, and with the lowest and the highest dependencies that are allowed.

    uv run python tools/pythons.py                          # 3.11 to 3.14, highest; and 3.11 with the lowest
    uv run python tools/pythons.py --python 3.13 --resolution highest --tests tests/pool

Each run has an environment of its own below `--envs`, made by uv, which finds interpreters or downloads them.
One that cannot be found is reported and counts as a failure, unless `--allow-missing` is given.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


def main() -> int:
    """Run all combinations, print a line for each; returns 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--python", nargs="+", default=PYTHONS, help="versions, or paths of interpreters")
    parser.add_argument(
        "--resolution", nargs="+", choices=("highest", "lowest-direct"), help="(default: both)"
    )
    parser.add_argument("--tests", nargs="+", default=["tests"], help="for pytest (default: the short tests)")
    parser.add_argument(
        "--envs", default="build/pythons", help="where environments go (default: %(default)s)"
    )
    parser.add_argument("--allow-missing", action="store_true", help="an interpreter may be missing")
    options = parser.parse_args()
    if shutil.which("uv") is None:
        sys.exit("pythons: uv is not found; pip install uv")
    runs = [(python, "highest") for python in options.python]
    runs.append((options.python[0], "lowest-direct"))
    results = {run: result(*run, options) for run in runs if run[1] in (options.resolution or run[1:])}
    for (python, resolution), outcome in results.items():
        print(f"{python:8} {resolution:14} {outcome}")
    good = {"passed", "interpreter not found"} if options.allow_missing else {"passed"}
    return 0 if set(results.values()) <= good else 1


def result(python: str, resolution: str, options: argparse.Namespace) -> str:
    """What became of one combination."""
    found = subprocess.run(["uv", "python", "find", python], cwd="/", capture_output=True, text=True)
    if (
        found.returncode
        and subprocess.run(["uv", "python", "install", python], capture_output=True).returncode
    ):
        return "interpreter not found"
    name = python.strip(os.sep).replace(os.sep, "-")
    env = ROOT / options.envs / f"{name}-{resolution}"
    # Not the lock file of the working tree: what the bounds in pyproject.toml allow is tested.
    install = ["uv", "pip", "install", "--python", str(env), "--resolution", resolution]
    steps = [
        ["uv", "venv", "--quiet", "--clear", "--python", python, str(env)],
        [*install, "--quiet", "--editable", ".[cli,demo,http,s3,zstd,text,tensorboard]", "--group", "dev"],
        [str(env / "bin" / "python"), "-m", "pytest", *options.tests],
    ]
    for number, step in enumerate(steps):
        if subprocess.run(step, cwd=ROOT).returncode:
            return ("no environment", "dependencies cannot be installed", "tests failed")[number]
    return "passed"


if __name__ == "__main__":
    sys.exit(main())
