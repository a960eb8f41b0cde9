"""Arrays that torch does not take as they are: flipped, of another byte order, read-only."""

import numpy as np
import pytest
import torch

from lightning_modules.evaluation.comparison import comparison
from lightning_modules.evaluation.dense import DenseSettings
from lightning_modules.evaluation.depth import depth
from lightning_modules.evaluation.fairness import fairness
from lightning_modules.evaluation.inputs import as_tensor, checked_labels
from lightning_modules.evaluation.knn import knn
from lightning_modules.evaluation.longtail import longtail
from lightning_modules.evaluation.multilabel import multilabel
from lightning_modules.evaluation.robustness import ShiftedSet, robustness
from lightning_modules.evaluation.segmentation import segmentation

rng = np.random.default_rng(0)
X = rng.normal(size=(12, 4)).astype(np.float32)
Y = np.arange(12) % 3
TOKENS = rng.normal(size=(3, 2, 2, 4)).astype(np.float32)
MAPS = 1 + np.arange(48).reshape(3, 4, 4) % 2
QUICK = DenseSettings(n_iter=3, batch_size=2)


def flipped(array):
    """Equal to the array, and with negative strides."""
    return np.flip(np.flip(array).copy())


def swapped(array):
    return array.astype(array.dtype.newbyteorder())


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


LAYOUTS = [flipped, swapped, read_only, lambda array: swapped(flipped(array))]
EVALUATIONS = {
    "comparison": lambda of: comparison(of(X[:, 0]), of(X[:, 1])),
    "depth": lambda of: depth(of(TOKENS), of(MAPS.astype(np.uint16)), of(TOKENS), of(MAPS), settings=QUICK),
    "fairness": lambda of: fairness(of(X[:, 0]), of(Y)),
    "knn": lambda of: knn(of(X), of(Y), of(X + 1), of(Y), k=3),
    "longtail": lambda of: longtail(of(Y), of(Y), of(np.array([3, 2, 1]))),
    "multilabel": lambda of: multilabel(of(X), of(np.eye(3, dtype=int)[Y]), of(X), of(np.eye(3)[Y])),
    "robustness": lambda of: robustness(of(X), of(Y), {"other": ShiftedSet(of(X + 1), of(Y))}),
    "segmentation": lambda of: segmentation(
        of(TOKENS), of(MAPS), of(TOKENS), of(MAPS), n_classes=3, settings=QUICK
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["float16", "float64", "uint8", "uint16", "int64"])
def test_as_tensor_has_the_numbers_of_the_array(layout, kind):
    array = (10 * X).astype(kind)
    np.testing.assert_array_equal(as_tensor(layout(array)).numpy(), array)


def test_as_tensor_copies_only_where_it_must():
    array = X.copy()
    assert as_tensor(array).data_ptr() == array.ctypes.data


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "int32"])
def test_labels_of_any_integer_type(layout, kind):
    found = checked_labels("train", layout(Y.astype(kind)), 12)
    assert found.dtype == torch.int64
    assert found.tolist() == Y.tolist()


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_take_arrays_of_any_layout(name, layout):
    evaluate = EVALUATIONS[name]
    assert str(evaluate(layout)) == str(evaluate(lambda array: array))
