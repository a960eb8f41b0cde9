"""What a curation leaves in the loggers, read back from the files that they wrote."""

import csv

import numpy as np
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from curated_data import CurationLogger, RecurationCallback
from curated_data.errors import ConfigError
from curated_data.selection.metrics import cluster_balance, entropy
from curated_data.training.logging_callback import curation_metrics
from tests.support.images import noise, write_samples
from tests.support.recuration_runs import SIZES, fit


def test_tensorboard_has_numbers_plots_and_the_table(write_pool, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shards = write_pool(SIZES)
    loggers = [TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv", flush_logs_every_n_steps=1)]
    saving = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1)
    callbacks = [CurationLogger(class_names=["a", "b", "c"]), RecurationCallback(1, share=0.5), saving]
    _, data = fit(
        shards, tmp_path / "c", None, epochs=3, callbacks=callbacks, logger=loggers, enable_checkpointing=True
    )
    events = accumulator.EventAccumulator(loggers[0].log_dir, {"images": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    assert [event.step for event in scalars["curation/selected"]] == [0, 4, 8]
    last = cluster_balance(data.curation.tree, data.curation.ids)[0]
    logged = scalars["curation/level_1/selected_perplexity"][-1]
    assert logged.value == pytest.approx(last.selected_perplexity, rel=1e-6)
    labels = data.pool.labels(np.arange(len(data.pool)))
    assert scalars["curation/selected_class_entropy"][-1].value == pytest.approx(
        entropy(np.bincount(labels[data.curation.ids])), rel=1e-6
    )
    assert scalars["curation/fresh"][-1].value == 32
    for name in ("curation/cluster_sizes", "curation/classes"):
        images = events.Images(name)
        assert [image.step for image in images] == [0, 4, 8]
        assert images[0].encoded_image_string.startswith(b"\x89PNG")
        assert images[0].width > 300
    tables = events.Tensors("curation/levels/text_summary")
    assert [table.step for table in tables] == [0, 4, 8]
    lines = tables[0].tensor_proto.string_val[0].decode().splitlines()
    assert len(lines) == 2 + 2
    assert "selected_perplexity" in lines[0]

    with open(f"{loggers[1].log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["curation/selected"]]
    assert [int(row["step"]) for row in rows] == [0, 4, 8]
    assert float(rows[-1]["curation/level_1/covered"]) == pytest.approx(last.covered)

    # A resumed run logs nothing again, and continues with what is new.
    resumed = TensorBoardLogger(tmp_path / "tb2")
    middle = next((tmp_path / "checkpoints").glob("*step=8.ckpt"))
    callbacks = [CurationLogger(), RecurationCallback(1, share=0.5)]
    fit(shards, tmp_path / "c", None, epochs=4, callbacks=callbacks, logger=resumed, ckpt_path=middle)
    again = accumulator.EventAccumulator(resumed.log_dir)
    again.Reload()
    assert [event.step for event in again.Scalars("curation/selected")] == [8, 12]


def test_weights_and_biases_gets_images_and_a_table(write_pool, tmp_path):
    wandb = pytest.importorskip("wandb")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="curation")
    fit(write_pool(SIZES), tmp_path / "c", None, epochs=1, callbacks=[CurationLogger()], logger=logger)
    wandb.finish()
    media = sorted(path.name for path in (tmp_path / "wandb").rglob("media/*/curation/*"))
    assert any(name.startswith("cluster_sizes") and name.endswith(".png") for name in media)
    assert any(name.startswith("levels") and name.endswith(".table.json") for name in media)


def test_metrics_without_labels(write_pool, tmp_path):
    _, data = fit(write_pool(SIZES), tmp_path / "c", None, epochs=1, callbacks=[])
    values = curation_metrics(data.curation)
    assert "curation/class_entropy" not in values
    assert values["curation/selected"] == 32
    assert all(np.isfinite(list(values.values())))
    with pytest.raises(ConfigError, match=r"labels: .*\(64,\).*\(3,\)"):
        fit(write_pool(SIZES), tmp_path / "c", None, epochs=1, callbacks=[CurationLogger(np.zeros(3))])
    with pytest.raises(ConfigError, match=r"^CurationLogger\.labels: .*integers"):
        fit(write_pool(SIZES), tmp_path / "c", None, epochs=1, callbacks=[CurationLogger(np.zeros(64))])


def test_labels_that_only_a_decoder_understands_are_told_once(tmp_path, caplog):
    shards = write_samples(tmp_path / "pool-%d.tar", ({"png": png, "cls": "cat"} for png in noise(64)))
    logger = CSVLogger(tmp_path / "csv", flush_logs_every_n_steps=1)
    callbacks = [CurationLogger(), RecurationCallback(1)]
    changes = {"decoders": {"cls": len}}
    fit(shards, tmp_path / "c", None, epochs=2, callbacks=callbacks, logger=logger, changes=changes)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["curation/selected"]]
    assert len(rows) == 2
    assert "curation/class_entropy" not in rows[0]
    assert caplog.text.count("no figures about classes: ") == 1
