"""k-NN against brute force and scikit-learn; the callback: what it measures and what it leaves alone."""

import json
import logging

import lightning as L
import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_modules import SimCLR
from lightning_modules.evaluation.knn import knn
from lightning_modules.evaluation.online import OnlineKNN, embed_share, evaluation_mode
from tests.lightning_modules.ranks import on_two_ranks


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


def test_ranks_join_to_the_same_result(features):
    train, train_labels, test, test_labels = features

    def share(rank):
        mine, tested = (slice(0, 40), slice(40, None))[rank], (slice(0, 90), slice(90, None))[rank]
        return knn(
            train[mine], train_labels[mine], test[tested], test_labels[tested], k=(5, 100), block_size=32
        ).accuracy

    expected = knn(*features, k=(5, 100)).accuracy
    assert on_two_ranks(share) == [pytest.approx(expected)] * 2


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
        ({"test_features": np.zeros((100, 3), np.float32)}, "8 dimensions, test features 3"),
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


def fit(callbacks: list[L.Callback], **options) -> tuple[SimCLR, L.Trainer]:
    module = small_module()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    torch.manual_seed(1)
    trainer.fit(module, DataLoader(TwoViews(16), batch_size=8, shuffle=True))
    return module, trainer


def test_the_callback_changes_nothing_of_the_training():
    probe = OnlineKNN(Labelled(40), Labelled(13), k=[1, 5])
    probed, trainer = fit([probe])
    plain, _ = fit([])
    for (name, x), (_, y) in zip(probed.state_dict().items(), plain.state_dict().items()):
        assert torch.equal(x, y), name
    assert [row["epoch"] for row in probe.history] == [1, 2]
    with evaluation_mode(probed):
        sets = [embed_share(probed, Labelled(n)) for n in (40, 13)]
    expected = knn(*sets[0], *sets[1], k=(1, 5))
    assert float(trainer.callback_metrics["knn/5"]) == pytest.approx(expected.accuracy[5])
    assert float(trainer.callback_metrics["knn/class_average_1"]) == pytest.approx(expected.class_accuracy[1])


def test_a_failing_probe_is_logged_and_the_run_goes_on(caplog):
    with caplog.at_level(logging.WARNING):
        _, trainer = fit(
            [OnlineKNN(Labelled(40), Labelled(13, broken=True)), OnlineKNN(Labelled(4), Labelled(4), k=9)]
        )
    assert trainer.global_step == 4
    assert "OSError: a disk gone" in caplog.text
    assert "k must lie in 1..4" in caplog.text


def _probe_on_a_rank(rank: int) -> dict:
    module = small_module().eval()
    loader = DataLoader(Labelled(13), batch_size=4)
    probe = OnlineKNN(Labelled(41), loader, k=5)
    broken = OnlineKNN(Labelled(41, broken=rank == 1), loader, k=5)
    return {"scores": probe._probe(_Trainer(), module), "broken": broken._probe(_Trainer(), module)}


class _Trainer:
    """What the probe asks of a Trainer."""

    precision_plugin = L.pytorch.plugins.precision.Precision()


def test_ranks_share_the_probe_and_skip_it_together():
    module = small_module()
    with evaluation_mode(module):
        sets = [embed_share(module, Labelled(n)) for n in (41, 13)]
    expected = knn(*sets[0], *sets[1], k=5)
    for result in on_two_ranks(_probe_on_a_rank):
        assert result["scores"]["knn/5"] == pytest.approx(expected.accuracy[5])
        assert result["broken"] is None


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
