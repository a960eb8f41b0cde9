"""A data module's groups of settings, the arguments that they replace, and several pools to evaluate on."""

import pickle
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from curated_data import CuratedDataModule, DecodingOptions, DeviceOptions, LoaderOptions
from curated_data.errors import ConfigError
from curated_data.streaming.device import ResizedCrops
from curated_data.training.options import MOVED
from tests.support.trainers import quiet_trainer

VALUES = {
    "num_workers": 0,
    "eval_batch_size": 3,
    "pin_memory": False,
    "persistent_workers": False,
    "prefetch_factor": 2,
    "multiprocessing_context": "fork",
    "worker_timeout": 5.0,
    "slow_after": 7.0,
    "storage_options": {"anon": True},
    "decoders": {"cls": int},
    "fields": ["label"],
    "min_size": 16,
    "on_error": "skip",
    "max_skipped": 0.5,
    "device_views": ResizedCrops(8),
    "decode_on_device": False,
}


@pytest.mark.parametrize("name", sorted(MOVED))
def test_an_old_argument_works_and_names_its_new_place(write_pool, name):
    group, field = MOVED[name]
    paths = write_pool([4])
    with pytest.warns(DeprecationWarning, match=rf"{name}.*{group}=\w+Options\({field}="):
        old = CuratedDataModule(paths, **{name: VALUES[name]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = CuratedDataModule(paths, **{group: {field: VALUES[name]}})
    assert getattr(old, group) == getattr(new, group)
    with pytest.warns(DeprecationWarning, match=f"{group}.{field}"):
        assert getattr(old, name) == VALUES[name]
    with pytest.warns(DeprecationWarning, match=name):
        setattr(old, name, VALUES[name])
    with pytest.raises(TypeError, match=r"'num_worker'.*'num_workers'"):
        CuratedDataModule(paths, num_worker=1)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: LoaderOptions(num_workers=-1), "loader.num_workers"),
        (lambda: LoaderOptions(num_workers=True), "loader.num_workers"),
        (lambda: LoaderOptions(eval_batch_size=0), "loader.eval_batch_size"),
        (lambda: LoaderOptions(slow_after=float("nan")), "loader.slow_after"),
        (lambda: LoaderOptions(multiprocessing_context="sporn"), "loader.multiprocessing_context"),
        (lambda: DecodingOptions(on_error="ignore"), "decoding.on_error"),
        (lambda: DecodingOptions(max_skipped=2), "decoding.max_skipped"),
        (lambda: DecodingOptions(min_size=0), "decoding.min_size"),
        (lambda: DecodingOptions(decoders={"cls": 3}), "decoders"),
        (lambda: DeviceOptions(views=3), "device.views"),
        (lambda: DeviceOptions(decode=True), "device.decode"),
        (
            lambda: CuratedDataModule("none.tar", loader={"num_worker": 1}),
            "loader, num_worker.*'num_workers'",
        ),
        (lambda: CuratedDataModule("none.tar", loader=3), "loader: .*LoaderOptions"),
        (lambda: CuratedDataModule("none.tar", shuffle="ful"), "shuffle"),
        (lambda: CuratedDataModule("none.tar", seed=0.5), "seed"),
    ],
)
def test_bad_values_are_one_error_each(make, named):
    with pytest.raises(ConfigError, match=f"^{named}"):
        make()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_old_argument_counts_before_its_group(write_pool):
    options = LoaderOptions(num_workers=2, slow_after=3)
    data = CuratedDataModule(write_pool([4]), num_workers=1, loader=options)
    assert data.loader == LoaderOptions(num_workers=1, slow_after=3)


def test_fields_are_checked_against_the_pool(write_pool):
    with pytest.raises(ConfigError, match=r"fields: .*'labels'"):
        CuratedDataModule(write_pool([4]), decoding=DecodingOptions(fields=["labels"]))


class Evaluated(pl.LightningModule):
    """Keeps what it validates and tests on, by the number of the loader."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Linear(1, 1)
        self.seen: dict[tuple[str, int], list[int]] = {}

    def keep(self, step: str, batch: dict, number: int) -> None:
        self.seen.setdefault((step, number), []).extend(batch["sample_id"][~batch["padding"]].tolist())

    def training_step(self, batch, batch_idx):
        return self.weight(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.keep("validate", batch, dataloader_idx)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.keep("test", batch, dataloader_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


@pytest.mark.filterwarnings("ignore")
def test_named_pools_give_a_loader_each(write_pool):
    small, large = write_pool([5], name="small"), write_pool([9], name="large")
    data = CuratedDataModule(
        small, val_pool={"small": small, "large": large}, test_pool=large, batch_size=4, image_size=8,
        loader=LoaderOptions(num_workers=0, eval_batch_size=np.int64(3)),
    )  # fmt: skip
    module = Evaluated()
    quiet_trainer(max_epochs=1, num_sanity_val_steps=0).fit(module, data)
    quiet_trainer().test(module, data)
    assert module.seen == {
        ("validate", 0): list(range(5)),
        ("validate", 1): list(range(9)),
        ("test", 0): list(range(9)),
    }
    assert list(data.val_dataloader()) == ["small", "large"]
    assert list(pickle.loads(pickle.dumps(data)).val_dataloader()) == ["small", "large"]
    with pytest.raises(ConfigError, match="test_pool"):
        CuratedDataModule(small, test_pool={})
    without = CuratedDataModule(small, batch_size=4)
    with pytest.raises(Exception, match="test_dataloader"):
        quiet_trainer().test(module, without)
