"""The layouts in which evaluation datasets are published, by name.

A layout is a function from a folder (and what the suite says of a part) to `Images`: files and what is known
of each. Suites also have the layouts `shards`, `folder` and `torchvision`.
"""

from collections.abc import Callable

from curated_data.datasets.classification import cub, file_list, folder_split, inat, sun397, voc2007
from curated_data.datasets.dense import ade20k, cityscapes, kitti, nyu, sun_rgbd, voc2012
from curated_data.datasets.fairness import dollar_street
from curated_data.datasets.images import Images
from curated_data.datasets.instances import revisited
from curated_data.datasets.shifted import class_folders, imagenet_v2, objectnet, real

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
