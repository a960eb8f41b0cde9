"""The bench of what training gains: its pools, ways, training, figures, and that it goes on where it was."""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchmetrics.functional.classification import multiclass_accuracy

from benchmarks.balance import embed
from benchmarks.evidence import __main__ as bench
from benchmarks.evidence import gains, training
from benchmarks.evidence.figure import draw
from benchmarks.evidence.pools import Evidence, cut
from benchmarks.evidence.ways import WAYS, Asked

SHARD = Path(__file__).parents[2] / "recipes" / "data" / "fashion-lt50" / "fashion-test-00.tar"


@pytest.fixture(scope="module")
def classes() -> list[np.ndarray]:
    """Images of each of the ten garments, 32 x 32."""
    with tarfile.open(SHARD) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
    found: dict[int, list[np.ndarray]] = {}
    for name in members:
        if name.endswith(".png"):
            image = np.array(Image.open(io.BytesIO(members[name])).convert("RGB"))
            label = int(members[name.removesuffix(".png") + ".cls"])
            found.setdefault(label, []).append(np.pad(image, ((2, 2), (2, 2), (0, 0))))
    return [np.stack(found[label]) for label in sorted(found)]


@pytest.fixture(scope="module")
def pool(classes: list[np.ndarray]) -> Evidence:
    return cut(classes, ratio=20, largest=80, bank=10, test=20)


def test_a_cut_has_an_exponential_tail_and_an_evaluation_of_its_own(classes: list[np.ndarray]) -> None:
    pool = cut(classes, ratio=20, largest=80, bank=10, test=20)
    counts = np.bincount(pool.labels)
    assert counts[0] == 80
    assert counts[-1] == 4
    assert np.allclose(counts[1:] / counts[:-1], 20 ** (-1 / 9), atol=0.12)
    assert np.bincount(pool.bank_labels).tolist() == [10] * 10
    assert np.bincount(pool.test_labels).tolist() == [20] * 10
    parts = [{image.tobytes() for image in part} for part in (pool.images, pool.bank, pool.test)]
    assert len(set.union(*parts)) == sum(map(len, parts))
    steeper = cut(classes, ratio=80, largest=80, bank=10, test=20)
    assert {image.tobytes() for image in steeper.images} < parts[0]
    with pytest.raises(ValueError, match=r"class 0: 1030 images are asked of 150"):
        cut(classes, ratio=20, largest=1000, bank=10, test=20)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "whole"])
def test_ways_select_as_many_as_asked(pool: Evidence, way: str) -> None:
    def rows(images: np.ndarray) -> np.ndarray:
        return embed(images, "pixels:16")

    asked = Asked(pool, 60, 1, lambda: rows(pool.images), lambda places: rows(pool.bank[places]))
    ids = WAYS[way](asked)
    assert len(ids) == len(set(ids.tolist())) == 60
    assert set(ids.tolist()) <= set(range(len(pool.labels)))
    assert np.array_equal(ids, WAYS[way](asked))
    if way == "labels":
        found, all_of = np.bincount(pool.labels[ids], minlength=10), np.bincount(pool.labels)
        assert ((found == all_of) | (found >= found.max() - 1)).all()


def test_views_of_an_even_image_are_even_and_within_range() -> None:
    views = training.view(torch.rand(16, 3, 1, 1).expand(16, 3, 8, 8))
    assert views.shape == (16, 3, 8, 8)
    assert views.abs().max() <= 0.5
    assert torch.allclose(views, views[:, :, :1, :1].expand_as(views), atol=1e-5)
    assert len(views[:, :, 0, 0].unique()) > 16  # each has colours of its own


def test_training_changes_weights_and_depends_on_the_seed_alone(pool: Evidence) -> None:
    images = training.halved(pool.images)
    assert images.shape[1:] == (16, 16, 3)
    trained = [training.features(training.pretrain(images, 3, seed), images[:5]) for seed in (0, 0, 1)]
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])
    assert not torch.equal(trained[0], training.features(training.pretrain(images, 0, 0), images[:5]))


def test_figures_are_means_over_classes_of_what_torchmetrics_counts() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, 12))
    labels = np.repeat(np.arange(6), [50, 40, 30, 20, 10, 5])
    bank, test = (
        torch.from_numpy(centres[labels] + rng.normal(size=(len(labels), 12))).float() for _ in range(2)
    )
    figures = training.accuracies(bank, labels, test, labels, np.array([4, 5]))
    truth = torch.from_numpy(labels)
    by_class = multiclass_accuracy(
        torch.from_numpy(training.probe(bank, labels, test)), truth, num_classes=6, average=None
    )
    assert figures["linear"] == pytest.approx(100 * float(by_class.mean()), abs=1e-4)
    assert figures["linear_rare"] == pytest.approx(100 * float(by_class[4:].mean()), abs=1e-4)
    near = training.neighbours(bank, labels, test, labels)
    assert figures["knn"] == pytest.approx(100 * near.mean())
    assert figures["linear"] > 60


def test_gains_are_paired_by_seed_and_have_students_intervals() -> None:
    def line(way: str, seed: int, value: float) -> dict[str, object]:
        return dict(zip(gains.KEY, ("p", 10, 100.0, 0.1, way, 5, seed))) | {"knn": value}

    lines = [line("random", seed, value) for seed, value in enumerate([10, 20, 30, 40])]
    lines += [line("labels", seed, value) for seed, value in [(3, 43.5), (1, 22), (2, 31)]]
    found = gains.gains(gains.by_setting(lines), ("p", 10, 100.0, 0.1, "labels", 5), "knn")
    assert found.tolist() == [2, 1, 3.5]
    assert gains.standard_error(found) == pytest.approx(stats.sem(found))
    low, high = stats.t.interval(0.95, 2, found.mean(), stats.sem(found))
    assert gains.half_interval(found) == pytest.approx((high - low) / 2)


@pytest.mark.long
def test_a_run_that_was_killed_goes_on(
    pool: Evidence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "pool_of", lambda *_: pool)  # that of real packages needs a network
    arguments = ["evidence", "--out", "lines", "--packages", ".", "--pools", "fashion"]
    arguments += ["--ways", "random", "labels", "--steps", "2", "--seeds", "2"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", arguments)
    bench.main()
    file = tmp_path / "lines"
    whole = file.read_text().splitlines()
    assert [(json.loads(line)["way"], json.loads(line)["seed"]) for line in whole] == [
        ("random", 0), ("labels", 0), ("random", 1), ("labels", 1),
    ]  # fmt: skip
    file.write_text("\n".join(whole[:3]) + "\n" + whole[3][:20])
    capsys.readouterr()
    bench.main()
    again = [json.loads(line) for line in file.read_text().splitlines()]
    expected = [json.loads(line) for line in whole]
    for line in (*again, *expected):
        line.pop("cpu_seconds")
    assert again == expected
    printed = capsys.readouterr().out
    assert printed.count('"seed": 1') == 1
    assert "| labels | 2 |" in printed
    drawn = draw(again).axes
    assert len(drawn) == 3
    gain = np.mean([again[i + 1]["linear"] - again[i]["linear"] for i in (0, 2)])
    assert any(np.allclose(line.get_ydata(), gain) for line in drawn[0].get_lines())
