"""SimCLR: two views of an image are told apart from the views of all other images (arXiv 2002.05709)."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.heads import mlp
from lightning_modules.losses import nt_xent
from lightning_modules.optim import build_optimizer, parameter_groups
from lightning_modules.pretraining.base import PretrainingModule
from lightning_modules.views import Views, simclr_views


class SimCLR(PretrainingModule):
    """SimCLR with any backbone.

    With BatchNorm and several ranks give the Trainer `sync_batchnorm=True`, as the paper does.

    Args:
        backbone: name of the network (`lightning_modules.backbones.build_backbone`).
        image_size: side of the views in pixels.
        small_images: ResNets: 3x3 first convolution, no max-pool; for images of about 32 pixels.
        pretrained, frozen_blocks, backbone_options: as in `build_backbone`.
        projection_dimension, hidden_dimension: of the head, a two-layer MLP; the hidden layer is as wide as
            the features unless given.
        batch_norm: in the head's hidden layer.
        temperature: 0.5 suits small batches and small images, 0.1 large batches of ImageNet (paper, table 5).
        optimizer: "lars" (batches of 1024 and more), "adamw" or "sgd".
        learning_rate: for a global batch of 256; 0.3 is the paper's for LARS; 1e-3 suits AdamW, 0.06 SGD.
        learning_rate_scaling: "linear", "sqrt" or "none", with the global batch.
        weight_decay: of weights, not of biases and normalisation.
        warmup_epochs: of linear warm-up, at most half the run; then a cosine to 0.
        augmentation: replaces fields of the views (`lightning_modules.views.Augmentation`), for example
            {"jitter": [0.4, 0.4, 0, 0], "grey": 0} for grey images.

    Examples:
        >>> from curated_data import CuratedDataModule
        >>> from lightning import Trainer
        >>> from lightning_modules import SimCLR
        >>> module = SimCLR(
        ...     "resnet10", backbone_options={"width": 16}, image_size=32, small_images=True,
        ...     optimizer="adamw", learning_rate=1e-3
        ... )
        >>> data = CuratedDataModule(
        ...     "pool-{000..001}.tar", views=module.views(), batch_size=16, loader={"num_workers": 0}
        ... )
        >>> quiet = {"enable_progress_bar": False, "enable_model_summary": False}
        >>> Trainer(fast_dev_run=2, accelerator="cpu", **quiet).fit(module, data)
        >>> module.embedding_dimension
        128
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        *,
        image_size: int = 224,
        small_images: bool = False,
        pretrained: bool | str = False,
        frozen_blocks: int = 0,
        backbone_options: Mapping[str, Any] | None = None,
        projection_dimension: int = 128,
        hidden_dimension: int | None = None,
        batch_norm: bool = True,
        temperature: float = 0.5,
        optimizer: str = "lars",
        learning_rate: float = 0.3,
        learning_rate_scaling: str = "linear",
        weight_decay: float = 1e-6,
        warmup_epochs: float = 10,
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
            learning_rate_scaling=learning_rate_scaling,
            warmup_epochs=warmup_epochs,
        )
        self.save_hyperparameters()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        features = self.backbone.dimension
        self.head = mlp([features, hidden_dimension or features, projection_dimension], batch_norm=batch_norm)
        self.views()  # an unknown field of `augmentation` is an error now, not in a worker

    def views(self) -> Views:
        return simclr_views(self.image_size, **(self.hparams.augmentation or {}))

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        a, b = self.project(batch["views"])
        return nt_xent(a, b, temperature=self.hparams.temperature)

    def project(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Projections (B, projection_dimension) of both views, from one pass over both."""
        a, b = self.head(self.backbone(torch.cat(views))).chunk(2)
        return a, b

    def configure_optimizers(self) -> Optimizer:
        sharded = self._trainer is not None and isinstance(self.trainer.strategy, FSDPStrategy)
        if sharded and self.hparams.optimizer == "lars":
            raise ValueError(
                "optimizer 'lars' scales by the norms of whole weights, which strategy='fsdp' cuts: take "
                "strategy='ddp', or optimizer 'adamw'"
            )
        groups = parameter_groups([self.backbone, self.head], self.hparams.weight_decay)
        return build_optimizer(self.hparams.optimizer, groups, learning_rate=self.learning_rate)
