"""Views made on the device, from images that workers have only decoded and resized.

The random numbers for a sample depend only on its seed, which depends only on (seed, epoch, position in the
epoch): they are the same on any number of ranks, in whatever batch the sample is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from curated_data.errors import ConfigError
from curated_data.randomness import GOLDEN, mixed, shifted
from curated_data.streaming.batch import as_views

if TYPE_CHECKING:
    from curated_data.streaming.encoded import DeviceDecoder

DeviceViews = Callable[[Tensor, Tensor], Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class PerSample:
    """Applies any random views of one image, such as torchvision's v2 transforms, to a batch on a device.

    Each sample is augmented by itself, with the generators of the CPU and the device seeded for it; both are
    restored afterwards. That launches the kernels of `views` once per sample. If it is too slow, use batched
    views, such as `ResizedCrops`.

    Args:
        views: maps an image, uint8 (C, H, W), to one tensor or several.
    """

    views: Callable[[Tensor], Any]

    def __call__(self, images: Tensor, seeds: Tensor) -> Tensor | list[Tensor]:
        """(B, C, H, W) images and (B,) seeds to the stacked results of `views`."""
        devices = [images.device] if images.device.type == "cuda" else []
        made = []
        with torch.random.fork_rng(devices=devices):
            for image, seed in zip(images, seeds.tolist(), strict=True):
                torch.random.default_generator.manual_seed(seed)
                if devices:
                    with torch.cuda.device(images.device):
                        torch.cuda.manual_seed(seed)
                made.append(self.views(image))
        if isinstance(made[0], Tensor):
            return torch.stack(made)
        return [torch.stack(view) for view in zip(*made, strict=True)]


@dataclass(frozen=True)
class ResizedCrops:
    """Random resized crops with a random horizontal flip, for a whole batch at once.

    The crops are distributed as in torchvision's `RandomResizedCrop` (area uniform in `scale`, logarithm of
    the aspect ratio uniform), and resized bilinearly without antialiasing.

    Args:
        size: side of a view, in pixels.
        n_views: views per sample.
        scale: range of the crop's area, as a share of the image's.
        ratio: range of the crop's aspect ratio, width to height.
        flip: probability of the flip.
    """

    size: int = 224
    n_views: int = 2
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __call__(self, images: Tensor, seeds: Tensor) -> list[Tensor]:
        """uint8 (B, C, H, W) and (B,) int64 to `n_views` of float (B, C, size, size) in 0..1."""
        images = images.float() / 255
        height, width = images.shape[-2:]
        drawn = uniform(seeds, 5 * self.n_views).to(images.device).view(len(images), self.n_views, 5)
        views = []
        for area, ratio, left, top, flip in (drawn[:, view].unbind(1) for view in range(self.n_views)):
            area = self.scale[0] + area * (self.scale[1] - self.scale[0])
            low, high = torch.log(torch.tensor(self.ratio)).tolist()
            aspect = torch.exp(low + ratio * (high - low)) * height / width
            w, h = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
            sign = 1 - 2 * (flip < self.flip).to(w)
            affine = torch.zeros(len(images), 2, 3, device=images.device)  # in -1..1, as in `affine_grid`
            affine[:, 0, 0], affine[:, 0, 2] = w * sign, (2 * left - 1) * (1 - w)
            affine[:, 1, 1], affine[:, 1, 2] = h, (2 * top - 1) * (1 - h)
            grid = F.affine_grid(affine, [*images.shape[:2], self.size, self.size], align_corners=False)
            views.append(F.grid_sample(images, grid, padding_mode="border", align_corners=False))
        return views


def with_device_views(batch: Any, views: DeviceViews, decoder: "DeviceDecoder | None") -> Any:
    """A batch for training on the device, with its views; others unchanged.

    Args:
        batch: with the seeds of the views, if it is for training.
        views: makes them.
        decoder: for batches whose images are encoded.

    Raises:
        ConfigError: workers made several views, or `views` gives none.
        SampleError: an image cannot be decoded.
    """
    if not isinstance(batch, dict) or "view_seed" not in batch:
        return batch
    seeds = batch.pop("view_seed")
    if "encoded" in batch:
        assert decoder is not None, "made with the loader"
        decoder(batch, seeds.device)
    if "image" not in batch:
        raise ConfigError("views: with device.views they give one tensor, and not a list of views")
    made = as_views(views(batch.pop("image"), seeds), "device.views")
    batch["image" if isinstance(made, Tensor) else "views"] = made
    return batch


def uniform(seeds: Tensor, n: int) -> Tensor:
    """(B, n) float32 uniform in 0..1, each row a function of its seed alone.

    Args:
        seeds: (B,) int64.
        n: numbers per seed.
    """
    steps = seeds.cpu()[:, None] + torch.arange(1, n + 1) * GOLDEN
    return shifted(mixed(steps), 40).float() / (1 << 24)
