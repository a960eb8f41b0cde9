"""A plan's memory is that of the whole process: never below what a curation then takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.memory_runs import write_pool

ROOT = Path(__file__).parents[2]


def run(what, pool, cache, n, dimension, duplicates):
    arguments = [str(each) for each in (what, pool, cache, n, dimension, duplicates)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.memory_runs", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_peak_of_a_curation_is_within_its_plan(tmp_path):
    n, dimension, duplicates = 12_000, 1024, False
    write_pool(tmp_path / "pool.tar", n)
    settings = (tmp_path / "pool.tar", tmp_path / "cache", n, dimension, duplicates)
    planned = run("plan", *settings)["found"]
    peak = run("curate", *settings)["peak"]
    assert 0.4 * planned <= peak <= planned
    # With the embeddings in the cache, too.
    assert run("curate", *settings)["peak"] <= planned
