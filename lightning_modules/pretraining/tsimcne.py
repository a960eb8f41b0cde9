"""t-SimCNE: images to a two-dimensional map by contrastive learning, in three stages (arXiv 2210.09879)."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from curated_data.parallel import world_size
from lightning_modules.losses import cauchy_contrast
from lightning_modules.pretraining.base import PretrainingModule
from lightning_modules.schedules import warmup_cosine
from lightning_modules.views import Views, simclr_views

log = logging.getLogger(__name__)


class TSimCNE(PretrainingModule):
    """t-SimCNE. One `Trainer.fit` over `sum(epochs)` epochs goes through all stages, and resumes in any.

    Stage 1 learns 128 outputs; stage 2 replaces the last layer by a new two-dimensional one and trains
    it alone; stage 3 fine-tunes everything at a thousandth of the rate. Each stage starts with a fresh
    optimiser. `coordinates(images)` is the map, `embed(images)` the backbone's features. With BatchNorm on
    several ranks give `sync_batchnorm=True`.

    Args:
        backbone, image_size, small_images, pretrained, frozen_blocks, backbone_options: as in
            `build_backbone`.
        epochs: of the three stages; the authors' shorter budgets are (400, 25, 75) and (775, 25, 200). The
            Trainer's `max_epochs` must be their sum.
        warmup_epochs: of stages 1 and 3.
        learning_rate: for a global batch of 256, linear scaling.
        fine_tuning_rate: stage 3's share of it.
        hidden_dimension, output_dimension: of the head.
        weight_decay, momentum: of SGD.
        augmentation: replaces fields of the views.

    Examples:
        >>> from curated_data import CuratedDataModule
        >>> from lightning import Trainer
        >>> from lightning_modules import TSimCNE
        >>> module = TSimCNE(
        ...     "resnet10", backbone_options={"width": 16}, epochs=(1, 0, 0), warmup_epochs=0
        ... )
        >>> data = CuratedDataModule(
        ...     "pool-{000..001}.tar", views=module.views(), batch_size=16, loader={"num_workers": 0}
        ... )
        >>> quiet = {"enable_progress_bar": False, "enable_model_summary": False}
        >>> Trainer(fast_dev_run=2, accelerator="cpu", **quiet).fit(module, data)
        >>> import torch
        >>> module.coordinates(torch.zeros(2, 3, 32, 32)).shape  # the map, two coordinates per image
        torch.Size([2, 2])
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        *,
        image_size: int = 32,
        small_images: bool = True,
        pretrained: bool | str = False,
        frozen_blocks: int = 0,
        backbone_options: Mapping[str, Any] | None = None,
        epochs: Sequence[int] = (1000, 50, 450),
        warmup_epochs: float = 10,
        learning_rate: float = 0.03,
        fine_tuning_rate: float = 1e-3,
        hidden_dimension: int = 1024,
        output_dimension: int = 128,
        weight_decay: float = 5e-4,
        momentum: float = 0.9,
        augmentation: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            backbone,
            image_size=image_size,
            small_images=small_images,
            pretrained=pretrained,
            frozen_blocks=frozen_blocks,
            backbone_options=backbone_options,
            learning_rate=learning_rate,
            warmup_epochs=warmup_epochs,
        )
        if len(epochs) != 3 or any(n < 0 for n in epochs) or sum(epochs) < 1:
            raise ValueError(f"epochs must be three counts, one per stage, got {list(epochs)}")
        self.save_hyperparameters()
        self.stage_epochs = tuple(epochs)
        self.hidden = nn.Sequential(nn.Linear(self.backbone.dimension, hidden_dimension), nn.ReLU())
        self.high = nn.Linear(hidden_dimension, output_dimension)
        self.low = nn.Linear(hidden_dimension, 2)
        nn.init.normal_(self.low.weight)
        nn.init.zeros_(self.low.bias)
        self.stage = 0  # the stage that the optimiser's state belongs to; 0 before the first batch
        self.views()

    def views(self) -> Views:
        options = {
            "scale": (0.2, 1.0),
            "jitter": (0.4, 0.4, 0.4, 0.1),
            "blur": 0.0,
            **(self.hparams.augmentation or {}),
        }
        return simclr_views(self.image_size, **options)

    def coordinates(self, images: Tensor) -> Tensor:
        """The map: (B, 2) for images (B, 3, S, S) as `eval_transform()` makes them."""
        return _exact(self.low, self.hidden(self.backbone(images)))

    def stage_at(self, epoch: int) -> int:
        """The stage, 1 to 3, of an epoch counted from 0."""
        first, second, _ = self.stage_epochs
        return 1 if epoch < first else 2 if epoch < first + second else 3

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        images = torch.cat(batch["views"])
        stage = self.stage_at(self.current_epoch) if self._trainer else 1
        layer, unused = (self.high, self.low) if stage == 1 else (self.low, self.high)
        with torch.set_grad_enabled(torch.is_grad_enabled() and stage != 2):
            hidden = self.hidden(self.backbone(images))
        a, b = _exact(layer, hidden).chunk(2)
        loss = cauchy_contrast(a, b)
        if world_size() > 1:  # DDP waits for a gradient of every parameter; these get zeros
            idle = [unused, *([self.backbone, self.hidden] if stage == 2 else [])]
            loss = loss + sum(0.0 * p.sum() for m in idle for p in m.parameters() if p.requires_grad)
        return loss

    def configure_optimizers(self) -> Optimizer:
        """One SGD over three groups; rates of 0 and a cleared state make it a stage's own optimiser."""
        body = [p for m in (self.backbone, self.hidden) for p in m.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": body, "stages": (1, 3)},
            {"params": list(self.high.parameters()), "stages": (1,)},
            {"params": list(self.low.parameters()), "stages": (2, 3)},
        ]
        return SGD(
            groups,
            lr=self.learning_rate,
            momentum=self.hparams.momentum,
            weight_decay=self.hparams.weight_decay,
        )

    def on_fit_start(self) -> None:
        super().on_fit_start()
        total = sum(self.stage_epochs)
        if self.trainer.max_epochs != total and self.trainer.max_steps == -1:
            raise ValueError(
                f"the three stages take {' + '.join(map(str, self.stage_epochs))} = {total} epochs, but the "
                f"Trainer's max_epochs is {self.trainer.max_epochs}; make them equal"
            )

    def set_rates(self, step: int) -> None:
        stage = self.stage_at(self.current_epoch)
        optimizer = self.trainer.optimizers[0]
        if stage != self.stage:
            log.info("t-SimCNE stage %d from epoch %d", stage, self.current_epoch)
            optimizer.state.clear()  # a fresh optimiser: no momentum from another stage's loss
            self.stage = stage
        rate = self.learning_rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate if stage in group["stages"] else 0.0
        self.log("learning_rate", rate, rank_zero_only=True, batch_size=1)
        self.log("stage", float(stage), rank_zero_only=True, batch_size=1)

    def learning_rate_at(self, step: int) -> float:
        first, second, third = (self.epochs_to_steps(n) for n in self.stage_epochs)
        warmup = self.epochs_to_steps(self.warmup_epochs)
        peak = self.peak_learning_rate
        if step < first:
            return warmup_cosine(step, total=first, peak=peak, warmup=min(warmup, first // 2))
        if step < first + second:
            return warmup_cosine(step - first, total=second, peak=peak)
        return warmup_cosine(
            step - first - second,
            total=third,
            peak=peak * self.hparams.fine_tuning_rate,
            warmup=min(warmup, third // 2),
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["stage"] = self.stage

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.stage = checkpoint["stage"]


def _exact(layer: nn.Linear, x: Tensor) -> Tensor:
    """A layer's outputs without autocast: at a distance of 100 from the centre bfloat16 has steps of a half,
    which is the distance of neighbours on the map.
    """
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(layer.weight.dtype))
