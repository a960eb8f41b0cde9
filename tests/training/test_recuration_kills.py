"""A run killed inside a re-curation ends, once resumed, with what an uninterrupted one ends with."""

import json
import os
import signal

import numpy as np
import pytest

from tests.support.programs import run_python
from tests.support.recuration_kills import MOMENTS, share_of


def check(folder, ranks, moments):
    done = run_python("-m", "tests.support.recuration_kills", folder, ranks, *moments)
    statuses = json.loads((folder / "statuses.json").read_text())
    for moment in moments:
        whole = f"whole-{share_of(moment)}"
        assert statuses[whole] == 0, done.stderr[-3000:]
        assert statuses[f"{moment} resumed"] == 0, done.stderr[-3000:]
        if moment.split()[0].isdigit() and statuses[f"{moment} killed"] == 0:
            continue  # the re-curation publishes fewer files
        if ranks == 1:
            assert os.WTERMSIG(statuses[f"{moment} killed"]) == signal.SIGKILL
        else:  # one of the ranks is killed, and Lightning ends the others
            assert statuses[f"{moment} killed"] != 0
        for rank in range(ranks):
            expected = trained(folder, whole, rank)
            found = trained(folder, moment, rank)
            assert found == expected, f"killed at {moment}, went on from step {statuses[f'{moment} from']}"
            assert len({epoch for epoch, _ in expected.values()}) == 3
            np.testing.assert_array_equal(
                np.load(folder / f"{moment}-{rank}.npy"), np.load(folder / f"{whole}-{rank}.npy")
            )


def trained(folder, run, rank):
    """Epoch and samples by step; a step that was trained again must have been the same."""
    steps = {}
    for line in (folder / f"{run}-{rank}.jsonl").read_text().splitlines():
        step, epoch, ids = json.loads(line)
        assert steps.setdefault(step, (epoch, ids)) == (epoch, ids)
    return steps


@pytest.mark.long
def test_killed_in_a_recuration(write_pool, tmp_path):
    write_pool([30, 20])
    check(tmp_path, 1, ["clustering of a share", "just after of a share"])


@pytest.mark.slow
def test_killed_at_every_moment(write_pool, tmp_path):
    write_pool([30, 20])
    named = [*MOMENTS, *(f"{moment} of a share" for moment in MOMENTS)]
    check(tmp_path, 1, [*named, *map(str, range(1, 16, 2)), *("3 of a share", "9 of a share")])


@pytest.mark.slow
def test_killed_on_two_ranks(write_pool, tmp_path):
    write_pool([30, 20])
    check(tmp_path, 2, ["embedding", "clustering", "switching", "just after of a share"])
