"""Plain supervised training of a classifier: torchvision's networks at any image size, and their module."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torchvision
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from curated_data.errors import nearest
from lightning_modules.backbones import build_backbone
from lightning_modules.optim import build_optimizer, parameter_groups
from lightning_modules.resnet import RESNETS
from lightning_modules.schedules import steps_of_run, warmup_cosine

SMALL_IMAGES = 64  # up to so many pixels, networks made for 224 get a finer stem


class Supervised(pl.LightningModule):
    """Cross-entropy; warm-up over a twentieth of the Trainer's steps, then a cosine to 0.

    Batches are those of `CuratedDataModule`: `image` (B, 3, S, S), `label` (B,), perhaps `padding` (B,).

    Args:
        net: images to logits (B, K).
        classes: (K,) the labels that the logits stand for, ascending; validation leaves out other labels.
        optimizer: "sgd" (momentum 0.9) or "adamw".
        learning_rate: after the warm-up.
        weight_decay: of weights; biases and normalisation have none.

    Attributes:
        loss: of the last training step.
        accuracy: of the last validation, over the images that this process saw, in 0..1.
    """

    classes: Tensor

    def __init__(
        self,
        net: nn.Module,
        classes: Sequence[int] | np.ndarray,
        *,
        optimizer: str = "sgd",
        learning_rate: float = 0.02,
        weight_decay: float = 5e-4,
    ) -> None:
        super().__init__()
        self.net = net
        self.optimizer, self.learning_rate, self.weight_decay = optimizer, learning_rate, weight_decay
        self.register_buffer("classes", torch.as_tensor(np.asarray(classes, np.int64)))
        if not (self.classes.diff() > 0).all():
            raise ValueError(f"classes: expected different labels in ascending order, got {list(classes)}")
        self.loss = torch.tensor(torch.nan)
        self._n_right = self._n_tested = 0

    @property
    def accuracy(self) -> float:
        return self._n_right / self._n_tested if self._n_tested else float("nan")

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        targets, are_classes = self._targets(batch["label"])
        if not are_classes.all():
            raise ValueError(f"label {int(batch['label'][~are_classes][0])} is none of the classes")
        loss = nn.functional.cross_entropy(self(batch["image"]), targets)
        self.loss = loss.detach()
        return loss

    def on_validation_epoch_start(self) -> None:
        self._n_right = self._n_tested = 0

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        targets, counts = self._targets(batch["label"])
        if "padding" in batch:
            counts = counts & ~batch["padding"]
        right = self(batch["image"]).argmax(1) == targets
        self._n_right += int((right & counts).sum())
        self._n_tested += int(counts.sum())

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        groups = parameter_groups([self.net], self.weight_decay)
        optimizer = build_optimizer(self.optimizer, groups, learning_rate=self.learning_rate)
        total = steps_of_run(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_cosine(step, total=total, peak=1.0, warmup=total // 20)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _targets(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Each label's place among the classes, and whether it is one of them."""
        places = torch.searchsorted(self.classes, labels).clamp(max=len(self.classes) - 1)
        return places, self.classes[places] == labels


def build_classifier(name: str, n_classes: int, *, image_size: int) -> nn.Module:
    """An untrained classifier whose stem suits the image size; an image is passed through it once.

    Args:
        name: torchvision's; `resnet10/18/34/50` may have a width, as `resnet18:16`.
        n_classes: the number of logits.
        image_size: side of the images in pixels. Up to 64, the network's first layers keep the resolution.

    Raises:
        ValueError: an unknown name (with the nearest ones), or a network that cannot take such images.
    """
    model, _, width = name.partition(":")
    known = torchvision.models.list_models(module=torchvision.models)
    if model not in RESNETS and model not in known:
        hint = nearest(model, sorted({*known, *RESNETS}), n=3)
        raise ValueError(f"architecture {name!r} is none of torchvision's classifiers{hint}")
    if width and not (model in RESNETS and width.isdecimal() and int(width) > 0):
        raise ValueError(
            f"architecture {name!r}: a width is a number of channels, of {', '.join(RESNETS)} alone"
        )
    try:
        if model in RESNETS:
            options: dict[str, Any] = {"width": int(width)} if width else {}
            small = image_size <= SMALL_IMAGES
            backbone = build_backbone(model, image_size=image_size, small_images=small, **options)
            return nn.Sequential(backbone, nn.Linear(backbone.dimension, n_classes))
        net = _build_torchvision(model, n_classes, image_size).eval()
        with torch.no_grad():
            net(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise ValueError(
            f"architecture {name!r} cannot take images of {image_size} x {image_size} ({error}); take larger "
            "images, or another architecture"
        ) from error
    return net.train()


def _build_torchvision(model: str, n_classes: int, image_size: int) -> nn.Module:
    options: dict[str, Any] = {}
    if model.startswith("vit_"):
        options = {"image_size": image_size}
    elif model.startswith("maxvit"):
        options = {"input_size": (image_size, image_size)}
    elif model in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    net = torchvision.models.get_model(model, weights=None, num_classes=n_classes, **options)
    # Position embeddings and attention windows fix the grid of the first two.
    if image_size <= SMALL_IMAGES and not model.startswith(("vit_", "maxvit")):
        _suit_small_images(net)
    return net


def _suit_small_images(net: nn.Module) -> None:
    """Make a network for 224 pixels keep the resolution of images of about 32.

    The first convolution gets stride 1 and at most 3x3, or patches of 2 pixels where it cuts patches; the
    max-pool of a ResNet-like stem goes. AlexNet and VGG average their last map, whose few values their dense
    layers would otherwise see many times over.
    """
    path, first = next((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
    cuts_patches = first.kernel_size == first.stride
    kernel, stride = (2, 2) if cuts_patches else (min(first.kernel_size[0], 3), 1)
    padding = 0 if cuts_patches else kernel // 2
    stem = nn.Conv2d(
        first.in_channels, first.out_channels, kernel, stride, padding, bias=first.bias is not None
    )
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    if stem.bias is not None:
        nn.init.zeros_(stem.bias)
    net.set_submodule(path, stem)
    pools = {"maxpool", "maxpool1", "features.pool0"}
    for name in [n for n, m in net.named_modules() if n in pools and isinstance(m, nn.MaxPool2d)]:
        net.set_submodule(name, nn.Identity())
    if isinstance(net, torchvision.models.AlexNet | torchvision.models.VGG):
        channels = [m for m in net.features if isinstance(m, nn.Conv2d)][-1].out_channels
        net.avgpool = nn.AdaptiveAvgPool2d(1)
        place = next(i for i, m in enumerate(net.classifier) if isinstance(m, nn.Linear))
        net.classifier[place] = nn.Linear(channels, net.classifier[place].out_features)
