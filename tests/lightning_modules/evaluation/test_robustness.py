"""Shifted sets made by hand: class maps, several right answers, samples without one."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from lightning_modules.evaluation.robustness import ShiftedSet, robustness
from tests.support.ranks import on_two_ranks

POINTS = torch.eye(4) * 4


def base(n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 4
    return POINTS[labels] + 0.3 * torch.randn(n, 4, generator=generator), labels


def test_a_class_map_limits_the_choice():
    """Labels 0 and 1 are base classes 2 and 0; the second sample looks like class 1, which it cannot be."""
    features = torch.stack([POINTS[2], POINTS[1] + 0.5 * POINTS[0], POINTS[2]])
    sets = {
        "mapped": ShiftedSet(features, torch.tensor([0, 1, 1]), classes=[2, 0]),
        "plain": ShiftedSet(features, torch.tensor([2, 0, 0])),
    }
    result = robustness(*base(), sets)
    assert result.sets["mapped"]["accuracy"] == pytest.approx(2 / 3)
    assert result.sets["mapped"]["class_average"] == pytest.approx((1 + 1 / 2) / 2)
    assert result.sets["mapped"]["n_classes"] == 2
    assert result.sets["plain"]["accuracy"] == pytest.approx(1 / 3)
    assert result.sets["base"]["accuracy"] == 1
    assert "| mapped |" in result.table()


def test_several_base_classes_for_one_label():
    sets = {"objects": ShiftedSet(POINTS, torch.tensor([0, 0, 1, 0]), classes=[[0, 1], [2, 3]])}
    assert robustness(*base(), sets).sets["objects"]["accuracy"] == 0.75


def test_several_right_answers_and_none():
    labels = torch.tensor([[0, 3], [2, -1], [2, 1], [-1, -1]])
    result = robustness(*base(), {"real": ShiftedSet(POINTS, labels)}).sets["real"]
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert (result["n"], result["n_left_out"]) == (3, 1)
    assert np.isnan(result["class_average"])


def test_labels_that_no_base_class_has_are_wrong_and_warned_of(caplog):
    sets = {
        "far": ShiftedSet(POINTS, torch.tensor([0, 1, 7, 9])),
        "near": ShiftedSet(POINTS, torch.arange(4)),
    }
    assert robustness(*base(), sets).sets["far"]["accuracy"] == 0.5
    (line,) = caplog.messages
    assert "far: 2 of 4 samples have labels that no base class has (the 4 base classes lie in 0..3)" in line


def test_labels_of_any_size():
    """Ids in the millions are classes 0 .. 3, one of which stands for no label of the set with a map."""
    x, y = base()
    own = torch.tensor([0, 1, 1, 2])
    figures = []
    for ids in (torch.arange(4), torch.tensor([7, 47_115, 1_462_345, 2**40])):
        a, b, c, d = ids.tolist()
        sets = {
            "plain": ShiftedSet(POINTS, torch.tensor([a, b, a, d])),
            "several": ShiftedSet(POINTS, torch.tensor([[d, a], [c, a], [c, -1], [-1, -1]])),
            "mapped": ShiftedSet(POINTS, own, classes=[a, [b, d], d]),
        }
        figures.append(robustness(x, ids[y], sets, inverse_penalties=(1.0,)).sets)
    assert figures[0]["plain"]["accuracy"] == 0.75
    assert figures[0]["mapped"]["n_classes"] == 3
    for name, row in figures[0].items():
        assert figures[1][name] == pytest.approx(row, nan_ok=True)


def test_the_head_is_scikit_learns():
    x, y = base()
    generator = torch.Generator().manual_seed(1)
    noisy = x + 2 * torch.randn(x.shape, generator=generator)
    result = robustness(x, y, {"noisy": ShiftedSet(noisy, y)}, inverse_penalties=(1.0,))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    kept = torch.ones(200, dtype=torch.bool)
    kept[order[:20]] = False
    reference = LogisticRegression(C=1.0, tol=1e-8).fit(x[kept].numpy(), y[kept].numpy())
    assert result.sets["noisy"]["accuracy"] == pytest.approx(reference.score(noisy.numpy(), y.numpy()))


def _share(rank, x, y):
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    part = slice(None) if rank is None else slice(0, 70) if rank == 0 else slice(70, None)
    sets = {
        "mapped": ShiftedSet(2 * x[part].flip(1), 3 - y[part], classes=[0, 1, 2, 3]),
        "real": ShiftedSet(x[part], torch.stack([y[part], y[part] - 1], 1)),
    }
    result = robustness(x[part], y[part], sets, inverse_penalties=(0.1, 1.0))
    return [value for row in result.sets.values() for value in row.values()]


def test_two_ranks_get_the_result_of_one():
    parts = [part.numpy() for part in base()]
    want = _share(None, *parts)
    for got in on_two_ranks(_share, *parts):
        assert got == pytest.approx(want, nan_ok=True)


@pytest.mark.parametrize(
    ("shifted", "message"),
    [
        ({}, "no shifted sets"),
        ({"base": ShiftedSet(POINTS, torch.tensor([0, 1, 2, 2]))}, '"base"'),
        ({"a": ShiftedSet(POINTS, torch.tensor([0, 1, 2, 2]), classes=[0, 9])}, "^a: .*class map"),
        ({"a": ShiftedSet(POINTS, torch.tensor([0, 1, 2, 2]), classes=[0, 1])}, "^a: .*label 2"),
        ({"a": ShiftedSet(POINTS[:, :3], torch.tensor([0, 1, 2, 2]))}, "^a: .* 3"),
        ({"a": ShiftedSet(POINTS, torch.tensor([0, 1]))}, "^a: .*4 labels"),
    ],
)
def test_bad_input_is_named(shifted, message):
    with pytest.raises(ValueError, match=message):
        robustness(*base(), shifted)
    with pytest.raises(ValueError, match="one class only"):
        robustness(
            POINTS,
            torch.zeros(4, dtype=torch.int64),
            {"a": ShiftedSet(POINTS, torch.zeros(4, dtype=torch.int64))},
        )
