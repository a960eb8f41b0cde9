"""The evaluation recipe from end to end, on small trees in the layouts of the paper's suite."""

import csv
import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from scipy.io import savemat

from curated_data.datasets import LAYOUTS, load_suite
from curated_data.errors import ConfigError, PoolError
from lightning_modules.evaluation.suite import EVALUATIONS
from recipes import evaluate

WNIDS = ["n01440764", "n01443537", "n01484850", "n01491361"]
COLORS = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220], [200, 200, 40]])


def picture(
    path: Path, label: int, seed: int, *, noise: float = 60, size: tuple[int, int] = (12, 16)
) -> Path:
    """A noisy image of its class's colour."""
    rng = np.random.default_rng(1000 * label + seed)
    pixels = np.clip(COLORS[label] + noise * rng.normal(size=(*size, 3)), 0, 255).astype(np.uint8)
    return write(path, pixels)


def write(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return path


def text(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder of datasets: a base of four classes, its shifted sets, landmarks, dense scenes."""
    root = tmp_path_factory.mktemp("datasets")
    for label, name in enumerate(WNIDS):
        for i in range(12):
            picture(root / "imagenet" / "train" / name / f"{i}.png", label, i)
            if i < 4:
                number = 1 + 4 * label + i
                file = root / "imagenet" / "val" / name / f"ILSVRC2012_val_{number:08d}.png"
                picture(file, label, 100 + i)
    shutil.copy(
        root / "imagenet/train" / WNIDS[2] / "5.png",
        root / "imagenet/val" / WNIDS[2] / "ILSVRC2012_val_00000009.png",
    )
    for label in (1, 3):
        for i in range(4):
            picture(root / "imagenet-a" / WNIDS[label] / f"{i}.png", label, 200 + i, noise=700)
    for label in range(4):  # ten classes would sort as "10" before "2"
        picture(root / "v2" / str(label) / "a.png", label, 300)
    real = [[i // 4] for i in range(16)]
    real[0], real[1] = [0, 2], []
    text(root / "real" / "real.json", real)
    shutil.copytree(root / "imagenet" / "val", root / "real" / "val")
    picture(root / "real" / "train" / WNIDS[0] / "n01440764_1.png", 0, 0)  # no validation image
    _objectnet(root / "objectnet")
    _dollar_street(root / "dollar")
    _landmarks(root / "roxford5k")
    _scenes(root)
    _several_classes(root / "voc")
    return root


def _objectnet(root: Path) -> None:
    names = ["tench, Tinca tinca", "goldfish", "great white shark", "tiger shark"]
    order = [2, 0, 3, 1]  # label i of ILSVRC 2012 is line i, in an order of its own
    text(root / "mappings" / "imagenet_to_label_2012_v2", "\n".join(names[i] for i in order) + "\n")
    text(root / "mappings" / "pytorch_to_imagenet_2012_id.json", {str(c): order.index(c) for c in range(4)})
    text(root / "mappings" / "folder_to_objectnet_label.json",
         {"fish": "Fish", "shark": "Shark", "mug": "Mug"})  # fmt: skip
    text(root / "mappings" / "objectnet_to_imagenet_1k.json",
         {"Fish": f"{names[0]}; goldfish", "Shark": "tiger shark"})  # fmt: skip
    for folder, label in (("fish", 0), ("fish", 1), ("shark", 3), ("mug", 2)):
        image = np.full((20, 20, 3), [255, 0, 0], np.uint8)  # the border
        image[2:-2, 2:-2] = COLORS[label]
        write(root / "images" / folder / f"{label}.png", image)


def _dollar_street(root: Path) -> None:
    lines = ["id,country.name,country.id,region.id,topics,place,income,imageRelPath,imagenet_sysnet_id"]
    for i in range(16):
        label = i % 4
        picture(root / "assets" / f"{i}.png", label, 400 + i)
        region = ("af", "eu")[i % 2]
        lines.append(f'x{i},C,cc,{region},"[""t""]",home,{50 + 100 * i},assets/{i}.png,"[{label}]"')
    text(root / "images_v2_imagenet_test.csv", "\n".join(lines) + "\n")


def _landmarks(root: Path) -> None:
    """Two landmarks: each query's box shows one, the rest of it the other one's colour."""
    names = [f"view_{i:06d}" for i in range(8)]
    for i, name in enumerate(names):
        picture(root / "jpg" / f"{name}.jpg", i % 2, 500 + i, noise=20)
    for label, name in enumerate(("query_a", "query_b")):
        image = np.array(Image.open(picture(root / "jpg" / f"{name}.jpg", 1 - label, 600, size=(40, 40))))
        image[8:24, 8:24] = COLORS[label]
        write(root / "jpg" / f"{name}.jpg", image)
    truth = [
        {
            "bbx": [8.0, 8.0, 24.0, 24.0],
            "easy": np.array([a, a + 2]),
            "hard": [a + 4],
            "junk": np.array([a + 6]),
        }
        for a in (0, 1)
    ]
    content = {"gnd": truth, "imlist": names, "qimlist": ["query_a", "query_b"]}
    (root / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content))


def _several_classes(root: Path) -> None:
    """Images that show red, blue, both or neither; of one it is difficult to say."""
    flags: dict[str, list[str]] = {}
    for i in range(24):
        split = "trainval" if i < 16 else "test"
        image = np.full((16, 16, 3), 128, np.uint8)
        for name, side, color in (("red", np.s_[:8], COLORS[0]), ("blue", np.s_[8:], COLORS[2])):
            there = bool(i % 4 in ((1, 3) if name == "red" else (2, 3)))
            if there:
                image[side] = color
            flag = "0" if i == 5 else "1" if there else "-1"
            flags.setdefault(f"{name}_{split}", []).append(f"{i:06d} {flag:>2}")
        write(root / "JPEGImages" / f"{i:06d}.jpg", image)
    for name, lines in flags.items():
        text(root / "ImageSets" / "Main" / f"{name}.txt", "\n".join(lines) + "\n")


def _scenes(root: Path) -> None:
    """Left halves are of one class and near, right halves of another and far."""
    for split, n in (("training", 6), ("validation", 3)):
        for i in range(n):
            image = np.zeros((16, 24, 3), np.uint8)
            cut = 6 + 2 * i
            image[:, :cut], image[:, cut:] = COLORS[0], COLORS[2]
            labels = np.full((16, 24), 5, np.uint8)
            labels[:, :cut] = 9
            labels[0] = 0
            write(root / "ade" / "images" / split / f"{i}.jpg", image)
            write(root / "ade" / "annotations" / split / f"{i}.png", labels)
            metres = np.full((16, 24), 20.0)
            metres[:, :cut] = 5.0
            metres[-1] = 0
            write(root / "kitti" / "raw" / "day" / f"{split}{i}.png", image)
            depth = (metres * 256).astype(np.uint16)
            write(root / "kitti" / "data_depth_annotated" / "train" / "day" / f"{split}{i}.png", depth)
    for split, n, name in (("training", 6, "train"), ("validation", 3, "test")):
        lines = [f"day/{split}{i}.png day/{split}{i}.png 721.5" for i in range(n)]
        text(root / "kitti" / f"eigen_{name}.txt", "\n".join([*lines, "day/none.png None 721.5"]) + "\n")


SUITE = """
datasets:
  imagenet: {layout: folder, root: imagenet, train: train, test: val, steps: 20,
             evaluations: [knn, linear, few_shot, long_tail, retrieval, duplicates]}
  imagenet-a: {layout: class_folders, base: imagenet, root: imagenet-a, test: "", evaluations: [robustness]}
  imagenet-v2: {layout: imagenet_v2, base: imagenet, root: v2, test: "", evaluations: [robustness]}
  objectnet: {layout: objectnet, base: imagenet, root: objectnet, test: "", evaluations: [robustness]}
  real: {layout: real, base: imagenet, root: real, test: real.json, evaluations: [robustness]}
  dollar: {layout: dollar_street, base: imagenet, root: dollar, test: images_v2_imagenet_test.csv,
           evaluations: [fairness]}
  oxford: {layout: revisited, root: roxford5k, train: gallery, test: queries, evaluations: [instances]}
  ade: {layout: ade20k, root: ade, train: training, test: validation, steps: 40, evaluations: [segmentation]}
  kitti: {layout: kitti, root: kitti, train: eigen_train.txt, test: eigen_test.txt, steps: 20,
          evaluations: [depth]}
  voc: {layout: voc2007, root: voc, train: trainval, test: test, evaluations: [multilabel]}
  paris: {layout: revisited, root: rparis6k, train: gallery, test: queries, evaluations: [instances]}
"""


def run(monkeypatch, suite: Path, root: Path, folder: Path, *embedders: str) -> int:
    arguments = ["--suite", suite, "--root", root, "--cache-dir", folder / "cache",
                 "--out", folder / "out", "--workers", 0, *embedders]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    return evaluate.main()


@pytest.fixture(scope="module")
def report(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "suite.yaml").write_text(SUITE)
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, folder / "suite.yaml", root, folder, "pixels:4", "pixels:2", "--compare") == 1
    return folder / "out"


@pytest.mark.long
def test_every_kind_of_evaluation_has_its_figures(report):
    values = json.loads((report / "results.json").read_text())["pixels:4"]
    assert "paris" not in values
    assert values["imagenet"]["k-NN, k = 10"] == values["imagenet"]["linear, sgd"] == 1.0
    assert values["imagenet"]["linear, 10-shot"] == 1.0
    assert values["imagenet"]["linear, sgd, tail classes"] == 1.0
    assert 0.25 < values["imagenet-a"]["robustness, accuracy"] < 1
    # Right only if folders, mappings and labels find the right classes.
    for name in ("imagenet-v2", "objectnet", "real"):
        assert values[name]["robustness, accuracy"] == 1.0, name
    dollar = values["dollar"]
    assert {f"fairness, income {n}" for n in ("1 lowest", "4 highest")} <= set(dollar)
    assert {"fairness, region af", "fairness, gap by region"} <= set(dollar)
    assert values["oxford"]["instances, medium, mAP"] == 1.0  # only if queries are cut to their box
    assert values["ade"]["segmentation, mIoU"] > 0.5
    assert values["voc"]["several classes, mAP"] == 1.0
    # An untrained layer says 40 m everywhere: 7 times too much on the left, once too much on the right.
    assert 0.2 < values["kitti"]["depth, AbsRel"] < 3.5


def test_intervals_are_of_the_samples_that_it_keeps(report):
    with np.load(report / "samples.npz") as samples:
        name = "imagenet-a|robustness, accuracy"
        a, b = samples[f"pixels:4|{name}"], samples[f"pixels:2|{name}"]
        assert a.shape == (8,)
        assert samples["pixels:4|ade|segmentation, mIoU"].shape == (3, 3, 150)
    with open(report / "results.csv", newline="") as file:
        rows = {(r["embedder"], r["dataset"], r["figure"]): r for r in csv.DictReader(file)}
    row = rows["pixels:2", "imagenet-a", "robustness, accuracy"]
    assert float(row["difference"]) == pytest.approx(b.mean() - a.mean())
    theirs = stats.bootstrap((a, b), lambda x, y, axis: np.mean(y, axis) - np.mean(x, axis), paired=True,
                             vectorized=True, method="percentile")  # fmt: skip
    assert a.tolist() != b.tolist()
    assert float(row["low"]) == pytest.approx(theirs.confidence_interval.low, abs=1 / 8)
    assert "[" in (report / "table.md").read_text()
    assert (report / "results.png").stat().st_size > 10_000


def test_a_planted_duplicate_is_reported(report):
    with open(report / "duplicates.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "same bytes"]
    assert {(row["test"], row["train"]) for row in rows} == {
        (f"{WNIDS[2]}/ILSVRC2012_val_00000009", f"{WNIDS[2]}/5")
    }
    values = json.loads((report / "results.json").read_text())["pixels:4"]["imagenet"]
    assert values["duplicates, test images also in train"] == 1 / 16


def test_missing_folders_and_bad_suites_are_named(root, tmp_path, monkeypatch, capsys):
    (tmp_path / "suite.yaml").write_text(
        "datasets:\n"
        "  here: {layout: folder, root: imagenet, train: train, test: val, evaluations: [health]}\n"
        "  gone: {layout: folder, root: nowhere, train: train, test: val}\n"
        "  of-gone: {layout: class_folders, base: gone, root: imagenet-a, test: '',\n"
        "            evaluations: [robustness]}\n"
        "  city: {layout: cityscapes, root: cs, train: train, test: val, evaluations: [segmentation]}\n"
    )
    assert run(monkeypatch, tmp_path / "suite.yaml", root, tmp_path, "pixels:2") == 1
    errors = capsys.readouterr().err
    assert "not evaluated, gone: " in errors
    assert "not evaluated, of-gone: needs gone" in errors
    assert f"city: {root / 'cs' / 'leftImg8bit' / 'train'} is not there: put Cityscapes'" in errors
    assert run(monkeypatch, tmp_path / "suite.yaml", root, tmp_path, "pixels:2", "--compare") == 2
    assert "two embedders" in capsys.readouterr().err
    for option, value in (("--workers", "-1"), ("--device", "abacus")):
        assert run(monkeypatch, tmp_path / "suite.yaml", root, tmp_path, "pixels:2", option, value) == 2
        assert f"evaluate: {option}" in capsys.readouterr().err
    for content in ("datasets: [a]", "datasets:", "name: x"):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(ConfigError, match=r"bad\.yaml: .*datasets"):
            load_suite(tmp_path / "bad.yaml", EVALUATIONS)
    for content, message in (
        ("[1, 2]", r"bad\.yaml: .* list"),
        ("datasets: {a: }", "a: .*None"),
        ("datasets: {a: [1]}", r"a: .*\[1\]"),
    ):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(ConfigError, match=message):
            load_suite(tmp_path / "bad.yaml", EVALUATIONS)
    for fields, message in (
        ("layout: objectnet, test: x, base: b, evaluations: [robustness]", r"a\.base: "),
        ("layout: ade20k, test: x, evaluations: [segmentation]", r"a\.train: "),
        ("layout: folder, train: x, test: x, steps: 0", "a.steps"),
        ("layout: folder, trian: x", r"a\.trian: .*'train'"),
    ):
        (tmp_path / "bad.yaml").write_text(f"datasets: {{a: {{{fields}}}}}")
        with pytest.raises(ConfigError, match=message):
            load_suite(tmp_path / "bad.yaml", EVALUATIONS)


def test_what_a_dataset_does_not_allow_is_named_and_the_rest_runs(root, tmp_path, monkeypatch, capsys):
    for i in range(4):
        picture(tmp_path / "one" / "train" / "only" / f"{i}.png", 0, i)
    shutil.copytree(tmp_path / "one" / "train", tmp_path / "one" / "test")
    (tmp_path / "suite.yaml").write_text(
        "datasets:\n"
        f"  one: {{layout: folder, root: {tmp_path / 'one'}, train: train, test: test}}\n"
        "  dtd: {layout: torchvision, dataset: DTD, train: {split: trian}, test: {split: test}}\n"
        "  voc: {layout: torchvision, dataset: FakeData, train: {size: 2, target_transform: x}, test: {}}\n"
    )
    assert run(monkeypatch, tmp_path / "suite.yaml", root, tmp_path, "pixels:2") == 1
    errors = capsys.readouterr().err
    assert "not evaluated, pixels:2, one, linear: train has one class only" in errors
    assert "not evaluated, dtd: torchvision.datasets.DTD does not take {'split': 'trian'}" in errors
    values = json.loads((tmp_path / "out" / "results.json").read_text())["pixels:2"]["one"]
    assert values["k-NN, k = 1"] == 1.0


def test_test_folders_without_one_of_the_classes(tmp_path, monkeypatch, caplog):
    for label, name in enumerate("abcd"):
        for i in range(4):
            if name != "d":
                picture(tmp_path / "train" / name / f"{i}.png", label, i)
            if name != "b":
                picture(tmp_path / "test" / name / f"{i}.png", label, 10 + i)
    (tmp_path / "suite.yaml").write_text(
        "datasets: {few: {layout: folder, train: train, test: test, evaluations: [knn]}}"
    )

    def accuracy() -> float:
        assert run(monkeypatch, tmp_path / "suite.yaml", tmp_path, tmp_path, "pixels:4") == 0
        return json.loads((tmp_path / "out" / "results.json").read_text())["pixels:4"]["few"]["k-NN, k = 10"]

    assert accuracy() == pytest.approx(2 / 3)  # of a and c; train has no d
    assert "test has no folder for 1 of train's classes, and 1 that train has not" in caplog.text
    picture(tmp_path / "test" / "b" / "0.png", 1, 20)  # the folder is read again when there is more in it
    assert accuracy() == pytest.approx(9 / 13)


def test_a_misspelt_part_is_no_other_part(tmp_path):
    savemat(tmp_path / "allsplit.mat", {"alltest": np.array([["x"]], object)})
    for layout, part in (("cub", "trian"), ("folder_split", "val"), ("revisited", "query"),
                         ("sun_rgbd", "val")):  # fmt: skip
        with pytest.raises(PoolError, match=f"'{part}'"):
            LAYOUTS[layout](tmp_path, part)
    (tmp_path / "allsplit.mat").write_bytes(b"no MATLAB file")
    with pytest.raises(PoolError, match=r"allsplit\.mat: "):
        LAYOUTS["sun_rgbd"](tmp_path, "test")


def test_layouts_of_lists_and_tables(tmp_path):
    for i in range(3):
        picture(tmp_path / "images" / f"c{i % 2}" / f"{i}.png", i % 2, i)
    text(tmp_path / "list.csv", "c0/0.png 0\nc1/1.png 1\n")
    found = LAYOUTS["file_list"](tmp_path, "list.csv")
    assert ([f.name for f in found.files], found.labels.tolist()) == (["0.png", "1.png"], [0, 1])
    annotations = {
        "images": [{"id": 7, "file_name": "images/c1/1.png"}, {"id": 3, "file_name": "images/c0/2.png"}],
        "annotations": [{"image_id": 7, "category_id": 20}, {"image_id": 3, "category_id": 4}],
        "categories": [{"id": 20, "name": "b"}, {"id": 4, "name": "a"}],
    }
    text(tmp_path / "train2018.json", annotations)
    found = LAYOUTS["inat"](tmp_path, "train2018.json")
    assert ([f.name for f in found.files], found.labels.tolist()) == (["2.png", "1.png"], [0, 1])
    assert found.classes == ["a", "b"]
    text(tmp_path / "ClassName.txt", "/images/c0\n/images/c1\n")
    text(tmp_path / "Testing_01.txt", "/images/c1/1.png\n")
    assert LAYOUTS["sun397"](tmp_path, "Testing_01.txt").labels.tolist() == [1]
    text(tmp_path / "images.txt", "1 c0/0.png\n2 c1/1.png\n3 c0/2.png\n")
    text(tmp_path / "image_class_labels.txt", "1 1\n2 2\n3 1\n")
    text(tmp_path / "train_test_split.txt", "1 1\n2 0\n3 1\n")
    assert LAYOUTS["cub"](tmp_path, "train").labels.tolist() == [0, 0]
    assert [f.name for f in LAYOUTS["cub"](tmp_path, "test").files] == ["1.png"]
    split = [LAYOUTS["folder_split"](tmp_path / "images", part, per_class=1) for part in ("train", "test")]
    assert sorted(f.name for part in split for f in part.files) == ["0.png", "1.png", "2.png"]
    assert split[0].labels.tolist() == [0, 1]
    text(tmp_path / "list.csv", "c0/0.png 0\ngone.png 1\n")
    with pytest.raises(PoolError, match=r"gone\.png .*1 of 2"):
        LAYOUTS["file_list"](tmp_path, "list.csv")
    text(tmp_path / "train_test_split.txt", "1 1\n2 0 x\n3 1\n")
    with pytest.raises(PoolError, match=r"train_test_split\.txt, line 2: .*'2 0 x'"):
        LAYOUTS["cub"](tmp_path, "train")
    text(tmp_path / "train_test_split.txt", "1 1\n4 1\n")
    with pytest.raises(PoolError, match=r"CUB.*'4'"):
        LAYOUTS["cub"](tmp_path, "train")
    text(tmp_path / "list.csv", "c0/0.png\n")
    with pytest.raises(PoolError, match=r"list\.csv, line 1: "):
        LAYOUTS["file_list"](tmp_path, "list.csv")


def test_maps_are_in_the_datasets_own_codes(tmp_path):
    rgb = np.zeros((6, 8, 3), np.uint8)
    ids = np.full((6, 8), 7, np.uint8)
    ids[:2], ids[2:4] = 33, 3
    write(tmp_path / "leftImg8bit" / "val" / "ulm" / "ulm_0_leftImg8bit.png", rgb)
    write(tmp_path / "gtFine" / "val" / "ulm" / "ulm_0_gtFine_labelIds.png", ids)
    found = LAYOUTS["cityscapes"](tmp_path, "val")
    assert found.n_classes == 19
    assert found.maps[0][:, 0].tolist() == [18, 18, 255, 255, 0, 0]

    write(tmp_path / "JPEGImages" / "a.jpg", rgb)
    palette = Image.fromarray(np.array([[0, 20, 255]] * 3, np.uint8), "P")
    palette.putpalette([i % 251 for i in range(768)])
    (tmp_path / "SegmentationClass").mkdir()
    palette.save(tmp_path / "SegmentationClass" / "a.png")
    text(tmp_path / "ImageSets" / "Segmentation" / "val.txt", "a\n")
    assert LAYOUTS["voc2012"](tmp_path, "val").maps[0][0].tolist() == [0, 20, 255]

    millimetres = np.full((480, 640), 2500, np.uint16)
    write(tmp_path / "kitchen" / "rgb.jpg", np.zeros((480, 640, 3), np.uint8))
    write(tmp_path / "kitchen" / "depth.png", millimetres)
    for part in ("nyu_train.txt", "nyu_test.txt"):
        text(tmp_path / part, "/kitchen/rgb.jpg /kitchen/depth.png 518.9\n")
    whole, inside = (LAYOUTS["nyu"](tmp_path, f"nyu_{part}.txt").maps[0] for part in ("train", "test"))
    assert (whole == 2.5).all()
    assert (inside > 0).sum() == (471 - 45) * (601 - 41)

    scene = tmp_path / "SUNRGBD" / "kv1" / "room"
    write(scene / "image" / "x.jpg", rgb)
    millimetres = np.full((6, 8), 1234, np.uint16)
    millimetres[0] = 9000
    write(scene / "depth_bfx" / "x.png", (millimetres << 3) | (millimetres >> 13))
    savemat(tmp_path / "allsplit.mat",
            {"alltest": np.array([["/n/fs/sun3d/data/SUNRGBD/kv1/room/"]], object)})  # fmt: skip
    for part in ("test", "all"):
        depth = LAYOUTS["sun_rgbd"](tmp_path / "SUNRGBD", part).maps[0]
        np.testing.assert_allclose(depth[:, 0], [8.0] + [1.234] * 5)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return (print, ("harm",))

    (tmp_path / "gnd_x.pkl").write_bytes(pickle.dumps({"gnd": Harm()}))
    with pytest.raises(PoolError, match=r"builtins\.print"):
        LAYOUTS["revisited"](tmp_path, "queries")


def test_torchvision_sets_become_pools(tmp_path, monkeypatch):
    for label, name in enumerate(("banded", "dotted")):
        for i in range(3):
            picture(tmp_path / "dtd" / "dtd" / "images" / name / f"{name}_{i}.jpg", label, i)
    for split, chosen in (("train", (0, 1)), ("test", (2,))):
        lines = [f"{name}/{name}_{i}.jpg" for name in ("banded", "dotted") for i in chosen]
        text(tmp_path / "dtd" / "dtd" / "labels" / f"{split}1.txt", "\n".join(lines) + "\n")
    (tmp_path / "suite.yaml").write_text(
        "datasets: {dtd: {layout: torchvision, dataset: DTD, train: {split: train}, test: {split: test},"
        " evaluations: [knn]}}"
    )
    assert run(monkeypatch, tmp_path / "suite.yaml", tmp_path, tmp_path, "pixels:4") == 0
    values = json.loads((tmp_path / "out" / "results.json").read_text())
    assert values["pixels:4"]["dtd"]["k-NN, k = 1"] == 1.0
