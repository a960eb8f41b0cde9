"""What somebody uses stays in the cache; what nobody uses goes, also after kills."""

import copy
import multiprocessing
import os
import pickle
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from curated_data import RecurationCallback, curate
from curated_data.cache.artifacts import open_cache
from curated_data.cache.holds import Hold, hold, holding, remove_unheld
from curated_data.pipeline.reopen import reopen
from tests.support.recuration_runs import SIZES, fit

CONTEXT = multiprocessing.get_context("fork")
NAME = "0123456789abcdef0123"


@pytest.fixture
def artifact(tmp_path) -> Path:
    folder = open_cache(tmp_path / "cache") / "embeddings" / NAME
    folder.mkdir(parents=True)
    (folder / "rows").write_text("x")
    return folder


def remove(folder: Path) -> bool:
    return remove_unheld(folder, below=folder.parent.parent)


def _hold(folder, started, ended):
    held = Hold(folder)
    started.set()
    ended.wait(60)
    del held


def holder(folder):
    started, ended = CONTEXT.Event(), CONTEXT.Event()
    process = CONTEXT.Process(target=_hold, args=(folder, started, ended))
    process.start()
    assert started.wait(60)
    return process, ended


def test_what_another_process_holds_stays_until_it_ends(artifact):
    first, ended = holder(artifact)
    second, _ = holder(artifact)
    assert not remove(artifact)
    os.kill(second.pid, signal.SIGKILL)
    second.join()
    assert not remove(artifact)
    ended.set()
    first.join()
    assert remove(artifact)
    assert not artifact.exists()
    assert remove(artifact)  # it is gone already
    assert list(artifact.parent.iterdir()) == []


def test_killed_holders_release(artifact):
    process, _ = holder(artifact)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert remove(artifact)


def test_a_hold_ends_with_its_object_also_while_a_fork_of_it_lives(artifact):
    held = Hold(artifact)
    started, ended = CONTEXT.Event(), CONTEXT.Event()

    def wait(held):
        started.set()
        ended.wait(60)

    process = CONTEXT.Process(target=wait, args=(held,))
    process.start()
    assert started.wait(60)
    assert not remove(artifact)
    del held
    assert remove(artifact)
    ended.set()
    process.join()


def test_a_fork_that_ends_takes_nothing_from_its_parent(artifact):
    held = Hold(artifact)

    def drop(held):
        del held

    process = CONTEXT.Process(target=drop, args=(held,))
    process.start()
    process.join()
    child = os.fork()
    if child == 0:
        del held
        os._exit(0)
    os.waitpid(child, 0)
    assert not remove(artifact)
    del held
    assert remove(artifact)


def test_copies_hold_by_themselves(artifact):
    held = Hold(artifact)
    others = [copy.deepcopy(held), pickle.loads(pickle.dumps(held))]
    del held
    assert not remove(artifact)
    others.pop()
    assert not remove(artifact)
    others.pop()
    assert remove(artifact)


def test_what_is_looked_up_in_a_block_is_held_to_its_end(artifact):
    hold(artifact)  # outside of any block
    with holding():
        hold(artifact)
        with holding():
            pass
        assert not remove(artifact)
    assert remove(artifact)


def test_locks_are_removed_with_the_last_hold(artifact):
    holds = [Hold(artifact) for _ in range(3)]
    (lock,) = (artifact.parent.parent / ".locks").iterdir()
    while holds:
        assert lock.exists()
        holds.pop()
    assert not lock.exists()


def test_where_no_lock_can_be_taken_nothing_is_held_and_nothing_fails(artifact, tmp_path):
    (artifact.parent.parent / ".locks").symlink_to(tmp_path)
    assert Hold(artifact).folder == artifact
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}
    Hold(tmp_path / "no" / "cache" / "here")
    assert not (tmp_path / "no").exists()


def _hold_often(folder, ended):
    while not ended.is_set():
        held = Hold(folder)
        if (folder / "rows").exists():
            time.sleep(0.001)
            (folder / "rows").read_text()
        del held
        time.sleep(random.random() * 0.02)


def test_no_holder_ever_loses_what_it_has_seen(artifact):
    """Holders come and go while one process removes and builds the artifact again and again."""
    ended = CONTEXT.Event()
    processes = [CONTEXT.Process(target=_hold_often, args=(artifact, ended)) for _ in range(3)]
    for process in processes:
        process.start()
    for _ in range(30):
        while not remove(artifact):
            time.sleep(0.0005)
        temporary = artifact.with_name(".tmp-new")
        temporary.mkdir()
        (temporary / "rows").write_text("x")
        temporary.rename(artifact)
    ended.set()
    for process in processes:
        process.join()
        assert process.exitcode == 0


CONFIG = {"target_size": 10, "levels": [{"n_clusters": 4}], "embedding": {"num_workers": 0}}


def test_a_curation_is_held_as_long_as_it_is_in_use(write_pool, tmp_path):
    found = curate(write_pool([20]), CONFIG, embedder="pixels:2", cache_dir=tmp_path / "c")
    name = found.folders["selection"].name
    folders = dict(found.folders)
    opened = reopen(tmp_path / "c", name)
    del found
    for folder in folders.values():
        assert not remove_unheld(folder, below=tmp_path / "c")
    store = opened.embeddings
    del opened
    assert not remove_unheld(folders["embeddings"], below=tmp_path / "c")
    assert store.as_array().shape == (20, 12)
    assert remove_unheld(folders["tree"], below=tmp_path / "c")
    del store
    assert remove_unheld(folders["embeddings"], below=tmp_path / "c")


class Slower(RecurationCallback):
    """Opens what the first re-curation made, as another run on the same cache would, to read it later."""

    opened = None

    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        if self.n_recurations == 1 and self.opened is None:
            self.opened = reopen(trainer.datamodule.cache_dir, self.state.selection)


def test_a_faster_training_leaves_what_a_slower_one_reads(write_pool, tmp_path):
    callback = Slower(every_n_epochs=1)
    fit(write_pool(SIZES), tmp_path / "c", None, epochs=4, callbacks=[callback])
    slower, callback.opened = callback.opened, None
    assert callback.n_recurations == 3
    rows = slower.embeddings.as_array()
    assert rows.shape == (sum(SIZES), 6)
    assert np.isfinite(rows).all()
    mine = f"embeddings/{slower.embeddings.folder.name}"
    assert mine in callback.state.artifacts  # to be looked at again after the next re-curation
    kept = {path.name for path in (tmp_path / "c" / "embeddings").iterdir()}
    assert len(kept) == 3  # the first curation's, the slower run's, the last one's
    del slower
    assert remove_unheld(tmp_path / "c" / mine, below=tmp_path / "c")


def test_two_ranks_do_not_hold_each_others_leftovers(write_pool, tmp_path):
    callback = RecurationCallback(every_n_epochs=1)
    fit(
        write_pool(SIZES),
        tmp_path / "c",
        None,
        epochs=4,
        callbacks=[callback],
        devices=2,
        strategy="ddp_fork",
    )
    for stage in ("embeddings", "tree"):  # the first curation's and the last one's
        assert len([path for path in (tmp_path / "c" / stage).iterdir() if path.name[0] != "."]) == 2
