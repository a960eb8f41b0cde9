"""Augmentations and the evaluation transform: uint8 images (3, H, W) of any size to float tensors (3, S, S).

They run one sample at a time in loader workers. Every random number comes from torch's global generator,
which the loader seeds for each sample, so a sample's views depend on nothing else. All are plain picklable
objects.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_LUMA = torch.tensor([0.299, 0.587, 0.114])  # ITU-R 601
_RGB_TO_YIQ = torch.stack(
    [_LUMA, torch.tensor([0.5959, -0.2746, -0.3213]), torch.tensor([0.2115, -0.5227, 0.3112])]
)
_YIQ_TO_RGB = torch.linalg.inv(_RGB_TO_YIQ)


@dataclass(frozen=True)
class EvalTransform:
    """Resize the shorter side, crop the centre, normalise. Deterministic.

    Args:
        size: side of the output S in pixels.
        crop: the centre crop's share of the resized side; 1 for small images, 0.875 (256 to 224) for large
            ones.
    """

    size: int
    crop: float = 1.0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __call__(self, image: Tensor) -> Tensor:
        _check_image(image)
        side = max(round(self.size / self.crop), self.size)
        height, width = image.shape[1:]
        if min(height, width) != side:
            scale = side / min(height, width)
            image = TF.resize(
                image, [max(round(height * scale), side), max(round(width * scale), side)], antialias=True
            )
        return normalize(TF.center_crop(image, [self.size, self.size]), self.mean, self.std)


@dataclass(frozen=True)
class Augmentation:
    """One random view: resized crop, flip, colour jitter, grey, blur, solarisation, normalisation.

    All colour changes of a view are one affine map of its RGB values, in the order brightness, contrast,
    saturation, hue, grey: one small matrix product instead of a dozen passes over the image. Hue turns the
    chrominance plane of YIQ, which keeps luma; the values are cut to 0..255 once, at the end.

    Args:
        size: side of the view S in pixels.
        scale: the crop's area as a share of the image's, drawn uniformly.
        of_square: the share is of the area of the largest square in the image instead: with one `scale` and
            `ratio` 1, a random crop after the shorter side is resized.
        ratio: the crop's aspect ratio, drawn uniformly in its logarithm.
        flip: probability of a horizontal flip.
        jitter: largest changes of brightness, contrast, saturation (shares) and hue (turns).
        jitter_probability, grey, blur, solarize: probabilities.
        blur_sigma: range of the Gaussian's deviation in pixels.
    """

    size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_probability: float = 0.8
    grey: float = 0.2
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    of_square: bool = False

    def __call__(self, image: Tensor) -> Tensor:
        _check_image(image)
        # All draws at once: a call of torch.rand costs as much as an operation on a small image.
        draws = torch.rand(32).tolist()
        top, left, height, width = _random_crop(
            image.shape[1], image.shape[2], self.scale, self.ratio, draws[:20], self.of_square
        )
        image = TF.resized_crop(image, top, left, height, width, [self.size, self.size], antialias=True)
        if draws[20] < self.flip:
            image = image.flip(-1)
        image = image.float()
        jitter = self.jitter if draws[21] < self.jitter_probability else (0.0,) * 4
        grey = draws[26] < self.grey
        if grey or any(jitter):
            image = _change_color(image, jitter, draws[22:26], grey)
        if draws[27] < self.blur:
            low, high = self.blur_sigma
            image = gaussian_blur(image, low + (high - low) * draws[28])
        if draws[29] < self.solarize:
            image = torch.where(image >= 128, 255 - image, image)
        return normalize(image, self.mean, self.std)


@dataclass(frozen=True)
class Views:
    """The views of one image, one for each augmentation, as a list of tensors (3, S, S)."""

    augmentations: tuple[Augmentation, ...] = field(default_factory=tuple)

    def __call__(self, image: Tensor) -> list[Tensor]:
        return [augment(image) for augment in self.augmentations]


def simclr_views(size: int, *, n_views: int = 2, strength: float | None = None, **options: Any) -> Views:
    """SimCLR's augmentation (arXiv 2002.05709, appendix A).

    Args:
        size: side of the views in pixels.
        strength: of the colour jitter (0.8, 0.8, 0.8, 0.2); None takes 0.5 up to 64 pixels and 1 above, as
            the paper does for CIFAR-10 and ImageNet. Blur (probability 0.5) is used above 64 pixels alone.
        options: fields of `Augmentation` that replace the defaults.
    """
    small = size <= 64
    strength = (0.5 if small else 1.0) if strength is None else strength
    jitter = tuple(strength * value for value in (0.8, 0.8, 0.8, 0.2))
    settings: dict[str, Any] = {
        "scale": (0.08, 1.0),
        "jitter": jitter,
        "blur": 0.0 if small else 0.5,
    } | options
    return Views((Augmentation(size, **settings),) * n_views)


def eval_transform(
    size: int,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> EvalTransform:
    """The usual evaluation transform for a size: the whole image up to 64 pixels, the central 7/8 above."""
    return EvalTransform(size, crop=1.0 if size <= 64 else 0.875, mean=mean, std=std)


def normalize(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(image / 255 - mean) / std, in one pass: image (3, H, W), uint8 or float in 0..255, to float32."""
    scale = torch.tensor([1 / (255 * s) for s in std]).view(3, 1, 1)
    shift = torch.tensor([m / s for m, s in zip(mean, std)]).view(3, 1, 1)
    return image * scale - shift


def color_matrix(*, saturation: float = 1.0, hue: float = 0.0, grey: bool = False) -> Tensor:
    """The (3, 3) matrix on RGB that scales saturation, turns the hue, and drops colour where `grey`."""
    if grey:
        return _LUMA.expand(3, 3)
    luma, identity = _LUMA.expand(3, 3), torch.eye(3)
    matrix = saturation * identity + (1 - saturation) * luma
    if hue:
        cos, sin = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
        turn = torch.tensor([[1.0, 0.0, 0.0], [0.0, cos, -sin], [0.0, sin, cos]])
        matrix = _YIQ_TO_RGB @ turn @ _RGB_TO_YIQ @ matrix
    return matrix


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of a float image (3, H, W), borders reflected, the kernel cut at three deviations.

    A sum of shifted images along each axis: on a CPU ten times faster than a convolution of three channels.
    """
    radius = min(math.ceil(3 * sigma), min(image.shape[1:]) - 1)
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-radius, radius + 1)]
    total = sum(weights)
    image = F.pad(image, (radius,) * 4, mode="reflect")
    for axis in (1, 2):
        length = image.shape[axis] - 2 * radius
        blurred = image.narrow(axis, 0, length) * (weights[0] / total)
        for i, weight in enumerate(weights[1:], start=1):
            blurred.add_(image.narrow(axis, i, length), alpha=weight / total)
        image = blurred
    return image


def _random_crop(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draws: list[float],
    of_square: bool = False,
) -> tuple[int, int, int, int]:
    """Top, left, height, width of a random crop: up to nine tries, then the largest centre crop."""
    area = min(height, width) ** 2 if of_square else height * width
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for u, v in zip(draws[0:18:2], draws[1:18:2]):
        target = area * (scale[0] + (scale[1] - scale[0]) * u)
        aspect = math.exp(low + (high - low) * v)
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int((height - h + 1) * draws[18]), int((width - w + 1) * draws[19]), h, w
    aspect = width / height
    if aspect < ratio[0]:
        w, h = width, min(round(width / ratio[0]), height)
    elif aspect > ratio[1]:
        w, h = min(round(height * ratio[1]), width), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def _change_color(
    image: Tensor, jitter: tuple[float, float, float, float], draws: list[float], grey: bool
) -> Tensor:
    """Brightness, contrast, saturation, hue by random factors, then grey: float image (3, H, W) in 0..255."""
    pixels = image.reshape(3, -1)
    brightness, contrast, saturation = (_factor(s, u) for s, u in zip(jitter[:3], draws))
    matrix = color_matrix(saturation=saturation, hue=jitter[3] * (2 * draws[3] - 1), grey=grey)
    # The matrix keeps grey values, so contrast about the mean luma may be applied before or after it.
    mean_luma = float(torch.mv(pixels, pixels.new_full((pixels.shape[1],), 1 / pixels.shape[1])) @ _LUMA)
    offset = torch.full((3, 1), brightness * (1 - contrast) * mean_luma)
    return torch.addmm(offset, matrix, pixels, alpha=brightness * contrast).clamp_(0, 255).view_as(image)


def _factor(strength: float, draw: float) -> float:
    low = max(0.0, 1 - strength)
    return low + (1 + strength - low) * draw


def _check_image(image: Tensor) -> None:
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
        found = f"{tuple(image.shape)} {image.dtype}" if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"expected a uint8 image tensor (3, H, W), got {found}")
    if not min(image.shape[1:]):
        raise ValueError(f"image of shape {tuple(image.shape)} has no pixels")
