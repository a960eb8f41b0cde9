"""Learning rates over whole runs: closed forms, runs without an end, epochs that change their length."""

import math
from typing import Any

import lightning as L
import pytest
from torch.utils.data import DataLoader, IterableDataset

from tests.lightning_modules.test_pretraining import Images, build, fit
from tests.support.trainers import quiet_trainer


def test_a_run_without_an_end_has_no_schedule():
    with pytest.raises(ValueError, match="max_epochs or max_steps"):
        fit(build("simclr"), max_epochs=-1)


class Endless(IterableDataset):
    """Images for ever, as a stream without an index gives them."""

    def __init__(self, module: L.LightningModule) -> None:
        self.images = Images(module)

    def __iter__(self):
        while True:
            yield from (self.images[i] for i in range(len(self.images)))


def test_a_loader_without_a_length_needs_the_batches_of_an_epoch():
    options = {"accelerator": "cpu", "max_steps": 3, "logger": False, "enable_checkpointing": False,
               "enable_progress_bar": False, "enable_model_summary": False}  # fmt: skip
    module = build("simclr")
    with pytest.raises(ValueError, match="limit_train_batches"):
        L.Trainer(**options).fit(module, DataLoader(Endless(module), batch_size=4))
    without_warmup = build("simclr", warmup_epochs=0)
    with pytest.raises(ValueError, match="max_steps"):
        L.Trainer(**options | {"max_steps": -1, "max_epochs": 1}).fit(
            without_warmup, DataLoader(Endless(module), batch_size=4)
        )
    trainer = L.Trainer(**options, limit_train_batches=2)
    trainer.fit(module, DataLoader(Endless(module), batch_size=4))
    assert trainer.global_step == 3
    module = build("simclr", warmup_epochs=0)  # nothing is counted in epochs
    L.Trainer(**options).fit(module, DataLoader(Endless(module), batch_size=4))


def test_a_second_run_scales_its_rate_to_its_own_batch():
    module = build("simclr", learning_rate=0.256)
    fit(module, max_epochs=1)
    assert module.peak_learning_rate == pytest.approx(0.004)
    loader = DataLoader(Images(module), batch_size=8)
    quiet_trainer(max_epochs=1).fit(module, loader)
    assert module.peak_learning_rate == pytest.approx(0.008)


def test_learning_rate_follows_its_closed_form():
    module = build("simclr", optimizer="sgd", learning_rate=0.5, warmup_epochs=0.5)
    rates = []

    class Record(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    fit(module, callbacks=[Record()])
    peak = 0.5 * 4 / 256
    expected = [peak / 2, peak] + [peak * 0.5 * (1 + math.cos(math.pi * s / 14)) for s in range(14)]
    assert rates == pytest.approx(expected)


class OfEachLength(L.LightningDataModule):
    """Epochs of different lengths, as re-curations may make them."""

    def __init__(self, module: L.LightningModule, lengths: list[int]) -> None:
        super().__init__()
        self.images, self.lengths = Images(module), lengths

    def train_dataloader(self) -> DataLoader:
        length = self.lengths[self.trainer.current_epoch]
        return DataLoader(self.images, batch_size=2, sampler=[0, 1] * length)


class Rates(L.Callback):
    """Notes the learning rate of each optimiser step, and stops after some steps, with a checkpoint."""

    def __init__(self, stop: int | None = None, path: Any = None) -> None:
        self.rates: list[float] = []
        self.stop, self.path = stop, path

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, *arguments):
        if trainer.global_step == self.stop:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True
            self.stop = None


def rates_of(lengths: list[int], *, stop=None, path=None, resume=None, **options: Any) -> list[float]:
    module = build("simclr", optimizer="sgd", learning_rate=0.5, warmup_epochs=0)
    rates = Rates(stop, path)
    trainer = quiet_trainer(callbacks=[rates], reload_dataloaders_every_n_epochs=1, min_epochs=0, **options)
    trainer.fit(module, OfEachLength(module, lengths), ckpt_path=resume)
    return rates.rates


def test_schedules_end_with_the_run_when_epochs_change_their_length(tmp_path):
    lengths = [4, 2, 6]
    peak = 0.5 * 4 / 256  # two batches of two are accumulated
    places = [(e + i / (n // 2)) / 3 for e, n in enumerate(lengths) for i in range(n // 2)]
    expected = [peak * 0.5 * (1 + math.cos(math.pi * place)) for place in places]
    whole = rates_of(lengths, max_epochs=3, accumulate_grad_batches=2)
    assert whole == pytest.approx(expected)
    options = {"max_epochs": 3, "accumulate_grad_batches": 2}
    before = rates_of(lengths, stop=4, path=tmp_path / "a.ckpt", **options)  # within the third epoch
    after = rates_of(lengths, resume=tmp_path / "a.ckpt", **options)
    assert before[:4] + after == pytest.approx(expected)
    # A run of so many steps is as long as it says, whatever the epochs' lengths.
    steps = rates_of(lengths, max_steps=5, accumulate_grad_batches=2)
    assert steps == pytest.approx([peak * 0.5 * (1 + math.cos(math.pi * s / 5)) for s in range(5)])
