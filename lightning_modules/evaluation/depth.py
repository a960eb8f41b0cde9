"""Depth by a linear layer on patch tokens: 256 bins, a scale-invariant loss; RMSE, AbsRel, delta < 1.25."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curated_data.parallel import together
from lightning_modules.distributed import all_reduce
from lightning_modules.evaluation.dense import (
    DenseSet,
    DenseSettings,
    Images,
    checked_dense_pair,
    each_map,
    train_layer,
    upsampled,
)
from lightning_modules.evaluation.inputs import Array, as_tensor
from lightning_modules.evaluation.result import PER_SAMPLE, Result


@dataclass(frozen=True)
class DepthResult(Result):
    """Means over the test images that have a valid pixel, of each image's figure over its valid pixels.

    Attributes:
        rmse: root of the mean squared error, in the unit of the depth maps.
        absolute_relative: mean of |prediction - depth| / depth.
        delta_1: share of pixels with max(prediction / depth, depth / prediction) < 1.25.
        n_images: images counted; n_without: images without a valid pixel, left out.
        n_invalid: pixels of the test set left out: not finite, or outside of the valid range.
        scores: (n, 3) RMSE, AbsRel and delta < 1.25 of each of this rank's test images, NaN for those left
            out.
    """

    rmse: float
    absolute_relative: float
    delta_1: float
    n_images: int
    n_without: int
    n_invalid: int
    scores: np.ndarray = field(repr=False, compare=False, metadata=PER_SAMPLE)

    def rows(self) -> list[dict[str, Any]]:
        return [{"RMSE": self.rmse, "AbsRel": self.absolute_relative, "delta < 1.25": self.delta_1}]


def depth(
    train_tokens: Array,
    train_depths: Images,
    test_tokens: Array,
    test_depths: Images,
    *,
    min_depth: float = 1e-3,
    max_depth: float = 10.0,
    n_bins: int = 256,
    settings: DenseSettings | None = None,
    device: str | torch.device = "cpu",
) -> DepthResult:
    """Train a linear layer that predicts a softmax over depth bins, whose mean is the depth, and test it.

    The loss is sqrt(mean(g²) - 0.85 mean(g)²) of g = log(prediction) - log(depth) over a batch's valid pixels
    (Eigen et al. 2014). A pixel is valid if its depth is finite and in [min_depth, max_depth]; 0 and
    infinity, the usual marks of "not measured", are thus left out. Under `torch.distributed` every rank gives
    its share and gets the whole result.

    Args:
        train_tokens: (n, h, w, d) patch tokens, an array or a memory map; test_tokens: (m, h, w, d).
        train_depths: n depth maps (H, W), of any sizes not below the tokens' grid; test_depths: m of them.
        min_depth, max_depth: the valid range, of predictions too: 10 for NYU, 80 for KITTI.
        n_bins: evenly spaced over the range.
        settings: of the training.
        device: where to train.

    Raises:
        ValueError: shapes that do not match, a bad range, or no valid pixel in train or test.

    Examples:
        >>> import numpy as np
        >>> from lightning_modules.evaluation import DenseSettings, depth
        >>> depths = np.full((8, 16, 16), 2.0)  # the right half of each image is farther away
        >>> depths[:, :, 8:] = 4.0
        >>> tokens = np.eye(2)[(depths[:, ::8, ::8] > 3).astype(int)]  # (8, 2, 2, 2): a patch is 8 x 8 pixels
        >>> settings = DenseSettings(n_iter=50, batch_size=4, warmup=5)
        >>> result = depth(tokens, depths, tokens, depths, settings=settings)
        >>> 0 < result.rmse < 3  # in the unit of the depths; more steps make it smaller
        True
    """
    if not 0 < min_depth < max_depth or n_bins < 2:
        raise ValueError(
            f"need 0 < min_depth < max_depth and two bins, got {min_depth}, {max_depth}, {n_bins}"
        )
    with together():
        train, test = checked_dense_pair(train_tokens, train_depths, test_tokens, test_depths)
        valid = [
            sum(int(_valid(torch.as_tensor(map_), min_depth, max_depth).sum()) for map_ in each_map(data))
            for data in (train, test)
        ]
    for name, count in zip(("train", "test"), valid):
        if int(all_reduce(torch.tensor([count], device=device))) == 0:
            raise ValueError(
                f"{name}: no pixel has a depth in [{min_depth:g}, {max_depth:g}]: is the unit right?"
            )
    centers = torch.linspace(min_depth, max_depth, n_bins, device=device)

    def predict(output: Tensor, size: tuple[int, ...]) -> Tensor:
        expected = torch.einsum("bhw,b->hw", output.softmax(0), centers)
        return upsampled(expected[None], size)[0].clamp(min_depth, max_depth)

    def loss_of(outputs: list[Tensor], rows: list[int]) -> tuple[Tensor, Tensor]:
        errors = []
        for output, i in zip(outputs, rows):
            truth = as_tensor(train.maps[i]).to(device, torch.float32)
            valid = _valid(truth, min_depth, max_depth)
            errors.append(predict(output, tuple(truth.shape))[valid].log() - truth[valid].log())
        return _scale_invariant(torch.cat(errors) if errors else torch.zeros(0, device=device))

    layer = train_layer(train, n_bins, loss_of, settings or DenseSettings(), device)
    return _tested(test, lambda tokens, size: predict(layer(tokens), size), min_depth, max_depth, device)


def depth_scores(prediction: Tensor, truth: Tensor) -> Tensor:
    """RMSE, AbsRel and delta < 1.25 of depths (n,): a tensor (3,) float64."""
    prediction, truth = prediction.double(), truth.double()
    error = prediction - truth
    ratio = torch.maximum(prediction / truth, truth / prediction)
    return torch.stack(
        [error.square().mean().sqrt(), (error.abs() / truth).mean(), (ratio < 1.25).double().mean()]
    )


def _scale_invariant(g: Tensor) -> tuple[Tensor, Tensor]:
    """A value with the gradient of the loss over all ranks' pixels, and 1 / ranks for its weight.

    The loss is a root of sums over all ranks, so its gradient in g, (g - 0.85 mean) / (n loss), needs the
    sums alone.
    """
    with torch.no_grad():
        sums = all_reduce(torch.stack([g.new_tensor(len(g)), g.sum(), g.square().sum()]).double())
        n, mean = sums[0].clamp_min(1), sums[1] / sums[0].clamp_min(1)
        loss = (sums[2] / n - 0.85 * mean.square()).clamp_min(1e-12).sqrt()
        weight = (g - 0.85 * mean) / (n * loss)
    # `train_layer` divides the summed gradients by the count: zero counts everywhere leave them as they are.
    return (weight.to(g.dtype) * g).sum(), g.new_zeros(())


def _tested(
    test: DenseSet,
    predict: Callable[[Tensor, tuple[int, ...]], Tensor],
    min_depth: float,
    max_depth: float,
    device: str | torch.device,
) -> DepthResult:
    # Three scores, images, images without, invalid pixels.
    sums = torch.zeros(6, dtype=torch.float64, device=device)
    each = np.full((len(test), 3), np.nan)
    with torch.no_grad():
        for i, map_ in enumerate(each_map(test)):
            truth = torch.as_tensor(map_).to(device, torch.float32)
            valid = _valid(truth, min_depth, max_depth)
            sums[5] += (~valid).sum()
            if not bool(valid.any()):
                sums[4] += 1
                continue
            prediction = predict(test.token_map(i, device), tuple(truth.shape))
            scores = depth_scores(prediction[valid], truth[valid])
            each[i] = scores.cpu().numpy()
            sums[:3] += scores
            sums[3] += 1
    sums = all_reduce(sums).cpu()
    rmse, relative, delta = (sums[:3] / sums[3]).tolist()
    return DepthResult(rmse, relative, delta, int(sums[3]), int(sums[4]), int(sums[5]), each)


def _valid(depth_map: Tensor, min_depth: float, max_depth: float) -> Tensor:
    depth_map = depth_map.to(torch.float32)  # PNGs hold uint16, which torch does not compare
    return torch.isfinite(depth_map) & (depth_map >= min_depth) & (depth_map <= max_depth)
