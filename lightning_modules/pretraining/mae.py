"""MAE: a light decoder reconstructs the patches that the encoder did not see (arXiv 2111.06377)."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_modules.masking import random_mask
from lightning_modules.optim import build_optimizer, parameter_groups
from lightning_modules.pretraining.base import PretrainingModule
from lightning_modules.views import Augmentation, Views


class MAE(PretrainingModule):
    """Masked autoencoder. One view of each image; masks depend on seed, batch and sample, not on the rank.

    Encoder and decoder start as in the paper (appendix A.1), by Xavier's uniform rule.

    Args:
        backbone: a timm vision transformer with a class token.
        image_size: side of the views in pixels.
        pretrained, frozen_blocks, backbone_options: as in `build_backbone`.
        mask_ratio: share of patches hidden from the encoder.
        decoder_dimension, decoder_depth, decoder_heads: of the decoder; 512, 8, 16 in the paper for ViT-B to
            ViT-H.
        normalize_pixels: targets are each patch's pixels less their mean, divided by their deviation.
        learning_rate: for a global batch of 256, linear scaling (paper: 1.5e-4, AdamW).
        weight_decay, betas: of AdamW.
        warmup_epochs: of linear warm-up, at most half the run (paper: 40); then a cosine to 0.
        augmentation: replaces fields of the views: crop and flip alone in the paper.
        seed: of the masks.

    Examples:
        >>> from curated_data import CuratedDataModule
        >>> from lightning import Trainer
        >>> from lightning_modules import MAE
        >>> module = MAE(
        ...     "timm:vit_tiny_patch16_224", image_size=32, backbone_options={"patch_size": 8, "depth": 2},
        ...     decoder_dimension=32, decoder_depth=1, decoder_heads=2, warmup_epochs=0
        ... )
        >>> data = CuratedDataModule(
        ...     "pool-{000..001}.tar", views=module.views(), batch_size=16, loader={"num_workers": 0}
        ... )
        >>> quiet = {"enable_progress_bar": False, "enable_model_summary": False}
        >>> Trainer(fast_dev_run=2, accelerator="cpu", **quiet).fit(module, data)
        >>> module.embedding_dimension
        192
    """

    n_views = 1

    def __init__(
        self,
        backbone: str = "timm:vit_base_patch16_224",
        *,
        image_size: int = 224,
        pretrained: bool | str = False,
        frozen_blocks: int = 0,
        backbone_options: Mapping[str, Any] | None = None,
        mask_ratio: float = 0.75,
        decoder_dimension: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        normalize_pixels: bool = True,
        learning_rate: float = 1.5e-4,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_epochs: float = 40,
        augmentation: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            backbone,
            image_size=image_size,
            small_images=False,
            pretrained=pretrained,
            frozen_blocks=frozen_blocks,
            backbone_options=backbone_options,
            learning_rate=learning_rate,
            warmup_epochs=warmup_epochs,
        )
        self.save_hyperparameters()
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio must lie between 0 and 1, got {mask_ratio}")
        encoder = self.backbone.vision_transformer()
        if not pretrained:
            encoder.init_weights("jax")  # timm's name for that rule
        self.n_patches: int = encoder.patch_embed.num_patches
        self.patch_size: int = encoder.patch_embed.patch_size[0]
        if self.n_patches * self.patch_size**2 != image_size**2:
            raise ValueError(
                f"backbone {backbone!r} cuts its patches out of a convolution's output, and MAE rebuilds "
                "pixels: use a transformer without a convolutional stem"
            )
        self.n_keep = max(round(self.n_patches * (1 - mask_ratio)), 1)
        if self.n_keep == self.n_patches:
            raise ValueError(
                f"mask_ratio {mask_ratio} of {self.n_patches} patches masks none; use smaller patches"
            )
        self.decoder = Decoder(
            encoder.embed_dim,
            encoder.patch_embed.grid_size,
            patch_values=3 * self.patch_size**2,
            dimension=decoder_dimension,
            depth=decoder_depth,
            heads=decoder_heads,
        )
        self.views()

    def views(self) -> Views:
        options = {
            "scale": (0.2, 1.0),
            "jitter": (0.0, 0.0, 0.0, 0.0),
            "grey": 0.0,
            **(self.hparams.augmentation or {}),
        }
        return Views((Augmentation(self.image_size, **options),))

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        images = batch["views"][0]
        keep, restore = random_mask(
            self.sample_ids(batch), self.n_patches, self.n_keep, seed=self.hparams.seed, draw=self.draw
        )
        predicted = self.reconstruct(images, keep, restore)
        return reconstruction_loss(
            predicted,
            patchify(images, self.patch_size),
            masked=restore >= self.n_keep,
            normalize=self.hparams.normalize_pixels,
        )

    def reconstruct(self, images: Tensor, keep: Tensor, restore: Tensor) -> Tensor:
        """Predicted pixels of every patch, (B, n_patches, 3 * p * p), from the kept patches alone."""
        class_token, seen = self.backbone(images, as_tokens=True, keep=keep)
        return self.decoder(class_token, seen, restore)

    def configure_optimizers(self) -> Optimizer:
        groups = parameter_groups([self.backbone, self.decoder], self.hparams.weight_decay)
        return build_optimizer("adamw", groups, learning_rate=self.learning_rate, betas=self.hparams.betas)


class Decoder(nn.Module):
    """Narrow transformer from encoded kept patches to the pixels of all patches."""

    positions: Tensor

    def __init__(
        self,
        encoder_dimension: int,
        grid: tuple[int, int],
        *,
        patch_values: int,
        dimension: int,
        depth: int,
        heads: int,
    ) -> None:
        super().__init__()
        self.project = nn.Linear(encoder_dimension, dimension)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dimension))
        self.register_buffer("positions", sine_cosine_positions(*grid, dimension), persistent=False)
        self.blocks = nn.ModuleList(Block(dimension, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dimension)
        self.to_pixels = nn.Linear(dimension, patch_values)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, class_token: Tensor, seen: Tensor, restore: Tensor) -> Tensor:
        seen = self.project(seen)
        n_hidden = restore.shape[1] - seen.shape[1]
        shuffled = torch.cat([seen, self.mask_token.to(seen.dtype).expand(len(seen), n_hidden, -1)], dim=1)
        patches = shuffled.gather(1, restore[..., None].expand(-1, -1, seen.shape[-1])) + self.positions
        x = torch.cat([self.project(class_token)[:, None], patches], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.to_pixels(self.norm(x[:, 1:]))


def reconstruction_loss(
    predicted: Tensor, pixels: Tensor, *, masked: Tensor, normalize: bool = True
) -> Tensor:
    """Mean squared error over the masked patches.

    Args:
        predicted, pixels: (B, N, 3 * p * p).
        masked: (B, N) boolean.
        normalize: pixels of each patch are centred and divided by their deviation first.
    """
    pixels = pixels.float()
    if normalize:
        variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
        pixels = (pixels - mean) / (variance + 1e-6).sqrt()
    error = (predicted.float() - pixels).square().mean(-1)
    return (error * masked).sum() / masked.sum()


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, 3, h * p, w * p) to (B, h * w, p * p * 3), patches in reading order."""
    b, c, height, width = images.shape
    h, w = height // patch_size, width // patch_size
    patches = images.reshape(b, c, h, patch_size, w, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(b, h * w, patch_size * patch_size * c)


def sine_cosine_positions(height: int, width: int, dimension: int) -> Tensor:
    """Fixed position embeddings (h * w, dimension): sines and cosines of the row and of the column."""
    if dimension % 4:
        raise ValueError(f"decoder_dimension must be a multiple of 4, got {dimension}")
    frequencies = 10000.0 ** (-torch.arange(dimension // 4) / (dimension // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    parts = [axis.flatten()[:, None] * frequencies for axis in (rows, columns)]
    return torch.cat([f(part) for part in parts for f in (torch.sin, torch.cos)], dim=1)
