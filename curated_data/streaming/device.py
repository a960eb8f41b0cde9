"""Views made on the device, of images that workers only decoded and brought to one size.

What is drawn for a sample is a function of its seed, which is one of (seed, epoch, place in the epoch): the
same on any number of ranks, whatever the batch that it is in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

DeviceViews = Callable[[Tensor, Tensor], Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class PerSample:
    """Any random views of one image, such as torchvision's v2 transforms, for a batch on a device.

    Each sample is augmented by itself, with the CPU's and the device's generator seeded for it; both are
    afterwards as they were before. As many kernels are started as `views` starts for each sample: where that
    is too slow, give views that are batched, as `ResizedCrops`.

    Args:
        views: from an image, uint8 (C, H, W), to a tensor or to several.
    """

    views: Callable[[Tensor], Any]

    def __call__(self, images: Tensor, seeds: Tensor) -> Tensor | list[Tensor]:
        """(B, C, H, W) and (B,) to what `views` gives, stacked."""
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
    """Random resized crops with a random flip, all of a batch in one step.

    As torchvision's `RandomResizedCrop` draws them (area uniform in `scale`, the logarithm of the ratio of
    sides uniform), bilinear without antialiasing.

    Args:
        size: side of a view, in pixels.
        n_views: views of a sample.
        scale: area of the crop, as a share of the image's.
        ratio: width to height.
        flip: probability of a horizontal flip.
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
            affine = torch.zeros(len(images), 2, 3, device=images.device)  # to -1..1, as `affine_grid` has it
            affine[:, 0, 0], affine[:, 0, 2] = w * sign, (2 * left - 1) * (1 - w)
            affine[:, 1, 1], affine[:, 1, 2] = h, (2 * top - 1) * (1 - h)
            grid = F.affine_grid(affine, [*images.shape[:2], self.size, self.size], align_corners=False)
            views.append(F.grid_sample(images, grid, padding_mode="border", align_corners=False))
        return views


def uniform(seeds: Tensor, n: int) -> Tensor:
    """(B, n) float32 uniform in 0..1, each row a function of its seed alone.

    Args:
        seeds: (B,) int64.
        n: numbers a seed.
    """
    state = seeds.cpu()[:, None] + torch.arange(1, n + 1) * -0x61C8864680B583EB  # SplitMix64's steps
    state = (state ^ _shifted(state, 30)) * -0x40A7B892E31B1A47
    state = (state ^ _shifted(state, 27)) * -0x6B2FB644ECCEEE15
    return (_shifted(state ^ _shifted(state, 31), 40)).float() / (1 << 24)


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, as unsigned."""
    return (x >> by) & ((1 << (64 - by)) - 1)
