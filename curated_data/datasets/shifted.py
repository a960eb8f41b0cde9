"""Sets that test a head trained on ImageNet: other images of its classes, or other labels of its images."""

import json
import re
from pathlib import Path

import numpy as np

from curated_data.datasets.images import Images, image_files, need, subfolders
from curated_data.errors import PoolError


def class_folders(root: Path, part: str = "", *, base: list[str]) -> Images:
    """ImageNet-A, -R and -Sketch: folders named as the base set's (WordNet ids), of all its classes or some.

    Args:
        root, part: the folder, and where in it the class folders are.
        base: the base set's class folders, in the order of its labels.
    """
    number = {name: i for i, name in enumerate(base)}
    folders = subfolders(root / part, "a folder for each class, named by its WordNet id")
    unknown = [folder.name for folder in folders if folder.name not in number]
    if unknown:
        raise PoolError(f"{root / part / unknown[0]}: the base set has no class {unknown[0]!r}")
    return _of_folders(root, folders, [[number[folder.name]] for folder in folders])


def imagenet_v2(root: Path, part: str = "", *, base: list[str]) -> Images:
    """ImageNet-V2: folders "0" to "999", which are class numbers and sort by number, not by name."""
    folders = subfolders(root / part, "ImageNet-V2's folders 0 to 999")
    odd = [folder.name for folder in folders if not folder.name.isdigit() or int(folder.name) >= len(base)]
    if odd:
        raise PoolError(f"{root / part / odd[0]}: expected folders named 0 to {len(base) - 1}")
    folders.sort(key=lambda folder: int(folder.name))
    return _of_folders(root, folders, [[int(folder.name)] for folder in folders])


def objectnet(root: Path, part: str = "", *, base: list[str]) -> Images:
    """ObjectNet: its classes that ImageNet has, by the files in `mappings`; the red border of 2 pixels is cut
    off.

    `folder_to_objectnet_label.json` names a folder's class, `objectnet_to_imagenet_1k.json` that class's
    ImageNet labels ("a; b"), line i of `imagenet_to_label_2012_v2` is label i of ILSVRC 2012, and
    `pytorch_to_imagenet_2012_id.json` gives the i of each class number.
    """
    mappings = need(root / part / "mappings", "objectnet-1.0, as its archive unpacks (images, mappings)")
    what = "ObjectNet's mappings"
    try:
        class_of, labels_of, line_of = (
            json.loads(need(mappings / f"{name}.json", what).read_bytes())
            for name in (
                "folder_to_objectnet_label",
                "objectnet_to_imagenet_1k",
                "pytorch_to_imagenet_2012_id",
            )
        )
        lines = need(mappings / "imagenet_to_label_2012_v2", what).read_text("utf-8").splitlines()
        number = {lines[int(line)].strip(): int(i) for i, line in line_of.items()}
        stands_for = {
            name: [number[label.strip()] for label in labels.split("; ")]
            for name, labels in labels_of.items()
        }
        folders = [
            folder
            for folder in subfolders(root / part / "images", "ObjectNet's images")
            if class_of[folder.name] in stands_for
        ]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise PoolError(f"{mappings}: do not fit together ({type(error).__name__}: {error})") from error
    if not folders:
        raise PoolError(f"{root / part / 'images'}: no folder is of a class that ImageNet has")
    return _of_folders(root, folders, [stands_for[class_of[folder.name]] for folder in folders], border=2)


def real(root: Path, part: str, *, base: list[str]) -> Images:
    """ReaL labels of ImageNet's validation images: entry i - 1 of `real.json` lists the right classes of
    `ILSVRC2012_val_<i>.JPEG`, none for images left out.

    Args:
        root: holds the validation images, in `val` or not, in class folders or not, and `part`, the JSON
            file.
        base: unused: the labels are class numbers.
    """
    path = need(root / part, "real.json (github.com/google-research/reassessed-imagenet)")
    try:
        answers = json.loads(path.read_bytes())
        width = max(1, *(len(answer) for answer in answers))
    except (ValueError, TypeError) as error:
        raise PoolError(f"{path}: expected a JSON list of lists of classes ({error})") from error
    # Beside `train`, where it is ImageNet's folder.
    folder = root / "val" if (root / "val").is_dir() else root
    files = image_files(folder, "ImageNet's validation images")
    labels = np.full((len(files), width), -1, np.int64)
    for i, file in enumerate(files):
        found = re.fullmatch(r"ILSVRC2012_val_(\d{8})", file.stem)
        if not found or not 1 <= int(found[1]) <= len(answers):
            raise PoolError(
                f"{file}: expected the name ILSVRC2012_val_<number>, with a number of 1 to {len(answers)}"
            )
        answer = answers[int(found[1]) - 1]
        labels[i, : len(answer)] = answer
    return Images(root, files, labels)


def _of_folders(root: Path, folders: list[Path], stands_for: list[list[int]], border: int = 0) -> Images:
    found = [image_files(folder, "the class's images") for folder in folders]
    labels = np.repeat(np.arange(len(folders)), [len(files) for files in found])
    names = [folder.name for folder in folders]
    files = [file for each in found for file in each]
    return Images(root, files, labels, names, class_map=stands_for, border=border)
