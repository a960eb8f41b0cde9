"""What loggers note of a training's data, read back from the files that they wrote."""

import lightning
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from curated_data import Component, CuratedDataModule, Mixture, RecurationCallback
from curated_data.training.hyperparameters import _place
from tests.support.options import grouped
from tests.support.recuration_runs import SIZES, TinyModule, datamodule, fit, to_float

OPTIONS = {
    "devices": 1, "accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


class Saving(TinyModule):
    """A module with hyperparameters, of which one has the name of an argument of the data module."""

    def __init__(self, rate: float, embedder: str):
        super().__init__()
        self.save_hyperparameters()


class Own(CuratedDataModule):
    """A data module with hyperparameters."""

    def __init__(self, crop: int, logs: bool, pool, *arguments, **options):
        super().__init__(pool, *arguments, **options)
        self.save_hyperparameters({"crop": crop}, logger=logs)


def hparams(logger):
    with open(f"{logger.log_dir}/hparams.yaml") as file:
        return yaml.safe_load(file)


def test_settings_and_figures_are_in_hparams_yaml(write_pool, tmp_path):
    logger = CSVLogger(tmp_path / "csv")
    _, data = fit(
        write_pool(SIZES), tmp_path / "c", None, epochs=2, callbacks=[RecurationCallback(1)], logger=logger
    )
    noted = hparams(logger)["curated_data"]
    assert noted["pool"] == {"first": data.pool.urls[0], "last": data.pool.urls[-1]}
    assert (noted["shards"], noted["samples"]) == (3, 64)
    assert noted["embedder"] == "pixels:8"
    assert noted["curation"]["target_size"] == 32
    assert [level["n_clusters"] for level in noted["curation"]["levels"]] == [10, 3]
    assert (
        noted["curation"]["sampling"] == data.base_curation.config.sampling
    )  # resolved, where it was left out
    report = data.base_curation.report
    selection = noted["selection"]
    assert (selection["selected"], selection["share"]) == (32, 0.5)
    assert selection["failed"] == selection["near_duplicates"] == selection["excluded"] == 0
    assert [selection[f"level_{level}"]["n_clusters"] for level in (1, 2)] == [10, 3]
    assert selection["level_1"]["covered"] == report["levels"][0]["covered"]
    assert selection["level_1"]["selected_perplexity"] == pytest.approx(
        report["levels"][0]["selected_perplexity"]
    )


def test_tensorboard_has_them_beside_the_modules_own(write_pool, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plugin = pytest.importorskip("tensorboard.plugins.hparams.metadata")
    logger = TensorBoardLogger(tmp_path / "tb")
    trainer = lightning.Trainer(
        logger=logger, enable_checkpointing=True, default_root_dir=tmp_path, **OPTIONS
    )
    trainer.fit(Saving(0.1, "mine"), datamodule(write_pool(SIZES), tmp_path / "c"))
    noted = hparams(logger)
    assert (noted["rate"], noted["embedder"]) == (0.1, "mine")
    assert noted["curated_data"]["embedder"] == "pixels:8"

    events = accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = plugin.parse_session_start_info_plugin_data(content).hparams
    assert values["curated_data/selection/selected"].number_value == 32
    assert values["curated_data/curation/seed"].number_value == 0
    assert values["rate"].number_value == 0.1

    # Checkpoints have nothing of it: `load_from_checkpoint` would give it to the data module as arguments.
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)
    assert "datamodule_hyper_parameters" not in saved


@pytest.mark.parametrize("logs", [True, False])
def test_a_subclass_may_have_its_own_or_want_none(write_pool, tmp_path, logs):
    logger = CSVLogger(tmp_path / "csv")
    shards = write_pool(SIZES)
    data = Own(4, logs, shards, views=to_float, batch_size=8, **grouped({"num_workers": 0}))
    lightning.Trainer(logger=logger, enable_checkpointing=False, **OPTIONS).fit(TinyModule(), data)
    if logs:
        assert hparams(logger)["crop"] == 4
        assert hparams(logger)["curated_data"]["selection"] == {"selected": 64, "share": 1.0}
    else:
        assert not list((tmp_path / "csv").rglob("hparams.yaml"))
    assert dict(data.hparams) == {"crop": 4}


def test_each_component_of_a_mixture(write_pool, tmp_path):
    shards = write_pool(SIZES)
    curation = {"target_size": 32, "levels": [{"n_clusters": 5}], "include": list(range(30)),
                "embedding": {"num_workers": 0}}  # fmt: skip
    mixture = Mixture(
        [Component("curated", shards, curation=curation), Component("few", shards, selection=[3, 4, 5])],
        weights={0: [3, 1], 100: [1, 1]},
        epoch_size=32,
    )
    data = CuratedDataModule(
        mixture=mixture, embedder="pixels:8", views=to_float, batch_size=8, cache_dir=tmp_path / "c",
        **grouped({"num_workers": 0}),
    )  # fmt: skip
    logger = CSVLogger(tmp_path / "csv")
    lightning.Trainer(logger=logger, enable_checkpointing=False, **OPTIONS).fit(TinyModule(), data)
    noted = hparams(logger)["curated_data"]
    assert noted["mixture"] == {
        "epoch_size": 32,
        "shares": {"batch_0": [0.75, 0.25], "batch_100": [0.5, 0.5]},
    }
    curated, few = noted["components"]["curated"], noted["components"]["few"]
    assert curated["selection"]["selected"] == 32
    assert curated["curation"]["include"] == "30 values"
    assert few["selection"] == {"selected": 3, "share": 3 / 64}
    assert "curation" not in few


@pytest.mark.long
def test_two_ranks_note_them_once(write_pool, tmp_path):
    logger = CSVLogger(tmp_path / "csv", name=None)
    fit(write_pool(SIZES), tmp_path / "c", None, epochs=1, callbacks=[], logger=logger,
        devices=2, strategy="ddp_fork")  # fmt: skip
    files = list((tmp_path / "csv").rglob("hparams.yaml"))
    assert len(files) == 1
    with open(files[0]) as file:
        assert yaml.safe_load(file)["curated_data"]["selection"]["selected"] == 32


def test_urls_are_noted_without_what_is_secret():
    assert _place("https://me:word@host.org:80/a/b.tar?signature=x#y") == "https://host.org:80/a/b.tar"
    assert _place("s3://bucket/a{1}.tar") == "s3://bucket/a{1}.tar"
    assert _place("/a/b?c#d.tar") == "/a/b?c#d.tar"
