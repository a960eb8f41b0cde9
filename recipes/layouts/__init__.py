"""Readers of evaluation datasets in the layouts that their publishers give them.

A layout is a function from a folder (and what the suite says of a part) to `Images`: files and what is known
of each. `LAYOUTS` names them for suites; the layouts `shards`, `folder` and `torchvision` are the recipe's
own.
"""

from collections.abc import Callable

from recipes.layouts.classification import cub, file_list, folder_split, inat, sun397, voc2007
from recipes.layouts.dense import ade20k, cityscapes, kitti, nyu, sun_rgbd, voc2012
from recipes.layouts.fairness import dollar_street
from recipes.layouts.images import Images, Maps, to_shards
from recipes.layouts.instances import revisited
from recipes.layouts.shifted import class_folders, imagenet_v2, objectnet, real

LAYOUTS: dict[str, Callable[..., Images]] = {
    "ade20k": ade20k,
    "cityscapes": cityscapes,
    "class_folders": class_folders,
    "cub": cub,
    "dollar_street": dollar_street,
    "file_list": file_list,
    "folder_split": folder_split,
    "imagenet_v2": imagenet_v2,
    "inat": inat,
    "kitti": kitti,
    "nyu": nyu,
    "objectnet": objectnet,
    "real": real,
    "revisited": revisited,
    "sun397": sun397,
    "sun_rgbd": sun_rgbd,
    "voc2007": voc2007,
    "voc2012": voc2012,
}

__all__ = ["LAYOUTS", "Images", "Maps", "to_shards"]
