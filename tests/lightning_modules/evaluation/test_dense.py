"""Segmentation and depth: scores against torchmetrics and by hand, made images, ranks, bad maps."""

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.functional import mean_squared_error

from lightning_modules.evaluation.dense import DenseSettings
from lightning_modules.evaluation.depth import depth, depth_scores
from lightning_modules.evaluation.segmentation import segmentation, segmentation_scores
from tests.support.ranks import on_two_ranks

QUICK = DenseSettings(n_iter=60, batch_size=6, learning_rate=0.05, warmup=5)


def scenes(n: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens (n, 4, 4, 5), masks (n, 16, 16) of three classes in patches, depths that grow with the class."""
    generator = np.random.default_rng(0)
    classes = generator.integers(0, 3, (n, 4, 4))
    tokens = np.eye(5, dtype=np.float32)[classes] * 2 + 0.1 * generator.normal(size=(n, 4, 4, 5)).astype(
        np.float32
    )
    masks = classes.repeat(4, 1).repeat(4, 2)
    return tokens, masks, (1.0 + 2.0 * masks).astype(np.float32)


def test_scores_are_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    truth, predicted = (torch.randint(0, 6, (4, 9, 9), generator=generator) for _ in range(2))
    truth[0, :3] = 255
    known = truth != 255
    confusion = torch.zeros(7, 7, dtype=torch.int64)  # class 6 never occurs: left out of the mean
    for t, p in zip(truth[known], predicted[known]):
        confusion[t, p] += 1
    result = segmentation_scores(confusion.numpy())
    metric = MulticlassJaccardIndex(6, average="macro", ignore_index=255)
    assert result.miou == pytest.approx(float(metric(predicted, truth)), abs=1e-6)
    assert result.pixel_accuracy == pytest.approx(float((truth == predicted)[known].float().mean()))
    assert 6 not in result.iou


def test_segments_what_tokens_tell():
    tokens, masks, _ = scenes()
    masks = masks.copy()
    masks[:, 0] = 255
    result = segmentation(tokens[:18], masks[:18], tokens[18:], masks[18:], n_classes=3, settings=QUICK)
    assert result.miou > 0.8
    assert result.n_ignored == 6 * 16
    noise = np.random.default_rng(1).normal(size=tokens.shape).astype(np.float32)
    chance = segmentation(noise[:18], masks[:18], noise[18:], masks[18:], n_classes=3, settings=QUICK)
    assert chance.miou < 0.35


def test_masks_may_differ_in_size():
    tokens, masks, _ = scenes(8)
    mixed = [mask if i % 2 else mask[::2, :] for i, mask in enumerate(masks)]
    result = segmentation(tokens, mixed, tokens, mixed, n_classes=3, settings=QUICK)
    assert result.miou > 0.7


def test_depth_scores_by_hand():
    prediction, truth = torch.tensor([1.0, 2.0, 5.0, 1.2]), torch.tensor([1.0, 1.0, 4.0, 1.0])
    rmse, relative, delta = depth_scores(prediction, truth).tolist()
    assert rmse == pytest.approx(float(mean_squared_error(prediction, truth, squared=False)))
    assert relative == pytest.approx((0 + 1 + 0.25 + 0.2) / 4)
    assert delta == pytest.approx(2 / 4)  # 5 / 4 is 1.25, which is not below it


def test_depth_that_tokens_tell_and_pixels_that_do_not_count():
    tokens, _, depths = scenes()
    depths = depths.copy()
    depths[:, 0], depths[:, 1], depths[:, 2], depths[-1] = 0, np.inf, np.nan, 0
    result = depth(tokens[:18], depths[:18], tokens[18:], depths[18:], max_depth=8.0, settings=QUICK)
    assert result.rmse < 1.0
    assert result.delta_1 > 0.5
    assert (result.n_images, result.n_without) == (5, 1)
    assert result.n_invalid == 5 * 3 * 16 + 256
    noise = np.random.default_rng(1).normal(size=tokens.shape).astype(np.float32)
    chance = depth(noise[:18], depths[:18], noise[18:], depths[18:], max_depth=8.0, settings=QUICK)
    assert chance.rmse > 1.4 * result.rmse


@pytest.mark.parametrize("kind", ["uint16", "uint32", "int32"])
def test_depths_as_pngs_hold_them(kind):
    """Millimetres in whole numbers give the figures of the same depths as float32, 0 counts nowhere."""
    tokens, _, depths = scenes()
    depths = (1000 * depths).astype(kind)
    depths[:, 0] = 0
    quick, options = DenseSettings(n_iter=5, batch_size=4), {"min_depth": 1, "max_depth": 8000}
    found, want = (
        depth(tokens[:18], maps[:18], tokens[18:], maps[18:], settings=quick, **options)
        for maps in (depths, depths.astype(np.float32))
    )
    assert found == want
    assert found.n_invalid == 6 * 16


def _share(rank, tokens, masks, depths):
    a = slice(None, 18) if rank is None else slice(0, 5) if rank == 0 else slice(5, 18)
    b = slice(18, None) if rank is None else slice(18, 21) if rank == 0 else slice(21, None)
    quick = DenseSettings(n_iter=10, batch_size=4, learning_rate=0.05, warmup=2)
    one = segmentation(tokens[a], masks[a], tokens[b], masks[b], n_classes=3, settings=quick)
    two = depth(tokens[a], depths[a], tokens[b], depths[b], settings=quick)
    return [one.miou, one.pixel_accuracy, two.rmse, two.absolute_relative, two.delta_1]


def test_two_ranks_get_the_result_of_one():
    parts = scenes()
    want = _share(None, *parts)
    for got in on_two_ranks(_share, *parts):
        assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.zeros((23, 16, 16), int), "24 .*23 "),
        (np.zeros((24, 3, 16), int), "4 x 4"),
        (np.zeros((24, 16, 16, 3), int), r"map 0 .*\(16, 16, 3\)"),
        (np.full((24, 16, 16), 255), "every pixel has the ignored label"),
        (np.full((24, 16, 16), 3), r"0\.\.2"),
        (np.zeros((24, 16, 16)), "integer"),
    ],
)
def test_bad_masks_are_named(masks, message):
    tokens, right, _ = scenes()
    with pytest.raises(ValueError, match=message):
        segmentation(tokens, masks, tokens, right, n_classes=3, settings=QUICK)


def test_tokens_of_another_network_are_named():
    tokens, masks, depths = scenes()
    for result in (
        lambda: segmentation(tokens, masks, tokens[..., :2], masks, n_classes=3, settings=QUICK),
        lambda: depth(tokens, depths, tokens[..., :2], depths, settings=QUICK),
    ):
        with pytest.raises(ValueError, match=r"train .*\d+ .*test .*2"):
            result()


@pytest.mark.parametrize("value", [0.0, np.inf, np.nan, 1000.0])
def test_no_valid_depth_is_an_error(value):
    tokens, _, depths = scenes()
    with pytest.raises(ValueError, match=r"^train: "):
        depth(tokens, np.full_like(depths, value), tokens, depths)
    with pytest.raises(ValueError, match=r"^test: "):
        depth(tokens, depths, tokens, np.full_like(depths, value))
    with pytest.raises(ValueError, match="min_depth"):
        depth(tokens, depths, tokens, depths, min_depth=5, max_depth=1)
