"""The exact search of a bank against faiss, from memory and from disk, on one and on two processes."""

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_modules.evaluation import nearest
from lightning_modules.evaluation.knn import knn
from lightning_modules.evaluation.retrieval import retrieval
from tests.support.ranks import on_two_ranks


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(nearest, "TILE_NUMBERS", 64 * 24)
    monkeypatch.setattr(nearest, "_TILE_ROWS", 1)
    monkeypatch.setattr(nearest, "SCORES", 7 * 64)


@pytest.mark.parametrize(("n", "k"), [(1000, 1), (1000, 17), (1000, 100), (50, 80), (64, 64), (129, 5)])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_top_rows_are_those_of_faiss(n, k, metric):
    generator = torch.Generator().manual_seed(n + k)
    bank, queries = (torch.randn(count, 24, generator=generator) for count in (n, 30))
    kind = faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2
    if metric == "cosine":
        queries = F.normalize(queries, dim=1)
    stored = F.normalize(bank, dim=1) if metric == "cosine" else bank
    want, rows = faiss.knn(queries.numpy(), stored.numpy(), min(k, n), metric=kind)
    found, found_rows = nearest.top_rows(queries, bank, k, metric=metric)
    want = want if metric == "cosine" else -np.sqrt(want)
    np.testing.assert_allclose(found.numpy(), want, atol=2e-5)
    assert (found_rows.numpy() == rows).mean() > 0.999


@pytest.mark.parametrize(("tile", "k"), [(1, 5), (512, 5), (512, 700), (1000, 40), (4096, 200)])
def test_tiles_of_all_sizes(monkeypatch, tile, k):
    """More and fewer rows than k in a tile; a shorter last one."""
    monkeypatch.setattr(nearest, "TILE_NUMBERS", 16 * tile)
    generator = torch.Generator().manual_seed(tile)
    bank, queries = (F.normalize(torch.randn(n, 16, generator=generator), dim=1) for n in (9001, 20))
    want, rows = faiss.knn(queries.numpy(), bank.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    found, found_rows = nearest.top_rows(queries, 3 * bank, k)
    np.testing.assert_allclose(found.numpy(), want, atol=1e-6)
    assert (found_rows.numpy() == rows).mean() > 0.999


def test_norms_beyond_the_range_of_their_squares():
    bank = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    spread = bank * torch.logspace(-10, 25, 300)[:, None]
    for want, found in zip(nearest.top_rows(bank[:9], bank, 7), nearest.top_rows(bank[:9], spread, 7)):
        torch.testing.assert_close(found, want)


def test_queries_of_such_norms():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 6, (300,), generator=generator)
    x = F.one_hot(labels, 8) + 0.5 * torch.randn(300, 8, generator=generator)
    bank, queries, spread = x[:200], x[200:], x[200:] * torch.logspace(-10, 35, 100)[:, None]
    want, found = (knn(bank, labels[:200], each, labels[200:], k=5) for each in (queries, spread))
    assert found == want
    truth = {"query_labels": labels[200:], "gallery_labels": labels[:200]}
    want, found = (retrieval(each, bank, **truth, k=5).scores["5"] for each in (queries, spread))
    assert found == pytest.approx(want)


def test_no_queries_or_no_bank():
    bank = torch.eye(5)
    for m, n in ((0, 5), (2, 0), (0, 0)):
        values, rows = nearest.top_rows(bank[:m], bank[:n], 3)
        assert values.shape == rows.shape == (m, min(3, n))


def test_equal_rows_are_all_found():
    bank = torch.eye(4).repeat(100, 1)
    values, rows = nearest.top_rows(torch.eye(4), bank, 100)
    assert (values == 1).all()
    for i in range(4):
        assert sorted(rows[i].tolist()) == list(range(i, 400, 4))


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("bank") / "bank.npy"
    labels = rng.integers(0, 6, 700)
    rows = rng.normal(size=(6, 16))[labels] + rng.normal(size=(700, 16))
    np.save(path, rows.astype(np.float16))
    return path, labels


def _share(rank, path, labels, spoilt):
    """k-NN of a bank that is a memory map, of which a rank has a part; rank None is the only process."""
    bank = np.load(path, mmap_mode="r")
    mine = {0: slice(100, 250), 1: slice(250, 700), None: slice(100, 700)}[rank]
    tested = {0: slice(0, 70), 1: slice(70, 100), None: slice(0, 100)}[rank]
    if spoilt and rank == 1:
        bank = np.array(bank)
        bank[300] = np.nan
    try:
        found = knn(bank[mine], labels[mine], bank[tested], labels[tested], k=(1, 20), block_size=32)
    except ValueError as error:
        return str(error)
    return [found.accuracy, found.correct[20]]


def test_a_bank_on_disk_in_shares(on_disk):
    path, labels = on_disk
    whole, bank = _share(None, path, labels, False), np.load(path)
    in_memory = knn(bank[100:], labels[100:], bank[:100], labels[:100], k=(1, 20))
    assert whole[0] == in_memory.accuracy
    ranks = on_two_ranks(_share, path, labels, False)
    for accuracy, _ in ranks:
        assert accuracy == pytest.approx(whole[0])
    np.testing.assert_array_equal(np.concatenate([correct for _, correct in ranks]), in_memory.correct[20])


def test_rows_that_are_not_finite_end_it_on_every_rank(on_disk):
    for message in on_two_ranks(_share, *on_disk, True):
        assert "rows of features are not finite" in message
