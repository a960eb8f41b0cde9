"""However often a run is stopped, and wherever it continues from, it trains what one run trains."""

import contextlib
import random
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from curated_data import RecurationCallback
from tests.support.listing import Interrupted, Listing, expected_stream
from tests.support.recuration_runs import SIZES, TinyModule, datamodule
from tests.support.trainer_runs import data, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class Saving(Checkpoint):
    """Writes a checkpoint at every moment at which one may be written."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, trainer, moment: str) -> None:
        name = f"{moment}-step={trainer.global_step}-{len(list(self.folder.glob('*')))}.ckpt"
        trainer.save_checkpoint(self.folder / name)

    def on_train_batch_end(self, trainer, *_):
        self.save(trainer, "batch")

    def on_validation_end(self, trainer, *_):
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer, *_):
        self.save(trainer, "epoch")

    def on_exception(self, trainer, *_):
        self.save(trainer, "exception")

    def on_train_end(self, trainer, *_):
        self.save(trainer, "end")


class Stopping(lightning.Callback):
    """Stops a run after a batch: by an error, or as EarlyStopping and a Timer do."""

    def __init__(self, how: str, after: int):
        self.how, self.left = how, after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.left -= 1
        if self.left == 0 and self.how == "stop":
            trainer.should_stop = True

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.left == 0 and self.how == "error":
            raise Interrupted


def stopped_runs(rng: random.Random, folder: Path, fit, whole: list, steps_a_batch: int = 1) -> list[str]:
    """Stop and resume until the end, at random; every run must continue as `whole`. Returns what was done."""
    done, path, history = 0, None, []
    for number in range(20):
        how = rng.choice(["max_steps", "error", "stop", "end", "end"] if number < 6 else ["end"])
        after = rng.randint(1, 7)
        more = {"max_steps": done + after} if how == "max_steps" and steps_a_batch == 1 else {}
        kept = folder / str(number)
        trained = fit([Stopping(how, after), Saving(kept)], path, more)
        history.append(f"{how} {after}")
        assert trained == whole[done : done + len(trained)], history
        if how == "end":
            assert done + len(trained) == len(whole), history
            return history
        checkpoints = sorted(kept.glob("*.ckpt"))
        if not checkpoints:
            continue
        path = rng.choice(checkpoints)
        if rng.random() < 0.5:  # more often the last, as users do
            path = max(checkpoints, key=lambda path: n_trained(path))
        done = n_trained(path)
        history.append(f"from {path.name}")
    raise AssertionError("never ended")


def n_trained(path: Path) -> int:
    loops = torch.load(path, weights_only=True)["loops"]["fit_loop"]
    return loops["epoch_loop.batch_progress"]["total"]["processed"]


OPTIONS = {
    "plain": {},
    "validated": {"val": True},
    "validated within epochs": {"val": True, "val_check_interval": 2},
    "limited": {"limit_train_batches": 3, "max_epochs": 5, "val": True},
    "accumulated": {"accumulate_grad_batches": 2},
    "by steps": {"max_steps": 15, "max_epochs": -1, "val": True},
    "by both": {"max_steps": 100, "val": True},
    "estimated": {"estimates": True, "val": True},
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_any_stops_and_resumes_train_what_one_run_trains(folder, tmp_path, options, seed):
    settings = dict(options)
    val = {"val_pool": str(folder / "validation-0.tar")} if settings.pop("val", False) else {}
    estimates = settings.pop("estimates", False)

    def fit(callbacks, path, more):
        module = Listing(estimates=estimates)
        run = trainer(folder, 1, callbacks=callbacks, **(settings | more))
        with contextlib.suppress(Interrupted):
            run.fit(module, data(folder, 1, **val), ckpt_path=path)
        return module.trained

    steps_a_batch = settings.get("accumulate_grad_batches", 1)
    stopped_runs(random.Random(seed), tmp_path, fit, expected_stream(3), steps_a_batch)


def test_resumed_at_an_epochs_last_batch_and_again_within_the_next(folder, tmp_path):
    path = None
    for stop in (5, 7, None):
        kept = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        module = Listing()
        more = {} if stop is None else {"max_steps": stop}
        run = trainer(folder, 1, callbacks=[kept], **more)
        run.fit(module, data(folder, 1), ckpt_path=path)
        path = tmp_path / f"step={stop}.ckpt"
    assert run.global_step == 15
    assert module.trained == expected_stream(3)[7:]
    assert run.current_epoch == 3


@pytest.mark.parametrize("saved", ["batch", "epoch", "end"])
def test_a_run_cut_short_in_its_last_epoch_trains_the_rest_of_it(folder, tmp_path, saved):
    trainer(folder, 1, max_steps=13, callbacks=[Saving(tmp_path)]).fit(Listing(), data(folder, 1))
    (path,) = tmp_path.glob(f"{saved}-step=13-*.ckpt")
    module = Listing()
    run = trainer(folder, 1, max_epochs=3)
    run.fit(module, data(folder, 1), ckpt_path=path)
    assert module.trained == expected_stream(3)[13:]
    assert run.current_epoch == 3


class Noting(TinyModule):
    """Keeps what it saw in memory."""

    def __init__(self):
        super().__init__()
        self.trained: list[list] = []

    def training_step(self, batch, index):
        self.trained.append([self.current_epoch, batch["sample_id"].tolist()])
        return super().training_step(batch, index)

    def validation_step(self, batch, index):
        pass


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{}, {"val": True}, {"limit_train_batches": 3}], ids=str)
def test_re_curated_runs_too(write_pool, tmp_path, options, seed):
    shards, settings = write_pool(SIZES), dict(options)
    validates = settings.pop("val", False)

    def fit(callbacks, path, more):
        lightning.seed_everything(0, verbose=False)
        module = Noting()
        loaded = datamodule(shards, tmp_path / "cache", **({"val_pool": shards} if validates else {}))
        callbacks = [RecurationCallback(every_n_epochs=1, keep_artifacts=True), *callbacks]
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        run = lightning.Trainer(
            max_epochs=3, accelerator="cpu", num_sanity_val_steps=0, callbacks=callbacks,
            enable_checkpointing=len(callbacks) > 1, **quiet, **(settings | more),
        )  # fmt: skip
        with contextlib.suppress(Interrupted):
            run.fit(module, loaded, ckpt_path=path)
        return module.trained

    whole = fit([], None, {})
    assert len(whole) == 3 * settings.get("limit_train_batches", 4)
    stopped_runs(random.Random(seed), tmp_path / "kept", fit, whole)
