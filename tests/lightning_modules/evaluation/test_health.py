"""Effective rank, alignment and uniformity against closed forms and loops."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist

from lightning_modules.evaluation.health import health
from tests.support.ranks import on_two_ranks


def test_effective_rank_of_known_spectra():
    orthogonal = torch.linalg.qr(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))[0]
    assert health(orthogonal).effective_rank == pytest.approx(8, rel=1e-5)
    assert health(orthogonal[:, :1] * torch.ones(1, 8)).effective_rank == pytest.approx(1, abs=1e-3)
    singular = torch.tensor([4.0, 2, 1, 1, 0, 0, 0, 0])
    shares = (singular / singular.sum()).numpy()
    want = np.exp(-sum(p * np.log(p) for p in shares if p > 0))
    assert health(orthogonal * singular).effective_rank == pytest.approx(want, rel=1e-3)


def test_alignment_and_uniformity_are_their_definitions():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(70, 5)), generator.normal(size=(70, 5))
    result = health(x, y, block_size=32)
    unit_x, unit_y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    assert result.alignment == pytest.approx(((unit_x - unit_y) ** 2).sum(1).mean(), rel=1e-5)
    want = np.log(np.exp(-2 * pdist(unit_x) ** 2).mean())
    assert result.uniformity == pytest.approx(want, rel=1e-5)
    assert result.feature_deviation == pytest.approx(unit_x.std(0).mean() * np.sqrt(5), rel=1e-5)


def test_norms_beyond_the_range_of_their_squares():
    x = np.random.default_rng(0).normal(size=(70, 5))
    want, found = (health(z, z[::-1].copy()) for z in (x, x * 1e25))
    assert found.alignment == pytest.approx(want.alignment, rel=1e-5)
    assert found.uniformity == pytest.approx(want.uniformity, rel=1e-5)
    assert found.effective_rank == pytest.approx(want.effective_rank, rel=1e-5)


def test_collapse_shows():
    x = torch.ones(30, 6) + 1e-6 * torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    result = health(x, x)
    assert result.effective_rank == pytest.approx(1, abs=1e-2)
    assert result.uniformity == pytest.approx(0, abs=1e-4)
    assert result.alignment == 0
    assert result.feature_deviation == pytest.approx(0, abs=1e-2)


def _share(rank, x):
    part = slice(None) if rank is None else slice(0, 13) if rank == 0 else slice(13, None)
    result = health(x[part], x[part] + 1, max_pairs_samples=40, block_size=8)
    return [
        result.effective_rank,
        result.alignment,
        result.uniformity,
        result.feature_deviation,
        result.n_samples,
    ]


def test_two_ranks_get_the_result_of_one():
    x = np.random.default_rng(0).normal(size=(100, 5))
    want = _share(None, x)
    for got in on_two_ranks(_share, x):
        assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    ("features", "second", "message"),
    [
        (torch.ones(1, 3), None, "two samples"),
        (torch.zeros(5, 3), None, "all features are zero"),
        (torch.full((5, 3), torch.inf), None, "not finite"),
        (torch.ones(5), None, r"\(n, d\)"),
        (torch.ones(5, 3), torch.ones(4, 3), "second_view"),
    ],
)
def test_bad_input_is_named(features, second, message):
    with pytest.raises(ValueError, match=message):
        health(features, second)
