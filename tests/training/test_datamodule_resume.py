"""What a stream goes on with: in a second fit, after a validation, without a Trainer, in a new selection."""

import itertools

import numpy as np
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from curated_data.streaming import EpochOrder
from tests.support.listing import Listing, Replacing, expected_stream
from tests.support.trainer_runs import GLOBAL_BATCH, N_SAMPLES, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


def test_fit_goes_on_in_the_same_trainer_and_starts_over_in_a_new_one(folder):
    module, loaded = Listing(), data(folder, 1)
    first = trainer(folder, 1, max_epochs=1)
    first.fit(module, loaded)
    first.fit_loop.max_epochs = 2
    first.fit(module, loaded)
    assert module.trained == expected_stream(2)
    again = Listing()
    trainer(folder, 1, max_epochs=1).fit(again, loaded)
    assert again.trained == expected_stream(1)


def test_validating_a_checkpoint_does_not_move_the_stream(folder, tmp_path):
    kept = ModelCheckpoint(tmp_path, every_n_train_steps=3)
    trainer(folder, 1, max_steps=3, max_epochs=-1, callbacks=[kept]).fit(Listing(), data(folder, 1))
    loaded = data(folder, 1, val_pool=str(folder / "validation-0.tar"))
    trainer(folder, 1).validate(Listing(), loaded, ckpt_path=kept.best_model_path, verbose=False)
    module = Listing()
    trainer(folder, 1, max_epochs=1).fit(module, loaded)
    assert module.trained == expected_stream(1)


def test_without_a_trainer_the_state_counts_what_was_handed_out(folder):
    loaded = data(folder, 1)
    seen = [batch["sample_id"].tolist() for batch in itertools.islice(loaded.train_dataloader(), 7)]
    assert len(seen) == 5  # an epoch's
    seen += [batch["sample_id"].tolist() for batch in itertools.islice(loaded.train_dataloader(), 3)]
    resumed = data(folder, 1)
    resumed.load_state_dict(loaded.state_dict())
    rest = resumed.train_dataloader()
    seen += [batch["sample_id"].tolist() for batch in rest]
    seen += [batch["sample_id"].tolist() for batch in rest]
    assert seen == expected_stream(3)
    assert len(rest) == 5


@pytest.mark.long
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("at_batch", [None, 2])
def test_a_new_selection_is_streamed_from_the_next_epoch_and_survives_a_resume(
    folder, tmp_path, at_batch, cached
):
    ids = np.arange(N_SAMPLES)[::-1].copy()
    new = EpochOrder(ids, seed=0, batch_size=GLOBAL_BATCH)
    expected = expected_stream(2)
    expected += [new.batches(2, batch, batch + 1)[1].tolist() for batch in range(6)]
    expected += [new.batches(3, batch, batch + 1)[1].tolist() for batch in range(6)]
    cache = {"cache_dir": tmp_path / "cache" if cached else None}
    within = ModelCheckpoint(tmp_path / "within", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    ends = ModelCheckpoint(tmp_path / "ends", filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
    module = Listing()
    run = trainer(folder, 1, max_epochs=4, callbacks=[Replacing(ids, 1, at_batch), within, ends])
    run.fit(module, data(folder, 1, num_workers=1, **cache))
    assert module.trained == expected
    assert run.reload_dataloaders_every_n_epochs == 0
    for name, step in (
        ("within", 9),
        ("within", 10),
        ("ends", 10),
        ("within", 11),
        ("within", 14),
        ("ends", 16),
    ):
        path = tmp_path / name / f"step={step}.ckpt"
        resumed = Listing()
        if at_batch is None and (name, step) == ("within", 10):
            continue  # written before the epoch's end, which Lightning does not run again when it resumes
        callback = [Replacing(ids, 1)] if at_batch is None and step == 9 else []
        trainer(folder, 1, max_epochs=4, callbacks=callback).fit(
            resumed, data(folder, 1, **cache), ckpt_path=str(path)
        )
        assert resumed.trained == expected[step:], step
