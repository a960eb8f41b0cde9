"""Transport plans against POT, convex duality, and identities that hold for any input."""

import math
import warnings

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize
from sklearn.metrics import pairwise_distances

from lightning_modules.transport import gaussian_similarity, p2ot, solve_p2ot, solve_sp2ot, sp2ot

TIGHT = {"tol": 1e-11}


def random_cost(n: int = 60, k: int = 7, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -(scale * torch.randn(n, k, dtype=torch.float64, generator=generator)).log_softmax(1)


def with_virtual(cost: torch.Tensor) -> np.ndarray:
    return np.hstack([cost.numpy(), np.zeros((len(cost), 1))])


def random_similarity(n: int, neighbors: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return gaussian_similarity(torch.randn(n, 3, generator=generator), n_neighbors=neighbors)


def dense(similarity: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    indices, weights = (part.numpy() for part in similarity)
    matrix = np.zeros((len(indices), len(indices)))
    np.put_along_axis(matrix, indices, weights.astype(np.float64), axis=1)
    return matrix


# --- oracles
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.05, 1.0, 30.0])
def test_whole_mass_is_pots_unbalanced_sinkhorn(gamma):
    cost = random_cost()
    n, k = cost.shape
    want = ot.unbalanced.sinkhorn_unbalanced(
        np.full(n, 1 / n),
        np.full(k, 1 / k),
        cost.numpy(),
        0.1,
        reg_m=(math.inf, gamma),
        reg_type="entropy",
        numItermax=100_000,
        stopThr=1e-14,
    )
    np.testing.assert_allclose(p2ot(cost, 1.0, gamma=gamma, **TIGHT), want, atol=1e-9)


@pytest.mark.parametrize("rho", [0.05, 0.5, 0.95, 1.0])
def test_hard_clusters_are_pots_sinkhorn_with_a_virtual_column(rho):
    cost = random_cost()
    n, k = cost.shape
    extended, columns = (
        (with_virtual(cost), np.r_[np.full(k, rho / k), 1 - rho])
        if rho < 1
        else (cost.numpy(), np.full(k, 1 / k))
    )
    want = ot.sinkhorn(
        np.full(n, 1 / n), columns, extended, 0.1, method="sinkhorn_log", numItermax=100_000, stopThr=1e-14
    )
    got = p2ot(cost, rho, gamma=math.inf, **TIGHT)
    np.testing.assert_allclose(got, want[:, :k], atol=1e-9)


def test_small_epsilon_reaches_the_cost_of_partial_wasserstein():
    cost = random_cost(40, 5)
    n, k = cost.shape
    rho = 0.6
    plan = ot.partial.partial_wasserstein(
        np.full(n, 1 / n), np.full(k, rho / k), cost.numpy(), m=rho * (1 - 1e-10)
    )
    got = p2ot(cost, rho, gamma=math.inf, epsilon=2e-3)
    assert float((got * cost).sum()) == pytest.approx((plan * cost.numpy()).sum(), rel=4e-3)


@pytest.mark.parametrize("rho", [0.2, 0.8])
def test_free_cluster_sizes_are_a_softmax_with_one_threshold(rho):
    cost, epsilon = random_cost(), 0.1
    kernel = np.exp(-cost.numpy() / epsilon)
    rows, n = kernel.sum(1), len(cost)
    threshold = brentq(lambda b: (rows / (rows + b)).mean() - rho, 1e-12, 1e12, xtol=1e-15, rtol=1e-14)
    want = kernel / (rows + threshold)[:, None] / n
    np.testing.assert_allclose(p2ot(cost, rho, epsilon=epsilon, gamma=1e-7, **TIGHT), want, atol=1e-7)


@pytest.mark.parametrize(("rho", "gamma", "epsilon"), [(0.1, 1.0, 0.1), (0.5, 0.3, 0.2), (0.9, 5.0, 0.05)])
def test_general_case_is_the_optimum_of_the_dual(rho, gamma, epsilon):
    """L-BFGS on the dual in both potentials (u of rows, v of columns), written from the primal problem."""
    cost = random_cost(30, 4)
    n, k = cost.shape
    extended = with_virtual(cost)

    def negative_dual(z):
        u, v = z[:n], z[n:]
        q = np.exp((u[:, None] + v[None] - extended) / epsilon)
        soft = gamma * (rho / k) * np.exp(-v[:k] / gamma)
        value = epsilon * q.sum() - u.sum() / n - (1 - rho) * v[k] + soft.sum()
        columns = q.sum(0)
        slope_v = columns - np.r_[(rho / k) * np.exp(-v[:k] / gamma), 1 - rho]
        return value, np.r_[q.sum(1) - 1 / n, slope_v]

    start = np.r_[np.full(n, -epsilon * np.log(n * (k + 1))), np.zeros(k + 1)]
    found = minimize(
        negative_dual,
        start,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 50_000, "maxfun": 50_000, "ftol": 0, "gtol": 1e-12, "maxcor": 50},
    )
    want = np.exp((found.x[:n, None] + found.x[None, n:] - extended) / epsilon)[:, :k]
    np.testing.assert_allclose(p2ot(cost, rho, epsilon=epsilon, gamma=gamma, **TIGHT), want, atol=1e-8)


@pytest.mark.parametrize("outer", [1, 3, 50])
def test_semantic_term_is_pots_fused_gromov_wasserstein(outer):
    cost = random_cost(50, 6)
    n, k = cost.shape
    similarity = random_similarity(n)
    matrix = dense(similarity)
    symmetric = torch.from_numpy((matrix + matrix.T) / 2)
    rho, weight, epsilon = 0.5, 5.0, 0.1
    alpha = weight / (2 + weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = ot.gromov.entropic_fused_gromov_wasserstein(
            with_virtual(cost),
            symmetric.numpy(),
            np.diag(np.r_[np.ones(k), 0]),
            np.full(n, 1 / n),
            np.r_[np.full(k, rho / k), 1 - rho],
            loss_fun="square_loss",
            epsilon=epsilon * (1 - alpha),
            alpha=alpha,
            max_iter=outer,
            tol=0,
            solver="PGD",
            numItermax=20_000,
            stopThr=1e-15,
        )
    got = solve_sp2ot(
        cost,
        symmetric,
        rho,
        weight=weight,
        epsilon=epsilon,
        gamma=math.inf,
        max_iter=outer,
        tol=1e-15,
        marginal_tol=1e-12,
        first_marginal_tol=1e-12,
    )
    np.testing.assert_allclose(got.plan, want[:, :k], atol=1e-7)


def test_gaussian_similarity_is_the_kernel_of_the_nearest():
    features = torch.randn(90, 6, generator=torch.Generator().manual_seed(3)) * 4 + 100
    indices, weights = gaussian_similarity(features, n_neighbors=7, block_size=32)
    distances = pairwise_distances(features.double().numpy())
    np.fill_diagonal(distances, np.inf)
    order = np.argsort(distances, axis=1)[:, :7]
    want = np.exp(-(np.take_along_axis(distances, order, 1) ** 2) / (2 * 2**2 * 6))
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(weights, want, rtol=1e-4)


# --- identities
# ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 80),
    k=st.integers(2, 12),
    rho=st.sampled_from([0.01, 0.1, 0.5, 0.99, 1.0]),
    gamma=st.sampled_from([0.01, 1.0, 100.0, math.inf]),
    epsilon=st.sampled_from([0.05, 0.1, 1.0]),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 1000),
)
def test_optimality_for_any_problem(n, k, rho, gamma, epsilon, scale, seed):
    cost = random_cost(n, k, scale, seed)
    # The hardest of these, costs of 100 epsilon and nearly all mass, take more than the default of 1,000.
    result = solve_p2ot(cost, rho, epsilon=epsilon, gamma=gamma, tol=1e-9, max_iter=20_000)
    plan, v = result.plan, result.potentials
    assert result.converged
    assert bool((plan >= 0).all())
    assert bool((plan.sum(1) <= (1 + 1e-12) / n).all())
    assert float(plan.sum()) == pytest.approx(rho, rel=1e-8)
    want = rho / k * torch.exp(-v[:k] / gamma)
    torch.testing.assert_close(plan.sum(0), want, atol=rho * 2e-9, rtol=0)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), weight=st.sampled_from([0.0, 20.0]))
def test_equivariant_to_the_order_of_samples_and_clusters(seed, weight):
    generator = torch.Generator().manual_seed(seed)
    cost = random_cost(40, 5, seed=seed)
    matrix = torch.from_numpy(dense(random_similarity(40, seed=seed)))
    rows, columns = torch.randperm(40, generator=generator), torch.randperm(5, generator=generator)
    arguments = {"rho": 0.6, "weight": weight, "tol": 1e-10, "marginal_tol": 1e-10}
    plan = solve_sp2ot(cost, matrix, **arguments).plan
    moved = solve_sp2ot(cost[rows][:, columns], matrix[rows][:, rows], **arguments).plan
    torch.testing.assert_close(moved, plan[rows][:, columns], atol=1e-7, rtol=0)


def test_no_similarity_weight_is_p2ot():
    cost = random_cost()
    got = solve_sp2ot(cost, random_similarity(len(cost)), 0.4, weight=0.0, marginal_tol=1e-10).plan
    torch.testing.assert_close(got, p2ot(cost, 0.4, tol=1e-10), atol=1e-11, rtol=0)


def test_similarity_lowers_the_objective_and_joins_neighbours():
    cost = random_cost(80, 5)
    similarity = random_similarity(80)
    result = solve_sp2ot(cost, similarity, 0.5, weight=20.0)
    assert result.converged
    matrix = dense(similarity)
    np.fill_diagonal(matrix, 0)

    def objective(plan):
        plan = plan.numpy()
        slack = 1 / 80 - plan.sum(1)
        columns = plan.sum(0)
        entropy = (plan * np.log(plan)).sum() + (slack * np.log(np.maximum(slack, 1e-300))).sum()
        kl = (columns * np.log(columns / 0.1) - columns + 0.1).sum()
        return (plan * cost.numpy()).sum() - 20 * (matrix * (plan @ plan.T)).sum() + kl + 0.1 * entropy

    plain = p2ot(cost, 0.5)
    assert objective(result.plan) < objective(plain)
    assert result.objective[-1] == pytest.approx(objective(result.plan), abs=1e-7)
    assert np.diff(result.objective[-3:]).max() <= 1e-6


def test_full_steps_that_would_rise_are_shortened():
    """Two samples, each other's only neighbour: linearisation alone swaps their clusters for ever."""
    cost = torch.zeros(2, 2, dtype=torch.float64)
    cost[0, 0] = cost[1, 1] = -0.05
    matrix = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    result = solve_sp2ot(cost, matrix, 1.0, weight=8.0, epsilon=0.05, gamma=math.inf, first_marginal_tol=1e-9)
    assert result.converged
    assert max(np.diff(result.objective)) <= 1e-6


def test_forms_of_similarity_agree():
    cost, similarity = random_cost(), random_similarity(60)
    matrix = torch.from_numpy(dense(similarity))
    indices, weights = similarity
    padded = torch.cat([indices, torch.full((60, 1), -1)], 1), torch.cat([weights, torch.ones(60, 1)], 1)
    plans = [
        sp2ot(cost, form, 0.5, weight=10.0)
        for form in (similarity, matrix, matrix.to_sparse_coo(), matrix.to_sparse_csr(), padded)
    ]
    for plan in plans[1:]:
        torch.testing.assert_close(plan, plans[0], atol=1e-8, rtol=0)


def test_warm_start_changes_the_speed_alone():
    cost = random_cost(200, 10)
    cold = solve_p2ot(cost, 0.3, **TIGHT)
    near = cost + 0.01 * torch.randn(cost.shape, dtype=cost.dtype, generator=torch.Generator().manual_seed(1))
    again, warm = solve_p2ot(near, 0.31, **TIGHT), solve_p2ot(near, 0.31, potentials=cold.potentials, **TIGHT)
    torch.testing.assert_close(again.plan, warm.plan, atol=1e-11, rtol=0)
    assert warm.n_iter < again.n_iter
    whole = solve_p2ot(cost, 1.0, potentials=cold.potentials, **TIGHT)
    torch.testing.assert_close(whole.plan, p2ot(cost, 1.0, **TIGHT), atol=1e-11, rtol=0)
    back = solve_p2ot(cost, 0.3, potentials=whole.potentials, **TIGHT)
    torch.testing.assert_close(back.plan, cold.plan, atol=1e-11, rtol=0)


def test_leading_dimensions_are_problems_of_their_own():
    cost = torch.stack([random_cost(seed=seed) for seed in range(6)]).reshape(2, 3, 60, 7)
    plans = p2ot(cost, 0.5, **TIGHT)
    similarity = random_similarity(60)
    semantic = sp2ot(cost[0], similarity, 0.5, weight=10.0)
    assert plans.shape == cost.shape
    torch.testing.assert_close(plans[1, 2], p2ot(cost[1, 2], 0.5, **TIGHT))
    torch.testing.assert_close(semantic[1], sp2ot(cost[0, 1], similarity, 0.5, weight=10.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_input(dtype):
    cost = random_cost(500, 20).to(dtype)
    plan = p2ot(cost, 0.5, tol=1e-9)
    assert plan.dtype == torch.float32
    assert float(plan.double().sum()) == pytest.approx(0.5, rel=1e-7)
    torch.testing.assert_close(plan.double(), p2ot(cost.double(), 0.5, tol=1e-9), atol=1e-9, rtol=1e-4)


def test_autocast_changes_nothing():
    cost, similarity = random_cost(300, 20).float(), random_similarity(300)
    plain = p2ot(cost, 0.5), sp2ot(cost, similarity, 0.5, weight=10.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = p2ot(cost, 0.5), sp2ot(cost, similarity, 0.5, weight=10.0)
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(plain[1], cast[1])


def test_inputs_need_no_gradient_and_keep_their_values():
    cost = random_cost().requires_grad_()
    before = cost.detach().clone()
    assert not p2ot(cost, 0.5).requires_grad
    assert torch.equal(cost, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu():
    cost, similarity = random_cost(300, 20), random_similarity(300)
    torch.testing.assert_close(p2ot(cost.cuda(), 0.5, **TIGHT).cpu(), p2ot(cost, 0.5, **TIGHT))
    there = sp2ot(cost.cuda(), tuple(part.cuda() for part in similarity), 0.5, weight=10.0)
    torch.testing.assert_close(there.cpu(), sp2ot(cost, similarity, 0.5, weight=10.0), atol=1e-7, rtol=0)


# --- bad input
# -------------------------------------------------------------------------------------------------------


def test_running_out_of_iterations_warns():
    with pytest.warns(RuntimeWarning, match="marginal error"):
        p2ot(random_cost(), 0.5, max_iter=3)
    with pytest.warns(RuntimeWarning, match="not converged"):
        sp2ot(random_cost(), random_similarity(60), 0.5, weight=30.0, max_iter=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rho": 0.0}, "rho"),
        ({"rho": 1.1}, "rho"),
        ({"rho": math.nan}, "rho"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"gamma": -1.0}, "gamma"),
        ({"gamma": math.nan}, "gamma"),
        ({"max_iter": 0}, "max_iter"),
        ({"tol": 0.0}, "tol"),
        ({"cost": torch.zeros(5, 1)}, "K = 1"),
        ({"cost": torch.zeros(0, 3)}, "empty"),
        ({"cost": torch.zeros(5)}, "N, K"),
        ({"cost": torch.tensor([[0.0, math.nan]])}, r"cost\[0, 1\] is nan"),
        ({"cost": torch.tensor([[0.0, math.inf]])}, r"cost\[0, 1\] is inf"),
        ({"potentials": torch.zeros(3)}, "potentials"),
        ({"potentials": torch.full((8,), math.nan)}, "potentials"),
    ],
)
def test_bad_settings_are_named(change, message):
    arguments = {"cost": random_cost(), "rho": 0.5} | change
    with pytest.raises(ValueError, match=message):
        p2ot(**arguments)


def test_integers_are_no_costs():
    with pytest.raises(TypeError, match="floating-point"):
        p2ot(torch.zeros(4, 3, dtype=torch.int64), 0.5)


@pytest.mark.parametrize(
    ("similarity", "message"),
    [
        (torch.zeros(3, 3), "similarity"),
        ((torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 3)), "indices"),
        ((torch.full((60, 2), 60), torch.ones(60, 2)), "60"),
        (torch.full((60, 60), math.nan), "NaN"),
    ],
)
def test_bad_similarities_are_named(similarity, message):
    with pytest.raises(ValueError, match=message):
        sp2ot(random_cost(), similarity, 0.5, weight=1.0)
    with pytest.raises(ValueError, match="weight"):
        sp2ot(random_cost(), random_similarity(60), 0.5, weight=-1.0)
