"""The state of the stream in checkpoints: found under any class name, required, and never trusted."""

import copy
import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from curated_data import CuratedDataModule, RecurationCallback
from curated_data.errors import CacheError, ConfigError, CuratedDataError
from curated_data.streaming.state import checked_state
from tests.support.listing import Listing, Replacing, expected_stream
from tests.support.recuration_runs import SIZES, TinyModule, datamodule
from tests.support.trainer_runs import GLOBAL_BATCH, N_SAMPLES, SELECTION, data, scaled, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def checkpoints(folder, tmp_path_factory) -> Path:
    kept = tmp_path_factory.mktemp("kept")
    saving = ModelCheckpoint(kept, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(folder, 1, callbacks=[saving]).fit(Listing(), data(folder, 1))
    return kept


class Derived(CuratedDataModule):
    pass


class Wrapping(CuratedDataModule):
    """Keeps the state within one of its own, under another name by now."""

    def state_dict(self):
        return {"stream": super().state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict["stream"])


def made(kind, folder, **more) -> CuratedDataModule:
    return kind(
        str(folder / "pool-{0..2}.tar"), selection=SELECTION, batch_size=8, image_size=8,
        loader={"num_workers": 0}, eval_transform=scaled, cache_dir=folder / "cache", **more,
    )  # fmt: skip


@pytest.mark.parametrize("step", [3, 5, 7, 10])
def test_a_derived_or_renamed_class_resumes_the_stream(folder, checkpoints, step):
    module = Listing()
    run = trainer(folder, 1)
    run.fit(module, made(Derived, folder), ckpt_path=checkpoints / f"step={step}.ckpt")
    assert module.trained == expected_stream(3)[step:]
    assert run.global_step == 15


@pytest.mark.parametrize("estimates", [True, False])
def test_a_loop_that_resumes_without_a_state_of_the_stream_is_an_error(
    folder, checkpoints, tmp_path, estimates
):
    saved = torch.load(checkpoints / "step=7.ckpt", weights_only=True)
    state = saved.pop("CuratedDataModule")
    for name, more in (("none", {}), ("two", {"A": state, "B": state}), ("wrapped", {"A": {"s": state}})):
        torch.save(saved | more, tmp_path / f"{name}.ckpt")
        with pytest.raises(ConfigError, match=r"batch 7.*Derived"):
            trainer(folder, 1).fit(
                Listing(estimates=estimates), made(Derived, folder), ckpt_path=tmp_path / f"{name}.ckpt"
            )
    module = Listing()
    torch.save(saved | {"Wrapping": {"stream": state}}, tmp_path / "own.ckpt")
    trainer(folder, 1).fit(module, made(Wrapping, folder), ckpt_path=tmp_path / "own.ckpt")
    assert module.trained == expected_stream(3)[7:]


def test_a_checkpoint_of_a_bare_loader_does_not_resume_a_data_module(folder, tmp_path):
    kept = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(folder, 1, max_steps=2, callbacks=[kept]).fit(Listing(), data(folder, 1).train_dataloader())
    with pytest.raises(ConfigError, match="bare loader"):
        trainer(folder, 1).fit(Listing(), data(folder, 1), ckpt_path=tmp_path / "step=2.ckpt")


GOOD = {
    "selection": None,
    "next_selection": None,
    "epoch": 1,
    "batch": 0,
    "global_batch_size": 8,
    "order": "0" * 20,
    "n_trained": 5,
    "between_epochs": False,
}
HOSTILE = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=30), st.binary(max_size=5),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(["/", "../../etc/passwd", "a" * 20, "A" * 20, "/" + "a" * 19, "a" * 20 + "\n"]),
    st.sampled_from([torch.zeros(0, dtype=torch.int64), torch.zeros(2), torch.tensor(3),
                     torch.tensor([-1]), torch.tensor([1 << 60])]),
)  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(GOOD)), value=HOSTILE)
def test_a_state_of_any_values_is_taken_or_one_clear_error(folder, name, value):
    loaded = data(folder, 1)
    before = sorted(map(str, folder.rglob("*")))
    try:
        loaded.load_state_dict(GOOD | {name: value})
        loaded.train_dataloader()
    except CuratedDataError:
        pass
    else:
        assert checked_state(GOOD | {name: value})
    assert sorted(map(str, folder.rglob("*"))) == before


@pytest.mark.parametrize("state", [None, [], "x", 3, GOOD | {"epoch": -1}, {"epoch": 1}])
def test_what_is_no_state_is_named(folder, state):
    with pytest.raises(CacheError, match="checkpoint's stream"):
        data(folder, 1).load_state_dict(state)


def test_ids_of_another_pool_are_an_error(folder):
    with pytest.raises(ConfigError, match=rf"id {N_SAMPLES}\b"):
        data(folder, 1).load_state_dict(GOOD | {"selection": torch.tensor([0, N_SAMPLES])})


def test_a_fresh_trainer_begins_with_the_first_selection(folder):
    loaded = data(folder, 1)
    ids = np.arange(N_SAMPLES)
    for _ in range(2):
        module = Listing()
        trainer(folder, 1, max_epochs=2, callbacks=[Replacing(ids, 0)]).fit(module, loaded)
        assert module.trained[:5] == expected_stream(1)
        assert len(module.trained) == 5 + N_SAMPLES // GLOBAL_BATCH
    loaded.set_selection(ids[:24])  # outside a run: for all that come
    for _ in range(2):
        module = Listing()
        trainer(folder, 1, max_epochs=1).fit(module, loaded)
        assert sorted(itertools.chain(*module.trained)) == ids[:24].tolist()


def test_re_curated_objects_begin_anew_with_a_fresh_trainer(write_pool, tmp_path):
    loaded, callback = datamodule(write_pool(SIZES), tmp_path / "cache"), RecurationCallback(1)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        module = TinyModule()
        seen = []
        module.training_step = lambda batch, index, module=module, seen=seen: (
            seen.append(batch["sample_id"].tolist()) or TinyModule.training_step(module, batch, index)
        )
        trainer(tmp_path, 1, max_epochs=2, callbacks=[callback]).fit(module, loaded)
        runs.append(seen)
        assert callback.n_recurations == 1
    assert runs[0] == runs[1]


def test_a_copy_of_a_state_stays_as_it_was(folder):
    state = copy.deepcopy(GOOD)
    data(folder, 1).load_state_dict(state)
    assert state == GOOD


def test_logged_figures_need_no_advice_on_ranks(write_pool, tmp_path, caplog, recwarn):
    caplog.set_level(logging.INFO)
    loaded = datamodule(write_pool(SIZES), tmp_path / "cache", batch_size=4)
    callback = RecurationCallback(1)
    run = trainer(tmp_path, 2, max_epochs=2, callbacks=[callback])
    run.fit(TinyModule(), loaded)
    assert "recuration/jaccard" in run.callback_metrics
    assert not [warning for warning in recwarn if "sync_dist" in str(warning.message)]
