"""Whole runs in a Trainer on two ranks are those of one process on the joined batches, sharded ones too."""

import os
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader

from lightning_modules import SP2OT, DINOv2
from tests.lightning_modules.test_pretraining import BUILD, SMALL_VIT, VIT, Images, build
from tests.support.ranks import on_two_ranks
from tests.support.trainers import quiet_trainer

NAMES = {
    "simclr": {},
    "mae": {"learning_rate": 1e-3},
    "dinov2": {"drop_path": 0.0, "learning_rate": 2e-3},  # drop path belongs to a rank, as dropout does
    "dinov2-softmax": {"drop_path": 0.0, "learning_rate": 2e-3},
    "tsimcne": {},
    "sp2ot": {},
}


def module_of(name: str) -> L.LightningModule:
    if name in BUILD:
        return build(name, **NAMES[name])
    torch.manual_seed(0)
    return SP2OT(4, **VIT, backbone_options=SMALL_VIT, buffer_size=12, n_neighbors=3, n_heads=2)


class Losses(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, *args) -> None:
        self.values.append(float(outputs["loss"]))


def whole_run(
    rank: int, name: str, world: int = 2, strategy: Any = "ddp", path: str | None = None
) -> dict[str, Any]:
    """Losses of all steps and the weights at the end: batches of 8, of which a rank has its share."""
    if world > 1:
        os.environ["LOCAL_RANK"] = str(rank)  # in a forked process: the Trainer starts none itself
    module, losses = module_of(name), Losses()
    share = 8 // world
    order = torch.randperm(16, generator=torch.Generator().manual_seed(5)).tolist()
    rows = [order[i + rank * share : i + (rank + 1) * share] for i in (0, 8, 4, 0)]
    loader = DataLoader(Images(module), batch_sampler=[(r * share)[:share] for r in rows])
    trainer = quiet_trainer(
        devices=world, strategy=strategy if world > 1 else "auto", max_epochs=4,
        accumulate_grad_batches=2, callbacks=[losses], use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    if path is not None:
        trainer.save_checkpoint(path)
    weights = {
        key: getattr(value, "full_tensor", lambda v=value: v)() for key, value in module.named_parameters()
    }
    return {"losses": losses.values, "weights": weights}


def check(ranks: list[dict[str, Any]], name: str) -> None:
    expected = whole_run(0, name, world=1)
    assert len(expected["losses"]) == 16
    losses = np.mean([r["losses"] for r in ranks], axis=0)
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-4, atol=1e-5)
    moved = 0.0
    start = dict(module_of(name).named_parameters())
    for key, weight in expected["weights"].items():
        moved = max(moved, float((weight - start[key]).detach().abs().max()))
        for r in ranks:
            np.testing.assert_allclose(r["weights"][key], weight.detach(), rtol=0, atol=1e-5, err_msg=key)
    assert moved > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_train_as_one_process_does(name):
    check(on_two_ranks(whole_run, name), name)


@pytest.mark.long
def test_sharded_dinov2_trains_as_one_process_does(tmp_path):
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
    )
    path = str(tmp_path / "last.ckpt")
    ranks = on_two_ranks(whole_run, "dinov2", 2, strategy, path)
    check(ranks, "dinov2")
    whole = DINOv2.load_from_checkpoint(path)
    for key, weight in whole.named_parameters():
        np.testing.assert_array_equal(weight.detach(), ranks[0]["weights"][key], err_msg=key)


class FSDPOnCPU(FSDPStrategy):
    """Without a GPU Lightning refuses FSDPStrategy itself; the module refuses any before it wraps."""


def _refused(rank: int, strategy: type) -> str:
    with pytest.raises(ValueError) as error:
        whole_run(rank, "dinov2", 2, strategy())
    return str(error.value)


@pytest.mark.parametrize("strategy", [ModelParallelStrategy, FSDPOnCPU])
def test_strategies_that_do_not_suit_the_teacher_are_refused(strategy):
    for message in on_two_ranks(_refused, strategy):
        assert "data_parallel_size=2, tensor_parallel_size=1" in message


def _decayed(rank: int, name: str) -> list[list[tuple[int, float]]]:
    """Numbers in each group of the optimiser, and their decay: whole, and as FSDP leaves them to a rank."""
    module = module_of(name)

    def groups() -> list[tuple[int, float]]:
        found = module.configure_optimizers().param_groups
        return [(sum(p.numel() for p in group["params"]), group["weight_decay"]) for group in found]

    module.setup("fit")
    whole = groups()
    FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))
    return [whole, groups()]


@pytest.mark.parametrize("name", ["simclr", "mae"])
def test_weights_that_fsdp_flattens_still_decay(name):
    ranks = on_two_ranks(_decayed, name)
    for i, (whole, decay) in enumerate(ranks[0][0]):
        assert sum(sharded[i][0] for _, sharded in ranks) == pytest.approx(whole, abs=2)  # padding
        assert all(sharded[i][1] == decay for _, sharded in ranks)
    assert ranks[0][0][0][1] > 0
