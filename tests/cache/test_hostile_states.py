"""States in checkpoints name artifacts of the cache, and have nothing else removed or read."""

import copy
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curated_data import CuratedDataModule, RecurationCallback
from curated_data.errors import CacheError
from tests.support.guard import HOSTILE, NAME, NAMES, Guard, is_artifact

STATE = {
    "n_recurations": 1, "last_step": 4, "best": None, "epochs_without_gain": 0, "unfinished": None,
    "artifacts": [f"tree/{NAME}"], "selection": NAME,
}  # fmt: skip


def test_a_callback_takes_the_state_that_it_writes(tmp_path):
    callback = RecurationCallback(1)
    for state in (STATE, callback.state_dict(), STATE | {"best": 0.5, "unfinished": {"epoch": 1, "step": 2}}):
        loaded = RecurationCallback(1)
        loaded.load_state_dict(copy.deepcopy(state))
        assert loaded.state_dict() == state
    loaded = RecurationCallback(1)
    loaded.load_state_dict({name: value for name, value in STATE.items() if name != "selection"})
    assert loaded.state_dict()["selection"] is None


@given(st.sampled_from(sorted(STATE)), NAMES | NAMES.map(lambda name: [name]))
@settings(max_examples=300, deadline=None)
def test_a_callback_refuses_what_no_re_curation_writes(field, value):
    """Any value but those of the field's own kind, with one error that names the field."""
    is_count = type(value) is int and 0 <= value < 2**62
    is_right = {
        "best": value is None or type(value) in (int, float),
        "unfinished": value is None,
        "artifacts": isinstance(value, list)
        and all(is_artifact(name, "embeddings|near_duplicates|tree") for name in value),
        "selection": value is None or re.fullmatch("[0-9a-f]{20}", str(value)) is not None,
    }.get(field, is_count)
    callback = RecurationCallback(1)
    if is_right:
        callback.load_state_dict(STATE | {field: value})
        return
    with pytest.raises(CacheError, match=field):
        callback.load_state_dict(STATE | {field: value})
    assert callback.state.artifacts == []
    with pytest.raises(CacheError, match="RecurationCallback"):
        RecurationCallback(1).load_state_dict({name: STATE[name] for name in STATE if name != "artifacts"})


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("name", [*HOSTILE, f"selection/{NAME}"])
def test_no_state_has_anything_removed(place, name, monkeypatch):
    _, cache, _, _ = place
    before = contents(cache.parent)
    guard = Guard(cache, monkeypatch)
    for artifacts in (name, [name], [name] * 2, {name: 1} if isinstance(name, str) else name, [[name]]):
        if artifacts == []:
            continue
        with pytest.raises(CacheError):
            RecurationCallback(1).load_state_dict(STATE | {"artifacts": artifacts})
    assert guard.outside == []
    monkeypatch.undo()
    assert contents(cache.parent) == before


@pytest.mark.parametrize("name", HOSTILE)
def test_a_stream_takes_no_selection_by_a_path(place, name, monkeypatch):
    shards, cache, _, _ = place
    np.save(cache.parent / "victim" / "ids.npy", np.arange(3))
    data = CuratedDataModule(shards, cache_dir=cache, loader={"num_workers": 0})
    state = {"epoch": 0, "batch": 0, "n_trained": 0, "global_batch_size": None, "order": None,
             "selection": None, "next_selection": None}  # fmt: skip
    guard = Guard(cache, monkeypatch)
    for field in state:
        if (name is None and field not in ("epoch", "batch", "n_trained")) or state[field] == name:
            continue
        if (field, type(name)) in (
            ("global_batch_size", int),
            ("order", str),
            ("epoch", int),
            ("batch", int),
        ):
            continue
        if field == "n_trained" and type(name) is int and name >= 0:
            continue
        with pytest.raises(CacheError, match=field):
            data.load_state_dict(state | {field: name})
    assert guard.outside == []


@pytest.mark.long
@pytest.mark.parametrize("artifacts", ["absolute", "climbing", "letters", "selection", "link"])
def test_a_training_checkpoint_has_no_folder_removed(write_pool, tmp_path, artifacts):
    """Plain values in a checkpoint file, as `weights_only` loads them, in a whole run that re-curates."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from tests.support.recuration_runs import SIZES, fit

    shards, cache, victim = write_pool(SIZES), tmp_path / "cache", tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("years of work")
    saving = ModelCheckpoint(tmp_path / "k", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    callbacks = [RecurationCallback(1), saving]
    fit(shards, cache, None, epochs=2, callbacks=callbacks, enable_checkpointing=True)
    path = tmp_path / "k" / "step=6.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (key,) = (key for key in checkpoint["callbacks"] if "Recuration" in key)
    state = checkpoint["callbacks"][key]
    (tmp_path / "cache" / "tree" / NAME).symlink_to(victim)
    state["artifacts"] = {
        "absolute": [str(victim)],
        "climbing": ["../victim", "tree/../../victim"],
        "letters": str(victim),
        "selection": [f"selection/{state['selection']}"],
        "link": [f"tree/{NAME}"],
    }[artifacts]
    torch.save(checkpoint, path)
    before = {found for found in tmp_path.rglob("*") if ".locks" not in found.parts}
    resumed = {"epochs": 3, "callbacks": [RecurationCallback(1)], "ckpt_path": path}
    if artifacts == "link":  # of the right form, so it is looked at, and stays
        fit(shards, cache, None, **resumed)
    else:
        with pytest.raises(CacheError, match="artifacts"):
            fit(shards, cache, None, **resumed)
        assert before <= {found for found in tmp_path.rglob("*") if ".locks" not in found.parts}
    assert (victim / "precious").read_text() == "years of work"
    assert (cache / "selection" / state["selection"]).is_dir()
