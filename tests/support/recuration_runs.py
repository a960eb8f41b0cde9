"""Small trainings that re-curate, and what they saw."""

import json
from pathlib import Path

import lightning
import torch
from torch import nn

from curated_data import CuratedDataModule
from tests.support.options import grouped

SIZES = [30, 20, 14]


class TinyModule(lightning.LightningModule):
    """A linear map of 8 x 8 images, with BatchNorm, trained to spread its features; notes which samples it
    saw.
    """

    def __init__(self, record: str | None = None):
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.BatchNorm1d(6))
        self.record = record
        self.embedding_dimension = 6

    def embed(self, images):
        return self.network(images)

    def eval_transform(self):
        return to_float

    def training_step(self, batch, index):
        if self.record:
            with open(f"{self.record}-{self.global_rank}.jsonl", "a") as file:
                file.write(json.dumps([self.current_epoch, batch["sample_id"].tolist()]) + "\n")
        features = self.network(batch["image"])
        loss = -features.var(0).log().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def to_float(image):
    """uint8 to 0..1."""
    return image.float() / 255


def datamodule(shards, cache, **changes):
    settings = {
        "embedder": "pixels:8",
        "views": to_float,
        "batch_size": 8,
        "num_workers": 0,
        "cache_dir": cache,
        "last_batch": "drop",
    }
    curation = {
        "target_size": 32,
        "levels": [{"n_clusters": 10}, {"n_clusters": 3}],
        "embedding": {"num_workers": 0, "dtype": "float32"},
    }
    return CuratedDataModule(shards, curation, **grouped(settings | changes))


def fit(shards, cache, record, *, epochs, callbacks, ckpt_path=None, changes=None, **options):
    lightning.seed_everything(0, verbose=False)
    settings = {"devices": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
                "enable_model_summary": False, "enable_checkpointing": False}  # fmt: skip
    settings |= options
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=callbacks, **settings)
    data = datamodule(shards, cache, **(changes or {}))
    trainer.fit(TinyModule(record and str(record)), data, ckpt_path=ckpt_path)
    return trainer, data


def seen(record, rank=0):
    lines = Path(f"{record}-{rank}.jsonl").read_text().splitlines()
    return [(epoch, ids) for epoch, ids in map(json.loads, lines)]


def by_epoch(batches):
    found: dict[int, list[int]] = {}
    for epoch, ids in batches:
        found.setdefault(epoch, []).extend(ids)
    return found


class OneCycle(TinyModule):
    """Trained by a schedule over as many steps as the Trainer expects."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        self.expected = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=self.expected)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
