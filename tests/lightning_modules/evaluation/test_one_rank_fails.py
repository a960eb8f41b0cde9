"""Bad input on one rank ends an evaluation on both at once; neither waits for the other."""

import numpy as np
import pytest

from lightning_modules.evaluation.clustering import clustering
from lightning_modules.evaluation.comparison import comparison
from lightning_modules.evaluation.depth import depth
from lightning_modules.evaluation.fairness import fairness
from lightning_modules.evaluation.health import health
from lightning_modules.evaluation.knn import knn
from lightning_modules.evaluation.linear import linear
from lightning_modules.evaluation.longtail import longtail
from lightning_modules.evaluation.multilabel import multilabel
from lightning_modules.evaluation.retrieval import retrieval
from lightning_modules.evaluation.robustness import ShiftedSet, robustness
from lightning_modules.evaluation.segmentation import segmentation
from tests.support.ranks import on_two_ranks

rng = np.random.default_rng(0)
X = rng.normal(size=(12, 4)).astype(np.float32)
NOT_FINITE = X.copy()
NOT_FINITE[5, 1] = np.nan
Y = np.arange(12) % 3
TOKENS = rng.normal(size=(3, 2, 2, 4)).astype(np.float32)
MAPS = np.ones((3, 4, 4))
GROUND_TRUTH = [{"easy": [1]}] * 12


class Unreadable:
    """A bank on a disk that fails."""

    shape = (12, 4)

    def __getitem__(self, rows):
        raise OSError("input/output error")


# Each evaluation, with what one rank has wrong: the call with good input, the call with bad, the reason.
CASES = {
    "knn": (lambda: knn(X, Y, X, Y, k=3), lambda: knn(X, Y[:9], X, Y, k=3), "12 labels"),
    "knn, bank": (lambda: knn(X, Y, X, Y, k=3), lambda: knn(NOT_FINITE, Y, X, Y, k=3), "train: 1 rows"),
    "knn, unreadable bank": (
        lambda: knn(X, Y, X, Y, k=3),
        lambda: knn(Unreadable(), Y, X, Y, k=3),
        "input/output error",
    ),
    "linear": (lambda: linear(X, Y, X, Y), lambda: linear(X, Y, NOT_FINITE, Y), "not finite"),
    "multilabel": (
        lambda: multilabel(X, np.eye(3, dtype=int)[Y], X, np.eye(3, dtype=int)[Y]),
        lambda: multilabel(X, np.eye(3, dtype=int)[Y] + 1, X, np.eye(3, dtype=int)[Y]),
        "marks",
    ),
    "retrieval": (
        lambda: retrieval(X, X, query_labels=Y, gallery_labels=Y, k=2),
        lambda: retrieval(X, NOT_FINITE, query_labels=Y, gallery_labels=Y, k=2),
        "gallery: 1 rows",
    ),
    "retrieval, instances": (
        lambda: retrieval(X, X, ground_truth=GROUND_TRUTH, k=2),
        lambda: retrieval(X, X, ground_truth=[*GROUND_TRUTH[1:], {"easy": [99]}], k=2),
        "place 99",
    ),
    "robustness": (
        lambda: robustness(X, Y, {"other": ShiftedSet(X, Y)}),
        lambda: robustness(X, -1 - Y, {"other": ShiftedSet(X, Y)}),
        "labels must be >= 0",
    ),
    "robustness, shifted": (
        lambda: robustness(X, Y, {"other": ShiftedSet(X, Y)}),
        lambda: robustness(X, Y, {"other": ShiftedSet(X[:, :2], Y)}),
        "2 dimensions",
    ),
    "segmentation": (
        lambda: segmentation(TOKENS, MAPS.astype(int), TOKENS, MAPS.astype(int), n_classes=2),
        lambda: segmentation(TOKENS, 5 * MAPS.astype(int), TOKENS, MAPS.astype(int), n_classes=2),
        "labels 5..5",
    ),
    "depth": (
        lambda: depth(TOKENS, MAPS, TOKENS, MAPS),
        lambda: depth(TOKENS, MAPS[:, :1], TOKENS, MAPS),
        "has shape",
    ),
    "clustering": (lambda: clustering(Y, Y), lambda: clustering(Y, Y - 5), ">= 0"),
    "longtail": (lambda: longtail(Y, Y, [3, 2, 1]), lambda: longtail(Y, Y[1:], [3, 2, 1]), "expected 12"),
    "health": (lambda: health(X), lambda: health(NOT_FINITE), "not finite"),
    "fairness": (lambda: fairness(X[:, 0], Y), lambda: fairness(X[:, 0], Y[1:]), "one group per sample"),
    "comparison": (
        lambda: comparison(X[:, 0], X[:, 1]),
        lambda: comparison(X[:, 0], X[1:, 1]),
        "the same samples",
    ),
}


def outcomes(rank: int) -> dict[str, str]:
    found = {}
    for name, (good, bad, _) in CASES.items():
        try:
            (bad if rank == 1 else good)()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def test_both_ranks_raise_and_the_other_one_says_where():
    here, there = on_two_ranks(outcomes)
    for name, (_, _, reason) in CASES.items():
        assert reason in there[name], name
        assert "on rank" not in there[name], name
        assert here[name].startswith("RankError: rank 1 failed: "), name
        assert reason in here[name], name


@pytest.mark.parametrize("name", CASES)
def test_one_process_raises_its_own_error(name):
    _, bad, reason = CASES[name]
    with pytest.raises((ValueError, OSError), match=reason):
        bad()
