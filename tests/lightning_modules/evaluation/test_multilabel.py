"""Mean average precision of one head a class, against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from lightning_modules.evaluation.multilabel import average_precision, multilabel
from tests.support.ranks import on_two_ranks


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 6)).astype(np.float32)
    marks = (x[:, :3] + rng.normal(size=(300, 3)) > 0.5).astype(np.int64)
    marks[rng.random(marks.shape) < 0.1] = -1
    return x, marks


def test_average_precision_is_scikit_learns():
    rng = np.random.default_rng(1)
    for _ in range(20):
        scores, positive = rng.integers(0, 9, 40) / 8, rng.random(40) < 0.3
        positive[0] = True
        found = average_precision(torch.tensor(scores), torch.tensor(positive))
        assert found == pytest.approx(average_precision_score(positive, scores))


def test_each_class_is_scikit_learns_head():
    x, marks = data()
    found = multilabel(x[:200], marks[:200], x[200:], marks[200:], inverse_penalties=(0.5,))
    for c in range(3):
        known, asked = marks[:200, c] >= 0, marks[200:, c] >= 0
        # Two columns of weights share what one column has: their penalty counts half.
        head = LogisticRegression(C=1.0, tol=1e-8).fit(x[:200][known], marks[:200, c][known])
        want = average_precision_score(marks[200:, c][asked], head.decision_function(x[200:][asked]))
        assert found.average_precision[c] == pytest.approx(want, abs=0.01)
    assert found.mean_average_precision == pytest.approx(np.mean(found.average_precision))


def _share(rank):
    x, marks = data()
    train, test = {0: (slice(0, 50), slice(200, 280)), 1: (slice(50, 200), slice(280, 300)),
                   None: (slice(0, 200), slice(200, 300))}[rank]  # fmt: skip
    return multilabel(x[train], marks[train], x[test], marks[test]).average_precision


@pytest.mark.long
def test_two_ranks_get_the_result_of_one():
    for found in on_two_ranks(_share):
        assert found == pytest.approx(_share(None), abs=1e-6)


@pytest.mark.parametrize("n", [2, 3])
def test_a_large_part_held_out_leaves_a_sample(n):
    """The only C is chosen, whatever is left to choose it on; then all of train counts, marked or not."""
    x, marks = data()
    marks[:3] = [[1, 1, -1], [0, -1, 1], [-1, 0, 0]]
    found = multilabel(x[:n], marks[:n], x[200:], marks[200:], held_out=0.9, inverse_penalties=(0.5,))
    for c in range(3):
        known, asked = marks[:n, c] >= 0, marks[200:, c] >= 0
        if len(set(marks[:n, c][known])) < 2:
            assert np.isnan(found.average_precision[c])
            continue
        head = LogisticRegression(C=1.0, tol=1e-8).fit(x[:n][known], marks[:n, c][known])
        want = average_precision_score(marks[200:, c][asked], head.decision_function(x[200:][asked]))
        assert found.average_precision[c] == pytest.approx(want, abs=0.01)
        assert found.inverse_penalty[c] == 0.5


def test_bad_input_is_named():
    x, marks = data()
    with pytest.raises(ValueError, match=r"\(300, C\)"):
        multilabel(x, marks[:, 0], x, marks)
    with pytest.raises(ValueError, match="1, 0 or -1"):
        multilabel(x, marks + 1, x, marks)
    with pytest.raises(ValueError, match="not whole numbers"):
        multilabel(x, marks * 0.5, x, marks)
    with pytest.raises(ValueError, match=r"two samples or more.*got 1"):
        multilabel(x[:1], marks[:1], x, marks)
    with pytest.raises(ValueError, match="no class has a positive"):
        multilabel(x, marks * 0, x, marks)
