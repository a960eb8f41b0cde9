"""What Lightning calls on subclasses and modules: batch hooks, transforms, the Tuner, prediction writers."""

import functools
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.tuner import Tuner
from torch import nn
from torchvision import transforms
from torchvision.transforms import v2

from curated_data import CuratedDataModule
from curated_data.streaming import PerSample
from tests.support.listing import Listing
from tests.support.trainer_runs import N_SAMPLES, SELECTION, data, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class Hooked(CuratedDataModule):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        return batch | {"seen": batch["image"].dtype, "by": "data module"}


class Seeing(Listing):
    def __init__(self):
        super().__init__()
        self.batches: list[dict] = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return super().training_step(batch | {"image": batch["image"].float()}, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.batches.append(batch)


class HookedModule(Seeing):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch | {"seen": batch["image"].dtype, "by": "module"}


HALVED = PerSample(v2.ToDtype(torch.float16))


@pytest.mark.parametrize("device_views", [None, HALVED])
@pytest.mark.parametrize(
    ("kind", "module", "by"),
    [(Hooked, Seeing, "data module"), (CuratedDataModule, HookedModule, "module"),
     (Hooked, HookedModule, "data module")],
)  # fmt: skip
def test_hooks_run_after_the_views_are_made(folder, device_views, kind, module, by):
    loaded = kind(
        str(folder / "pool-{0..2}.tar"), batch_size=8, image_size=8,
        loader={"num_workers": 0}, device={"views": device_views}, val_pool=str(folder / "validation-0.tar"),
    )  # fmt: skip
    module = module()
    trainer(folder, 1, max_epochs=1).fit(module, loaded)
    assert len(module.batches) == N_SAMPLES // 8 + 2
    assert {batch["by"] for batch in module.batches} == {by}
    of_training = torch.float32 if device_views is None else torch.float16
    assert [batch["seen"] for batch in module.batches] == [of_training] * 6 + [torch.float32] * 2


class Grey(nn.Module):
    def forward(self, image):
        return torch.full((1, 2, 2), 0.5)


def grey(image):
    return torch.full((1, 2, 2), 0.5)


def grey_of(image, value=0.5):
    return torch.full((1, 2, 2), value)


class AsMethod:
    def views(self):
        return grey

    eval_transform = views


FORMS = {
    "module": Grey(),
    "function": grey,
    "function with a default": grey_of,
    "partial": functools.partial(grey_of, value=0.5),
    "lambda": lambda image: grey(image),
    "v1": transforms.Compose([Grey()]),
    "v2": v2.Compose([Grey()]),
    "factory": lambda: grey,
    "factory with a default": lambda value=0.5: functools.partial(grey_of, value=value),
    "class": Grey,
    "partial factory": functools.partial(lambda value: functools.partial(grey_of, value=value), 0.5),
}


@pytest.mark.parametrize("form", [*FORMS, "method"])
def test_a_modules_views_are_a_transform_or_make_one(folder, form):
    module = Seeing() if form != "method" else type("WithMethods", (AsMethod, Seeing), {})()
    if form != "method":
        module.views = module.eval_transform = FORMS[form]
    loaded = data(folder, 1, views=None, eval_transform=None, val_pool=str(folder / "validation-0.tar"))
    trainer(folder, 1, max_epochs=1).fit(module, loaded)
    assert len(module.batches) == 5 + 2
    assert all(torch.equal(batch["image"].unique(), torch.tensor([0.5])) for batch in module.batches)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["power", "binsearch"])
@pytest.mark.parametrize("start", [2, 16, 100])
def test_a_search_for_a_batch_size_ends_at_the_selection(folder, mode, start):
    loaded, module = data(folder, 1, val_pool=str(folder / "validation-0.tar")), Seeing()
    run = trainer(folder, 1, max_epochs=1, limit_val_batches=1)
    Tuner(run).scale_batch_size(
        module, datamodule=loaded, mode=mode, init_val=start, steps_per_trial=1, margin=0.0
    )
    assert loaded.batch_size == len(SELECTION)
    module.batches.clear()
    run.fit(module, loaded)
    batch = module.batches[0]
    assert sorted(batch["sample_id"].tolist()) == sorted(SELECTION.tolist())


class Writer(BasePredictionWriter):
    def __init__(self, interval):
        super().__init__(interval)
        self.batches: list = []
        self.epochs: list = []

    def write_on_batch_end(
        self, trainer, module, prediction, batch_indices, batch, batch_idx, dataloader_idx
    ):
        self.batches.append(batch_indices)

    def write_on_epoch_end(self, trainer, module, predictions, batch_indices):
        self.epochs.append(batch_indices)


class Predicting(Seeing):
    def predict_step(self, batch, batch_idx):
        return batch["sample_id"], batch["padding"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_prediction_writers_get_plain_ids(folder, tmp_path, num_workers):
    writer = Writer("batch_and_epoch")
    run = trainer(folder, 1, callbacks=[writer], enable_checkpointing=False)
    predicted = run.predict(Predicting(), data(folder, 1, num_workers=num_workers))
    ((of_epoch,),) = writer.epochs
    for batches in (writer.batches, of_epoch):
        assert all(type(ids) is list and {type(one) for one in ids} == {int} for ids in batches)
        assert [one for ids in batches for one in ids] == list(range(N_SAMPLES))
    torch.save(writer.batches, tmp_path / "ids.pt")
    assert torch.load(tmp_path / "ids.pt", weights_only=True) == writer.batches
    assert torch.cat([ids for ids, _ in predicted]).tolist() == list(range(N_SAMPLES))
    assert not torch.cat([padding for _, padding in predicted]).any()


class Collecting(pl.Callback):
    def __init__(self, folder: Path):
        self.folder = folder

    def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        torch.save(outputs, self.folder / f"{trainer.global_rank}-{batch_idx}.pt")


def test_padding_of_predictions_is_marked_on_ranks(folder, tmp_path):
    """53 samples in global batches of 8: the last rank of the last batch repeats one."""
    run = trainer(folder, 2, callbacks=[Collecting(tmp_path)], enable_checkpointing=False)
    run.predict(Predicting(), data(folder, 2), return_predictions=False)
    parts = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("*.pt"))]
    ids = torch.cat([ids for ids, _ in parts])
    padding = torch.cat([padding for _, padding in parts])
    assert sorted(ids[~padding].tolist()) == list(range(N_SAMPLES))
    assert ids[padding].tolist() == [N_SAMPLES - 1]
