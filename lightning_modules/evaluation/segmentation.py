"""Semantic segmentation by a linear layer on patch tokens, upsampled: mean intersection over union."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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
class SegmentationResult(Result):
    """Figures in 0..1, over all pixels of the test set whose label is not ignored.

    Attributes:
        miou: mean intersection over union of the classes that occur in the test set or are predicted there.
        pixel_accuracy: share of the pixels that are right.
        class_accuracy: mean over the classes of the test set.
        iou: of each such class.
        n_ignored: pixels with the ignored label in the test set.
        counts: (n, 3, C) int64: in each of this rank's test images, pixels of each class that are right, that
            have the class, and that are predicted to. `mean_iou` of their sum over images is `miou`. None
            from `segmentation_scores`.
    """

    miou: float
    pixel_accuracy: float
    class_accuracy: float
    iou: dict[int, float]
    n_ignored: int
    counts: np.ndarray | None = field(default=None, repr=False, compare=False, metadata=PER_SAMPLE)

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"mIoU": self.miou, "pixel accuracy": self.pixel_accuracy, "class average": self.class_accuracy}
        ]


def segmentation(
    train_tokens: Array,
    train_masks: Images,
    test_tokens: Array,
    test_masks: Images,
    *,
    n_classes: int,
    ignore_label: int = 255,
    settings: DenseSettings | None = None,
    device: str | torch.device = "cpu",
) -> SegmentationResult:
    """Train a linear layer with cross-entropy on train tokens and segment the test images.

    Under `torch.distributed` every rank gives its share and gets the whole result.

    Args:
        train_tokens: (n, h, w, d) patch tokens, an array or a memory map; test_tokens: (m, h, w, d).
        train_masks: n integer masks (H, W), of any sizes not below the tokens' grid; test_masks: m of them.
        n_classes: labels are 0 .. n_classes - 1, or `ignore_label`.
        ignore_label: pixels that count nowhere.
        settings: of the training.
        device: where to train.

    Raises:
        ValueError: shapes that do not match, labels outside of the classes, or only ignored pixels in train
            or test.

    Examples:
        >>> import numpy as np
        >>> from lightning_modules.evaluation import DenseSettings, segmentation
        >>> masks = np.zeros((8, 16, 16), int)  # the right half of each image is of class 1
        >>> masks[:, :, 8:] = 1
        >>> tokens = np.eye(2)[masks[:, ::8, ::8]]  # (8, 2, 2, 2): a patch is 8 x 8 pixels
        >>> settings = DenseSettings(n_iter=50, batch_size=4, warmup=5)
        >>> result = segmentation(tokens, masks, tokens, masks, n_classes=2, settings=settings)
        >>> result.pixel_accuracy > 0.9
        True
    """
    if n_classes < 2:
        raise ValueError(f"n_classes must be 2 or more, got {n_classes}")
    with together():
        train, test = checked_dense_pair(train_tokens, train_masks, test_tokens, test_masks)
        n_train = _checked_labels("train", train, n_classes, ignore_label)
        n_test = _checked_labels("test", test, n_classes, ignore_label)
    for name, count in (("train", n_train), ("test", n_test)):
        if int(all_reduce(torch.tensor([count], device=device))) == 0:
            raise ValueError(
                f"{name}: every pixel has the ignored label {ignore_label}, or there are no images"
            )

    def loss_of(outputs: list[Tensor], rows: list[int]) -> tuple[Tensor, Tensor]:
        total, count = torch.zeros((), device=device), torch.zeros((), device=device)
        for output, i in zip(outputs, rows):
            mask = as_tensor(train.maps[i]).to(device, torch.int64)
            logits = upsampled(output, tuple(mask.shape))
            total = total + F.cross_entropy(
                logits[None], mask[None], ignore_index=ignore_label, reduction="sum"
            )
            count += (mask != ignore_label).sum()
        return total, count

    layer = train_layer(train, n_classes, loss_of, settings or DenseSettings(), device)
    confusion = torch.zeros(n_classes * n_classes, dtype=torch.int64, device=device)
    n_ignored = torch.zeros(1, dtype=torch.int64, device=device)
    counts = np.zeros((len(test), 3, n_classes), np.int64)
    with torch.no_grad():
        for i in range(len(test)):
            mask = as_tensor(test.maps[i]).to(device, torch.int64)
            predicted = upsampled(layer(test.token_map(i, device)), tuple(mask.shape)).argmax(0)
            known = mask != ignore_label
            own = torch.bincount(mask[known] * n_classes + predicted[known], minlength=n_classes**2)
            confusion += own
            own = own.reshape(n_classes, n_classes)
            counts[i] = torch.stack([own.diagonal(), own.sum(1), own.sum(0)]).cpu().numpy()
            n_ignored += (~known).sum()
    table = all_reduce(confusion).cpu().numpy().reshape(n_classes, n_classes)
    return replace(segmentation_scores(table, int(all_reduce(n_ignored))), counts=counts)


def mean_iou(counts: np.ndarray) -> np.ndarray:
    """Mean intersection over union of counts (..., 3, C) as `SegmentationResult` has them, over the classes
    that occur or are predicted.
    """
    right, true, predicted = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
    union = true + predicted - right
    iou = np.divide(right, union, out=np.full(union.shape, np.nan), where=union > 0)
    return np.nanmean(iou, axis=-1)


def segmentation_scores(confusion: np.ndarray, n_ignored: int = 0) -> SegmentationResult:
    """Scores of a confusion matrix, (true class, predicted class)."""
    right, true, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    union = true + predicted - right
    occurs = union > 0
    iou = right[occurs] / union[occurs]
    present = true > 0
    return SegmentationResult(
        miou=float(iou.mean()),
        pixel_accuracy=float(right.sum() / true.sum()),
        class_accuracy=float((right[present] / true[present]).mean()),
        iou=dict(zip(np.flatnonzero(occurs).tolist(), iou.tolist())),
        n_ignored=n_ignored,
    )


def _checked_labels(name: str, data: DenseSet, n_classes: int, ignore_label: int) -> int:
    """How many pixels of this rank's masks are not ignored; an error if some have other labels."""
    n_known = 0
    for i, mask in enumerate(each_map(data)):
        if mask.dtype.kind not in "iu":
            raise ValueError(f"{name}: mask {i} has {mask.dtype} values; expected integer labels")
        known = mask[mask != ignore_label]
        n_known += len(known)
        if len(known) and (known.min() < 0 or known.max() >= n_classes):
            raise ValueError(
                f"{name}: mask {i} has labels {int(known.min())}..{int(known.max())}, outside of "
                f"0..{n_classes - 1} "
                f"and not the ignored label {ignore_label}"
            )
    return n_known
