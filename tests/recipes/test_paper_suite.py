"""The paper's suite opens every set in the folders that its archives unpack to."""

from pathlib import Path

import numpy as np
import pytest

from curated_data.datasets.suite import load_suite, open_part, open_suite
from curated_data.errors import PoolError
from lightning_modules.evaluation.suite import EVALUATIONS
from tests.support.paper_datasets import image, write_all

SUITE = Path(__file__).parents[2] / "configs" / "suites" / "paper.yaml"
CHECKSUMMED = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "flowers": "Flowers102"}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    root, cache = tmp_path_factory.mktemp("datasets"), tmp_path_factory.mktemp("cache")
    write_all(root)
    parts, missing = open_suite(load_suite(SUITE, EVALUATIONS), root, cache)
    return root, parts, missing


def test_every_set_is_found_and_the_others_are_named(opened):
    root, parts, missing = opened
    assert set(parts) == set(load_suite(SUITE, EVALUATIONS)) - set(CHECKSUMMED)
    assert len(missing) == len(CHECKSUMMED)
    for line, (name, kind) in zip(missing, CHECKSUMMED.items(), strict=True):
        assert line.startswith(f"{name}: torchvision.datasets.{kind} does not find its files below {root} ")
        assert line.endswith(f"put there what `{kind}({str(root)!r}, download=True)` unpacks")


def test_labels_maps_and_truths_are_those_of_their_files(opened):
    _, parts, _ = opened
    labels = {
        "imagenet-v2": [0, 1, 2, 3], "imagenet-a": [0, 1], "inat18": [0, 1, 2], "inat21": [0, 1, 2],
        "places205": [0, 1], "aircraft": [0, 1], "cars": [0, 1], "cub": [0, 1], "dtd": [0, 1],
        "food": [0, 1], "pets": [0, 1], "sun397": [0, 1], "caltech101": [0, 0, 1, 1],
    }  # fmt: skip
    assert {name: sorted(parts[name]["test"].labels().tolist()) for name in labels} == labels
    images = {name: part["test"].images for name, part in parts.items()}
    assert images["imagenet-a"].class_map == [[1], [3]]
    assert images["objectnet"].class_map == [[0, 1], [3]]
    assert images["imagenet-real"].labels.ravel().tolist() == [*(i // 3 for i in range(11)), -1]
    assert images["paris"].ground_truth[1] == {"easy": [1], "hard": [], "junk": [3]}
    assert images["voc07"].marks.tolist() == [[1, 0], [0, 1]]
    assert {name: int(images[name].maps[0][0, 0]) for name in ("ade20k", "cityscapes", "voc12")} == {
        "ade20k": 6, "cityscapes": 0, "voc12": 7,
    }  # fmt: skip
    assert np.unique(images["kitti"].maps[0]).tolist() == [0, 10]  # outside of the crop, and within
    assert np.unique(parts["nyu"]["train"].images.maps[0]).tolist() == pytest.approx([2.56])
    assert np.unique(images["sun-rgbd"].maps[0]).tolist() == pytest.approx([2.56])
    assert images["dollar-street"].groups["region"] == ["af", "am", "as", "eu"]
    assert images["dollar-street"].labels.tolist() == [[0, 0], [1, 0], [2, 0], [3, 0]]


def test_image_files_of_torchvision_sets_are_kept_as_they_are(opened):
    root, parts, _ = opened
    sample = parts["food"]["test"].pool.read([1])[0]
    assert sample["jpg"] == (root / "food-101" / "images" / "baklava" / "1.jpg").read_bytes()
    assert "png" in parts["pets"]["test"].pool.read([0])[0]  # torchvision decodes these itself


def test_a_damaged_image_of_a_torchvision_set_is_named(opened, tmp_path):
    write_all(tmp_path)
    image(tmp_path / "oxford-iiit-pet" / "images" / "beagle_0.jpg").write_bytes(b"\xff\xd8 cut off")
    with pytest.raises(PoolError, match=r"OxfordIIITPet .*image 1 .*'trainval'"):
        open_part("pets", load_suite(SUITE, EVALUATIONS), "train", tmp_path, tmp_path / "cache")
