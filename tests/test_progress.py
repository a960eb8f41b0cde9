"""What is said during long work: where no logging is configured, where it is, and where it is silenced."""

import logging
import time

import pytest

from curated_data import progress as module
from curated_data.progress import line, progress
from tests.support.programs import run_python

CURATE = """
import logging, os, sys
{before}
import numpy as np
from curated_data import curate_embeddings
curate_embeddings(np.random.default_rng(0).normal(size=(300, 4)), {{"target_size": 20}})
"""


def said(before: str = "", **environment: str) -> str:
    done = run_python("-c", CURATE.format(before=before), **environment)
    assert done.stdout == ""
    return done.stderr


@pytest.mark.long
def test_a_program_that_configures_nothing_sees_the_stages():
    lines = said().splitlines()
    assert any("300 samples" in text for text in lines)
    assert any("selection: 20 of 300" in text for text in lines)


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "environment"),
    [
        ("", {"CURATED_DATA_QUIET": "1"}),
        ("logging.getLogger('curated_data').setLevel(logging.WARNING)", {}),
        ("logging.basicConfig(level=logging.WARNING)", {}),
    ],
)
def test_it_can_be_silenced(before, environment):
    assert said(before, **environment) == ""


@pytest.mark.long
def test_a_configured_program_gets_each_line_once_as_it_asks():
    lines = said("logging.basicConfig(level=logging.INFO, format='MINE %(message)s')").splitlines()
    mine = [text for text in lines if "selection: 20 of 300" in text]
    assert len(mine) == 1
    assert mine[0].startswith("MINE")


def test_lines_come_while_no_step_ends(caplog, monkeypatch):
    monkeypatch.setattr(module, "PERIOD", 0.01)
    with caplog.at_level(logging.INFO, logger="curated_data"), progress("working", 8, "parts") as advance:
        advance(2)
        until = time.monotonic() + 60
        while not caplog.messages and time.monotonic() < until:
            time.sleep(0.01)
    assert caplog.messages[0].startswith("working: 2 of 8 parts (25 %)")
    seen = len(caplog.messages)
    time.sleep(0.1)
    assert len(caplog.messages) == seen  # the work has ended


@pytest.mark.parametrize(
    ("done", "total", "seconds", "expected"),
    [
        (0, 100, 70, "w: 0 of 100 x (0 %), 70 s so far"),
        (50, 100, 3600, "w: 50 of 100 x (50 %), 60 min left"),
        (1, 1000, 3600, "w: 1 of 1,000 x (0 %), 42 d left"),
        (1500, None, 60, "w: 1,500 x in 60 s"),
        (120, 100, 60, "w: 120 of 100 x (120 %), 0 s left"),
    ],
)
def test_time_left(done, total, seconds, expected):
    assert line("w", done, total, "x", seconds) == expected
