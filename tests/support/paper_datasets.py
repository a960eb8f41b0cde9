"""Small copies of the sets of the paper's suite, each in the folders that its archives unpack to."""

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361")
SIZE = (16, 24)


def write_all(root: Path) -> None:
    """Write every set but CIFAR and Flowers, whose files torchvision knows by checksum."""
    _imagenet(root)
    _objectnet(root / "objectnet-1.0")
    for folder, lists, path in (
        (
            "inat18",
            {"train": "train2018.json", "val": "val2018.json"},
            "train_val2018/Aves/{c}/{part}{i}.jpg",
        ),
        ("inat21", {"train": "train.json", "val": "val.json"}, "{part}/0000{c}_Animalia/{part}{i}.jpg"),
    ):
        _inat(root / folder, lists, path)
    _places(root / "places205")
    for folder, name in (("roxford5k", "all_souls"), ("rparis6k", "paris_defense")):
        _landmarks(root / folder, name)
    _aircraft(root / "fgvc-aircraft-2013b" / "data")
    for name in ("BACKGROUND_Google", "accordion", "airplanes"):
        for i in range(32):
            image(root / "caltech101" / "101_ObjectCategories" / name / f"image_{i:04d}.jpg")
    _cars(root / "stanford_cars")
    _cub(root / "CUB_200_2011")
    _classes_by_list(root)
    _voc2007(root / "VOCdevkit" / "VOC2007")
    _masks(root)
    _depths(root)
    _dollar_street(root / "dataset_dollarstreet")


def image(path: Path, size: tuple[int, int] = SIZE) -> Path:
    """A file of noise, of its path's format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path.name))).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def map_image(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def text(path: Path, content: object) -> None:
    """Lines of a sequence, or else JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = isinstance(content, Sequence) and all(isinstance(line, str) for line in content)
    path.write_text("\n".join(content) + "\n" if lines else json.dumps(content))


def _imagenet(root: Path) -> None:
    for label, name in enumerate(WNIDS):
        for i in range(3):
            image(root / "imagenet" / "train" / name / f"{name}_{i}.JPEG")
            image(root / "imagenet" / "val" / name / f"ILSVRC2012_val_{1 + 3 * label + i:08d}.JPEG")
        image(root / "imagenetv2-matched-frequency-format-val" / str(label) / "d41d8cd98f00b204.jpeg")
        image(root / "sketch" / name / "sketch_0.JPEG")
        if label in (1, 3):
            image(root / "imagenet-a" / name / "0.000116_digital clock _ digital clock_0.865662.jpg")
            image(root / "imagenet-r" / name / "graffiti_1.jpg")
    text(root / "imagenet" / "real.json", [[i // 3] for i in range(11)] + [[]])
    for name in ("imagenet-a", "imagenet-r"):
        text(root / name / "README.txt", ["Of the archive."])


def _objectnet(root: Path) -> None:
    names = ["tench, Tinca tinca", "goldfish, Carassius auratus", "great white shark", "tiger shark"]
    text(root / "mappings" / "imagenet_to_label_2012_v2", names)
    text(root / "mappings" / "pytorch_to_imagenet_2012_id.json", {str(i): i for i in range(4)})
    text(root / "mappings" / "folder_to_objectnet_label.json",
         {"air_freshener": "Air freshener", "fish": "Fish", "shark": "Shark"})  # fmt: skip
    text(root / "mappings" / "objectnet_to_imagenet_1k.json",
         {"Fish": f"{names[0]}; {names[1]}", "Shark": "tiger shark"})  # fmt: skip
    for folder in ("air_freshener", "fish", "shark"):
        image(root / "images" / folder / "0a1b2c.png")


def _inat(root: Path, lists: Mapping[str, str], path: str) -> None:
    categories = [{"id": c, "name": f"species {c}", "supercategory": "Aves"} for c in range(3)]
    for part, name in lists.items():
        images, annotations = [], []
        for c in range(3):
            for i in range(3 - c if part == "train" else 1):
                file = path.format(c=c, part=part, i=i)
                image(root / file)
                images.append({"id": len(images), "file_name": file, "license": 0})
                annotations.append({"id": len(images), "image_id": images[-1]["id"], "category_id": c})
        content = {"images": images, "annotations": annotations, "categories": categories, "licenses": []}
        text(root / name, content)


def _places(root: Path) -> None:
    scenes = ("a/abbey", "a/apartment_building/outdoor")
    for part in ("train", "val"):
        lines = [f"{scene}/gsun_{part}.jpg {label}" for label, scene in enumerate(scenes)]
        text(root / "trainvalsplit_places205" / f"{part}_places205.csv", lines)
        for line in lines:
            image(root / "data/vision/torralba/deeplearning/images256" / line.split()[0])


def _landmarks(root: Path, name: str) -> None:
    gallery, queries = ([f"{name}_{first + i:06d}" for i in range(n)] for first, n in ((0, 4), (100, 2)))
    for each in (*gallery, *queries):
        image(root / "jpg" / f"{each}.jpg")
    truth = [{"bbx": [1.5, 1.5, 10.25, 10.0], "easy": np.array([i]), "hard": np.array([], np.int64),
              "junk": np.array([i + 2])} for i in range(2)]  # fmt: skip
    content = {"gnd": truth, "imlist": gallery, "qimlist": queries}
    (root / f"gnd_{root.name}.pkl").write_bytes(pickle.dumps(content, protocol=2))


def _aircraft(root: Path) -> None:
    variants = ["707-320", "727-200"]
    text(root / "variants.txt", variants)
    for part in ("trainval", "test"):
        names = [f"{len(part)}00000{i}" for i in range(2)]
        text(root / f"images_variant_{part}.txt", [f"{n} {v}" for n, v in zip(names, variants, strict=True)])
        for name in names:
            image(root / "images" / f"{name}.jpg")


def _cars(root: Path) -> None:
    (root / "devkit").mkdir(parents=True)
    fields = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for folder, file in (("cars_train", "devkit/cars_train_annos.mat"),
                         ("cars_test", "cars_test_annos_withlabels.mat")):  # fmt: skip
        rows = [(1, 1, 5, 5, c, f"{c:05d}.jpg") for c in (1, 2)]
        savemat(root / file, {"annotations": np.array(rows, fields)[None]})
        for row in rows:
            image(root / folder / row[-1])
    savemat(
        root / "devkit" / "cars_meta.mat", {"class_names": np.array([["AM General", "Acura RL"]], object)}
    )


def _cub(root: Path) -> None:
    names = [f"{folder}/bird_{i}.jpg" for folder in ("001.Albatross", "002.Auklet") for i in range(2)]
    for name in names:
        image(root / "images" / name)
    text(root / "images.txt", [f"{i} {name}" for i, name in enumerate(names, 1)])
    text(root / "image_class_labels.txt", [f"{i} {1 + i // 3}" for i in range(1, 5)])
    text(root / "train_test_split.txt", [f"{i} {i % 2}" for i in range(1, 5)])


def _classes_by_list(root: Path) -> None:
    """DTD, Food-101, the pets and SUN397: two classes, one image of each to train and one to test."""
    text(root / "SUN397" / "ClassName.txt", ["/a/abbey", "/a/apartment_building/outdoor"])
    (root / "oxford-iiit-pet" / "annotations" / "trimaps").mkdir(parents=True)
    for i, (part, pets, sun) in enumerate((("train", "trainval", "Training"), ("test", "test", "Testing"))):
        for name in ("banded", "dotted"):
            image(root / "dtd" / "dtd" / "images" / name / f"{name}_{i}.jpg")
        text(root / "dtd/dtd/labels" / f"{part}1.txt", [f"{n}/{n}_{i}.jpg" for n in ("banded", "dotted")])
        for name in ("apple_pie", "baklava"):
            image(root / "food-101" / "images" / name / f"{i}.jpg")
        text(root / "food-101/meta" / f"{part}.json", {n: [f"{n}/{i}"] for n in ("apple_pie", "baklava")})
        for name in ("Abyssinian", "beagle"):
            image(root / "oxford-iiit-pet" / "images" / f"{name}_{i}.jpg")
        lines = [f"{name}_{i} {c} {c} 1" for c, name in enumerate(("Abyssinian", "beagle"), 1)]
        text(root / "oxford-iiit-pet" / "annotations" / f"{pets}.txt", lines)
        lines = [f"/a/{name}/sun_{i}.jpg" for name in ("abbey", "apartment_building/outdoor")]
        text(root / "SUN397" / f"{sun}_01.txt", lines)
        for line in lines:
            image(root / "SUN397" / line[1:])


def _voc2007(root: Path) -> None:
    for part, names in (("trainval", ("000005", "000007")), ("test", ("000001", "000002"))):
        for name in names:
            image(root / "JPEGImages" / f"{name}.jpg")
        text(root / "ImageSets" / "Main" / f"{part}.txt", names)
        for c, kind in enumerate(("aeroplane", "bicycle")):
            lines = [f"{name} {'1' if i == c else '-1':>2}" for i, name in enumerate(names)]
            text(root / "ImageSets" / "Main" / f"{kind}_{part}.txt", lines)


def _masks(root: Path) -> None:
    mask = np.full(SIZE, 7, np.uint8)
    for i, (ade, city, voc) in enumerate((("training", "train", "train"), ("validation", "val", "val"))):
        folder, name = root / "ADEChallengeData2016", f"ADE_{ade}_0000000{i}"
        image(folder / "images" / ade / f"{name}.jpg")
        map_image(folder / "annotations" / ade / f"{name}.png", mask)
        folder, name = root / "cityscapes", f"ulm_{i:06d}_000019"
        image(folder / "leftImg8bit" / city / "ulm" / f"{name}_leftImg8bit.png")
        for kind in ("labelIds", "instanceIds"):
            map_image(folder / "gtFine" / city / "ulm" / f"{name}_gtFine_{kind}.png", mask)
        folder, name = root / "VOCdevkit" / "VOC2012", f"2007_00000{i}"
        image(folder / "JPEGImages" / f"{name}.jpg")
        map_image(folder / "SegmentationClass" / f"{name}.png", mask)
        text(folder / "ImageSets" / "Segmentation" / f"{voc}.txt", [name])


def _depths(root: Path) -> None:
    depth = np.full(SIZE, 2560, np.uint16)
    drive = "2011_10_03_drive_0034_sync"
    for part, archive, places in (("train", "train", "sync"), ("test", "val", "official_splits/test")):
        color = f"2011_10_03/{drive}/image_02/data/{part}.png"
        truth = f"{drive}/proj_depth/groundtruth/image_02/{part}.png"
        image(root / "kitti" / color)
        map_image(root / "kitti" / "data_depth_annotated" / archive / truth, depth)
        lines = [f"{color} {truth} 718.856", f"2011_10_03/{drive}/image_02/data/0.png None 718.856"]
        text(root / "kitti" / f"eigen_{part}_files_with_gt.txt", lines)
        image(root / "nyu" / places / "kitchen_0028b" / f"rgb_{part}.jpg")
        map_image(root / "nyu" / places / "kitchen_0028b" / f"sync_depth_{part}.png", depth)
        line = f"/kitchen_0028b/rgb_{part}.jpg /kitchen_0028b/sync_depth_{part}.png 518.8579"
        text(root / "nyu" / f"nyudepthv2_{part}_files_with_gt.txt", [line])
    scene = root / "SUNRGBD" / "kv1" / "NYUdata" / "NYU0001"
    image(scene / "image" / "NYU0001.jpg")
    map_image(scene / "depth_bfx" / "NYU0001.png", (depth << 3) | (depth >> 13))
    toolbox = root / "SUNRGBDtoolbox" / "traintestSUNRGBD"
    toolbox.mkdir(parents=True)
    listed = np.array([["/n/fs/sun3d/data/SUNRGBD/kv1/NYUdata/NYU0001"]], object)
    savemat(toolbox / "allsplit.mat", {"alltrain": listed, "alltest": listed})


def _dollar_street(root: Path) -> None:
    rows = ["id,country.name,country.id,region.id,type,topics,place,income,imageRelPath,imagenet_sysnet_id"]
    for i, region in enumerate(("af", "am", "as", "eu")):
        file = image(root / "assets" / f"{i:024x}" / f"{i:024x}.jpg")
        place = f'{i:024x},Burundi,bi,{region},image,"[""stove""]",family,{26.9 + 500 * i}'
        rows.append(f'{place},{file.relative_to(root)},"[{i}, 0]"')
    text(root / "images_v2_imagenet_test.csv", rows)
