"""A plan's memory is that of the whole process: never below what a curation then takes."""

import json
import sys

import pytest

from tests.support.memory_runs import write_pool, write_rows
from tests.support.programs import run_python


def run(*arguments):
    return json.loads(run_python("-m", "tests.support.memory_runs", *arguments).stdout.splitlines()[-1])


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


LONG = pytest.mark.slow


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("n", "dimension", "dtype", "preset", "duplicates"),
    [
        (40_000, 256, "float16", "default", False),
        pytest.param(300_000, 256, "float16", "default", False, marks=LONG),
        pytest.param(300_000, 256, "float16", "default", True, marks=LONG),
        pytest.param(100_000, 512, "float32", "default", True, marks=LONG),
        pytest.param(100_000, 512, "float32", "paper", False, marks=LONG),
        pytest.param(30_000, 1024, "float16", "default", True, marks=LONG),
        pytest.param(30_000, 1024, "float16", "paper", False, marks=LONG),
    ],
)
def test_the_peak_of_a_curation_of_rows_is_within_what_is_promised(
    tmp_path, n, dimension, dtype, preset, duplicates
):
    write_rows(tmp_path / "rows.npy", n, dimension, dtype)
    found = run("rows", tmp_path / "rows.npy", tmp_path / "cache", preset, duplicates)
    assert found["found"] / 1.6 <= found["peak"] <= found["found"]
