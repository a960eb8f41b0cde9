"""Views: deterministic by torch's generator, well distributed, torchvision's where the same is meant."""

import math
import pickle

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.views import (
    Augmentation,
    _change_color,
    _random_crop,
    color_matrix,
    eval_transform,
    gaussian_blur,
    normalize,
    simclr_views,
)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_views_depend_on_the_generator_alone(image):
    views = pickle.loads(pickle.dumps(simclr_views(32)))
    torch.manual_seed(3)
    first = views(image)
    torch.manual_seed(3)
    second = views(image)
    assert [v.shape for v in first] == [(3, 32, 32)] * 2
    assert all(torch.equal(x, y) for x, y in zip(first, second))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], views(image)[0])


def test_without_changes_a_view_is_the_normalised_image(image):
    augment = Augmentation(
        40, scale=(1, 1), ratio=(1, 1), flip=0, jitter=(0, 0, 0, 0), grey=0, mean=(0, 0, 0), std=(1, 1, 1)
    )
    square = image[:, :, :40]
    torch.testing.assert_close(augment(square), square / 255)


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("draw", [0.1, 0.6, 0.95])
def test_color_changes_are_torchvisions(image, operation, draw):
    place = ["brightness", "contrast", "saturation"].index(operation)
    jitter = [0.0] * 4
    jitter[place] = 0.5
    draws = [0.5] * 4
    draws[place] = draw
    ours = _change_color(image.float(), tuple(jitter), draws, grey=False) / 255
    theirs = getattr(TF, f"adjust_{operation}")(image.float() / 255, 0.5 + draw)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-3)  # its luma weights are rounded to 4 digits


def test_hue_turns_and_keeps_luma(image):
    luma = torch.tensor([0.299, 0.587, 0.114])
    turn = color_matrix(hue=0.1)
    torch.testing.assert_close(luma @ turn, luma, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(turn @ turn, color_matrix(hue=0.2), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(color_matrix(hue=1.0), torch.eye(3), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(turn @ torch.ones(3), torch.ones(3), rtol=1e-3, atol=1e-3)
    grey = color_matrix(grey=True) @ image.float().reshape(3, -1)
    torch.testing.assert_close(
        grey.view_as(image)[0], TF.rgb_to_grayscale(image.float())[0], rtol=1e-3, atol=0.1
    )


def test_blur_is_torchvisions(image):
    ours = gaussian_blur(image.float(), 1.3)
    theirs = TF.gaussian_blur(image.float(), [9, 9], [1.3, 1.3])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    draws=st.lists(st.floats(0, 0.999999), min_size=20, max_size=20),
)
@settings(max_examples=200, deadline=None)
def test_crops_lie_in_the_image(height, width, draws):
    top, left, h, w = _random_crop(height, width, (0.08, 1.0), (3 / 4, 4 / 3), draws)
    assert 0 < h <= height
    assert 0 < w <= width
    assert 0 <= top <= height - h
    assert 0 <= left <= width - w


@pytest.mark.parametrize("shape", [(375, 500), (640, 480), (256, 256), (300, 2000)])
def test_crops_of_the_square_are_random_crops_after_a_resize(shape):
    share = (224 / 256) ** 2
    side = min(shape)
    crops = {
        _random_crop(*shape, (share, share), (1.0, 1.0), row, of_square=True)
        for row in torch.rand(500, 20, generator=torch.Generator().manual_seed(1)).tolist()
    }
    assert {h for _, _, h, _ in crops} == {w for _, _, _, w in crops} == {round(side * 224 / 256)}
    for place, length in zip((0, 1), shape):  # at any place, to the borders
        starts = torch.tensor([float(crop[place]) for crop in crops])
        room = length - round(side * 224 / 256)
        assert float(starts.min()) < 0.05 * room
        assert float(starts.max()) > 0.95 * room
        assert float(starts.mean()) == pytest.approx(room / 2, rel=0.1)


def test_crop_areas_are_uniform():
    areas = []
    for row in torch.rand(4000, 20, generator=torch.Generator().manual_seed(1)).tolist():
        _, _, h, w = _random_crop(200, 200, (0.2, 0.6), (3 / 4, 4 / 3), row)
        areas.append(h * w / 200**2)
    areas = torch.tensor(areas)
    assert float(areas.mean()) == pytest.approx(0.4, abs=0.01)
    assert float(areas.std()) == pytest.approx(0.4 / math.sqrt(12), abs=0.01)


@pytest.mark.parametrize("shape", [(3, 40, 56), (3, 500, 20), (3, 1, 1), (3, 32, 32)])
@pytest.mark.parametrize("size", [32, 96])
def test_eval_transform_takes_any_size(shape, size):
    image = torch.randint(0, 256, shape, dtype=torch.uint8)
    transform = eval_transform(size)
    assert transform(image).shape == (3, size, size)
    assert torch.equal(transform(image), transform(image))
    assert all(view.shape == (3, size, size) for view in simclr_views(size)(image))


def test_normalize():
    out = normalize(torch.full((3, 2, 2), 255, dtype=torch.uint8), (0.5, 0.5, 0.5), (0.25, 0.5, 1.0))
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([2.0, 1.0, 0.5]))


@pytest.mark.parametrize("bad", [torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8), "image"])
def test_wrong_images_are_refused(bad):
    with pytest.raises(TypeError, match="uint8 image tensor"):
        simclr_views(8)(bad)
    with pytest.raises(TypeError, match="uint8 image tensor"):
        eval_transform(8)(bad)
