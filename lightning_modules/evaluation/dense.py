"""What segmentation and depth share: a linear layer on patch tokens, trained over all ranks' images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.distributed import all_reduce
from lightning_modules.evaluation.inputs import Array, as_tensor, first_row, n_joined
from lightning_modules.evaluation.linear import batches_of
from lightning_modules.schedules import warmup_cosine

Images = Array | Sequence[Array]


@dataclass(frozen=True)
class DenseSettings:
    """How the layer is trained: AdamW, linear warm-up, cosine.

    Attributes:
        n_iter, batch_size: steps, and images in each over all ranks.
        learning_rate, weight_decay: of AdamW.
        warmup: steps.
        seed: of the batches and the first weights.

    Examples:
        >>> from lightning_modules.evaluation import DenseSettings
        >>> DenseSettings(n_iter=1000, batch_size=16).learning_rate
        0.001
    """

    n_iter: int = 5000
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    warmup: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.n_iter, self.batch_size) < 1 or self.learning_rate <= 0 or self.warmup < 0:
            raise ValueError(f"n_iter, batch_size and learning_rate must be positive: {self}")


@dataclass(frozen=True)
class DenseSet:
    """This rank's images: patch tokens (n, h, w, d) and for each image its map (H, W)."""

    tokens: Array
    maps: Images

    def __len__(self) -> int:
        return len(self.tokens)

    def token_map(self, i: int, device: str | torch.device) -> Tensor:
        """Tokens (d, h, w) float32 of one image."""
        return as_tensor(self.tokens[i]).to(device, torch.float32).permute(2, 0, 1)


def checked_dense(name: str, tokens: Array, maps: Images) -> DenseSet:
    """A set whose tokens are finite and whose maps fit them.

    Raises:
        ValueError: other shapes, another number of maps than of images, a map smaller than the grid of
            tokens, or tokens that are not finite.
    """
    if len(tokens.shape) != 4:
        raise ValueError(f"{name}: expected tokens (n, h, w, d), got {tuple(tokens.shape)}")
    if len(maps) != len(tokens):
        raise ValueError(f"{name}: {len(tokens)} images, but {len(maps)} maps")
    height, width = tokens.shape[1:3]
    for i in range(len(tokens)):
        shape = tuple(maps[i].shape)
        if len(shape) != 2 or shape[0] < height or shape[1] < width:
            raise ValueError(
                f"{name}: map {i} has shape {shape}; expected (H, W), not smaller than the {height} x "
                f"{width} tokens"
            )
        if not bool(torch.isfinite(as_tensor(tokens[i])).all()):
            raise ValueError(f"{name}: tokens of image {i} are not finite")
    return DenseSet(tokens, maps)


def checked_dense_pair(
    train_tokens: Array, train_maps: Images, test_tokens: Array, test_maps: Images
) -> tuple[DenseSet, DenseSet]:
    """Train and test sets, each as `checked_dense` has it, of tokens with as many features.

    Raises:
        ValueError: see `checked_dense`; or tokens of different lengths.
    """
    train = checked_dense("train", train_tokens, train_maps)
    test = checked_dense("test", test_tokens, test_maps)
    if train.tokens.shape[3] != test.tokens.shape[3]:
        raise ValueError(
            f"train tokens have {train.tokens.shape[3]} features, test tokens {test.tokens.shape[3]}"
        )
    return train, test


def train_layer(
    data: DenseSet,
    n_outputs: int,
    loss_of: Callable[[list[Tensor], list[int]], tuple[Tensor, Tensor]],
    settings: DenseSettings,
    device: str | torch.device,
) -> Callable[[Tensor], Tensor]:
    """Train a 1x1 convolution on standardised tokens.

    Args:
        data: this rank's share.
        n_outputs: channels of the output.
        loss_of: from the outputs (n_outputs, h, w) of this rank's part of a batch and the images' rows, to
            the sum of its losses and their number; may reduce over ranks, and is called on every rank for
            every batch.
        settings: of the training.
        device: where to train.

    Returns:
        The layer: tokens (d, h, w) to outputs (n_outputs, h, w).
    """
    rows_here = torch.empty(len(data), device=device)
    n, first = n_joined(rows_here), first_row(rows_here)
    mean, deviation = _moments(data, device)
    generator = torch.Generator().manual_seed(settings.seed)
    weight = (0.01 * torch.randn(n_outputs, len(mean), generator=generator)).to(device).requires_grad_()
    bias = torch.zeros(n_outputs, device=device, requires_grad=True)
    optimizer = torch.optim.AdamW(
        [weight, bias], lr=settings.learning_rate, weight_decay=settings.weight_decay
    )

    def layer(tokens: Tensor) -> Tensor:
        standardised = (tokens - mean[:, None, None]) / deviation[:, None, None]
        return torch.einsum("od,dhw->ohw", weight, standardised) + bias[:, None, None]

    next_batch = batches_of(n, min(settings.batch_size, n), settings.seed)
    for step in range(settings.n_iter):
        rows = [int(i) - first for i in next_batch() if first <= int(i) < first + len(data)]
        with torch.enable_grad():
            total, count = loss_of([layer(data.token_map(i, device)) for i in rows], rows)
            gradients = torch.autograd.grad(total, [weight, bias]) if total.requires_grad else None
        if gradients is None:
            gradients = (torch.zeros_like(weight), torch.zeros_like(bias))
        count = all_reduce(count.double().reshape(1)).clamp_min(1)
        for parameter, gradient in zip((weight, bias), gradients):
            parameter.grad = all_reduce(gradient) / count.to(gradient.dtype)
        rate = warmup_cosine(step, total=settings.n_iter, peak=settings.learning_rate, warmup=settings.warmup)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return layer


def upsampled(outputs: Tensor, size: tuple[int, ...]) -> Tensor:
    """Outputs (c, h, w) at the size of an image's map, bilinear."""
    return F.interpolate(outputs[None], size=list(size), mode="bilinear", align_corners=False)[0]


def each_map(data: DenseSet) -> Iterator[np.ndarray]:
    """The maps of this rank's images, one after another."""
    for i in range(len(data)):
        yield np.asarray(as_tensor(data.maps[i]))


def _moments(data: DenseSet, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every feature over all ranks' tokens."""
    d = data.tokens.shape[3]
    sums = torch.zeros(2 * d + 1, dtype=torch.float64, device=device)
    for i in range(len(data)):
        tokens = data.token_map(i, device).double().flatten(1)
        sums += torch.cat([tokens.sum(1), tokens.square().sum(1), tokens.new_tensor([tokens.shape[1]])])
    sums = all_reduce(sums)
    mean = sums[:d] / sums[-1]
    deviation = (sums[d:-1] / sums[-1] - mean.square()).clamp_min(1e-12).sqrt()
    return mean.float(), deviation.float()
