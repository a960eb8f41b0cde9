"""The DataModule in stock Trainers: every sample once, on any number of ranks, through any interruption."""

import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger

from curated_data.clustering import Level
from curated_data.config import CurationConfig
from curated_data.errors import ConfigError, PoolError
from curated_data.pool import ShardPool
from curated_data.training.datamodule import CenterCrop, CuratedDataModule
from tests.support.listing import Listing, expected_stream
from tests.support.programs import run_python
from tests.support.trainer_runs import EPOCHS, N_SAMPLES, N_VALIDATION, SELECTION, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


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
    run_python("-m", "tests.support.trainer_runs", folder)
    return Runs(folder)


@pytest.mark.long
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


def test_overfitting_sees_the_same_batches_every_epoch(folder):
    module = Listing()
    trainer(folder, 1, overfit_batches=2).fit(module, data(folder, 1))
    assert len(module.trained) == 2 * EPOCHS
    assert module.trained == [SELECTION[:8].tolist(), SELECTION[8:16].tolist()] * EPOCHS


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
    with pytest.raises(RuntimeError, match="timed out after 1 "):
        next(iter(loaded.train_dataloader()))


def test_curation_runs_once_and_is_found_again(fashion_train, fashion_test, tmp_path):
    def module(**arguments):
        return CuratedDataModule(
            fashion_train[3],
            CurationConfig(target_size=96, levels=[Level(n_clusters=30), Level(n_clusters=5)]),
            embedder=Pixels(),
            cache_dir=tmp_path / "cache",
            batch_size=16,
            loader={"num_workers": 0},
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
  views: {{class_path: curated_data.training.datamodule.CenterCrop, init_args: {{size: 6}}}}
  batch_size: 8
  loader: {{num_workers: 0}}
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


TREE = [{"n_clusters": 3}]
CURATED = {"curation": {"target_size": 5}, "selection": None, "embedder": Pixels()}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"curation": {"target_size": 5}}, "^selection: "),
        ({"curation": {"target_size": 5}, "selection": None}, "^embedder: "),
        (
            {"curation": {"target_size": 5}, "selection": None, "embedder": Pixels(), "cache_dir": None},
            "^cache_dir: ",
        ),
        ({"curation": {"target_sise": 5}, "selection": None}, "target_sise: .*'target_size'"),
        ({"stratify_level": 1}, "^stratify_level: "),
        ({**CURATED, "stratify_level": 1, "shuffle": "block"}, 'stratify_level: .*shuffle="full"'),
        (
            {**CURATED, "curation": {"target_size": 5, "levels": TREE}, "stratify_level": 2},
            "stratify_level: .* 2",
        ),
        ({**CURATED, "embedder": "pixels:2", "stratify_level": 9}, "stratify_level: .* 9"),
        ({"batch_size": 0}, "^batch_size: "),
        ({"batch_size": 2.5}, "^batch_size: "),
        ({"batch_size": True}, "^batch_size: .*True"),
        ({"seed": True}, "^seed: .*True"),
        ({"seed": "a"}, "^seed: .*'a'"),
        ({"num_workers": -1}, "num_workers"),
        ({"eval_batch_size": "8"}, "eval_batch_size"),
        ({"shuffle": "yes"}, "^shuffle: "),
        ({"last_batch": "keep"}, "^last_batch: "),
        ({"on_error": "ignore"}, "on_error"),
        ({"max_skipped": 2}, "max_skipped"),
        ({"decoders": {".": bytes}}, "^decoders: .*'.'"),
        ({"views": "simclr"}, "^views: "),
        ({"selection": np.array([0, 99])}, "id 99 "),
        ({"selection": np.array([-1])}, "id -1"),
        ({"selection": np.array([0.5])}, "^selection: "),
        ({"selection": "no-such-file.npy"}, "no-such-file.npy"),
        ({"selection": np.arange(5)}, "5 .* 8"),
    ],
)
def test_wrong_arguments_are_one_clear_error(folder, arguments, named):
    with pytest.raises(ConfigError, match=named):
        data(folder, 1, **arguments).train_dataloader()


def test_integers_of_numpy_are_integers(folder):
    given = {
        "batch_size": np.int64(4),
        "seed": np.int32(3),
        "num_workers": np.uint8(0),
        "image_size": np.int16(8),
    }
    loaded = data(folder, 1, **given)
    assert all(type(getattr(loaded, name)) is int for name in given if name != "num_workers")
    for ours, plain in zip(
        loaded.train_dataloader(),
        data(folder, 1, **{name: int(value) for name, value in given.items()}).train_dataloader(),
        strict=True,
    ):
        assert ours["sample_id"].tolist() == plain["sample_id"].tolist()


def test_a_missing_pool_is_named():
    with pytest.raises(PoolError, match="nowhere"):
        CuratedDataModule("/nowhere/at-all-*.tar")
