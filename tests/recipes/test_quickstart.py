"""The quickstart's data: long-tailed CIFAR-10 made from what torchvision reads."""

import hashlib
import io
import pickle
import sys

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from curated_data import ShardPool
from recipes import quickstart


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A hundred images in the files that torchvision would download, with their checksums in its class."""
    folder = tmp_path / "out" / "download" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch(name, count):
        images = rng.integers(0, 256, (count, 3072), np.uint8)
        return [name, write(name, {"data": images, "labels": [i % 10 for i in range(count)]})]

    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{i}", 20) for i in range(1, 5)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch", 20)])
    meta = {"filename": "batches.meta", "key": "label_names"}
    meta["md5"] = write("batches.meta", {"label_names": [str(i) for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return tmp_path / "out"


def test_cifar_becomes_shards(cifar):
    folder = quickstart.long_tailed_cifar(cifar, ratio=2000.0)
    train, test = ShardPool(folder / "train-*.tar"), ShardPool(folder / "test-*.tar")
    labels = train.labels(np.arange(len(train)))
    assert np.bincount(labels, minlength=10).tolist() == [8, 8, 8, 8, 8, 8, 8, 8, 6, 2]
    assert np.bincount(test.labels(np.arange(len(test)))).tolist() == [2] * 10
    originals = CIFAR10(cifar / "download", train=True)
    for key, sample in zip(train.keys([0, 40]), train.read([0, 40]), strict=True):
        image, label = originals[int(key)]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["png"]))), np.asarray(image))
        assert int(sample["cls"]) == label


def test_the_command_line_takes_it(cifar, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quickstart", "--data", "cifar10", "--out", str(cifar)])
    data = quickstart.choose_data(quickstart.parse_options())
    assert len(ShardPool(data.pool)) == 80
    assert data.image_size == 32
    assert data.class_names == quickstart.CIFAR_CLASSES
