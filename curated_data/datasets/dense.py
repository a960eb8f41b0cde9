"""Segmentation and depth sets: images with a map of labels, or of depths in metres."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from curated_data.datasets.images import (
    Images,
    Maps,
    existing,
    image_files,
    need,
    read_lines,
    read_map,
    train_or_test,
)
from curated_data.errors import PoolError

IGNORED = 255
# Ids of Cityscapes' 19 evaluated classes in the order of their train ids.
CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# Shares of height and width where KITTI's lidar is dense (Garg et al. 2016), pixels of NYU's valid frame.
GARG_CROP = (0.40810811, 0.99189189, 0.03594771, 0.96405229)
NYU_CROP = (45, 471, 41, 601)


def ade20k(root: Path, part: str) -> Images:
    """ADEChallengeData2016: `images/<part>/*.jpg`, `annotations/<part>/*.png` with 1 to 150, 0 for none."""
    what = "ADEChallengeData2016, as its archive unpacks (images, annotations)"
    files = image_files(root / "images" / part, what)
    maps = existing((root / "annotations" / part / f"{file.stem}.png" for file in files), what)

    def read(path: Path) -> np.ndarray:
        labels = read_map(path).astype(np.int64) - 1
        return np.where(labels < 0, IGNORED, labels)

    return Images(root, files, maps=Maps(maps, read), n_classes=150)


def cityscapes(root: Path, part: str) -> Images:
    """Cityscapes: `leftImg8bit/<part>/<city>/*_leftImg8bit.png`,
    `gtFine/<part>/<city>/*_gtFine_labelIds.png`.
    """
    what = "Cityscapes' leftImg8bit and gtFine, as their archives unpack"
    suffix = "_leftImg8bit"
    files = [f for f in image_files(root / "leftImg8bit" / part, what) if f.stem.endswith(suffix)]
    maps = existing(
        (root / "gtFine" / part / f.parent.name / f"{f.stem.removesuffix(suffix)}_gtFine_labelIds.png"
         for f in files), what)  # fmt: skip
    table = np.full(256, IGNORED, np.int64)
    table[list(CITYSCAPES)] = np.arange(len(CITYSCAPES))
    return Images(root, files, maps=Maps(maps, lambda path: table[read_map(path)]), n_classes=len(CITYSCAPES))


def voc2012(root: Path, part: str) -> Images:
    """VOCdevkit/VOC2012: `ImageSets/Segmentation/<part>.txt`, `JPEGImages`, `SegmentationClass` (a palette,
    255 for borders).
    """
    what = "VOC2012, as its archive unpacks (ImageSets, JPEGImages, SegmentationClass)"
    names = [line.strip() for line in read_lines(root / "ImageSets" / "Segmentation" / f"{part}.txt", what)]
    files = existing((root / "JPEGImages" / f"{name}.jpg" for name in names), what)
    maps = existing((root / "SegmentationClass" / f"{name}.png" for name in names), what)
    return Images(root, files, maps=Maps(maps, lambda p: read_map(p).astype(np.int64)), n_classes=21)


def nyu(root: Path, part: str) -> Images:
    """NYU v2 by a list, lines "image depth focal"; 16-bit PNG depth in millimetres.

    Paths lie below the root, or below its `sync` (the train archive) or `official_splits/test`. Where the
    list's name has "test" in it, depths count inside the frame that the protocol evaluates.
    """
    places = [root, root / "official_splits" / "test", root / "sync"]
    what = "NYU v2's frames (sync, official_splits/test) and the lists of them"
    files, maps = _listed(root, part, places, places, what)
    cut = (lambda h, w: NYU_CROP) if "test" in part else None
    return Images(root, files, maps=Maps(maps, _depth(1000.0, cut)), depth_range=(1e-3, 10.0))


def kitti(root: Path, part: str) -> Images:
    """KITTI's Eigen split by a list, lines "image depth focal"; depth PNG in 1/256 m.

    Images lie below the root or its `raw`, depths below it or its `data_depth_annotated`, there also in
    `train` and `val`. Lines with the depth "None" are passed over. Where the list's name has "test" in it,
    depths count inside the crop of Garg et al.
    """
    annotated = root / "data_depth_annotated"
    depths = [annotated, annotated / "train", annotated / "val", root]
    files, maps = _listed(root, part, [root / "raw", root], depths, "KITTI's raw images and annotated depths")

    def garg(h: int, w: int) -> tuple[int, int, int, int]:
        top, bottom, left, right = GARG_CROP
        return int(top * h), int(bottom * h), int(left * w), int(right * w)

    reader = _depth(256.0, garg if "test" in part else None)
    return Images(root, files, maps=Maps(maps, reader), depth_range=(1e-3, 80.0))


def sun_rgbd(root: Path, part: str) -> Images:
    """SUN RGB-D: scenes with `image/*.jpg` and `depth_bfx/*.png`, whose 16 bits are rotated by 3, in
    millimetres.

    Args:
        root: the folder `SUNRGBD`; in it, beside it, or beside it in `SUNRGBDtoolbox/traintestSUNRGBD` is
            `allsplit.mat` of the toolbox, if there is one.
        part: "train" or "test" of that file; "all" for every scene.
    """
    what = "SUNRGBD, as its archive unpacks, and the toolbox's allsplit.mat"
    if part == "all":
        scenes = sorted(image.parent for image in need(root, what).rglob("image") if image.is_dir())
    else:
        toolbox = root.parent / "SUNRGBDtoolbox" / "traintestSUNRGBD"
        found = [p for folder in (root, root.parent, toolbox) if (p := folder / "allsplit.mat").is_file()]
        if not found:
            raise PoolError(f"{root / 'allsplit.mat'} is not there: put it there, or say `test: all`")
        train_or_test(part)
        try:
            listed = loadmat(found[0])[f"all{part}"].ravel()
            paths = [str(np.ravel(entry)[0]).rpartition("SUNRGBD/")[2].strip("/") for entry in listed]
        except Exception as error:  # a damaged file raises almost anything
            raise PoolError(
                f"{found[0]}: not the toolbox's split ({type(error).__name__}: {error})"
            ) from error
        scenes = [root / path for path in paths]
    files, maps = [], []
    for scene in scenes:
        images, depths = sorted((scene / "image").glob("*.jpg")), sorted((scene / "depth_bfx").glob("*.png"))
        if len(images) != 1 or len(depths) != 1:
            raise PoolError(
                f"{scene}: expected one image and one depth_bfx, got {len(images)}, {len(depths)}"
            )
        files += images
        maps += depths
    if not files:
        raise PoolError(f"{root}: no scene with image and depth_bfx below it: put {what} there")

    def read(path: Path) -> np.ndarray:
        bits = read_map(path).astype(np.uint16)
        return np.minimum(((bits >> 3) | (bits << 13)).astype(np.float32) / 1000, 8.0)

    return Images(root, files, maps=Maps(maps, read), depth_range=(1e-3, 10.0))


def _listed(
    root: Path, part: str, images: list[Path], depths: list[Path], what: str
) -> tuple[list[Path], list[Path]]:
    """Images and depth maps that a list names, below the first of the folders that has them."""
    pairs = []
    for number, line in enumerate(
        read_lines(root / part, f"{what}: lines of image, depth and focal length"), 1
    ):
        entries = line.split()
        if len(entries) < 2:
            raise PoolError(f"{root / part}, line {number}: expected an image and a depth map, got {line!r}")
        if entries[1] != "None":
            pairs.append([entry.lstrip("/") for entry in entries[:2]])
    if not pairs:
        raise PoolError(f"{root / part}: no line has a depth map")
    found = [
        [next((p / name for p in places if (p / name).is_file()), root / name) for name in column]
        for column, places in zip(zip(*pairs), (images, depths))
    ]
    return existing(found[0], what), existing(found[1], what)


def _depth(
    unit: float, crop: Callable[[int, int], tuple[int, int, int, int]] | None
) -> Callable[[Path], np.ndarray]:
    """A reader of depth maps in metres, 0 (not measured) outside of the crop."""

    def read(path: Path) -> np.ndarray:
        metres = read_map(path).astype(np.float32) / unit
        if crop is None:
            return metres
        top, bottom, left, right = crop(*metres.shape)
        inside = np.zeros_like(metres)
        inside[top:bottom, left:right] = metres[top:bottom, left:right]
        return inside

    return read
