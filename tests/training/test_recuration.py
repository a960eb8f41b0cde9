"""Re-curation in training: a new selection by the model's own features, the same after a stop and on two
ranks.
"""

import logging
import math
import time

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar

from curated_data import CuratedDataModule, RecurationCallback, parallel
from curated_data.errors import CacheError, ConfigError, EmbedderError
from tests.support.recuration_runs import (
    SIZES,
    OneCycle,
    TinyModule,
    by_epoch,
    datamodule,
    fit,
    seen,
    to_float,
)
from tests.support.trainers import quiet_trainer


def test_each_epoch_streams_the_latest_selection(write_pool, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    callback = RecurationCallback(every_n_epochs=1)
    trainer, data = fit(write_pool(SIZES), tmp_path / "cache", tmp_path / "a", epochs=3, callbacks=[callback])
    epochs = by_epoch(seen(tmp_path / "a"))
    assert sorted(epochs) == [0, 1, 2]
    assert all(len(ids) == len(set(ids)) == 32 for ids in epochs.values())
    assert len({tuple(sorted(ids)) for ids in epochs.values()}) == 3
    assert sorted(epochs[2]) == sorted(data.selection)
    assert callback.n_recurations == 2  # none after the last epoch: nothing would be trained on it
    assert "re-curation 2 after epoch 1: 32 samples, Jaccard" in caplog.text
    before, after = set(epochs[1]), set(epochs[2])
    assert float(trainer.callback_metrics["recuration/jaccard"]) == pytest.approx(
        len(before & after) / len(before | after)
    )
    assert trainer.global_step == 12
    # Of the re-curations, only the last one's embeddings stay, beside the first curation's.
    assert len(list((tmp_path / "cache" / "embeddings").iterdir())) == 2


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_modules_in_other_types_re_curate(write_pool, tmp_path, precision):
    callback = RecurationCallback(every_n_epochs=1)
    _, data = fit(
        write_pool(SIZES), tmp_path / "cache", None, epochs=2, callbacks=[callback], precision=precision
    )
    assert callback.n_recurations == 1
    assert data.curation.embeddings.valid.all()


class Bars(TQDMProgressBar):
    """Notes each epoch's length as the bar and the Trainer have it."""

    def __init__(self):
        super().__init__()
        self.lengths: list[tuple[int, int]] = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.lengths.append((self.train_progress_bar.total, trainer.num_training_batches))
        super().on_train_epoch_end(trainer, pl_module)


@pytest.mark.parametrize("max_steps", [-1, 20])
def test_steps_and_bars_follow_a_selection_of_another_size(write_pool, tmp_path, caplog, max_steps):
    """The module's six features find more near-duplicates than the pixels did, so fewer samples are left."""
    lightning.seed_everything(0, verbose=False)
    bars, module = Bars(), OneCycle(str(tmp_path / "a"))
    data = datamodule(write_pool(SIZES), tmp_path / "cache")
    data.curation_config.near_duplicates.enabled = True
    data.curation_config.near_duplicates.threshold = 0.9
    data.curation_config.target_size = 64
    options = {"max_epochs": 3 if max_steps < 0 else -1, "max_steps": max_steps, "enable_progress_bar": True}
    trainer = quiet_trainer(**options, callbacks=[RecurationCallback(1, most=1), bars])
    trainer.fit(module, data)
    epochs = by_epoch(seen(tmp_path / "a"))
    lengths = [len(ids) // 8 for ids in epochs.values()]
    shown, expected = zip(*bars.lengths, strict=True)
    assert shown == expected
    assert shown[0] == 8 > shown[1] > 0
    assert trainer.global_step == sum(lengths) == (20 if max_steps > 0 else 8 + 2 * shown[1])
    assert module.expected == (24 if max_steps < 0 else 20)
    assert ("Set max_steps to fix the number of steps" in caplog.text) == (max_steps < 0)


@pytest.mark.long
def test_a_stop_and_a_resume_change_nothing(write_pool, tmp_path):
    shards = write_pool(SIZES)
    fit(
        shards,
        tmp_path / "c1",
        tmp_path / "whole",
        epochs=4,
        callbacks=[RecurationCallback(every_n_epochs=1)],
    )
    whole = seen(tmp_path / "whole")
    steps_an_epoch = len(whole) // 4
    for stop in (steps_an_epoch, 2 * steps_an_epoch, 2 * steps_an_epoch + 1, 3 * steps_an_epoch + 2):
        record, cache = tmp_path / f"stopped-{stop}", tmp_path / f"c-{stop}"
        saving = lightning.pytorch.callbacks.ModelCheckpoint(
            tmp_path / f"ckpt-{stop}", every_n_train_steps=1, save_top_k=-1, filename="{step}"
        )
        callbacks = [RecurationCallback(every_n_epochs=1), saving]
        fit(shards, cache, record, epochs=4, callbacks=callbacks, max_steps=stop, enable_checkpointing=True)
        assert seen(record) == whole[:stop]
        path = tmp_path / f"ckpt-{stop}" / f"step={stop}.ckpt"
        fit(shards, cache, record, epochs=4, callbacks=[RecurationCallback(every_n_epochs=1)], ckpt_path=path)
        assert seen(record) == whole, f"stopped after step {stop}"


def test_a_stratified_run_resumes_from_before_a_re_curation_that_dropped_its_tree(write_pool, tmp_path):
    shards, changes = write_pool(SIZES), {"stratify_level": 1}
    saving = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path / "ckpt", every_n_train_steps=1, save_top_k=-1, filename="{step}"
    )
    settings = {"epochs": 4, "changes": changes}
    callbacks = [RecurationCallback(every_n_epochs=1), saving]
    fit(
        shards, tmp_path / "c", tmp_path / "whole", callbacks=callbacks, enable_checkpointing=True, **settings
    )
    whole = seen(tmp_path / "whole")
    steps = len(whole) // 4
    for step in (steps + 2, 2 * steps, 3 * steps - 1):
        callbacks, path = [RecurationCallback(every_n_epochs=1)], tmp_path / "ckpt" / f"step={step}.ckpt"
        fit(shards, tmp_path / "c", tmp_path / f"r{step}", callbacks=callbacks, ckpt_path=path, **settings)
        assert seen(tmp_path / f"r{step}") == whole[step:], f"resumed after step {step}"
    for path in (tmp_path / "c" / "streaming").glob("*.npz"):  # clusters of level 1
        path.unlink()
    callbacks = [RecurationCallback(every_n_epochs=1)]
    path = tmp_path / "ckpt" / f"step={steps + 2}.ckpt"
    with pytest.raises(CacheError, match=r"^stratify_level: "):
        fit(shards, tmp_path / "c", None, callbacks=callbacks, ckpt_path=path, **settings)


def test_two_ranks_agree_with_each_other(write_pool, tmp_path):
    shards = write_pool(SIZES)
    callbacks = [RecurationCallback(every_n_epochs=1)]
    ranks = {"devices": 2, "strategy": "ddp_fork"}
    fit(shards, tmp_path / "cache", tmp_path / "ddp", epochs=3, callbacks=callbacks, **ranks)
    ranks = [by_epoch(seen(tmp_path / "ddp", rank)) for rank in (0, 1)]
    selections = set()
    for epoch in range(3):
        joined = ranks[0][epoch] + ranks[1][epoch]
        assert len(joined) == len(set(joined)) == 32
        selections.add(tuple(sorted(joined)))
    assert len(selections) == 3


def test_a_share_embeds_no_more_and_repeats_itself(write_pool, tmp_path, monkeypatch):
    """A third of the samples go through the model; runs, stops and the first curation's marks hold."""
    shards = write_pool(SIZES, bad={(0, 3): b"no image"})
    counted = []
    original = TinyModule.embed

    def embed(self, images):
        counted.append(len(images))
        return original(self, images)

    monkeypatch.setattr(TinyModule, "embed", embed)
    runs = []
    for name in ("a", "b"):
        callback = RecurationCallback(every_n_epochs=1, share=0.34)
        _, data = fit(shards, tmp_path / name, tmp_path / f"r{name}", epochs=3, callbacks=[callback])
        runs.append(seen(tmp_path / f"r{name}"))
    assert runs[0] == runs[1]
    epochs = by_epoch(runs[0])
    assert all(len(ids) == len(set(ids)) == 32 and 3 not in ids for ids in epochs.values())
    assert len({tuple(sorted(ids)) for ids in epochs.values()}) == 3
    n_fresh = math.ceil(0.34 * 63)
    assert sum(counted) == 2 * 2 * n_fresh  # two runs, two re-curations each
    assert data.curation.report["fresh"] == n_fresh
    assert data.curation.embeddings is data.base_curation.embeddings
    # The first curation's rows and tree stay; of the shares', the last one's.
    assert len(list((tmp_path / "b" / "embeddings").iterdir())) == 2
    assert data.base_curation.folders["tree"].exists()


class Unreadable:
    """An embedder that works once, as on a machine that then loses its disk."""

    dimension = 3
    fingerprint = "unreadable"

    def preprocess(self, image):
        return to_float(image)

    def __call__(self, batch):
        raise OSError("the disk is gone")


def test_a_failure_keeps_the_selection_or_stops(write_pool, tmp_path, caplog):
    shards = write_pool(SIZES)
    keep = RecurationCallback(
        every_n_epochs=1, embedder=lambda module: Unreadable(), on_failure="keep", share=0.5
    )
    fit(shards, tmp_path / "cache", tmp_path / "kept", epochs=3, callbacks=[keep])
    epochs = by_epoch(seen(tmp_path / "kept"))
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert "the old selection stays: EmbedderError: Unreadable" in caplog.text
    assert "the disk is gone" in caplog.text
    stop = RecurationCallback(every_n_epochs=1, embedder=lambda module: Unreadable())
    with pytest.raises(EmbedderError, match="the disk is gone"):
        fit(shards, tmp_path / "cache", None, epochs=3, callbacks=[stop])


class _FailsOnRankOne(torch.nn.Module):
    dimension, fingerprint = 3, "fails on rank one"

    def preprocess(self, image):
        return to_float(image)

    def forward(self, batch):
        if parallel.rank() == 1:
            raise OSError("the disk is gone")
        time.sleep(0.3)  # the other rank is in the middle of its work
        return batch.mean((2, 3))


@pytest.mark.long
def test_a_failure_on_one_rank_keeps_the_selection_of_all_or_stops_all(write_pool, tmp_path):
    shards, failed = write_pool(SIZES), []

    def embedder(module):
        failed.append(len(failed) == 0)
        return _FailsOnRankOne() if failed[-1] else module

    ranks = {"devices": 2, "strategy": "ddp_fork"}
    keep = RecurationCallback(every_n_epochs=1, embedder=embedder, on_failure="keep")
    fit(shards, tmp_path / "cache", tmp_path / "kept", epochs=3, callbacks=[keep], **ranks)
    first, second = (by_epoch(seen(tmp_path / "kept", rank)) for rank in (0, 1))
    epochs = [sorted(first[epoch] + second[epoch]) for epoch in range(3)]
    assert epochs[0] == epochs[1] != epochs[2]
    stop = RecurationCallback(every_n_epochs=1, embedder=lambda module: _FailsOnRankOne())
    with pytest.raises(Exception, match="the disk is gone"):
        fit(shards, tmp_path / "other", None, epochs=3, callbacks=[stop], **ranks)


def test_triggers(write_pool, tmp_path):
    shards = write_pool(SIZES)
    cases = [
        (RecurationCallback(every_n_epochs=2), 2),
        (RecurationCallback(every_n_epochs=1, start_epoch=2), 2),
        (RecurationCallback(every_n_epochs=1, most=1), 1),
        (RecurationCallback(every_n_steps=8), 2),
        (
            RecurationCallback(monitor="loss", mode="max", patience=1),
            4,
        ),  # the loss falls, so it never improves
    ]
    for callback, expected in cases:
        fit(shards, tmp_path / "cache", None, epochs=5, callbacks=[callback])
        if callback.monitor:
            assert 1 <= callback.n_recurations <= expected
        else:
            assert callback.n_recurations == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "every_n_epochs, every_n_steps, monitor"),
        ({"every_n_epochs": 1, "every_n_steps": 5}, "every_n_epochs.*every_n_steps"),
        ({"every_n_epochs": 1, "share": 0}, "share: .* 0"),
        ({"every_n_epochs": 0}, "every_n_epochs: .* 0"),
        ({"every_n_epochs": 2.5}, r"every_n_epochs: .*2\.5"),
        ({"every_n_steps": "2"}, "every_n_steps: .*'2'"),
        ({"every_n_epochs": True}, "every_n_epochs: .*True"),
        ({"every_n_epochs": 1, "embedder": "pixels:4"}, "embedder: .*`lambda module: 'pixels:4'`"),
        ({"every_n_epochs": 1, "on_failure": "ignore"}, "on_failure: .*'ignore'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        RecurationCallback(**arguments)
    RecurationCallback(np.int64(2), most=np.int32(3))  # whole numbers of any kind are fine


def test_what_it_needs_of_the_trainer(write_pool, tmp_path):
    shards = write_pool(SIZES)
    with pytest.raises(ConfigError, match=r"'val'.*loss"):
        fit(shards, tmp_path / "c", None, epochs=2, callbacks=[RecurationCallback(monitor="val")])
    trainer = lightning.Trainer(max_epochs=1, callbacks=[RecurationCallback(1)], logger=False,
                                enable_checkpointing=False, accelerator="cpu")  # fmt: skip
    with pytest.raises(ConfigError, match=r" 10 .* 7 "):
        fit(shards, tmp_path / "c", None, epochs=2, callbacks=[RecurationCallback(1, share=0.1)])
    bare = CuratedDataModule(
        shards, selection=np.arange(16), views=to_float, batch_size=8, loader={"num_workers": 0}
    )
    with pytest.raises(ConfigError, match="`curation`"):
        trainer.fit(TinyModule(), bare)
