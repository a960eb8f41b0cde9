"""For tests of the stream in a Trainer: a module that lists what it trains on, and what that should be."""

import lightning.pytorch as pl
import numpy as np
import torch

from curated_data.streaming import EpochOrder
from tests.support.trainer_runs import EPOCHS, GLOBAL_BATCH, SELECTION


def expected_stream(epochs: int = EPOCHS) -> list[list[int]]:
    """The global batches of the test selection, from the order alone."""
    order = EpochOrder(SELECTION, seed=0, batch_size=GLOBAL_BATCH)
    return [
        order.batches(epoch, batch, batch + 1)[1].tolist()
        for epoch in range(epochs)
        for batch in range(order.n_batches)
    ]


class Interrupted(Exception):
    pass


class Listing(pl.LightningModule):
    """Lists what it trained on, in this process; may fail at a batch."""

    def __init__(self, fail_at: int | None = None, estimates: bool = False):
        super().__init__()
        self.weight = torch.nn.Linear(1, 1)
        self.trained: list[list[int]] = []
        self.fail_at = fail_at
        self.estimates = estimates  # asks for the loader before the loops are restored

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
