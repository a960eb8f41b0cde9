"""Logistic regression against scikit-learn's, for features of any offset, scale and correlation."""

import numpy as np
import pytest
import sklearn
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from sklearn.linear_model import LogisticRegression

from lightning_modules.evaluation.logistic import fit_logistic
from tests.lightning_modules.evaluation.test_linear import data

needs_newton_of_all_classes = pytest.mark.skipif(
    Version(sklearn.__version__) < Version("1.6"),
    reason="an older scikit-learn fits one class against the rest",
)


@pytest.mark.parametrize(("c", "block", "copy"), [(0.01, 2**25, 2**30), (1.0, 300, 0), (100.0, 300, 2**30)])
def test_logistic_regression_is_scikit_learns(c, block, copy, monkeypatch):
    """Also in blocks of 25 samples, and without a copy in float64."""
    monkeypatch.setattr("lightning_modules.evaluation.logistic._BLOCK", block)
    monkeypatch.setattr("lightning_modules.evaluation.logistic._COPY", copy)
    x, y = data()
    head = fit_logistic(x, y, 4, inverse_penalty=c)
    reference = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(x.double().numpy(), y.numpy())
    # Scikit-learn's intercepts add up to 0 as ours do, both starting there.
    np.testing.assert_allclose(head.weight.T.numpy(), reference.coef_, atol=5e-3)
    np.testing.assert_allclose(
        head(x).softmax(1).numpy(), reference.predict_proba(x.double().numpy()), atol=5e-3
    )


def objective(weight, bias, x, y, c):
    """Scikit-learn's, in float64."""
    scores = x.double() @ weight + bias
    return c * F.cross_entropy(scores, y, reduction="sum").item() + weight.square().sum().item() / 2


@needs_newton_of_all_classes
@pytest.mark.parametrize("offset", [0.0, 100.0, -3e4])
@pytest.mark.parametrize("scale", [1.0, 1e-4, "mixed"])
@pytest.mark.parametrize("c", [1e-3, 1.0, 100.0])
def test_offsets_and_scales_reach_scikit_learns_objective(offset, scale, c, caplog):
    """Features of any mean and width end at the minimum, whatever the penalty, which stays that of W."""
    x, y = data()
    widths = torch.logspace(-3, 3, 12) if scale == "mixed" else torch.full((12,), scale)
    x = (x + offset).double() * widths
    head = fit_logistic(x, y, 4, inverse_penalty=c)
    assert not caplog.records
    # Theirs knows no offset, which the free intercept takes.
    middle = x.mean(0)
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=10_000, solver="newton-cholesky")
    theirs.fit((x - middle).numpy(), y.numpy())
    weight, bias = torch.from_numpy(theirs.coef_.T), torch.from_numpy(theirs.intercept_)
    best = objective(weight, bias, x - middle, y, c)
    found = objective(head.weight.double(), head.bias.double(), x, y, c)
    assert found == pytest.approx(best, rel=1e-4)


@needs_newton_of_all_classes
@given(
    seed=st.integers(0, 2**31),
    n=st.sampled_from([60, 300]),
    d=st.sampled_from([3, 12, 40]),
    n_classes=st.sampled_from([2, 4, 20]),
    offset=st.sampled_from([0.0, 100.0, 1e4, -1e4]),
    scale=st.integers(-3, 3).map(lambda power: 10.0**power),
    c=st.integers(-4, 4).map(lambda power: 10.0**power),
    apart=st.sampled_from([0.3, 1.0, 3.0]),
    rest=st.sampled_from([None, 1e-2, 1e-4, 1e-6]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
def test_any_features_reach_scikit_learns_objective(
    seed, n, d, n_classes, offset, scale, c, apart, rest, dtype, caplog
):
    """Of any offset, scale and C, and collinear but for a `rest`; or it says that it may not."""
    caplog.clear()
    rng = np.random.default_rng(seed)
    y = np.arange(n) % n_classes
    x = rng.normal(size=(n_classes, d))[y] * apart + rng.normal(size=(n, d))
    if rest is not None:
        x = x[:, : d // 2] @ rng.normal(size=(d // 2, d)) + rest * rng.normal(size=(n, d))
    x, y = torch.from_numpy(x * scale + offset).to(dtype), torch.from_numpy(y)
    head = fit_logistic(x, y, n_classes, inverse_penalty=c, max_iter=500)
    x = x.double()
    middle = x.mean(0)
    # Of two classes, theirs has one vector of weights, w: of ours, -w / 2 and w / 2, the squares are half.
    theirs = LogisticRegression(
        C=c * (2 if n_classes == 2 else 1), tol=1e-10, max_iter=300, solver="newton-cholesky"
    )
    theirs.fit((x - middle).numpy(), y.numpy())
    weight, bias = torch.from_numpy(theirs.coef_.T), torch.from_numpy(theirs.intercept_)
    if n_classes == 2:
        weight, bias = torch.cat([-weight, weight], 1) / 2, torch.cat([-bias, bias]) / 2
    best = objective(weight, bias, x - middle, y, c)
    found = objective(head.weight, head.bias, x, y, c)
    assert found <= best * (1 + 1e-4) or caplog.records


@needs_newton_of_all_classes
def test_a_large_penalty_of_a_small_loss_is_fitted_to_the_end(caplog):
    """Where slopes are small long before the objective is at its minimum."""
    x, y = data()
    x[:, 6:] = x[:, :6] + 1e-3 * x[:, 6:]
    head = fit_logistic(x * 100, y, 4, inverse_penalty=1e4)
    theirs = LogisticRegression(C=1e4, tol=1e-12, max_iter=10_000, solver="newton-cholesky")
    theirs.fit((x * 100).double().numpy(), y.numpy())
    best = objective(torch.from_numpy(theirs.coef_.T), torch.from_numpy(theirs.intercept_), x * 100, y, 1e4)
    assert objective(head.weight, head.bias, x * 100, y, 1e4) == pytest.approx(best, rel=1e-4)
    assert not caplog.records


def test_logistic_regression_says_that_it_has_not_converged(caplog):
    x, y = data()
    fit_logistic(x, y, 4, inverse_penalty=100.0, max_iter=3)
    assert "has not converged" in caplog.text
    assert "max_iter=3" in caplog.text
