"""Supervised training over whole runs: the schedule's end."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_modules.supervised import Supervised
from tests.support.trainers import quiet_trainer

SAMPLES = [{"image": torch.full((3, 4, 4), float(i % 2)), "label": i % 2} for i in range(24)]


class Stream(IterableDataset):
    """The samples without a length."""

    def __iter__(self):
        return iter(SAMPLES)


def fit(data: Any, **options: Any) -> list[float]:
    """The learning rate of each step of a run."""
    rates = []

    class Record(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    module = Supervised(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), [0, 1], learning_rate=0.5)
    quiet_trainer(callbacks=[Record()], **options).fit(module, DataLoader(data, batch_size=8))
    return rates


def test_a_run_without_an_end_has_no_schedule():
    with pytest.raises(ValueError, match="max_epochs or max_steps"):
        fit(SAMPLES, max_epochs=-1, max_time="00:00:00:05")
    with pytest.raises(ValueError, match="max_steps"):
        fit(Stream(), max_epochs=2)


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (SAMPLES, {"max_epochs": 2}),
        (SAMPLES, {"max_epochs": -1, "max_steps": 6, "max_time": "00:00:05:00"}),
        (Stream(), {"max_epochs": 2, "limit_train_batches": 3}),
        (Stream(), {"max_steps": 6}),
    ],
)
def test_the_schedule_ends_with_the_run(data, options):
    cosine = 0.25 * (1 + torch.cos(torch.pi * torch.arange(6) / 6))
    assert fit(data, **options) == pytest.approx(cosine.tolist())
