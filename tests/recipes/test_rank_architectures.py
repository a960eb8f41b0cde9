"""The ranking recipe: miniature trainings on two real sets, continuing where it stopped, known accuracies."""

import csv
import json
import logging

import numpy as np
import pytest
import torch
from scipy import stats

from curated_data import ShardPool, ShardWriter
from curated_data.pool.decode import decode_image
from lightning_modules.supervised import Supervised, build_classifier
from recipes import rank_architectures

ARCHITECTURES = ["resnet10:4", "resnet18:4", "shufflenet_v2_x0_5"]
QUICK = ["--image-size", "16", "--steps", "3", "--batch-size", "32", "--workers", "0"]
KNOWN = {  # two models change places
    "weak": (0.50, 0.20),
    "middle": (0.60, 0.31),
    "good": (0.72, 0.28),
    "better": (0.75, 0.40),
    "best": (0.90, 0.55),
}


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    levels = {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="module")
def halves(tmp_path_factory, fashion_train, fashion_test):
    """Two real datasets of some 100 images: classes with even and with odd labels."""
    folder = tmp_path_factory.mktemp("halves")
    for part, source in (("train", fashion_train[0]), ("test", fashion_test[0])):
        pool = ShardPool(source)
        labels = pool.labels(np.arange(200))
        for parity, name in enumerate(("even", "odd")):
            with ShardWriter(folder / name / f"{part}-%02d.tar") as writer:
                for i in np.flatnonzero(labels % 2 == parity):
                    image = pool.read([i], ["png"])[0]["png"]
                    writer.write({"__key__": f"{i:04d}", "png": image, "cls": int(labels[i])})
    return folder


@pytest.fixture
def known(tmp_path):
    path = tmp_path / "known.csv"
    rows = [f"{name},{a},{b}" for name, (a, b) in KNOWN.items()]
    path.write_text("\n".join(["model,accuracy_a,accuracy_b", *rows]) + "\n")
    return path


def run(tmp_path, *arguments):
    places = ["--cache-dir", tmp_path / "cache", "--out", tmp_path / "out"]
    return rank_architectures.main([*map(str, arguments), *map(str, places)])


def error_of(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0].startswith("rank_architectures: ")
    return "\n".join(lines)


def common_classes(halves):
    """Classes of each half that train and test have, as the command line takes them."""
    arguments = []
    for side, name in (("a", "even"), ("b", "odd")):
        found = []
        for part in ("train", "test"):
            pool = ShardPool(str(halves / name / f"{part}-*.tar"))
            found.append(set(pool.labels(np.arange(len(pool))).tolist()))
        arguments += [f"--{side}", halves / name, f"--classes-{side}", *sorted(found[0] & found[1])]
    return arguments


def test_trains_each_on_each_reports_and_goes_on(halves, tmp_path, monkeypatch):
    arguments = [*common_classes(halves), *QUICK, "--architectures", *ARCHITECTURES, "--seeds", 0]
    train, calls = rank_architectures.train, []

    def killed_at_the_third(*job):
        calls.append(job[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*job)

    monkeypatch.setattr(rank_architectures, "train", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *arguments)
    assert run(tmp_path, *arguments) == 0
    assert len(calls) == 3 + 4, "the two that were finished train again"
    assert calls[2] == calls[3]
    out = tmp_path / "out"
    first = (out / "accuracies.csv").read_bytes()
    ranking = json.loads((out / "ranking.json").read_text())
    assert list(ranking["models"]) == ARCHITECTURES
    pool = ShardPool(str(halves / "even" / "test-*.tar"))
    chosen = [int(c) for c in arguments[arguments.index("--classes-a") + 1 : arguments.index("--b")]]
    n_test = int(np.isin(pool.labels(np.arange(len(pool))), chosen).sum())
    for model in ranking["models"].values():
        n_right = round(model["accuracy_a"] * n_test)
        assert model["accuracy_a"] == pytest.approx(n_right / n_test, abs=1e-12)
        interval = stats.binomtest(n_right, n_test).proportion_ci(method="wilson")
        assert (model["low_a"], model["high_a"]) == pytest.approx((interval.low, interval.high))
    assert (out / "ranking.png").stat().st_size > 5000
    assert "Spearman" in (out / "table.md").read_text()

    assert run(tmp_path, *arguments) == 0
    assert len(calls) == 7, "everything is known by now"
    assert (out / "accuracies.csv").read_bytes() == first
    # A fresh run ends with the same, and the table that it wrote stands in for the trainings.
    one_side = tmp_path / "one.csv"
    with open(out / "accuracies.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    one_side.write_text(
        "model,accuracy_a,accuracy_b\n" + "".join(f"{r['model']},,{r['accuracy_b']}\n" for r in rows)
    )
    assert run(tmp_path / "fresh", *arguments, "--known", one_side) == 0
    assert len(calls) == 10, "B is known, A is not"
    fresh = tmp_path / "fresh" / "out"
    assert (fresh / "accuracies.csv").read_bytes() == first
    for model in json.loads((fresh / "ranking.json").read_text())["models"].values():
        assert model["low_a"] < model["accuracy_a"]
        assert model["low_b"] == model["accuracy_b"], "how many images are behind it is not known"


def test_known_accuracies_give_scipys_statistics(known, tmp_path):
    assert run(tmp_path, "--known", known, "--n-test-a", 10_000, "--n-test-b", 10_000) == 0
    found = json.loads((tmp_path / "out" / "ranking.json").read_text())
    a, b = (np.array(side) for side in zip(*KNOWN.values()))
    spearman, kendall = stats.spearmanr(a, b), stats.kendalltau(a, b)
    assert (found["spearman"], found["spearman_p"]) == pytest.approx((spearman.statistic, spearman.pvalue))
    assert (found["kendall"], found["kendall_p"]) == pytest.approx((kendall.statistic, kendall.pvalue))
    for name, (x, y) in {"fit": (a, b), "improvement_fit": (a / a.min() - 1, b / b.min() - 1)}.items():
        line = stats.linregress(x, y)
        expected = (line.slope, line.intercept, line.rvalue**2)
        assert tuple(found[name].values()) == pytest.approx(expected), name
    assert [(s["models"], s["significant"]) for s in found["swaps"]] == [(["middle", "good"], True)]
    assert "middle and good swap: significant" in (tmp_path / "out" / "table.md").read_text()
    with open(tmp_path / "out" / "ranking.csv", newline="") as file:
        ranks = {row["model"]: (float(row["rank_a"]), float(row["rank_b"])) for row in csv.DictReader(file)}
    assert ranks["best"] == (1, 1)
    assert ranks["good"] == (3, 4)


def test_json_with_seeds_gives_students_intervals(tmp_path):
    runs = {"x": [0.5, 0.52, 0.54], "y": [0.6, 0.61, 0.65], "z": [0.7, 0.72, 0.71]}
    path = tmp_path / "known.json"
    path.write_text(json.dumps({"a": runs, "b": runs}))
    assert run(tmp_path, "--known", path) == 0
    found = json.loads((tmp_path / "out" / "ranking.json").read_text())
    assert found["swaps"] == []
    for name, values in runs.items():
        expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
        assert (found["models"][name]["low_a"], found["models"][name]["high_a"]) == pytest.approx(expected)
    assert rank_architectures.read_known(tmp_path / "out" / "accuracies.csv") == {"a": runs, "b": runs}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--architectures", "resnet10:4", "rsnet18", "alexnet"], ["'rsnet18'", "did you mean", "resnet18"]),
        (["--architectures", "resnet10:4", "alexnet"], ["three architectures", "resnet10:4, alexnet"]),
        (["--architectures", "resnet10:4", "alexnet", "alexnet"], ["three architectures", "each once"]),
        (["--architectures", "alexnet:9", "resnet10", "vgg11"], ["'alexnet:9'", "width"]),
        (["--steps", "0"], ["--steps", "0"]),
        (["--a", "nowhere", "--small"], ["--a nowhere", "*train*.tar"]),
        (["--known", "nowhere.csv"], ["nowhere.csv", "accuracy_a"]),
        (["--confidence", 95], ["--confidence", "95"]),
        (["--learning-rate", 0], ["--learning-rate"]),
        (["--n-test-b", 0], ["--n-test-b"]),
    ],
)
def test_bad_options_give_one_clear_error(arguments, words, tmp_path, capsys):
    assert run(tmp_path, *arguments) == 2
    error = error_of(capsys)
    assert all(word in error for word in words), error


def test_bad_data_gives_one_clear_error(halves, known, tmp_path, capsys, write_pool):
    three = ["--architectures", *ARCHITECTURES, *QUICK]
    unlabelled = tmp_path / "unlabelled"
    source = ShardPool(write_pool([4]))
    for part in ("train", "test"):
        with ShardWriter(unlabelled / f"{part}-%02d.tar") as writer:
            for i, sample in enumerate(source.read(range(4), ["png"])):
                writer.write({"__key__": str(i), "png": sample["png"]})
    beyond = tmp_path / "beyond.npy"
    np.save(beyond, np.array([0, 10_000]))
    percent = tmp_path / "percent.csv"
    percent.write_text(known.read_text().replace("0.9,", "90,"))
    for arguments, words in [
        (["--b", unlabelled], ["dataset b", "no sample has a label", ".cls"]),
        (["--a", halves / "even", "--classes-a", 0, 1], ["dataset a (even)", "[1]", "no training sample"]),
        (["--a", halves / "even", "--selection-a", beyond], ["--selection-a", "10000"]),
        (["--train-b", "x.tar"], ["--train-b and --test-b"]),
        (["--known", percent, "--architectures", *KNOWN], ["'best'", "0..1", "90"]),
    ]:
        assert run(tmp_path, *three, *arguments) == 2
        error = error_of(capsys)
        assert all(word in error for word in words), error


def test_same_images_in_halves_by_default_or_by_selection(fashion_train, tmp_path):
    np.save(tmp_path / "some.npy", np.arange(500))
    for arguments, n_classes in (([], 5), (["--selection-b", tmp_path / "some.npy"], 10)):
        options = rank_architectures.parse_options(list(map(str, arguments)))
        data = rank_architectures.open_data(options, "ab", tmp_path, default=rank_architectures.FASHION)
        assert [len(data[side].classes) for side in "ab"] == [n_classes] * 2
        assert not arguments or np.array_equal(data["b"].ids, np.arange(500))
    labels = ShardPool(fashion_train).labels(np.arange(4196))
    options = rank_architectures.parse_options([])
    data = rank_architectures.open_data(options, "ab", tmp_path, default=rank_architectures.FASHION)
    assert len(data["a"].ids) + len(data["b"].ids) == len(labels)
    assert not set(labels[data["a"].ids]) & set(labels[data["b"].ids])


def test_accuracy_is_that_of_the_classes_that_count():
    # A network that answers by the image's first value, on labels of which 7 is none of the classes.
    class First(torch.nn.Module):
        def forward(self, images):
            return torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 3).float()

    module = Supervised(First(), [2, 5, 9])
    answers = torch.tensor([0, 1, 2, 1, 0, 2])
    labels = torch.tensor([2, 5, 5, 7, 9, 9])
    padding = torch.tensor([False, False, False, False, False, True])
    images = answers[:, None, None, None].expand(-1, 3, 1, 1).float()
    module.on_validation_epoch_start()
    module.validation_step({"image": images, "label": labels, "padding": padding}, 0)
    assert module.accuracy == 2 / 4
    with pytest.raises(ValueError, match="label 7"):
        module.training_step({"image": images, "label": labels}, 0)


@pytest.mark.parametrize("name", ["alexnet", "resnet18", "densenet121", "efficientnet_b0", "convnext_tiny"])
def test_small_images_keep_their_resolution(name, fashion_test):
    """At 32 pixels each default family's last map has more than one place; 224-pixel stems leave one."""
    torch.manual_seed(0)
    pool = ShardPool(fashion_test)
    images = torch.stack([decode_image(s["png"]) for s in pool.read([0, 1], ["png"])]).float() / 255
    images = torch.nn.functional.pad(images, (2, 2, 2, 2))
    net = build_classifier(name, 7, image_size=32).eval()
    sizes = []
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, __, output: sizes.append(output.shape[-1]))
    with torch.no_grad():
        logits = net(images)
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()
    assert sizes[0] >= 16
    assert sizes[-1] >= 2
