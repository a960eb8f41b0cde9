"""A module that lists what it was trained on, and what it should have been."""

import lightning.pytorch as pl
import torch

from curated_data.streaming import EpochOrder
from tests.streaming.trainer_runs import EPOCHS, GLOBAL_BATCH, SELECTION


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

    def __init__(self, fail_at: int | None = None):
        super().__init__()
        self.weight = torch.nn.Linear(1, 1)
        self.trained: list[list[int]] = []
        self.fail_at = fail_at

    def training_step(self, batch, batch_idx):
        if self.fail_at is not None and len(self.trained) == self.fail_at:
            raise Interrupted
        self.trained.append(batch["sample_id"].tolist())
        return self.weight(batch["image"].mean().view(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)
