"""What a run resumes as in the corners: strategies that restore late, limited epochs, extended runs."""

import copy
import itertools
import pickle

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner

from curated_data import RecurationCallback
from curated_data.streaming import EpochOrder
from tests.support.listing import Listing, Replacing, expected_stream
from tests.support.recuration_runs import SIZES, OneCycle, TinyModule, datamodule, seen
from tests.support.trainer_runs import GLOBAL_BATCH, N_SAMPLES, data, trainer
from tests.support.trainers import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class LateStrategy(SingleDeviceStrategy):
    """Restores checkpoints when all is set up, as FSDP, ModelParallel and DeepSpeed do."""

    @property
    def restore_checkpoint_after_setup(self):
        return True


@pytest.mark.long
@pytest.mark.parametrize("step", [3, 5, 7])
@pytest.mark.parametrize("estimates", [False, True])
def test_strategies_that_restore_late_resume_at_the_next_sample(folder, tmp_path, step, estimates):
    kept = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(folder, 1, max_epochs=2, callbacks=[kept]).fit(Listing(), data(folder, 1))
    module = Listing(estimates=estimates)
    late = trainer(folder, 1, strategy=LateStrategy(torch.device("cpu")))
    late.fit(module, data(folder, 1, num_workers=1), ckpt_path=str(tmp_path / f"step={step}.ckpt"))
    assert module.trained == expected_stream()[step:]


class Rated(Listing):
    """With a learning rate to find."""

    lr = 1e-3

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def test_a_search_for_a_learning_rate_leaves_the_stream_where_it_was(folder, tmp_path):
    kept = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module, loaded, run = Rated(), data(folder, 1), trainer(folder, 1, callbacks=[kept])
    Tuner(run).lr_find(module, datamodule=loaded, num_training=12, early_stop_threshold=None)
    assert len(module.trained) == 12
    module.trained.clear()
    run.fit(module, loaded)
    assert module.trained == expected_stream()
    resumed = Rated()
    trainer(folder, 1).fit(resumed, data(folder, 1), ckpt_path=str(tmp_path / "step=8.ckpt"))
    assert resumed.trained == expected_stream()[8:]


@pytest.mark.parametrize("at_batch", [None, 2])
def test_a_limited_epoch_is_followed_by_the_next_selection(folder, tmp_path, at_batch):
    """Three of five batches an epoch; a longer selection from the second epoch on."""
    ids = np.arange(N_SAMPLES)
    new = EpochOrder(ids, seed=0, batch_size=GLOBAL_BATCH)
    expected = expected_stream()[:3] + [
        new.batches(1, batch, batch + 1)[1].tolist() for batch in range(new.n_batches)
    ]
    within = ModelCheckpoint(tmp_path, filename="within-{step}", save_top_k=-1, every_n_train_steps=1)
    ends = ModelCheckpoint(tmp_path, filename="ends-{step}", save_top_k=-1, save_on_train_epoch_end=True)
    module, limited = Listing(), {"limit_train_batches": 3, "max_epochs": 3}
    callbacks = [Replacing(ids, 0, at_batch), within, ends]
    trainer(folder, 1, callbacks=callbacks, **limited).fit(module, data(folder, 1))
    assert module.trained == expected
    for name in ["ends-step=3", "within-step=4", "ends-step=6"] + ["within-step=3"] * (at_batch == 2):
        resumed = Listing()
        path, step = str(tmp_path / f"{name}.ckpt"), int(name[-1])
        trainer(folder, 1, **limited).fit(resumed, data(folder, 1), ckpt_path=path)
        assert resumed.trained == expected[step:], name


def test_a_checkpoint_of_the_first_selection_brings_it_back(folder, tmp_path):
    """Into a data module that streams another by now."""
    kept = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    loaded = data(folder, 1)
    callbacks = [Replacing(np.arange(N_SAMPLES), 0), kept]
    trainer(folder, 1, max_epochs=2, callbacks=callbacks).fit(Listing(), loaded)
    for step in (2, 5):
        module = Listing()
        run = trainer(folder, 1, max_epochs=2)
        run.fit(module, loaded, ckpt_path=str(tmp_path / f"step={step}.ckpt"))
        assert module.trained == expected_stream(2)[step:]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda loaded: pickle.loads(pickle.dumps(loaded))])
def test_a_copy_without_a_validation_pool_trains(folder, duplicate):
    loaded = duplicate(data(folder, 1, eval_transform=None))
    module = Listing()
    trainer(folder, 1, max_epochs=1).fit(module, loaded)
    assert module.trained == expected_stream(1)


def fit(shards, cache, record, callbacks, *, module=TinyModule, ckpt_path=None, changes=None, **options):
    """A training that re-curates after every epoch, unless `callbacks` say otherwise."""
    lightning.seed_everything(0, verbose=False)
    settings = {"max_epochs": 3, "accelerator": "cpu", "devices": 1, "logger": False,
                "enable_progress_bar": False, "enable_model_summary": False,
                "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)}  # fmt: skip
    if options.get("strategy") == "late":
        options["strategy"] = LateStrategy(torch.device("cpu"))
    run = lightning.Trainer(callbacks=callbacks, **(settings | options))
    run.fit(module(str(record)), datamodule(shards, cache, **(changes or {})), ckpt_path=ckpt_path)
    return seen(record)


def keeping(folder):
    """Checkpoints of every kind of moment."""
    within = ModelCheckpoint(folder, filename="within-{step}", save_top_k=-1, every_n_train_steps=1)
    ends = ModelCheckpoint(folder, filename="ends-{step}", save_top_k=-1, save_on_train_epoch_end=True)
    return [within, ends]


@pytest.mark.parametrize(
    ("options", "changes", "module"),
    [
        ({"limit_train_batches": 3}, {}, TinyModule),
        ({"limit_train_batches": 3}, {}, OneCycle),
        ({}, {"stratify_level": 2}, OneCycle),
        ({"strategy": "late"}, {}, OneCycle),
    ],
    ids=["limited", "limited, estimated", "stratified", "late"],
)
def test_every_checkpoint_of_a_recurated_run_goes_on_as_it_did(
    write_pool, tmp_path, options, changes, module
):
    shards, cache = write_pool(SIZES), tmp_path / "cache"
    how = {"module": module, "changes": changes, **options}

    def recurates():
        return RecurationCallback(every_n_epochs=1, keep_artifacts=True)

    whole = fit(shards, cache, tmp_path / "whole", [recurates(), *keeping(tmp_path / "kept")], **how)
    n = len(whole) // 3
    moments = [("within", n - 1), ("within", n), ("ends", n), ("within", n + 1), ("within", 2 * n)]
    for name, step in moments:
        path = tmp_path / "kept" / f"{name}-step={step}.ckpt"
        rest = fit(shards, cache, tmp_path / path.stem, [recurates()], ckpt_path=str(path), **how)
        assert rest == whole[step:], path.stem


@pytest.mark.parametrize("limit", ["max_epochs", "max_steps"])
def test_a_run_that_is_extended_makes_up_for_the_recuration_it_ended_with(write_pool, tmp_path, limit):
    shards, cache = write_pool(SIZES), tmp_path / "cache"
    whole = fit(shards, cache, tmp_path / "whole", [RecurationCallback(every_n_epochs=1)])
    n = len(whole) // 3
    short = {"max_epochs": 1} if limit == "max_epochs" else {"max_epochs": -1, "max_steps": n}
    callback = RecurationCallback(every_n_epochs=1)
    first = fit(shards, cache, tmp_path / "first", [callback, *keeping(tmp_path / "kept")], **short)
    assert first == whole[:n]
    assert callback.n_recurations == 0  # nothing would have been trained on it
    for name in ("within", "ends"):
        path = tmp_path / "kept" / f"{name}-step={n}.ckpt"
        callback = RecurationCallback(every_n_epochs=1)
        rest = fit(shards, cache, tmp_path / name, [callback], ckpt_path=str(path))
        assert rest == whole[n:]
    # The same objects in a Trainer of their own begin again, and owe nothing.
    again = fit(shards, cache, tmp_path / "again", [callback], max_epochs=1)
    assert again == whole[:n]


def test_the_same_trainer_makes_up_for_it_too(write_pool, tmp_path):
    shards, cache = write_pool(SIZES), tmp_path / "cache"
    whole = fit(shards, cache, tmp_path / "whole", [RecurationCallback(every_n_epochs=1)], max_epochs=2)
    lightning.seed_everything(0, verbose=False)
    module, loaded = TinyModule(str(tmp_path / "twice")), datamodule(shards, cache)
    run = quiet_trainer(max_epochs=1, callbacks=[RecurationCallback(1)])
    run.fit(module, loaded)
    run.fit_loop.max_epochs = 2
    run.fit(module, loaded)
    assert seen(tmp_path / "twice") == whole


class Odd(TinyModule):
    """Logs a metric that gets worse on the first rank and better on the second, where it is not sought."""

    def on_train_epoch_end(self):
        pass

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        sign = 1 if self.global_rank == 0 else -1
        self.log("odd", torch.tensor(float(self.current_epoch) * sign))
        return loss


def test_ranks_that_log_unlike_values_recurate_alike(write_pool, tmp_path):
    options = {"devices": 2, "strategy": "ddp_fork"}
    callback = RecurationCallback(monitor="odd", patience=1)
    fit(write_pool(SIZES), tmp_path / "cache", tmp_path / "odd", [callback], module=Odd, **options)
    ranks = [seen(tmp_path / "odd", rank) for rank in (0, 1)]
    epochs = [
        sorted(itertools.chain(*(ids for lines in ranks for at, ids in lines if at == epoch)))
        for epoch in range(3)
    ]
    assert all(len(set(ids)) == 32 for ids in epochs)
    assert epochs[0] == epochs[1] != epochs[2]  # worse after the second epoch, for the first time


def test_a_metric_that_is_not_a_number_is_no_best(write_pool, tmp_path):
    class Diverging(TinyModule):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            self.log("late", torch.tensor(float("nan") if self.current_epoch == 0 else -self.current_epoch))
            return loss

    callback = RecurationCallback(monitor="late", patience=2)
    shards = write_pool(SIZES)
    fit(shards, tmp_path / "cache", tmp_path / "a", [callback], module=Diverging, max_epochs=5)
    assert callback.n_recurations == 0
