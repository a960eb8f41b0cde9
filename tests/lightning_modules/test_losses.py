"""Losses against naive loops, against lightly's, and on two ranks against one process on the joined batch."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_modules import losses
from tests.support.ranks import on_two_ranks


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)


def naive_nt_xent(a, b, temperature):
    z = F.normalize(torch.cat([a, b]), dim=1)
    n, total = len(a), 0.0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        others = sum(math.exp(float(z[i] @ z[k]) / temperature) for k in range(2 * n) if k != i)
        total -= float(z[i] @ z[j]) / temperature - math.log(others)
    return total / (2 * n)


def naive_cauchy(a, b):
    z = torch.cat([a, b]).double()
    n, total = len(a), 0.0

    def kernel(i, j):
        return 1 / (1 + float(((z[i] - z[j]) ** 2).sum()))

    for i in range(2 * n):
        total -= math.log(kernel(i, (i + n) % (2 * n)))
        total += math.log(sum(kernel(i, j) for j in range(2 * n) if j != i))
    return total / (2 * n)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_is_the_double_loop(pair, temperature):
    assert float(losses.nt_xent(*pair, temperature=temperature)) == pytest.approx(
        naive_nt_xent(*pair, temperature), rel=1e-5
    )


@pytest.mark.parametrize("dimension", [2, 40])
def test_cauchy_contrast_is_the_double_loop(dimension):
    a, b = torch.randn(2, 7, dimension, generator=torch.Generator().manual_seed(1))
    assert float(losses.cauchy_contrast(a, b)) == pytest.approx(naive_cauchy(a, b), rel=1e-5)


def test_cauchy_contrast_identities(pair):
    a, b = (x[:, :2] for x in pair)
    loss = losses.cauchy_contrast(a, b)
    turn = torch.tensor([[math.cos(0.7), -math.sin(0.7)], [math.sin(0.7), math.cos(0.7)]])
    torch.testing.assert_close(losses.cauchy_contrast(a @ turn, b @ turn), loss)
    torch.testing.assert_close(losses.cauchy_contrast(a + 3, b + 3), loss)
    torch.testing.assert_close(losses.cauchy_contrast(b, a), loss)
    assert abs(float(losses.cauchy_contrast(2 * a, 2 * b)) - float(loss)) > 1e-2
    wide, other = (x.double().repeat(1, 43)[:, :128] for x in pair)
    expected = losses.cauchy_contrast(wide.float(), other.float())
    far = losses.cauchy_contrast((wide + 1000).float(), (other + 1000).float())
    torch.testing.assert_close(far, expected, rtol=1e-3, atol=1e-4)
    same = torch.ones(6, 2)
    assert float(losses.cauchy_contrast(same, same)) == pytest.approx(math.log(11))


def test_lightly_agrees(pair):
    lightly = pytest.importorskip("lightly.loss")
    torch.testing.assert_close(
        losses.nt_xent(*pair, temperature=0.2),
        lightly.NTXentLoss(temperature=0.2)(*pair),
        rtol=1e-5,
        atol=1e-6,
    )
    torch.testing.assert_close(losses.koleo(pair[0]), lightly.KoLeoLoss()(pair[0]), rtol=1e-5, atol=1e-6)

    generator = torch.Generator().manual_seed(2)
    teacher, student = torch.randn(2, 4, 9, generator=generator), torch.randn(5, 4, 9, generator=generator)
    theirs = lightly.DINOLoss(output_dim=9, student_temp=0.1)
    center = torch.zeros(9)
    for _ in range(2):  # twice, so that the second time has a centre
        targets = losses.centered_targets(teacher, center, 0.05)
        torch.testing.assert_close(
            losses.dino(student, targets),
            theirs(list(teacher), list(student), teacher_temp=0.05),
            rtol=1e-5,
            atol=1e-6,
        )
        center = losses.updated_center(center, teacher.flatten(0, 1))
        torch.testing.assert_close(center, theirs.center.flatten(), rtol=1e-5, atol=1e-7)

    mask = torch.rand(4, 3, 3, generator=generator) < 0.5
    mask[1] = False
    tokens = torch.randn(2, int(mask.sum()), 9, generator=generator)
    weights = (1 / (4 * mask.sum((1, 2), keepdim=True).clamp_min(1))).expand_as(mask)[mask]
    ours = losses.ibot(tokens[1], losses.centered_targets(tokens[0], torch.zeros(9), 0.05), weights)
    theirs = lightly.IBOTPatchLoss(output_dim=9, teacher_temp=0.05)
    torch.testing.assert_close(ours, theirs(tokens[0], tokens[1], mask), rtol=1e-5, atol=1e-6)

    from lightly.loss.swav_loss import sinkhorn

    torch.testing.assert_close(
        losses.sinkhorn_targets(tokens[0], 0.3),
        sinkhorn(tokens[0], iterations=3, epsilon=0.3),
        rtol=1e-4,
        atol=1e-6,
    )


def test_dino_is_the_loop_over_pairs_of_views():
    generator = torch.Generator().manual_seed(3)
    targets = torch.randn(2, 3, 4, generator=generator).softmax(-1)
    student = torch.randn(4, 3, 4, generator=generator)
    terms = [
        -(targets[t, b] * F.log_softmax(student[v, b] / 0.1, 0)).sum()
        for t in range(2)
        for v in range(4)
        for b in range(3)
        if t != v
    ]
    torch.testing.assert_close(losses.dino(student, targets), torch.stack(terms).mean())


def test_sinkhorn_targets_are_balanced_distributions():
    logits = torch.randn(60, 5, generator=torch.Generator().manual_seed(4))
    targets = losses.sinkhorn_targets(logits, 0.2, n_iterations=50)
    torch.testing.assert_close(targets.sum(1), torch.ones(60))
    torch.testing.assert_close(targets.mean(0), torch.full((5,), 0.2), rtol=1e-3, atol=1e-4)
    assert losses.sinkhorn_targets(logits[:0], 0.2).shape == (0, 5)


def test_koleo_is_the_loop(pair):
    x = F.normalize(pair[0], dim=1)
    nearest = [min(float((x[i] - x[j]).norm()) for j in range(6) if j != i) for i in range(6)]
    assert float(losses.koleo(pair[0])) == pytest.approx(-np.mean(np.log(nearest)), rel=1e-5)


def _on_a_rank(rank: int, a: torch.Tensor, b: torch.Tensor) -> dict:
    a, b = (x.chunk(2)[rank].clone().requires_grad_() for x in (a, b))
    out = {}
    for name, loss in _LOSSES.items():
        value = loss(a, b)
        # DDP averages the ranks' gradients; here inputs belong to one rank, so the average is half the sum.
        gradient = torch.autograd.grad(value, [a, b])
        out[name] = [value, gradient[0] / 2, gradient[1] / 2]
    uneven = a.detach() if rank == 0 else a.detach()[:2]
    out["sinkhorn"] = [losses.sinkhorn_targets(uneven, 0.3)]
    out["center"] = [losses.updated_center(torch.ones(a.shape[1]), uneven)]
    return out


_LOSSES = {
    "nt_xent": lambda a, b: losses.nt_xent(a, b, temperature=0.3),
    "cauchy": losses.cauchy_contrast,
    "koleo": lambda a, b: losses.koleo(a) + losses.koleo(b),
}


def test_two_ranks_are_one_process_on_the_joined_batch(pair):
    ranks = on_two_ranks(_on_a_rank, *pair)
    a, b = (x.clone().requires_grad_() for x in pair)
    for name, loss in _LOSSES.items():
        value = loss(a, b)
        gradient = torch.autograd.grad(value, [a, b])
        assert np.mean([r[name][0] for r in ranks]) == pytest.approx(float(value), abs=1e-5)
        for i in (0, 1):
            joined = np.concatenate([r[name][1 + i] for r in ranks])
            np.testing.assert_allclose(joined, gradient[i].numpy(), atol=1e-5)
    rows = torch.cat([pair[0][:3], pair[0][3:5]])
    joined = np.concatenate([r["sinkhorn"][0] for r in ranks])
    np.testing.assert_allclose(joined, losses.sinkhorn_targets(rows, 0.3).numpy(), atol=1e-5)
    for r in ranks:
        np.testing.assert_allclose(
            r["center"][0], losses.updated_center(torch.ones(5), rows).numpy(), atol=1e-6
        )


def test_bad_pairs_are_refused(pair):
    a, b = pair
    with pytest.raises(ValueError, match="at least 2 samples"):
        losses.nt_xent(a[:1], b[:1])
    with pytest.raises(ValueError, match=r"\(6, 5\) and \(5, 5\)"):
        losses.cauchy_contrast(a, b[:5])
    with pytest.raises(ValueError, match="temperature"):
        losses.nt_xent(a, b, temperature=0)
