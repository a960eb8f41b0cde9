"""k-NN against brute force and scikit-learn; the callback: what it measures and what it leaves alone."""

import json
import logging
import random

import lightning as L
import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_modules import SimCLR
from lightning_modules.evaluation.knn import knn
from lightning_modules.evaluation.linear import LinearSettings, linear
from lightning_modules.evaluation.online import OnlineKNN, OnlineLinear, embed_share, evaluation_mode
from tests.support.ranks import on_two_ranks
from tests.support.trainers import quiet_trainer


@pytest.fixture(scope="module")
def features() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(5, 8))
    labels = rng.integers(0, 5, 330)
    x = (centers[labels] + 1.5 * rng.normal(size=(330, 8))).astype(np.float32)
    return x[:230], labels[:230], x[230:], labels[230:]


def brute_force(train, train_labels, test, k, temperature):
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    predictions = []
    for row in test:
        similarity = train @ (row / np.linalg.norm(row))
        votes = np.zeros(train_labels.max() + 1)
        for i in np.argsort(-similarity)[:k]:
            votes[train_labels[i]] += np.exp(similarity[i] / temperature)
        predictions.append(votes.argmax())
    return np.array(predictions)


def test_knn_is_brute_force_and_scikit_learn(features):
    train, train_labels, test, test_labels = features
    result = knn(*features, k=(1, 7, 50), block_size=13)
    for k in (1, 7, 50):
        predicted = brute_force(train, train_labels, test, k, 0.07)
        assert result.accuracy[k] == pytest.approx((predicted == test_labels).mean())
        each = [(predicted == test_labels)[test_labels == c].mean() for c in range(5)]
        assert list(result.per_class[k].values()) == pytest.approx(each)
        assert result.class_accuracy[k] == pytest.approx(np.mean(each))
        theirs = KNeighborsClassifier(
            k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
        ).fit(train, train_labels)
        assert result.accuracy[k] == pytest.approx(theirs.score(test, test_labels), abs=1e-6)
    euclidean = knn(*features, k=15, metric="euclidean")
    theirs = KNeighborsClassifier(15).fit(train, train_labels).score(test, test_labels)
    assert euclidean.accuracy[15] == pytest.approx(theirs, abs=0.011)  # one sample: ties are broken otherwise


@pytest.mark.parametrize("temperature", [0.005, 0.0005, 1e-30])
def test_a_low_temperature_of_far_neighbours(temperature):
    """Neighbours at cosines of about 0.2, whose exp((s - 1) / temperature) are 0 in float32."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 1200)
    x = 0.12 * rng.normal(size=(10, 384))[labels] + rng.normal(size=(1200, 384))
    train, test = x[:1000] / np.linalg.norm(x[:1000], axis=1, keepdims=True), x[1000:]
    similarity = test / np.linalg.norm(test, axis=1, keepdims=True) @ train.T
    nearest = np.argsort(-similarity)[:, :20]
    near = np.take_along_axis(similarity, nearest, 1)
    weights = np.exp((near - near[:, :1]) / temperature)
    votes = np.stack([(weights * (labels[nearest] == c)).sum(1) for c in range(10)], 1)
    result = knn(x[:1000], labels[:1000], test, labels[1000:], k=20, temperature=temperature)
    assert near.max() < 0.5
    np.testing.assert_array_equal(result.correct[20], votes.argmax(1) == labels[1000:])


IDS = np.array([3, 47_115, 1_462_345, 15_300_000, 2**40])  # as taxa and WordNet offsets are numbered


@pytest.mark.parametrize("ids", [np.arange(5), IDS])
def test_labels_of_any_size(features, ids):
    """The largest class occurs in the test set alone and is always wrong, on one process and on two."""
    train, train_labels, test, test_labels = features
    known = train_labels < 4
    train, train_labels = train[known], train_labels[known]
    predicted = brute_force(train, train_labels, test, 7, 0.07)

    def share(rank):  # the first has no test sample of the last two classes, the second no other
        mine = slice(0, 40) if rank == 0 else slice(40, None)
        tested = (test_labels < 3) == (rank == 0)
        found = knn(train[mine], ids[train_labels[mine]], test[tested], ids[test_labels[tested]], k=7)
        return [found.accuracy, found.per_class]

    whole = knn(train, ids[train_labels], test, ids[test_labels], k=7)
    each = {int(ids[c]): (predicted == c)[test_labels == c].mean() for c in range(5)}
    assert each[int(ids[4])] == 0
    for accuracy, per_class in [[whole.accuracy, whole.per_class], *on_two_ranks(share)]:
        assert accuracy[7] == pytest.approx((predicted == test_labels).mean())
        assert per_class[7] == pytest.approx(each)


def test_ranks_join_to_the_same_result(features):
    train, train_labels, test, test_labels = features

    def share(rank):
        mine, tested = (slice(0, 40), slice(40, None))[rank], (slice(0, 90), slice(90, None))[rank]
        return knn(
            train[mine], train_labels[mine], test[tested], test_labels[tested], k=(5, 100), block_size=32
        ).accuracy

    expected = knn(*features, k=(5, 100)).accuracy
    assert on_two_ranks(share) == [pytest.approx(expected)] * 2


def test_k_of_any_integer_type_and_features_with_gradients(features):
    want = knn(*features, k=[5, 20])
    assert knn(*features, k=np.array([20, 5])).accuracy == want.accuracy
    assert knn(*features, k=np.int64(5)).accuracy == {5: want.accuracy[5]}
    train, labels, test, truth = features
    learnt = (torch.tensor(np.asarray(x), requires_grad=True) for x in (train, test))
    train, test = learnt
    assert knn(train, labels, test, truth, k=[5, 20]).accuracy == want.accuracy
    with pytest.raises(TypeError, match="integer"):
        knn(*features, k=2.5)


def test_result_files(features, tmp_path):
    result = knn(*features, k=(5, 10))
    assert len(result.table().splitlines()) == 4
    result.to_json(tmp_path / "knn.json")
    assert json.loads((tmp_path / "knn.json").read_text())["accuracy"]["5"] == result.accuracy[5]
    result.to_csv(tmp_path / "knn.csv")
    assert len((tmp_path / "knn.csv").read_text().splitlines()) == 3
    assert result.best == max(result.accuracy.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 231}, r"1\.\.230"),
        ({"k": 0}, r"1\.\.230"),
        ({"test_features": np.zeros((100, 3), np.float32)}, "8 .*3"),
        ({"train_features": np.full((230, 8), np.nan)}, "not finite"),
        ({"test_labels": np.full(100, -1)}, ">= 0"),
        ({"train_labels": np.zeros(3, int)}, "230 labels"),
        ({"metric": "hamming"}, "hamming"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_input(features, change, message):
    names = ("train_features", "train_labels", "test_features", "test_labels")
    arguments = dict(zip(names, features)) | change
    with pytest.raises(ValueError, match=message):
        knn(**{"k": 5} | arguments)


class Labelled(Dataset):
    """Noisy images whose class is their colour."""

    def __init__(self, n: int, *, broken: bool = False) -> None:
        generator = torch.Generator().manual_seed(n)
        self.labels = torch.arange(n) % 3
        self.images = torch.randn(n, 3, 16, 16, generator=generator)
        self.images[torch.arange(n), self.labels] += 1.0
        self.broken = broken

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict:
        if self.broken:
            raise OSError("a disk gone")
        return {"image": self.images[i], "label": self.labels[i]}


class TwoViews(Labelled):
    def __getitem__(self, i: int) -> dict:
        image = self.images[i]
        return {"views": [image + 0.1 * torch.randn(image.shape), image], "sample_id": i}


def small_module() -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(
        "resnet10",
        image_size=16,
        small_images=True,
        backbone_options={"width": 4},
        frozen_blocks=1,
        optimizer="sgd",
        learning_rate=0.1,
    )


def fit(callbacks: list[L.Callback], data: Dataset | None = None, **options) -> tuple[SimCLR, L.Trainer]:
    module = small_module()
    trainer = quiet_trainer(**{"max_epochs": 2, **options}, callbacks=callbacks)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    trainer.fit(module, DataLoader(data or TwoViews(16), batch_size=8, shuffle=True))
    return module, trainer


class RecordedOrder(TwoViews):
    """Notes which samples are asked for, and what the random generators were at each."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.asked: list[tuple] = []

    def __getitem__(self, i: int) -> dict:
        self.asked.append((i, random.random(), np.random.random(), float(torch.rand(()))))  # noqa: NPY002
        return super().__getitem__(i)


class Drawing(Labelled):
    """A labelled set that draws random numbers of every kind, as one with augmentations would."""

    def __getitem__(self, i: int) -> dict:
        random.random(), np.random.random(), torch.rand(3)  # noqa: NPY002
        return super().__getitem__(i)


def test_the_callbacks_change_nothing_of_the_training():
    settings = LinearSettings(n_iter=20, learning_rates=(0.1, 1.0))
    probes = [OnlineKNN(Drawing(40), Drawing(13), k=[1, 5]),
              OnlineLinear(Drawing(40), Drawing(13), settings=settings)]  # fmt: skip
    orders = [RecordedOrder(16) for _ in range(2)]
    probed, trainer = fit(probes, data=orders[0])
    plain, _ = fit([], data=orders[1])
    for (name, x), (_, y) in zip(probed.state_dict().items(), plain.state_dict().items()):
        assert torch.equal(x, y), name
    assert orders[0].asked == orders[1].asked
    assert len(orders[0].asked) == 32
    assert [[row["epoch"] for row in probe.history] for probe in probes] == [[1, 2]] * 2
    with evaluation_mode(probed):
        sets = [embed_share(probed, Labelled(n)) for n in (40, 13)]
    expected = knn(*sets[0], *sets[1], k=(1, 5))
    assert float(trainer.callback_metrics["knn/5"]) == pytest.approx(expected.accuracy[5])
    assert float(trainer.callback_metrics["knn/class_average_1"]) == pytest.approx(expected.class_accuracy[1])
    head = linear(*sets[0], *sets[1], settings=settings).heads[0]
    for name in ("accuracy", "class_average", "held_out"):
        assert float(trainer.callback_metrics[f"linear/{name}"]) == pytest.approx(head[name])


def test_a_failing_probe_is_logged_and_the_run_goes_on(caplog):
    with caplog.at_level(logging.WARNING):
        _, trainer = fit(
            [OnlineKNN(Labelled(40), Labelled(13, broken=True)), OnlineKNN(Labelled(4), Labelled(4), k=9)]
        )
    assert trainer.global_step == 4
    assert "OSError: a disk gone" in caplog.text
    assert "k must lie in 1..4" in caplog.text


QUICK = LinearSettings(n_iter=20, learning_rates=(0.1, 1.0))


def _probe_on_a_rank(rank: int) -> dict:
    module = small_module().eval()
    loader = DataLoader(Labelled(13), batch_size=4)
    probe = OnlineKNN(Labelled(41), loader, k=5)
    broken = OnlineKNN(Labelled(41, broken=rank == 1), loader, k=5)
    head = OnlineLinear(Labelled(41), loader, settings=QUICK)
    return {
        "scores": probe._probe(_Trainer(), module),
        "linear": head._probe(_Trainer(), module),
        "broken": broken._probe(_Trainer(), module),
    }


class _Trainer:
    """What the probe asks of a Trainer."""

    precision_plugin = L.pytorch.plugins.precision.Precision()


def _every_second(labelled: tuple, rank: int) -> tuple:
    return labelled[0][rank::2], labelled[1][rank::2]


def test_ranks_share_the_probe_and_skip_it_together():
    module = small_module()
    with evaluation_mode(module):
        sets = [embed_share(module, Labelled(n)) for n in (41, 13)]
    expected = knn(*sets[0], *sets[1], k=5)
    embedded = [[_every_second(s, r) for s in sets] for r in range(2)]
    results = on_two_ranks(_probe_on_a_rank)
    for result in results:
        assert result["scores"]["knn/5"] == pytest.approx(expected.accuracy[5])
        assert result["broken"] is None
        # The ranks' shares joined are the set in another order, so heads differ from one process's; ranks
        # agree.
        assert result["linear"] == results[0]["linear"]
    joined = [
        tuple(torch.cat([embedded[rank][part][j] for rank in range(2)]) for j in range(2))
        for part in range(2)
    ]
    head = linear(*joined[0], *joined[1], settings=QUICK).heads[0]
    for name in ("accuracy", "class_average", "held_out"):
        assert results[0]["linear"][f"linear/{name}"] == pytest.approx(head[name])


class Counted(L.LightningModule):
    """Embeds by a collective, as a sharded module does."""

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(torch.zeros(1))
        return images.flatten(1)


def _embed_by_collectives(rank: int) -> tuple:
    return embed_share(Counted(), Labelled(9), batch_size=4)


def test_ranks_embed_as_many_batches():
    images = torch.stack([Labelled(9)[i]["image"] for i in range(9)]).flatten(1)
    labels = torch.tensor([int(Labelled(9)[i]["label"]) for i in range(9)])
    for rank, (features, found) in enumerate(on_two_ranks(_embed_by_collectives)):  # two batches, and one
        np.testing.assert_array_equal(features, images[rank::2])
        np.testing.assert_array_equal(found, labels[rank::2])


def test_probes_follow_the_trainers_precision_and_see_the_last_step():
    probe = OnlineKNN(Labelled(40), Labelled(13), k=5, every_n_epochs=9)
    fit([probe], precision="bf16-true", max_steps=1)
    assert [row["epoch"] for row in probe.history] == [1]


class Flat(L.LightningModule):
    """A module that does not say how long its features are."""

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def _fewer_samples_than_ranks(rank: int) -> dict:
    probe = OnlineKNN(Labelled(41), Labelled(1), k=5)
    return probe._probe(_Trainer(), Flat())


def test_a_rank_without_a_sample_takes_part():
    module = Flat()
    expected = knn(*(part for n in (41, 1) for part in embed_share(module, Labelled(n))), k=5)
    for scores in on_two_ranks(_fewer_samples_than_ranks):
        assert scores["knn/5"] == expected.accuracy[5]


def test_sets_of_pairs_and_unlabelled_samples():
    module = small_module().eval()
    images, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, -1, 1, 2, -1, 0])
    found = embed_share(module, TensorDataset(images, labels), batch_size=4)
    assert found[1].tolist() == [0, 1, 2, 0]
    assert found[0].shape == (4, module.embedding_dimension)
    with pytest.raises(TypeError, match="map-style"):
        embed_share(module, iter([]))
    with pytest.raises(TypeError, match="'image' and 'label'"):
        embed_share(module, TwoViews(4))
    with pytest.raises(TypeError, match=r"embed\(images\).*LightningModule"):
        embed_share(L.LightningModule(), Labelled(4))
