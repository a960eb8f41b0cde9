"""Every pretraining module: gradients on two ranks, exact resume, bf16, checkpoints, clear errors."""

import importlib
import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from lightning_modules import MAE, DINOv2, SimCLR, TSimCNE
from lightning_modules.pretraining.dinov2 import layer_groups, update_average
from lightning_modules.schedules import cosine
from tests.support.ranks import on_two_ranks
from tests.support.trainers import quiet_trainer

VIT = {"backbone": "timm:vit_tiny_patch16_224", "image_size": 16}
STEM = "timm:vit_tiny_r_s16_p8_224"
SMALL_VIT = {"patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2}

BUILD = {
    "simclr": lambda **o: SimCLR(
        **VIT, backbone_options=SMALL_VIT, batch_norm=False, **{"optimizer": "lars", "warmup_epochs": 1, **o}
    ),
    "mae": lambda **o: MAE(
        **VIT,
        backbone_options=SMALL_VIT,
        decoder_dimension=16,
        decoder_depth=1,
        decoder_heads=2,
        **{"learning_rate": 1e-2, "warmup_epochs": 1, **o},
    ),
    "dinov2": lambda **o: DINOv2(
        **VIT,
        local_image_size=8,
        backbone_options=SMALL_VIT | {"reg_tokens": 2},
        n_local_views=2,
        head_hidden=16,
        head_bottleneck=8,
        **{"n_prototypes": 12, "drop_path": 0.2, "learning_rate": 1e-2, "warmup_epochs": 1, **o},
    ),
    "dinov2-softmax": lambda **o: BUILD["dinov2"](centering="softmax", **o),
    "tsimcne": lambda **o: TSimCNE(
        **VIT,
        small_images=False,
        backbone_options=SMALL_VIT,
        **{"epochs": (2, 1, 1), "warmup_epochs": 1, **o},
    ),
}


def build(name: str, **options: Any) -> L.LightningModule:
    torch.manual_seed(0)
    return BUILD[name](**options)


class Images(Dataset):
    """Views of fixed random images: the same for a sample in each epoch, whatever the generator's state."""

    def __init__(self, module: L.LightningModule, n: int = 16) -> None:
        self.views = module.views()
        self.images = torch.randint(
            0, 256, (n, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(i)
            return {"views": self.views(self.images[i]), "sample_id": i}


def fit(module: L.LightningModule, *, checkpoint: str | None = None, **options: Any) -> L.Trainer:
    trainer = quiet_trainer(**{"max_epochs": 4, **options})
    # The same four samples in every batch: a stock loader starts again when a run resumes within an epoch,
    # and what is tested here is the module, whose masks, rates and stages still depend on the place in the
    # run.
    loader = DataLoader(Images(module), batch_size=4, sampler=[3, 1, 2, 0] * 4)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


def batch_of(module: L.LightningModule, ids: range = range(8)) -> dict[str, Any]:
    dataset = Images(module)
    return torch.utils.data.default_collate([dataset[i] for i in ids])


class _Step(nn.Module):
    """DDP wraps `forward`; a training step is the module's loss."""

    def __init__(self, module: L.LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Mapping[str, Any]) -> torch.Tensor:
        loss = self.module.loss(batch)
        return loss[0] if isinstance(loss, tuple) else loss


def _gradients(rank: int | None, name: str, epoch: int) -> dict[str, Any]:
    # No drop path here: it belongs to a rank, as dropout does.
    module = build(name, **({"drop_path": 0.0} if "dino" in name else {}))
    if epoch:
        module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        module.trainer.fit_loop.epoch_progress.current.processed = epoch
    step: nn.Module = _Step(module)
    if rank is not None:
        step = DistributedDataParallel(step)
    loss = step(batch_of(module, range(8) if rank is None else range(4 * rank, 4 * rank + 4)))
    loss.backward()
    gradients = {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "gradients": gradients}


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "epoch"), [*((n, 0) for n in BUILD), ("tsimcne", 2), ("tsimcne", 3)], ids=str
)
def test_two_ranks_have_the_gradients_of_one_process_on_the_joined_batch(name, epoch):
    expected = _gradients(None, name, epoch)
    ranks = on_two_ranks(_gradients, name, epoch)
    assert np.mean([r["loss"] for r in ranks]) == pytest.approx(float(expected["loss"]), abs=1e-5)
    assert len(expected["gradients"]) > 1
    for r in ranks:
        for key, gradient in expected["gradients"].items():
            np.testing.assert_allclose(
                r["gradients"][key], gradient.numpy(), rtol=1e-5, atol=1e-5, err_msg=key
            )
        for key in set(r["gradients"]) - set(expected["gradients"]):
            assert not r["gradients"][key].any(), key


class _Stop(L.Callback):
    """Save in the middle of an epoch, and stop there as a kill would."""

    def __init__(self, batch: int, path: str) -> None:
        self.batch, self.path, self.seen = batch, path, 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.seen += 1
        if self.seen == self.batch:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "stop"),  # after so many batches, 4 an epoch: inside and at the ends of epochs and stages
    [*((name, 6) for name in BUILD), ("tsimcne", 4), ("tsimcne", 8), ("tsimcne", 9), ("tsimcne", 14)],
)
def test_resume_is_exact(name, stop, tmp_path):
    path = str(tmp_path / "stopped.ckpt")
    whole = build(name)
    fit(whole)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(build(name), callbacks=[_Stop(stop, path)])
    resumed = build(name)
    with torch.random.fork_rng():
        torch.manual_seed(123)  # a new process begins with another state of the generator
        fit(resumed, checkpoint=path)
    for (key, x), (_, y) in zip(whole.state_dict().items(), resumed.state_dict().items()):
        assert torch.equal(x, y), key


@pytest.mark.parametrize("name", BUILD)
def test_bf16_accumulation_and_checkpoint(name, tmp_path):
    module = build(name)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    trainer = fit(module, precision="bf16-mixed", accumulate_grad_batches=2)
    assert trainer.global_step == 8
    assert module.global_batch_size == 8
    assert math.isfinite(float(trainer.callback_metrics["loss"]))
    assert any(
        not torch.equal(v, before[k]) for k, v in module.backbone.state_dict(prefix="backbone.").items()
    )

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    path, _, attribute = checkpoint["module_class"].rpartition(".")
    module_class = getattr(importlib.import_module(path), attribute)
    assert module_class is type(module)
    loaded = module_class(**checkpoint["hyper_parameters"])
    loaded.load_state_dict(checkpoint["state_dict"])
    images = torch.stack([loaded.eval_transform()(image) for image in Images(module).images[:3]])
    features = loaded.eval().embed(images)
    assert features.shape == (3, loaded.embedding_dimension)
    torch.testing.assert_close(features, module.eval().embed(images))


@pytest.mark.parametrize("name", BUILD)
def test_float16_with_a_scaled_loss(name):
    """The scaler skips the steps whose gradients overflow, halves the scale, and then the run continues."""
    module, scaler = build(name), torch.amp.GradScaler("cpu")
    before = [p.detach().clone() for p in module.parameters() if p.requires_grad]
    trainer = fit(module, plugins=[MixedPrecision("16-mixed", device="cpu", scaler=scaler)])
    after = [p for p in module.parameters() if p.requires_grad]
    assert all(bool(torch.isfinite(p).all()) for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert scaler.get_scale() >= 2**8  # 8 of 16 steps skipped at most
    assert math.isfinite(float(trainer.callback_metrics["loss"]))


@pytest.mark.parametrize("name", BUILD)
def test_bad_batches_are_refused(name):
    module = build(name)
    batch = batch_of(module)
    with pytest.raises(TypeError, match=r"'views'"):
        module.training_step({"image": batch["views"][0]}, 0)
    with pytest.raises(ValueError, match=r"12, 16\)"):
        module.training_step({"views": [*batch["views"][1:], batch["views"][0][:, :, :12]]}, 0)
    with pytest.raises(ValueError, match=r"\(3, 3, 16, 16\)|got 2"):
        module.training_step({"views": [batch["views"][0], batch["views"][0][:3]]}, 0)
    if name != "mae":
        with pytest.raises(ValueError, match="1 sample"):
            module.training_step({"views": [v[:1] for v in batch["views"]]}, 0)
    with pytest.raises(ValueError, match="learning_rate"):
        build(name, learning_rate=0.0)


@pytest.mark.parametrize("name", ["simclr", "mae", "dinov2", "tsimcne"])
def test_a_nan_stops_the_run_with_the_sample_ids(name):
    module = build(name)

    class Broken(Images):
        def __getitem__(self, i: int) -> dict[str, Any]:
            sample = super().__getitem__(i)
            if i in (9, 10):
                sample["views"][0][1, 3, 3] = float("nan")
            return sample | {"sample_id": 1000 + i}

    trainer = L.Trainer(
        accelerator="cpu", max_epochs=4, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(RuntimeError, match=r"\[1009, 1010\]"):
        trainer.fit(module, DataLoader(Broken(module), batch_size=4))
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_teacher_is_the_closed_form_average():
    teacher, students = torch.zeros(3), [torch.randn(3) for _ in range(4)]
    momenta = [0.9, 0.95, 0.99, 1.0]
    for student, momentum in zip(students, momenta):
        update_average([teacher], [student], momentum)
    expected = sum(
        s * (1 - m) * math.prod(momenta[i + 1 :]) for i, (s, m) in enumerate(zip(students, momenta))
    )
    torch.testing.assert_close(teacher, expected)


def test_the_teacher_takes_the_students_buffers():
    module = build("dinov2")  # a hybrid's BatchNorm has some
    module.backbone.net.register_buffer("statistics", torch.zeros(3))
    module.student["backbone"].net.register_buffer("statistics", torch.tensor([1.0, 2, 3]))
    fit(module, max_epochs=1)
    assert module.backbone.net.statistics.tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", ["mae", "dinov2"])
def test_checkpointed_blocks_give_the_same_gradients(name):
    def gradients(enable: bool) -> dict[str, torch.Tensor]:
        module = build(name)
        calls = []
        for network in {module.backbone, *getattr(module, "student", {}).values()}:
            if hasattr(network, "vision_transformer"):
                network.net.set_grad_checkpointing(enable)
                network.net.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
        loss = module.loss(batch_of(module))
        (loss[0] if isinstance(loss, tuple) else loss).backward()
        n_calls.append(len(calls))
        return {k: p.grad for k, p in module.named_parameters() if p.grad is not None}

    n_calls: list[int] = []
    plain, checkpointed = gradients(False), gradients(True)
    assert n_calls[1] > n_calls[0]  # computed once more on the way back
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient)


def test_a_teacher_of_half_precision_is_refused():
    with pytest.raises(ValueError, match="bf16-mixed"):
        fit(build("dinov2"), precision="bf16-true")
    fit(build("simclr"), precision="bf16-true", max_epochs=1)


def test_dinov2_schedules_and_frozen_parts():
    module = build("dinov2", freeze_last_layer_epochs=1, teacher_momentum=0.5, warmup_epochs=0)
    start = {k: v.clone() for k, v in module.state_dict().items()}
    seen = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            groups = trainer.optimizers[0].param_groups
            last = next(g for g in groups if g["last_layer"])
            seen.append((last["lr"], max(g["weight_decay"] for g in groups)))
            if trainer.global_step == 4:
                same = torch.equal(
                    pl_module.student["dino_head"].prototypes.weight,
                    start["student.dino_head.prototypes.weight"],
                )
                seen.append(same)
            assert not any(p.grad is not None for part in pl_module.teacher_parts for p in part.parameters())
            assert not any(m.training for part in pl_module.teacher_parts for m in part.modules())

    fit(module, callbacks=[Record()])
    assert seen.pop(4) is True
    assert [lr == 0 for lr, _ in seen] == [True] * 4 + [False] * 12
    assert [wd for _, wd in seen] == pytest.approx(
        [cosine(s, total=16, start=0.04, final=0.4) for s in range(16)]
    )
    assert module.teacher_momentum_at(8) == pytest.approx(0.75)
    moved = [k for k, v in module.state_dict().items() if not torch.equal(v, start[k])]
    assert any(k.startswith("backbone.") for k in moved)


def test_dinov2_crops_take_their_scales():
    views = build("dinov2", global_scale=[0.5, 0.9], local_scale=[0.2, 0.3]).views().augmentations
    assert [view.scale for view in views] == [(0.5, 0.9)] * 2 + [(0.2, 0.3)] * 2


def test_layer_groups_cover_every_parameter_once():
    module = build("dinov2", layer_decay=0.5, patch_embed_rate=0.2)
    groups = module.configure_optimizers().param_groups
    listed = [p for g in groups for p in g["params"]]
    trained = [p for p in module.parameters() if p.requires_grad]
    assert len({id(p) for p in listed}) == len(listed) == len(trained)
    net = module.student["backbone"].net
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    decays = {id(p): g["decay_scale"] for g in groups for p in g["params"]}
    assert scale[id(net.blocks[1].attn.qkv.weight)] == 0.5
    assert scale[id(net.blocks[0].attn.qkv.weight)] == 0.25
    assert scale[id(net.cls_token)] == 0.125
    assert scale[id(net.patch_embed.proj.weight)] == pytest.approx(0.025)
    assert scale[id(net.norm.weight)] == 1.0
    assert decays[id(net.blocks[0].mlp.fc1.bias)] == decays[id(net.pos_embed)] == 0.0
    assert layer_groups(net, [], module.mask_token, decay=1.0, patch_embed_rate=1.0)[0]["lr_scale"] == 1.0


def test_tsimcne_stages():
    module = build("tsimcne", epochs=(2, 1, 1), warmup_epochs=0, learning_rate=0.64)
    log = []

    class Record(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            self.before = {k: v.clone() for k, v in pl_module.state_dict().items()}

        def on_train_batch_end(self, trainer, pl_module, *args):
            changed = {
                k.split(".")[0]
                for k, v in pl_module.state_dict().items()
                if not torch.equal(v, self.before[k])
            }
            log.append((pl_module.stage, changed, max(g["lr"] for g in trainer.optimizers[0].param_groups)))

    fit(module, callbacks=[Record()])
    stages = [stage for stage, _, _ in log]
    assert stages == [1] * 8 + [2] * 4 + [3] * 4
    assert [changed for _, changed, _ in log[:8:7]] == [{"backbone", "hidden", "high"}] * 2
    assert all(changed == {"low"} for stage, changed, _ in log if stage == 2)
    assert all("high" not in changed and "low" in changed for stage, changed, _ in log if stage == 3)
    peak = 0.64 * 4 / 256
    assert [log[i][2] for i in (0, 8, 12)] == pytest.approx([peak, peak, peak / 1000])
    assert module.eval().coordinates(torch.zeros(2, 3, 16, 16)).shape == (2, 2)


def test_maps_are_exact_under_autocast():
    module = build("tsimcne").eval()
    with torch.no_grad():
        module.low.bias.fill_(100.0)  # a cluster far out, where bfloat16 has steps of a half
    images = batch_of(module)["views"][0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coordinates = module.coordinates(images)
        assert coordinates.dtype == torch.float32
    assert len(coordinates.detach().unique(dim=0)) == len(images)
    assert not torch.equal(coordinates, coordinates.bfloat16().float())


def test_tsimcne_epochs_must_fit_the_trainer():
    with pytest.raises(ValueError, match=r"2 \+ 1 \+ 1 = 4 .*max_epochs.* 9"):
        fit(build("tsimcne"), max_epochs=9)
    with pytest.raises(ValueError, match=r"epochs .*\[2, 1\]"):
        build("tsimcne", epochs=(2, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: SimCLR("resnet10", temperature=0.0), "temperature"),
        (lambda: SimCLR("timm:vit_tiny_patch16_224", image_size=28), "28 .* 16"),
        (lambda: MAE("resnet10", image_size=32), "vision transformer"),
        (lambda: MAE(STEM, image_size=32, backbone_options={"depth": 1}), "convolutional stem"),
        (lambda: build("mae", mask_ratio=1.0), "mask_ratio"),
        (lambda: build("dinov2", centering="none"), "centering"),
        (lambda: build("dinov2", n_prototypes=1), "2 prototypes"),
        (lambda: DINOv2(**VIT, local_image_size=10, backbone_options=SMALL_VIT), "local_image_size.* 10"),
        (lambda: build("simclr", warmup_epochs=-1), "warmup_epochs"),
        (lambda: build("simclr", learning_rate_scaling="cubic"), "cubic"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        options()


def test_unknown_augmentation_is_refused_at_once():
    with pytest.raises(TypeError, match="colour"):
        SimCLR("resnet10", image_size=16, backbone_options={"width": 4}, augmentation={"colour": 1})
