"""The chaos program in its short form, and its long one; and that its cage holds."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.cage import caged
from tests.chaos.tally import BAD, Tally

ROOT = Path(__file__).parents[2]


def run(*arguments: str, seconds: float) -> str:
    """The table of a run without a bad outcome. In a process of its own, whose forks start clean."""
    command = [sys.executable, "-m", "tests.chaos", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize(("room", "cases"), [("kills", 12), ("files", 60)])
def test_a_few_attacks_do_no_harm(room, cases):
    table = run("--only", room, "--cases", str(cases), "--seconds", "300", "--seed", "1", seconds=500)
    assert f"| all | {cases} |" in table


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_many_attacks_do_no_harm(seed):
    table = run("--seconds", "600", "--seed", str(seed), seconds=1500)
    for room in ("kills", "files", "http", "ranks"):
        assert f"| {room}: " in table


def test_an_attacked_process_cannot_leave_its_cage():
    with caged() as cage:
        outside = cage.canary / "precious"
        link = cage.case / "link"
        link.symlink_to(outside)
        attempts = {
            "write": lambda: outside.write_text("x"),
            "append by a handle": lambda: os.open(outside, os.O_WRONLY | os.O_APPEND),
            "remove": outside.unlink,
            "rename out": lambda: os.rename(link, cage.canary / "new"),
            "rename away": lambda: os.rename(outside, cage.case / "new"),
            "through a link": lambda: link.write_text("x"),
            "climbing": lambda: (cage.case / ".." / ".." / "canary" / "precious").unlink(),
            "truncate": lambda: os.truncate(outside, 0),
            "make a folder": (cage.home / "beside").mkdir,
        }
        for name, attempt in attempts.items():
            ending = cage.run(attempt)
            assert (ending.how, len(ending.escapes)) == ("error", 1), name
            assert not cage.is_touched(), name
        connect = "import socket; socket.create_connection(('10.0.0.1', 9), timeout=1)"
        assert cage.run(lambda: exec(connect)).escapes
        assert cage.run((cage.case / "inside").touch).how == "done"
        assert cage.run(link.unlink).how == "done"  # the link itself is in the cage
        outside.write_text("changed")
        assert cage.is_touched()
    assert not cage.home.exists()


def test_a_process_is_killed_at_the_event_that_is_asked_for():
    with caged() as cage:

        def work() -> None:
            for number in range(5):
                (cage.case / str(number)).touch()

        assert cage.run(work).n_events == 5
        cage.fresh(None)
        ending = cage.run(work, kill_at=3)
        assert (ending.how, ending.error) == ("killed", f"signal {int(signal.SIGKILL)}")
        assert sorted(path.name for path in cage.case.iterdir()) == ["0", "1"]
        assert cage.run(signal.pause, limit=0.2).how == "hung"
        assert cage.run(lambda: os.kill(os.getpid(), signal.SIGUSR1)).how == "died"


@pytest.mark.parametrize("outcome", BAD)
def test_every_bad_outcome_is_shown(outcome):
    tally = Tally()
    tally.add("files: x", "equal")
    tally.add("files: x", outcome, "a bit flipped", "Traceback")
    assert len(tally.bad) == tally.total(BAD) == 1
    assert "a bit flipped" in tally.bad[0]
    assert "| all | 2 | 1 |" in tally.table()
