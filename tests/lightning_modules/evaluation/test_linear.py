"""Linear probes against scikit-learn and a plain torch loop; what is fitted never depends on test labels."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression

from lightning_modules.evaluation.linear import LinearSettings, first_of_each, fit_logistic, linear
from tests.support.ranks import on_two_ranks

QUICK = LinearSettings(
    n_iter=60, learning_rates=(0.01, 0.1, 1.0), batch_size=32, inverse_penalties=(0.01, 1.0)
)


def data(n: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = make_classification(
        n, 12, n_informative=6, n_classes=4, n_clusters_per_class=1, class_sep=1.5, random_state=seed
    )
    return torch.from_numpy(x).float(), torch.from_numpy(y)


@pytest.mark.parametrize(("c", "block", "copy"), [(0.01, 2**25, 2**30), (1.0, 300, 0), (100.0, 300, 2**30)])
def test_logistic_regression_is_scikit_learns(c, block, copy, monkeypatch):
    """Also in blocks of 25 samples, and without a copy in float64."""
    module = sys.modules[fit_logistic.__module__]
    monkeypatch.setattr(module, "_LOGISTIC_BLOCK", block)
    monkeypatch.setattr(module, "_LOGISTIC_COPY", copy)
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


def test_the_grid_is_each_head_trained_alone():
    """The joint training against torch's own SGD, one head at a time, on the same batches."""
    x, y = data()
    result = linear(x[:300], y[:300], x[300:], y[300:], settings=QUICK)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    held_out = torch.zeros(300, dtype=torch.bool)
    held_out[order[:30]] = True
    train_x, train_y = x[:300][~held_out], y[:300][~held_out]
    for rate in QUICK.learning_rates:
        layer = torch.nn.Linear(12, 4)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate * 32 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, QUICK.n_iter)
        generator = torch.Generator().manual_seed(0)
        left = torch.empty(0, dtype=torch.int64)
        for _ in range(QUICK.n_iter):
            while len(left) < 32:
                left = torch.cat([left, torch.randperm(270, generator=generator)])
            rows, left = left[:32], left[32:]
            optimizer.zero_grad()
            F.cross_entropy(layer(train_x[rows]), train_y[rows]).backward()
            optimizer.step()
            schedule.step()
        right = (layer(x[:300][held_out]).argmax(1) == y[:300][held_out]).float().mean()
        assert result.grid[f"sgd/features/{rate:g}"] == pytest.approx(float(right))


def test_the_best_features_and_rate_are_chosen_on_train():
    x, y = data()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    settings = dataclasses.replace(
        QUICK, protocols=("sgd", "logistic", "few_shot"), shots=(2, 500), n_draws=3
    )
    result = linear(
        {"noise": noise[:300], "good": x[:300]}, y[:300], {"noise": noise[300:], "good": x[300:]}, y[300:],
        settings=settings, train_counts=torch.bincount(y[:300]),
    )  # fmt: skip
    chosen = {head["protocol"]: head for head in result.heads if head["features"] == "good"}
    assert set(chosen) == {"sgd", "logistic", "2-shot", "500-shot"}
    assert chosen["logistic"]["accuracy"] > 0.7
    assert chosen["2-shot"]["accuracy_deviation"] > 0
    # With more shots than samples every draw is all of train.
    assert chosen["500-shot"]["accuracy_deviation"] == 0
    assert chosen["500-shot"]["accuracy"] > chosen["2-shot"]["accuracy"]
    full = LogisticRegression(C=1.0, max_iter=2000).fit(x[:300].numpy(), y[:300].numpy())
    assert chosen["500-shot"]["accuracy"] == pytest.approx(
        full.score(x[300:].numpy(), y[300:].numpy()), abs=0.02
    )
    assert {"head", "medium", "tail"} <= set(chosen["sgd"])
    assert "logistic" in result.table()


def test_few_shots_are_the_first_of_each_class():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([7, 0, 3])[torch.randint(0, 3, (60,), generator=generator)]
    labels[5] = 5  # a class with fewer
    order = torch.randperm(60, generator=generator)
    found = first_of_each(order, labels, 4)
    expected = [[row for row in order.tolist() if labels[row] == c][:4] for c in (0, 3, 5, 7)]
    assert found.tolist() == [row for rows in expected for row in rows]


def test_random_labels_give_chance():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 8, generator=generator)
    y = torch.randint(0, 4, (2000,), generator=generator)
    result = linear(
        x[:1000], y[:1000], x[1000:], y[1000:], settings=dataclasses.replace(QUICK, protocols=("logistic",))
    )
    assert result.accuracy == pytest.approx(0.25, abs=0.05)


def test_no_fit_depends_on_test_labels():
    """A leak would show: with other test labels every fitted figure must stay the same."""
    x, y = data()
    settings = dataclasses.replace(QUICK, protocols=("sgd", "logistic"))
    honest = linear(x[:300], y[:300], x[300:], y[300:], settings=settings)
    turned = linear(x[:300], y[:300], x[300:], 3 - y[300:], settings=settings)
    assert honest.grid == turned.grid
    assert [h["setting"] for h in honest.heads] == [h["setting"] for h in turned.heads]
    # And if train features were to hold the test answer, a probe would find it: the planted leak.
    leaked = torch.cat([x, F.one_hot(y, 4) * 10.0], 1)
    found = linear(leaked[:300], y[:300], leaked[300:], y[300:], settings=settings)
    assert found.accuracy > max(0.99, honest.accuracy)


def _share(rank, x, y):
    train = slice(0, 90) if rank == 0 else slice(90, 300)
    test = slice(300, 360) if rank == 0 else slice(360, 400)
    settings = dataclasses.replace(QUICK, protocols=("sgd", "logistic", "few_shot"), shots=(3,), n_draws=2)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    if rank is None:
        train, test = slice(0, 300), slice(300, 400)
    result = linear(x[train], y[train], x[test], y[test], settings=settings)
    return [*result.grid.values(), *(head["accuracy"] for head in result.heads)]


@pytest.mark.long
def test_two_ranks_get_the_result_of_one():
    x, y = (part.numpy() for part in data())
    want = _share(None, x, y)
    for got in on_two_ranks(_share, x, y):
        assert got == pytest.approx(want, abs=1e-9)


def test_classes_missing_on_one_side():
    x, y = data()
    test = x[300:], y[300:]
    without = y[:300] != 3
    result = linear(x[:300][without], y[:300][without], *test, settings=QUICK)
    assert result.n_classes == 3
    assert result.accuracy <= float((test[1] != 3).float().mean())
    only = test[1] == 1
    one = linear(x[:300], y[:300], test[0][only], test[1][only], settings=QUICK)
    assert one.heads[0]["class_average"] == one.accuracy


def _share_of_ids(rank, x, y, ids):
    x, y, ids = map(torch.from_numpy, (x, y, ids))
    train, test = ((slice(0, 90), slice(300, 360)), (slice(90, 300), slice(360, 400)))[rank]
    settings = dataclasses.replace(QUICK, protocols=("sgd", "logistic", "few_shot"), shots=(3,), n_draws=2)
    known = y[train] != 3
    result = linear(x[train][known], ids[y[train][known]], x[test], ids[y[test]], settings=settings)
    return [*result.grid.values(), *(head["class_average"] for head in result.heads), result.n_classes]


@pytest.mark.long
def test_labels_of_any_size():
    """Ids in the millions are classes 0, 1, 2 and, in the test set alone, 3."""
    x, y = (part.numpy() for part in data())
    ids = np.array([7, 47_115, 1_462_345, 2**40])
    want = on_two_ranks(_share_of_ids, x, y, np.arange(4))
    assert on_two_ranks(_share_of_ids, x, y, ids) == want
    assert want[0][-1] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": torch.zeros(300, dtype=torch.int64)}, "one class only"),
        ({"train_labels": torch.zeros(299, dtype=torch.int64)}, "expected 300 labels"),
        ({"train_features": torch.full((300, 12), torch.nan)}, "not finite"),
        ({"test_features": torch.zeros(100, 5)}, "dimensions"),
        ({"test_features": torch.zeros(0, 12), "test_labels": torch.zeros(0, dtype=torch.int64)}, "samples"),
        ({"test_features": {"other": torch.zeros(100, 12)}}, "train has features"),
        ({"train_counts": torch.ones(2)}, "train_counts"),
    ],
)
def test_bad_input_is_named(change, message):
    x, y = data()
    arguments = {
        "train_features": x[:300],
        "train_labels": y[:300],
        "test_features": x[300:],
        "test_labels": y[300:],
    }
    with pytest.raises(ValueError, match=message):
        linear(**(arguments | change), settings=QUICK)


@pytest.mark.parametrize(
    "options", [{"protocols": ("x",)}, {"held_out": 1.0}, {"n_iter": 0}, {"learning_rates": ()}]
)
def test_bad_settings_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LinearSettings(**options)
