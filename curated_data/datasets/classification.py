"""Classification sets whose splits and labels stand in files beside the images."""

import json
from pathlib import Path

import numpy as np

from curated_data.datasets.images import (
    Images,
    existing,
    image_files,
    need,
    read_lines,
    subfolders,
    train_or_test,
)
from curated_data.errors import PoolError


def file_list(root: Path, part: str) -> Images:
    """Places205, and whatever else lists its images: lines "path label", or "path,label".

    Args:
        root: folder that the paths are below, or below its `images` or `data/vision/torralba/deeplearning/
            images256` as the Places205 archives unpack.
        part: the list's file below the root, as `trainvalsplit_places205/train_places205.csv`.
    """
    lines = read_lines(root / part, "the list of images, lines of a path and a label")
    names, labels = [], []
    for number, line in enumerate(lines, 1):
        name, _, label = line.strip().replace(",", " ").rpartition(" ")
        if not name or not label.isdigit():
            raise PoolError(f"{root / part}, line {number}: expected a path and a label, got {line!r}")
        names.append(name.strip().lstrip("/"))
        labels.append(int(label))
    places = [root, root / "images", root / "data/vision/torralba/deeplearning/images256"]
    base = next((place for place in places if (place / names[0]).is_file()), root)
    return Images(root, existing((base / name for name in names), "the images"), np.array(labels))


def inat(root: Path, part: str) -> Images:
    """iNaturalist 2018 and 2021 by their COCO-style JSON (`train2018.json`, `train.json`, ...).

    A class is a category's place among the categories of the file by id, the same for train and val.
    """
    path = need(root / part, "the annotations as JSON")
    try:
        content = json.loads(path.read_bytes())
        classes = sorted(content["categories"], key=lambda category: category["id"])
        number = {category["id"]: i for i, category in enumerate(classes)}
        label = {entry["image_id"]: number[entry["category_id"]] for entry in content["annotations"]}
        images = sorted(content["images"], key=lambda image: image["file_name"])
        names = [image["file_name"] for image in images]
        labels = np.array([label[image["id"]] for image in images], np.int64)
    except (ValueError, KeyError, TypeError) as error:
        raise PoolError(f"{path}: not iNaturalist's annotations ({type(error).__name__}: {error})") from error
    files = existing((root / name for name in names), "the archive's images, unpacked beside the JSON")
    return Images(root, files, labels, [str(category["name"]) for category in classes])


def sun397(root: Path, part: str) -> Images:
    """SUN397 by its partition files (`Training_01.txt`, `Testing_01.txt`) and `ClassName.txt`."""
    names = read_lines(root / "ClassName.txt", "SUN397's list of classes (Partitions.zip)")
    number = {name.strip(): i for i, name in enumerate(names)}
    paths = [line.strip() for line in read_lines(root / part, "a partition of SUN397 (Partitions.zip)")]
    unknown = [path for path in paths if path.rpartition("/")[0] not in number]
    if unknown:
        raise PoolError(f"{root / part}: {unknown[0]!r} is in no class of ClassName.txt")
    files = existing((root / path.lstrip("/") for path in paths), "SUN397's images (a/abbey/..., ...)")
    labels = np.array([number[path.rpartition("/")[0]] for path in paths], np.int64)
    return Images(root, files, labels, [name.strip() for name in names])


def cub(root: Path, part: str) -> Images:
    """CUB-200-2011 by `images.txt`, `image_class_labels.txt` and `train_test_split.txt`; part: train or
    test.
    """
    what = "CUB_200_2011, as its archive unpacks"
    wanted = "1" if train_or_test(part) == "train" else "0"
    tables = {
        name: _pairs(root / f"{name}.txt", what)
        for name in ("images", "image_class_labels", "train_test_split")
    }
    try:
        ids = sorted((i for i, flag in tables["train_test_split"].items() if flag == wanted), key=int)
        names = [tables["images"][i] for i in ids]
        labels = np.array([int(tables["image_class_labels"][i]) - 1 for i in ids], np.int64)
    except (KeyError, ValueError) as error:
        raise PoolError(f"{root}: CUB's lists do not fit together ({error})") from error
    return Images(root, existing((root / "images" / name for name in names), what), labels)


def voc2007(root: Path, part: str) -> Images:
    """VOCdevkit/VOC2007: `ImageSets/Main/<class>_<part>.txt`, lines of an image and 1, -1 or 0
    (difficult).
    """
    what = "VOC2007, as its archive unpacks (ImageSets, JPEGImages)"
    lists = sorted(need(root / "ImageSets" / "Main", what).glob(f"?*_{part}.txt"))
    if not lists:
        raise PoolError(f"{root / 'ImageSets' / 'Main'} has no list <class>_{part}.txt: put {what} there")
    flags = [_pairs(path, what) for path in lists]
    names = sorted(flags[0])
    mark = {"1": 1, "-1": 0, "0": -1}
    try:
        marks = np.array([[mark[of_class[name]] for of_class in flags] for name in names], np.int64)
    except KeyError as error:
        raise PoolError(f"{lists[0].parent}: the lists of {part} do not fit together: {error}") from error
    files = existing((root / "JPEGImages" / f"{name}.jpg" for name in names), what)
    return Images(root, files, marks=marks, classes=[path.stem.rpartition("_")[0] for path in lists])


def folder_split(
    root: Path, part: str, *, per_class: int = 30, left_out: str = "BACKGROUND_Google"
) -> Images:
    """One folder per class without an official split, as Caltech-101: a seeded draw of `per_class` images of
    each trains, the others test (part: train or test).
    """
    train_or_test(part)
    folders = [folder for folder in subfolders(root, "a folder for each class") if folder.name != left_out]
    files, labels = [], []
    for label, folder in enumerate(folders):
        found = image_files(folder, "the class's images")
        order = np.random.default_rng(label).permutation(len(found))
        chosen = np.sort(order[:per_class] if part == "train" else order[per_class:])
        files += [found[i] for i in chosen]
        labels += [label] * len(chosen)
    if not files:
        raise PoolError(f"{root}: no class has more than {per_class} images, so none is left to test")
    return Images(root, files, np.array(labels), [folder.name for folder in folders])


def _pairs(path: Path, what: str) -> dict[str, str]:
    """A file with two words per line, as a mapping of the first to the second."""
    lines = [line.split() for line in read_lines(path, what)]
    for number, words in enumerate(lines, 1):
        if len(words) != 2:
            raise PoolError(f"{path}, line {number}: expected two words, got {' '.join(words)!r}")
    return dict(lines)
