"""Retrieval against torchmetrics on labels, and the Oxford protocol on cases worked by hand."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.retrieval import (
    retrieval_average_precision,
    retrieval_hit_rate,
    retrieval_recall,
)

from lightning_modules.evaluation.retrieval import retrieval, trapezoid_average_precision
from tests.support.ranks import on_two_ranks

METRICS = {"map": retrieval_average_precision, "recall": retrieval_recall, "hit_rate": retrieval_hit_rate}


def data(n: int = 40, m: int = 60) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (n + m,), generator=generator)
    features = F.one_hot(labels, 5) + 0.8 * torch.randn(n + m, 5, generator=generator)
    return features[:n], labels[:n], features[n:], labels[n:]


def test_by_label_is_torchmetrics():
    q, ql, g, gl = data()
    result = retrieval(q, g, query_labels=ql, gallery_labels=gl, k=(1, 5, 20, 60), block_size=7)
    similarity = (
        2 + F.normalize(q, dim=1) @ F.normalize(g, dim=1).T
    )  # torchmetrics takes scores <= 0 for wrong
    for k in (1, 5, 20, 60):
        right = ql[:, None] == gl[None]
        for name, metric in METRICS.items():
            want = np.mean([float(metric(s, r, top_k=k)) for s, r in zip(similarity, right)])
            assert result.scores[str(k)][name] == pytest.approx(want, abs=1e-6), (k, name)


def test_labels_of_any_size():
    q, ql, g, gl = data()
    ids = torch.tensor([7, 47_115, 1_462_345, 15_300_000, 2**40])
    want = retrieval(q, g, query_labels=ql, gallery_labels=gl, k=5)
    assert retrieval(q, g, query_labels=ids[ql], gallery_labels=ids[gl], k=5) == want


def test_leaving_oneself_out():
    q, ql, *_ = data()
    ql = torch.cat([ql[:-1], torch.tensor([9])])  # the last has nobody of its label
    result = retrieval(q, q, query_labels=ql, gallery_labels=ql, k=(5,), leave_one_out=True)
    similarity = 2 + F.normalize(q, dim=1) @ F.normalize(q, dim=1).T
    wanted = []
    for i in range(len(q) - 1):
        others = torch.arange(len(q)) != i
        right = (ql == ql[i])[others]
        wanted.append(float(retrieval_average_precision(similarity[i][others], right, top_k=5)))
    assert result.scores["5"]["map"] == pytest.approx(np.mean(wanted), abs=1e-6)
    assert result.n_without == {"5": 1}


def test_ties_go_by_place():
    q, g = torch.tensor([[1.0, 0]]), torch.tensor([[1.0, 0]] * 10)
    labels = torch.tensor([1, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    result = retrieval(q, g, query_labels=torch.tensor([1]), gallery_labels=labels, k=(2,))
    assert result.scores["2"]["recall"] == 1


def test_oxford_protocol_by_hand():
    """A gallery ranked 0, 1, 2, ...; the figures follow from the definition with a pencil."""
    angles = torch.arange(6) * 0.1
    gallery = torch.stack([angles.cos(), angles.sin()], 1)
    query = torch.tensor([[1.0, 0.0]])
    truth = [{"easy": [1], "hard": [3], "junk": [0]}]
    result = retrieval(query, gallery, ground_truth=truth, k=(1, 2))
    # Easy: 0 is junk, 3 is passed over: right at rank 0, AP 1. Medium: ranks of 1 and 3 among 1, 2, 3, 4, 5:
    # 0 and 2. Hard: 0 and 1 passed over: 3 at rank 1 among 2, 3, 4, 5: (0 / 1 + 1 / 2) / 2.
    assert result.scores["easy"]["map"] == pytest.approx(1)
    assert result.scores["medium"]["map"] == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert result.scores["hard"]["map"] == pytest.approx(0.25)
    assert result.scores["medium"]["precision@1"] == 1
    assert result.scores["medium"]["precision@2"] == 0.5
    # Precision at k stops at the last match: for "easy" k = 2 sees one place, and it is right.
    assert result.scores["easy"]["precision@2"] == 1
    assert trapezoid_average_precision(np.array([0, 1, 2])) == 1


def test_queries_with_nothing_to_find_are_counted():
    gallery = torch.eye(3)
    truth = [{"easy": [0]}, {"hard": [1]}]
    result = retrieval(torch.eye(3)[:2], gallery, ground_truth=truth, k=(1,))
    assert result.n_queries == {"easy": 1, "medium": 2, "hard": 1}
    assert result.n_without == {"easy": 1, "medium": 0, "hard": 1}


def _share(rank, q, ql, g, gl):
    q, ql, g, gl = map(torch.from_numpy, (q, ql, g, gl))
    a = slice(None) if rank is None else slice(0, 11) if rank == 0 else slice(11, None)
    b = slice(None) if rank is None else slice(0, 45) if rank == 0 else slice(45, None)
    labels = retrieval(q[a], g[b], query_labels=ql[a], gallery_labels=gl[b], k=(1, 20, 50), block_size=8)
    same = retrieval(
        q[a], q[a], query_labels=ql[a], gallery_labels=ql[a], k=(5,), leave_one_out=True, block_size=8
    )
    truth = [{"easy": [i % 60], "hard": [(i + 7) % 60]} for i in range(len(ql))][a]
    instances = retrieval(q[a], g[b], ground_truth=truth, k=(5,))
    return [value for r in (labels, same, instances) for row in r.scores.values() for value in row.values()]


def test_two_ranks_get_the_result_of_one():
    parts = [part.numpy() for part in data()]
    want = _share(None, *parts)
    for got in on_two_ranks(_share, *parts):
        assert got == pytest.approx(want, abs=1e-9)


def test_a_gallery_on_disk_is_read_tile_by_tile(tmp_path, monkeypatch):
    q, ql, g, gl = (part.numpy() for part in data())
    want = _share(None, q, ql, g, gl)
    np.save(tmp_path / "gallery.npy", g.astype(np.float64))
    gallery = Sliced(np.load(tmp_path / "gallery.npy", mmap_mode="r"))
    monkeypatch.setattr(sys.modules[retrieval.__module__], "TILE_NUMBERS", 7 * g.shape[1])
    labels = retrieval(q, gallery, query_labels=ql, gallery_labels=gl, k=(1, 20, 50), block_size=8)
    same = retrieval(q, q, query_labels=ql, gallery_labels=ql, k=(5,), leave_one_out=True, block_size=8)
    truth = [{"easy": [i % 60], "hard": [(i + 7) % 60]} for i in range(len(ql))]
    instances = retrieval(q, gallery, ground_truth=truth, k=(5,))
    got = [value for r in (labels, same, instances) for row in r.scores.values() for value in row.values()]
    assert got == pytest.approx(want, abs=1e-9)
    assert max(gallery.lengths) == 7
    test_ties_go_by_place()


class Sliced:
    """Rows that can only be had by slice; keeps how many were asked for at a time."""

    def __init__(self, array):
        self.array, self.shape, self.lengths = array, array.shape, []

    def __getitem__(self, rows):
        self.lengths.append(rows.stop - rows.start)
        return self.array[rows]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (61,)}, "1..60"),
        ({"k": 61}, "1..60"),
        ({"k": (0,)}, "1..60"),
        ({"query_labels": None}, "query_labels.*gallery_labels.*ground_truth"),
        ({"gallery_features": torch.zeros(60, 3)}, "dimensions"),
        ({"query_labels": torch.full((40,), 7)}, "no query"),
        ({"leave_one_out": True}, "leave_one_out"),
        ({"gallery_labels": None, "query_labels": None, "ground_truth": [{"easy": [60]}] * 40}, "place 60"),
        ({"gallery_labels": None, "query_labels": None, "ground_truth": [{}] * 40}, "no query"),
        ({"gallery_labels": None, "query_labels": None, "ground_truth": [{}]}, "40 queries"),
    ],
)
def test_bad_input_is_named(change, message):
    q, ql, g, gl = data()
    arguments = {"query_features": q, "gallery_features": g, "query_labels": ql, "gallery_labels": gl}
    with pytest.raises(ValueError, match=message):
        retrieval(**(arguments | change))
