"""What becomes a batch: views as tensors or arrays, of one number and shape."""

import numpy as np
import pytest
import torch
from PIL import Image

from curated_data.errors import ConfigError
from curated_data.pool import ShardPool
from curated_data.streaming import PoolDataset, collate


def test_views_of_different_shapes_are_one_clear_error(write_pool):
    dataset = PoolDataset(
        ShardPool(write_pool([4])), lambda image: torch.zeros(int(torch.randint(2, 50, (1,))))
    )
    with pytest.raises(ConfigError, match=r"^image: .*\[\("):
        collate(dataset.__getitems__([0, 1, 2, 3]))
    dataset.views = lambda image: (image, torch.zeros(int(torch.randint(2, 50, (1,)))))
    with pytest.raises(ConfigError, match=r"^views\[1\]: .*\[\("):
        collate(dataset.__getitems__([0, 1, 2, 3]))


def test_arrays_are_views_as_tensors_are(write_pool):
    pool = ShardPool(write_pool([2]))
    image = PoolDataset(pool)[1]["image"]
    batch, _ = collate(PoolDataset(pool, lambda image: image.numpy()[:, ::-1]).__getitems__([0, 1]))
    assert torch.equal(batch["image"][1], image.flip(1))
    for views in (lambda image: (image, image.numpy()), lambda image: (image for _ in range(2))):
        batch, _ = collate(PoolDataset(pool, views).__getitems__([0, 1]))
        assert len(batch["views"]) == 2
        assert all(torch.equal(view[1], image) for view in batch["views"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": torch.zeros(1)}, ".*dict"),
        (None, ".*NoneType"),
        (Image.new("RGB", (2, 2)), ".*Image"),
        ([], ".*no view"),
        ([torch.zeros(1), Image.new("RGB", (2, 2))], ".*item 1 .*Image"),
        (np.array(["a"]), ".*<U1"),
    ],
)
def test_views_of_other_types_are_one_clear_error(write_pool, given, message):
    paths = write_pool([3])
    with pytest.raises(ConfigError, match=f"^views: {message}.*") as caught:
        PoolDataset(ShardPool(paths), lambda image: given, on_error="skip").__getitems__([2])
    assert str(caught.value).endswith(f"in {paths[0]}: sample '000/0002'")


def test_a_decoder_may_make_labels_of_several_numbers(write_pool):
    pool = ShardPool(write_pool([3]))
    for label in ([0, 1], np.array([0, 1]), torch.tensor([0, 1])):
        dataset = PoolDataset(pool, decoders={"cls": lambda data, label=label: label})
        assert collate(dataset.__getitems__([0, 2]))[0]["label"].tolist() == [[0, 1], [0, 1]]


def test_samples_with_other_numbers_of_views_are_one_clear_error(write_pool):
    def collated(*given) -> None:
        views = iter(given)
        samples = PoolDataset(ShardPool(write_pool([3])), lambda image: next(views)).__getitems__([2, 0, 1])
        collate(samples)

    view = torch.zeros(1)
    with pytest.raises(ConfigError, match=r"^views: .*sample 2 .*sample 1"):
        collated([view] * 2, [view] * 2, [view])
    with pytest.raises(ConfigError, match=r"^views: sample 2 .*sample 0"):
        collated([view], view, [view])
