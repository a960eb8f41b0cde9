"""Linear probes against scikit-learn and a plain torch loop; what is fitted never depends on test labels."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression

from lightning_modules.evaluation.linear import LinearSettings, first_of_each, linear
from tests.support.ranks import on_two_ranks

QUICK = LinearSettings(
    n_iter=60, learning_rates=(0.01, 0.1, 1.0), batch_size=32, inverse_penalties=(0.01, 1.0)
)


def data(n: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = make_classification(
        n, 12, n_informative=6, n_classes=4, n_clusters_per_class=1, class_sep=1.5, random_state=seed
    )
    return torch.from_numpy(x).float(), torch.from_numpy(y)


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
        ({"train_labels": torch.zeros(299, dtype=torch.int64)}, "300 labels"),
        ({"train_features": torch.full((300, 12), torch.nan)}, "not finite"),
        ({"test_features": torch.zeros(100, 5)}, "dimensions"),
        ({"test_features": torch.zeros(0, 12), "test_labels": torch.zeros(0, dtype=torch.int64)}, " 0 test"),
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
