"""The default transform of an image."""

from dataclasses import dataclass

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from curated_data.errors import ConfigError


@dataclass(frozen=True)
class CenterCrop:
    """Resize the shorter side and crop the centre: uint8 (C, H, W) to (C, size, size).

    Args:
        size: in pixels.
        scale: convert to float32 in 0..1; otherwise the result is uint8.
    """

    size: int
    scale: bool = True

    def __call__(self, image: Tensor) -> Tensor:
        if not isinstance(image, Tensor):
            raise ConfigError(
                f"views: the default takes images, but the pool gave a {type(image).__name__}; for texts and "
                "arrays pass your own `views` (and `eval_transform`)"
            )
        resized = TF.resize(image, [self.size], antialias=True)
        cropped = TF.center_crop(resized, [self.size, self.size])
        return TF.to_dtype(cropped, torch.float32, scale=True) if self.scale else cropped
