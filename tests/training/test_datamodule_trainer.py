"""The DataModule under the options of a Trainer that users set, and copied, pickled, and in checkpoints."""

import copy
import json
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from curated_data import CuratedDataModule, CurationLogger, RecurationCallback
from tests.support.listing import Listing, expected_stream
from tests.support.programs import run_python
from tests.support.trainer_runs import N_SAMPLES, N_VALIDATION, SELECTION, data, scaled, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class Lister(Listing):
    """Also lists what it validates on and predicts, and what was called."""

    def __init__(self):
        super().__init__()
        self.validated: list[list[int]] = []
        self.predicted: list[int] = []

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch["sample_id"].tolist())

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return batch["sample_id"]


@pytest.fixture
def validated(folder):
    return lambda **more: data(
        folder, 1, val_pool=str(folder / "validation-0.tar"), eval_batch_size=4, **more
    )


ALL_VALIDATION = [list(range(start, min(start + 4, N_VALIDATION))) for start in range(0, N_VALIDATION, 4)]


def test_fast_dev_run_takes_one_batch_and_leaves_no_trace(folder, validated):
    module, loaded = Lister(), validated()
    trainer(folder, 1, fast_dev_run=True).fit(module, loaded)
    assert module.trained == expected_stream(1)[:1]
    assert module.validated == ALL_VALIDATION[:1]
    again = Lister()
    trainer(folder, 1, max_epochs=1).fit(again, loaded)
    assert again.trained == expected_stream(1)


@pytest.mark.parametrize(
    ("options", "epochs", "validations"),
    [
        ({"limit_val_batches": 2}, 2, ALL_VALIDATION[:2] * 2),
        ({"limit_val_batches": 0.5}, 1, ALL_VALIDATION[:2]),
        ({"limit_val_batches": 0}, 1, []),
        ({"num_sanity_val_steps": 2}, 1, ALL_VALIDATION[:2] + ALL_VALIDATION),
        ({"num_sanity_val_steps": -1}, 1, ALL_VALIDATION * 2),
        ({"reload_dataloaders_every_n_epochs": 1}, 3, ALL_VALIDATION * 3),
        ({"reload_dataloaders_every_n_epochs": 2}, 3, ALL_VALIDATION * 3),
        ({"check_val_every_n_epoch": 2}, 3, ALL_VALIDATION),
        ({"accumulate_grad_batches": 3}, 2, ALL_VALIDATION * 2),
        ({"profiler": "simple"}, 1, ALL_VALIDATION),
        ({"use_distributed_sampler": False}, 1, ALL_VALIDATION),
    ],
    ids=str,
)
def test_options_change_nothing_but_what_they_are_for(folder, validated, options, epochs, validations):
    module = Lister()
    trainer(folder, 1, max_epochs=epochs, **options).fit(module, validated())
    assert module.trained == expected_stream(epochs)
    assert module.validated == validations


def test_limit_train_batches_goes_on_where_the_last_epoch_stopped(folder, validated):
    module = Lister()
    trainer(folder, 1, max_epochs=5, limit_train_batches=2).fit(module, validated())
    assert module.trained == expected_stream(2)


def test_overfit_batches_validates_on_as_many(folder, validated):
    module = Lister()
    trainer(folder, 1, max_epochs=2, overfit_batches=1).fit(module, validated())
    assert module.trained == [SELECTION[:8].tolist()] * 2
    assert module.validated == ALL_VALIDATION[:1] * 2


def test_validate_and_predict_read_their_own_pools_and_select_nothing(folder, validated):
    module, loaded = Lister(), validated()
    run = trainer(folder, 1)
    run.validate(module, loaded, verbose=False)
    assert module.validated == ALL_VALIDATION
    assert loaded.selection is None
    predicted = run.predict(module, loaded)
    assert torch.cat(predicted).tolist() == list(range(N_SAMPLES))
    with pytest.raises(MisconfigurationException, match="test_dataloader"):
        run.test(module, loaded)
    run.test(module, loaded.val_dataloader(), verbose=False)
    assert module.validated == ALL_VALIDATION * 2
    run.fit_loop.max_epochs = 1
    run.fit(module, loaded)
    assert module.trained == expected_stream(1)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda loaded: pickle.loads(pickle.dumps(loaded))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("val", [True, False])
def test_a_copy_streams_the_same_and_shares_no_position(folder, validated, how, val):
    original = validated() if val else data(folder, 1)
    copied = COPIES[how](original)
    module = Lister()
    trainer(folder, 1, max_epochs=2).fit(module, copied)
    assert module.trained == expected_stream(2)
    assert module.validated == (ALL_VALIDATION * 2 if val else [])
    module = Lister()
    trainer(folder, 1, max_epochs=1).fit(module, original)
    assert module.trained == expected_stream(1)


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_goes_on_from_a_state_loaded_without_a_trainer(folder, how):
    first = data(folder, 1)
    for _, batch in zip(range(3), first.train_dataloader()):
        del batch
    resumed = data(folder, 1)
    resumed.load_state_dict(first.state_dict())
    module = Listing()
    trainer(folder, 1, max_epochs=1, limit_train_batches=2).fit(module, COPIES[how](resumed))
    assert module.trained == expected_stream(1)[3:]


def test_a_data_module_is_read_back_from_a_checkpoint(folder, tmp_path):
    kept = ModelCheckpoint(tmp_path, every_n_train_steps=3)
    trainer(folder, 1, max_steps=3, max_epochs=-1, callbacks=[kept]).fit(Listing(), data(folder, 1))
    loaded = CuratedDataModule.load_from_checkpoint(
        kept.best_model_path,
        pool=str(folder / "pool-{0..2}.tar"),
        selection=SELECTION,
        batch_size=8,
        loader={"num_workers": 0},
        image_size=8,
    )
    ids = [batch["sample_id"].tolist() for batch in loaded.train_dataloader()]
    assert ids == expected_stream(1)[3:]


class Kept(CuratedDataModule):
    """As users subclass it, to have the settings in the checkpoint."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.save_hyperparameters()


@pytest.mark.parametrize("callback", [CurationLogger, lambda: RecurationCallback(1)])
def test_the_whole_checkpoint_loads_without_pickles(folder, tmp_path, callback):
    class Embedding(Listing):
        def embed(self, images):
            return images.flatten(1)[:, :7]

        def eval_transform(self):
            return scaled

    settings = {
        "pool": str(folder / "pool-{0..2}.tar"),
        "curation": {"target_size": 24, "levels": [{"n_clusters": 5}], "embedding": {"num_workers": 0}},
        "embedder": "pixels:4",
        "cache_dir": str(tmp_path / "cache"),
        "batch_size": 8,
        "loader": {"num_workers": 0},
        "image_size": 8,
    }
    kept = ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(folder, 1, max_epochs=2, callbacks=[kept, callback()])
    module = Embedding()
    module.embedding_dimension = 7
    run.fit(module, Kept(**settings))
    found = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert found["datamodule_hyper_parameters"] == settings
    again = Kept.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.curation_config.levels[0].n_clusters == 5
    module.trained.clear()
    trainer(folder, 1, max_epochs=3, callbacks=[callback()]).fit(
        module, Kept(**settings), ckpt_path=str(tmp_path / "last.ckpt")
    )
    assert len(module.trained) == 3


def test_printing_it_runs_nothing(folder, tmp_path):
    curation = {"target_size": 8, "levels": [{"n_clusters": 4}]}
    loaded = data(
        folder, 1, selection=None, curation=curation, embedder="pixels:4", cache_dir=tmp_path / "cache"
    )
    assert "not set up" in str(loaded)
    assert not (tmp_path / "cache").exists()
    assert "40 samples selected" not in f"{data(folder, 1)}"
    given = data(folder, 1)
    given.setup()
    assert str(given) == repr(given)
    assert "53 samples), 40 samples selected, batch_size=8" in str(given)
    assert "the whole pool" in str(data(folder, 1, selection=None))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_launchers_within_a_script_divide_the_stream(folder, tmp_path, strategy):
    """In a program, as a fork of this process would inherit its threads."""
    program = tmp_path / "program.py"
    program.write_text(LAUNCHED)
    run_python(program, folder, tmp_path, strategy)
    ranks = [
        [json.loads(line)["ids"] for line in (tmp_path / f"run-{rank}.jsonl").read_text().splitlines()]
        for rank in (0, 1)
    ]
    streamed = [
        [sample for pair in zip(*slices, strict=True) for sample in pair]
        for slices in zip(*ranks, strict=True)
    ]
    assert streamed == expected_stream(2)


LAUNCHED = """
import sys
from pathlib import Path
from tests.support.trainer_runs import Recorder, data, trainer

if __name__ == "__main__":
    folder, out, strategy = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    loaded = data(folder, 2, num_workers=1)
    run = trainer(folder, 2, strategy=strategy, max_epochs=2)
    run.fit(Recorder(out, "run"), loaded)
    print(run.state.finished)
"""
