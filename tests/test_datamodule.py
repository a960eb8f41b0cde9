"""The DataModule in stock Trainers: every sample once, on any number of ranks, through any interruption."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger

from curated_data.clustering import Level
from curated_data.config import CurationConfig
from curated_data.datamodule import CenterCrop, CuratedDataModule
from curated_data.errors import ConfigError, PoolError
from curated_data.pool import ShardPool
from curated_data.streaming import EpochOrder
from tests.streaming.trainer_runs import (
    EPOCHS,
    GLOBAL_BATCH,
    N_SAMPLES,
    N_VALIDATION,
    SELECTION,
    data,
    trainer,
    write_pool,
)

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore")


def expected_stream(epochs: int = EPOCHS) -> list[list[int]]:
    """The global batches of the test selection, from the order alone."""
    order = EpochOrder(SELECTION, seed=0, batch_size=GLOBAL_BATCH)
    return [
        order.batches(epoch, batch, batch + 1)[1].tolist()
        for epoch in range(epochs)
        for batch in range(order.n_batches)
    ]


class Runs:
    """What `trainer_runs` wrote down."""

    def __init__(self, folder: Path):
        self.folder = folder

    def lines(self, run: str, stage: str = "train") -> list[list[dict[str, Any]]]:
        """By rank."""
        files = sorted(self.folder.glob(f"{run}-[0-9].jsonl"))
        ranks = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        return [[line for line in lines if line["stage"] == stage] for lines in ranks]

    def stream(self, run: str) -> list[list[int]]:
        """The global batches, joined from the ranks' slices."""
        ranks = [[line["ids"] for line in lines] for lines in self.lines(run)]
        return [
            [sample for together in zip(*slices, strict=True) for sample in together]
            for slices in zip(*ranks, strict=True)
        ]

    def real(self, run: str, stage: str) -> list[int]:
        """All samples that are not padding, of all ranks."""
        return [
            sample
            for lines in self.lines(run, stage)
            for line in lines
            for sample, padded in zip(line["ids"], line["padding"], strict=True)
            if not padded
        ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "tests.streaming.trainer_runs", str(folder)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return Runs(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    write_pool(folder, "pool", [20, 1, 32])
    write_pool(folder, "validation", [N_VALIDATION])
    return folder


def test_one_rank_is_given_the_order(runs):
    assert runs.stream("one") == expected_stream()
    assert {line["length"] for line in runs.lines("one")[0]} == {5}
    assert [(line["epoch"], line["index"]) for line in runs.lines("one")[0]] == list(
        itertools.product(range(EPOCHS), range(5))
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_share_the_selection_once_each(runs, workers):
    run = f"two-{workers}"
    assert runs.stream(run) == expected_stream()
    assert sorted(itertools.chain(*runs.stream(run)[:5])) == sorted(SELECTION)
    for lines in runs.lines(run):
        assert len(lines) == 5 * EPOCHS
        assert {line["length"] for line in lines} == {5}
        assert {line["sampler"] for line in lines} == {"GlobalBatchSampler"}


def test_views_do_not_depend_on_ranks_or_workers(runs):
    def views(run):
        seen = {}
        for lines in runs.lines(run):
            for number, line in enumerate(lines):
                for sample, total in zip(line["ids"], line["sum"], strict=True):
                    seen.setdefault((number, sample), []).append(total)
        return {key: sorted(totals) for key, totals in seen.items()}

    assert views("one") == views("two-0") == views("two-2")


def test_validation_gives_every_sample_once(runs):
    for run in ("one", "two-0", "two-2"):
        assert sorted(runs.real(run, "validate")) == sorted(list(range(N_VALIDATION)) * EPOCHS)
        per_rank = [[len(line["ids"]) for line in lines] for lines in runs.lines(run, "validate")]
        assert all(sizes == per_rank[0] for sizes in per_rank)
    assert not any(any(line["padding"]) for line in runs.lines("one", "validate")[0])


def test_prediction_covers_the_pool_once(runs):
    assert sorted(runs.real("predict-2", "predict")) == list(range(N_SAMPLES))


def test_a_padded_last_batch_loses_no_sample(runs):
    assert sorted(runs.real("padded", "train")) == list(range(N_SAMPLES))
    assert [len(line["ids"]) for line in runs.lines("padded")[0]] == [4] * 7


@pytest.mark.parametrize("run", ["from-2-to-1", "from-1-to-2"])
def test_training_resumes_on_another_number_of_ranks(runs, run):
    assert runs.stream(f"{run}-first")[:7] + runs.stream(run) == expected_stream()


def test_sigterm_loses_nothing(runs):
    first, resumed = runs.stream("sigterm-first"), runs.stream("sigterm")
    assert first + resumed == expected_stream()
    assert 0 < len(first) < len(expected_stream())


def test_sigkill_goes_back_to_the_last_checkpoint(runs):
    assert os.WTERMSIG(int((runs.folder / "sigkill.status").read_text())) == signal.SIGKILL
    first, resumed = runs.stream("sigkill-first"), runs.stream("sigkill")
    assert len(first) == 8
    assert first[:6] + resumed == expected_stream()


class Interrupted(Exception):
    pass


class Listing(pl.LightningModule):
    """Lists what it trained on, in this process; may fail at a batch."""

    def __init__(self, fail_at: int | None = None, estimates: bool = False):
        super().__init__()
        self.weight = torch.nn.Linear(1, 1)
        self.trained: list[list[int]] = []
        self.fail_at = fail_at
        self.estimates = estimates  # which asks for the loader before the loops are restored

    def training_step(self, batch, batch_idx):
        if self.fail_at is not None and len(self.trained) == self.fail_at:
            raise Interrupted
        self.trained.append(batch["sample_id"].tolist())
        return self.weight(batch["image"].mean().view(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        if self.estimates:
            self.trainer.estimated_stepping_batches  # noqa: B018
        return torch.optim.SGD(self.parameters(), 1e-3)


STEPS = {"max_steps": 15, "max_epochs": -1}
ENDS = {  # how a run ends, what it saves, and how it is taken up again
    "max_steps in an epoch": ({"max_steps": 4}, {"every_n_train_steps": 2}, {}),
    "max_steps at an epoch's end": ({"max_steps": 5}, {"every_n_epochs": 1}, {}),
    "max_steps, saved as an epoch": ({"max_steps": 7}, {"save_on_train_epoch_end": True}, STEPS),
    "steps to steps": ({"max_steps": 10}, {"every_n_train_steps": 1}, STEPS),
    "epochs": ({"max_epochs": 2}, {"every_n_epochs": 1}, {}),
    "saved after validation": ({"max_epochs": 2, "val": True}, {"every_n_epochs": 1}, {}),
    "validation within epochs": (
        {"max_epochs": 2, "val": True, "val_check_interval": 2},
        {},
        {"val": True, "val_check_interval": 2},
    ),
    "an exception": ({"fail_at": 8}, {"save_on_exception": True}, {}),
    "accumulated gradients": (
        {"max_steps": 3, "accumulate_grad_batches": 2},
        {"every_n_train_steps": 1},
        {"accumulate_grad_batches": 2},
    ),
    "limited epochs": (
        {"limit_train_batches": 3, "max_epochs": 2},
        {"every_n_train_steps": 2},
        {"limit_train_batches": 3, "max_epochs": 5},
    ),
}


@pytest.mark.parametrize(("first", "saving", "then"), ENDS.values(), ids=ENDS.keys())
def test_every_checkpoint_resumes_at_the_next_sample(folder, tmp_path, first, saving, then):
    first, then = dict(first), dict(then)
    kept = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, **saving)
    module = Listing(first.pop("fail_at", None))
    arguments = {"max_epochs": -1 if "max_steps" in first else EPOCHS, "callbacks": [kept]}
    val = {"val_pool": str(folder / "validation-0.tar")}
    loaded = data(folder, 1, **(val if first.pop("val", False) else {}))
    if module.fail_at is None:
        trainer(folder, 1, **{**arguments, **first}).fit(module, loaded)
    else:
        with pytest.raises(Interrupted):
            trainer(folder, 1, **{**arguments, **first}).fit(module, loaded)
    checkpoints = sorted((tmp_path / "kept").glob("*.ckpt"))
    assert checkpoints
    expected = expected_stream(6)
    assert module.trained == expected[: len(module.trained)]
    val = val if then.pop("val", False) else {}
    for path in checkpoints:
        state = torch.load(path, weights_only=True)["CuratedDataModule"]
        done = state["epoch"] * 5 + state["batch"]
        assert 0 < done <= len(module.trained)
        resumed = Listing()
        trainer(folder, 1, **then).fit(resumed, data(folder, 1, **val), ckpt_path=str(path))
        assert resumed.trained == expected[done : done + len(resumed.trained)]
        assert done + len(resumed.trained) == 15


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


def test_overfitting_sees_the_same_batches_every_epoch(folder):
    module = Listing()
    trainer(folder, 1, overfit_batches=2).fit(module, data(folder, 1))
    assert len(module.trained) == 2 * EPOCHS
    assert module.trained == [SELECTION[:8].tolist(), SELECTION[8:16].tolist()] * EPOCHS


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


@pytest.mark.parametrize("shuffle", ["full", "block", "none"])
@pytest.mark.parametrize("last_batch", ["pad", "short"])
def test_every_shuffle_streams_the_selection_once(folder, shuffle, last_batch):
    loaded = data(folder, 1, shuffle=shuffle, last_batch=last_batch, batch_size=7, num_workers=1)
    loader = loaded.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 6
    ids = torch.cat([batch["sample_id"][~batch["padding"]] for batch in batches]).numpy()
    assert np.array_equal(np.sort(ids), np.sort(SELECTION))
    assert (ids.tolist() == SELECTION.tolist()) == (shuffle == "none")
    assert [len(batch["sample_id"]) for batch in batches] == [7] * 5 + [7 if last_batch == "pad" else 5]


@pytest.mark.slow
def test_a_worker_that_hangs_is_an_error(folder):
    loaded = data(folder, 1, views=lambda image: time.sleep(120), num_workers=1, worker_timeout=1)
    with pytest.raises(RuntimeError, match="timed out after 1 seconds"):
        next(iter(loaded.train_dataloader()))


class Replacing(pl.Callback):
    """Gives the data module a new, longer selection at the end of an epoch."""

    def __init__(self, ids: np.ndarray, epoch: int, at_batch: int | None = None):
        self.ids, self.epoch, self.at_batch = ids, epoch, at_batch

    def on_train_epoch_end(self, trainer, module):
        if self.at_batch is None and trainer.current_epoch == self.epoch:
            trainer.datamodule.set_selection(self.ids)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.at_batch is not None and (trainer.current_epoch, batch_idx) == (self.epoch, self.at_batch):
            trainer.datamodule.set_selection(self.ids)


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


def test_curation_runs_once_and_is_found_again(fashion_train, fashion_test, tmp_path):
    def module(**arguments):
        return CuratedDataModule(
            fashion_train[3],
            CurationConfig(target_size=96, levels=[Level(n_clusters=30), Level(n_clusters=5)]),
            embedder=Pixels(),
            cache_dir=tmp_path / "cache",
            batch_size=16,
            num_workers=0,
            image_size=8,
            **arguments,
        )

    curated = module(val_pool=fashion_test, eval_batch_size=500, stratify_level=2)
    curated.setup("fit")
    assert len(curated.selection) == len(curated.curation.ids) == 96
    batches = list(curated.train_dataloader())
    assert len(batches) == 6
    assert batches[0]["image"].shape == (16, 3, 8, 8)
    ids = torch.cat([batch["sample_id"] for batch in batches]).numpy()
    assert np.array_equal(np.sort(ids), np.sort(curated.selection))
    labels = torch.cat([batch["label"] for batch in batches]).numpy()
    assert np.array_equal(labels, ShardPool(fashion_train[3]).labels(ids))
    clusters = curated.curation.tree.assignment(2)[curated.selection]
    largest = np.bincount(clusters).argmax()
    per_batch = [
        (curated.curation.tree.assignment(2)[batch["sample_id"].numpy()] == largest).sum()
        for batch in batches
    ]
    assert max(per_batch) - min(per_batch) <= 2
    assert sum(len(batch["sample_id"]) for batch in curated.val_dataloader()) == 1500
    curated.setup("fit")  # a look-up in the object
    again = module()
    again.setup()
    assert again.curation.report["cached"]["tree"]
    assert np.array_equal(again.selection, curated.selection)


class Pixels(torch.nn.Module):
    """An embedder of 4 x 4 pixels."""

    dimension = 16

    def preprocess(self, image: torch.Tensor) -> torch.Tensor:
        return image[:1].float().unfold(1, 7, 7).unfold(2, 7, 7).mean(dim=(-1, -2)).flatten() / 255

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


def test_views_come_from_the_module_that_is_trained(folder):
    class WithViews(Listing):
        def views(self):
            return lambda image: [image.float() / 255, image.float()[:, :4, :4]]

        def eval_transform(self):
            return lambda image: image.float().mean().view(1)

        def training_step(self, batch, batch_idx):
            assert [tuple(view.shape) for view in batch["views"]] == [(8, 3, 8, 8), (8, 3, 4, 4)]
            return self.weight(batch["views"][0].mean().view(1, 1)).sum()

        def validation_step(self, batch, batch_idx):
            assert batch["image"].shape[1:] == (1,)

    loaded = data(folder, 1, views=None, eval_transform=None, val_pool=str(folder / "validation-0.tar"))
    trainer(folder, 1, max_epochs=1).fit(WithViews(), loaded)


def test_stock_callbacks_and_loggers(folder, tmp_path):
    class Logged(Listing):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, on_epoch=True)
            return loss

        def on_train_epoch_start(self):
            self.log("seen", float(len(self.trained)))

    callbacks = [LearningRateMonitor(), ModelCheckpoint(tmp_path, monitor="loss", save_last=True)]
    run = trainer(
        folder, 1, max_epochs=2, callbacks=callbacks, logger=CSVLogger(tmp_path), log_every_n_steps=1,
        val_check_interval=0.5, num_sanity_val_steps=2,
    )  # fmt: skip
    run.fit(Logged(), data(folder, 1, val_pool=str(folder / "validation-0.tar")))
    assert (tmp_path / "last.ckpt").exists()
    assert run.estimated_stepping_batches == 10


def test_from_lightning_cli(folder, tmp_path):
    config = tmp_path / "config.yaml"
    ids = tmp_path / "ids.npy"
    np.save(ids, SELECTION)
    config.write_text(
        f"""
data:
  pool: {folder}/pool-{{0..2}}.tar
  selection: {ids}
  val_pool: [{folder}/validation-0.tar]
  views: {{class_path: curated_data.datamodule.CenterCrop, init_args: {{size: 6}}}}
  batch_size: 8
  num_workers: 0
  cache_dir: {tmp_path}/cache
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
"""
    )
    cli = LightningCLI(
        Listing, CuratedDataModule, args=["fit", "--config", str(config)], save_config_callback=None
    )
    assert cli.model.trained == expected_stream(1)
    assert cli.datamodule.views == CenterCrop(6)
    curated = tmp_path / "curated.yaml"
    curated.write_text(
        f"""
data:
  pool: {folder}/pool-0.tar
  curation: {{target_size: 8, levels: [{{n_clusters: 4}}]}}
  embedder: torchvision:resnet18
  cache_dir: {tmp_path}/cache
"""
    )
    cli = LightningCLI(
        Listing, CuratedDataModule, args=["--config", str(curated)], run=False, save_config_callback=None
    )
    assert cli.datamodule.curation_config.target_size == 8
    assert cli.datamodule.curation_config.levels[0].n_clusters == 4


CURATED = {"curation": {"target_size": 5}, "selection": None, "embedder": Pixels()}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"curation": {"target_size": 5}}, "selection: given together"),
        ({"curation": {"target_size": 5}, "selection": None}, "embedder"),
        (
            {"curation": {"target_size": 5}, "selection": None, "embedder": Pixels(), "cache_dir": None},
            "cache_dir",
        ),
        ({"curation": {"target_sise": 5}, "selection": None}, "target_size"),
        ({"stratify_level": 1}, "stratify_level"),
        (
            {**CURATED, "stratify_level": 1, "shuffle": "block"},
            'stratify_level: takes shuffle="full"',
        ),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"seed": "a"}, "seed: expected an integer, found 'a'"),
        ({"num_workers": -1}, "num_workers"),
        ({"eval_batch_size": "8"}, "eval_batch_size"),
        ({"shuffle": "yes"}, "shuffle"),
        ({"last_batch": "keep"}, "last_batch"),
        ({"on_error": "ignore"}, "on_error"),
        ({"max_skipped": 2}, "max_skipped"),
        ({"views": "simclr"}, "views"),
        ({"selection": np.array([0, 99])}, "id 99 is not in the pool"),
        ({"selection": np.array([-1])}, "id -1"),
        ({"selection": np.array([0.5])}, "selection"),
        ({"selection": "no-such-file.npy"}, "no-such-file.npy"),
        ({"selection": np.arange(5)}, "do not fill one global batch of 8"),
    ],
)
def test_wrong_arguments_are_one_clear_error(folder, arguments, named):
    with pytest.raises(ConfigError, match=named):
        data(folder, 1, **arguments).train_dataloader()


def test_a_missing_pool_is_named():
    with pytest.raises(PoolError, match="nowhere"):
        CuratedDataModule("/nowhere/at-all-*.tar")


def test_the_loader_given_by_hand_to_a_distributed_trainer_is_not_cut_twice(folder):
    """Lightning then cannot rebuild the sampler: a clear error is better than wrong shares."""
    loaded = data(folder, 1)
    sampler = loaded.train_dataloader().batch_sampler
    with pytest.raises(TypeError):
        type(sampler)(range(4), batch_size=8, drop_last=True)
