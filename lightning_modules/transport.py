"""Partial optimal transport for clustering with unknown, unequal cluster sizes: P²OT and SP²OT.

P²OT (arXiv 2401.09266) asks for a plan Q >= 0 between N samples and K clusters that moves only a share ρ of
the mass,

    min <Q, C> + ε <Q, log Q> + γ KL(Qᵀ1 || ρ/K)     with   Q 1 <= 1/N,   sum(Q) = ρ.

A virtual cluster of cost zero takes the slack, so rows become exact and the problem is entropic transport
with a soft marginal on the K real columns and a hard one, 1 - ρ, on the virtual column; `semidual` solves it.

SP²OT (arXiv 2404.03446) adds -λ <S, Q Qᵀ>, which pulls neighbours into the same cluster; it is solved by a
sequence of P²OT problems with the quadratic term linearised at the last plan.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from lightning_modules.semidual import solve_semidual
from lightning_modules.similarity import Similarity, gaussian_similarity, symmetrised

__all__ = ["TransportResult", "gaussian_similarity", "p2ot", "solve_p2ot", "solve_sp2ot", "sp2ot"]

P = ParamSpec("P")
R = TypeVar("R")


def _exact(function: Callable[P, R]) -> Callable[P, R]:
    """Without gradients, and without the half precision of an autocast around the call."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        devices = {value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for device in devices:
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return wrapped


@dataclass(frozen=True)
class TransportResult:
    """What a solver found.

    Attributes:
        plan: (..., N, K) float; rows sum to at most 1/N, everything to ρ. Times N, a row's sum is the
            sample's weight.
        potentials: (..., K + 1) float64, the virtual column's last (-inf where ρ = 1); a warm start for a
            next solve.
        marginal_error: the worst problem's sum of absolute violations of the column marginals, divided by ρ.
        n_iter: passes over the cost, of the problem that took most; for SP²OT summed over its outer
            iterations.
        converged: whether every problem reached its tolerance.
        objective: SP²OT: the full objective at every outer iteration (of the last problem of a batch); else
            empty.

    Examples:
        >>> import torch
        >>> from lightning_modules.transport import solve_p2ot
        >>> logits = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
        >>> result = solve_p2ot(-logits.log_softmax(1), rho=0.5)
        >>> weights = len(logits) * result.plan.sum(1)  # of the samples, each between 0 and 1
        >>> labels = result.plan.argmax(1)
    """

    plan: Tensor
    potentials: Tensor
    marginal_error: float
    n_iter: int
    converged: bool
    objective: tuple[float, ...] = ()


def p2ot(
    cost: Tensor,
    rho: float,
    *,
    epsilon: float = 0.1,
    gamma: float = 1.0,
    max_iter: int = 1000,
    tol: float = 1e-6,
    potentials: Tensor | None = None,
) -> Tensor:
    """The P²OT plan: `solve_p2ot`'s, with a warning where it did not converge.

    Returns:
        (..., N, K) plan of total mass `rho`, every row at most 1/N.

    Examples:
        >>> import torch
        >>> from lightning_modules.transport import p2ot
        >>> logits = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
        >>> plan = p2ot(-logits.log_softmax(1), rho=0.5)
        >>> plan.shape, round(plan.sum().item(), 4)  # half of the mass is transported
        (torch.Size([100, 5]), 0.5)
    """
    result = solve_p2ot(
        cost, rho, epsilon=epsilon, gamma=gamma, max_iter=max_iter, tol=tol, potentials=potentials
    )
    if not result.converged:
        _warn(f"p2ot: marginal error {result.marginal_error:.1e} > tol={tol:g} after {result.n_iter} passes")
    return result.plan


def sp2ot(
    cost: Tensor,
    similarity: Similarity,
    rho: float,
    *,
    weight: float,
    epsilon: float = 0.1,
    gamma: float = 1.0,
    max_iter: int = 100,
    tol: float = 1e-6,
    potentials: Tensor | None = None,
) -> Tensor:
    """The SP²OT plan: `solve_sp2ot`'s, with a warning where it did not converge.

    Returns:
        (..., N, K) plan of total mass `rho`, every row at most 1/N.

    Examples:
        >>> import torch
        >>> from lightning_modules.transport import gaussian_similarity, sp2ot
        >>> logits = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
        >>> similarity = gaussian_similarity(logits, n_neighbors=10)
        >>> plan = sp2ot(-logits.log_softmax(1), similarity, rho=0.5, weight=1.0)
        >>> round(plan.sum().item(), 4)
        0.5
    """
    result = solve_sp2ot(
        cost,
        similarity,
        rho,
        weight=weight,
        epsilon=epsilon,
        gamma=gamma,
        max_iter=max_iter,
        tol=tol,
        potentials=potentials,
    )
    if not result.converged:
        _warn(
            f"sp2ot: not converged to tol={tol:g} (marginal error {result.marginal_error:.1e}, "
            f"{len(result.objective) - 1} outer iterations of at most {max_iter})"
        )
    return result.plan


@_exact
def solve_p2ot(
    cost: Tensor,
    rho: float,
    *,
    epsilon: float = 0.1,
    gamma: float = 1.0,
    max_iter: int = 1000,
    tol: float = 1e-6,
    potentials: Tensor | None = None,
) -> TransportResult:
    """Solve P²OT by accelerated scaling.

    Args:
        cost: (..., N, K) finite costs, usually -log_softmax(logits); leading dimensions (heads) are separate
            problems.
        rho: share of the mass to move, in (0, 1].
        epsilon: entropic regularisation, > 0, in units of the cost.
        gamma: weight of the KL term on cluster sizes, > 0; `math.inf` makes all clusters equal.
        max_iter: most passes over the cost a problem may take.
        tol: largest sum of absolute column-marginal violations, relative to `rho`.
        potentials: (..., K + 1) of an earlier, similar problem. Changes the speed, not the result.

    Raises:
        TypeError: `cost` is not a floating-point tensor.
        ValueError: a shape, a value or a setting outside of the above.

    Examples:
        >>> import torch
        >>> from lightning_modules.transport import solve_p2ot
        >>> logits = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
        >>> result = solve_p2ot(-logits.log_softmax(1), rho=0.5)
        >>> result.converged, result.marginal_error < 1e-6
        (True, True)
        >>> again = solve_p2ot(-logits.log_softmax(1), rho=0.55, potentials=result.potentials)  # a warm start
    """
    cost = _check_cost(cost)
    _check_settings(rho, epsilon, gamma, max_iter, tol)
    *batch, n, k = cost.shape
    starts = _check_potentials(potentials, (*batch, k + 1))
    solved = [
        solve_semidual(c, rho, epsilon, gamma, max_iter, tol, start)
        for c, start in zip(cost.reshape(-1, n, k), starts, strict=True)
    ]
    return TransportResult(
        plan=torch.stack([s.plan() for s in solved]).reshape(cost.shape),
        potentials=torch.stack([s.potentials for s in solved]).reshape(*batch, k + 1),
        marginal_error=max(s.marginal_error for s in solved),
        n_iter=max(s.n_iter for s in solved),
        converged=all(s.marginal_error <= tol for s in solved),
    )


@_exact
def solve_sp2ot(
    cost: Tensor,
    similarity: Similarity,
    rho: float,
    *,
    weight: float,
    epsilon: float = 0.1,
    gamma: float = 1.0,
    max_iter: int = 100,
    tol: float = 1e-6,
    marginal_tol: float = 1e-6,
    first_marginal_tol: float = 1e-2,
    max_inner_iter: int = 1000,
    potentials: Tensor | None = None,
) -> TransportResult:
    """Solve SP²OT: P²OT problems whose cost is lowered for clusters that a sample's neighbours are in.

    From the uniform plan, C_t = C - weight (S + Sᵀ) Q_t and Q_{t+1} = P²OT(C_t). Each solve starts at the
    last one's potentials and is only as exact as the progress of the outer iteration asks for. S + Sᵀ has a
    zero diagonal and thus negative eigenvalues, so a full step may raise the objective; then the step towards
    Q_{t+1} is halved, which must lower it at last, since Q_{t+1} - Q_t is a direction of descent.

    Args:
        cost: (..., N, K), as in `solve_p2ot`.
        similarity: of the N samples, with a zero diagonal, not necessarily symmetric, shared by leading
            dimensions: an (N, N) tensor, dense or sparse (COO, CSR), or a pair of (N, k) arrays, the
            neighbours' indices (-1: none) and their weights, as `gaussian_similarity` gives.
        rho: share of the mass to move, in (0, 1].
        weight: λ, of the similarity term; 0 gives P²OT. The paper's: 1000 (1 - ρ), for a plan of mass ρ.
        epsilon: entropic regularisation, > 0.
        gamma: weight of the KL term on cluster sizes, > 0 or `math.inf`.
        max_iter: most outer iterations.
        tol: stop when the objective (entropy, KL term and virtual column included) changes by less than this.
        marginal_tol: column-marginal error, relative to `rho`, of the last inner solve.
        first_marginal_tol: that of the first one; `marginal_tol` makes every inner solve exact, and the whole
            slower.
        max_inner_iter: most passes over the cost of one inner solve.
        potentials: (..., K + 1) of an earlier, similar problem: a warm start of the first inner solve.

    Raises:
        TypeError: a tensor of a wrong kind.
        ValueError: a shape, a value or a setting outside of the above.

    Examples:
        >>> import torch
        >>> from lightning_modules.transport import gaussian_similarity, solve_sp2ot
        >>> logits = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
        >>> similarity = gaussian_similarity(logits, n_neighbors=10)
        >>> result = solve_sp2ot(-logits.log_softmax(1), similarity, rho=0.5, weight=1.0)
        >>> result.converged, result.objective[-1] <= result.objective[0]
        (True, True)
    """
    cost = _check_cost(cost)
    _check_settings(rho, epsilon, gamma, max_iter, tol)
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"weight must be finite and not negative, got {weight}")
    *batch, n, k = cost.shape
    graph = symmetrised(similarity, n).to(device=cost.device, dtype=cost.dtype)
    starts = _check_potentials(potentials, (*batch, k + 1))
    tols = (tol, marginal_tol, max(marginal_tol, first_marginal_tol))
    solved = [
        _solve_sp2ot(c, graph, rho, weight, epsilon, gamma, max_iter, max_inner_iter, tols, start)
        for c, start in zip(cost.reshape(-1, n, k), starts, strict=True)
    ]
    return TransportResult(
        plan=torch.stack([s.plan for s in solved]).reshape(cost.shape),
        potentials=torch.stack([s.potentials for s in solved]).reshape(*batch, k + 1),
        marginal_error=max(s.marginal_error for s in solved),
        n_iter=max(s.n_iter for s in solved),
        converged=all(s.converged for s in solved),
        objective=solved[-1].objective,
    )


# ---------------------------------------------------------------------------
# One SP²OT problem
# ---------------------------------------------------------------------------


def _solve_sp2ot(
    cost: Tensor,
    graph: Tensor,
    rho: float,
    weight: float,
    epsilon: float,
    gamma: float,
    max_iter: int,
    max_inner_iter: int,
    tols: tuple[float, float, float],
    potentials: Tensor | None,
) -> TransportResult:
    tol, marginal_tol, inner_tol = tols
    n, k = cost.shape
    plan = torch.full_like(cost, rho / (n * k))
    pull = graph @ plan if weight else torch.zeros_like(plan)
    history = [_objective(plan, cost, pull, rho, weight, epsilon, gamma)]
    n_iter, error, converged, last_tol = 0, math.inf, False, 0.0
    for outer in range(max_iter):
        if outer == max_iter - 1:
            inner_tol = marginal_tol
        linearised = cost - weight * pull
        inner = solve_semidual(linearised, rho, epsilon, gamma, max_inner_iter, inner_tol, potentials)
        n_iter, error, potentials = n_iter + inner.n_iter, inner.marginal_error, inner.potentials
        target = inner.plan()
        target_pull = graph @ target if weight else pull
        value, step = _objective(target, cost, target_pull, rho, weight, epsilon, gamma), 1.0
        moved, moved_pull = target, target_pull
        # Objectives of inexact plans, whose mass is a little off, do not compare: no line search among those.
        while max(inner_tol, last_tol) <= marginal_tol and value > history[-1] + tol and step > 0.01:
            step /= 2
            moved, moved_pull = plan.lerp(target, step), pull.lerp(target_pull, step)
            value = _objective(moved, cost, moved_pull, rho, weight, epsilon, gamma)
        change, plan, pull, last_tol = value - history[-1], moved, moved_pull, inner_tol
        history.append(value)
        if inner_tol <= marginal_tol and (abs(change) < tol or weight == 0):
            converged = error <= marginal_tol
            break
        # Exact enough that the inner error hides no progress of the outer iteration, and no more.
        exact_now = weight == 0 or abs(change) < 10 * tol or change > 0
        inner_tol = marginal_tol if exact_now else max(marginal_tol, min(inner_tol, 0.1 * abs(change)))
    assert potentials is not None, "max_iter is 1 or more"
    return TransportResult(plan, potentials, error, n_iter, converged, tuple(history))


def _objective(
    plan: Tensor, cost: Tensor, pull: Tensor, rho: float, weight: float, epsilon: float, gamma: float
) -> float:
    """<Q, C> - λ <S, QQᵀ> + γ KL(Qᵀ1 || ρ/K) + ε <Q, log Q>, over K + 1 columns; `pull`: (S + Sᵀ) Q."""
    n, k = plan.shape
    columns = plan.sum(0, dtype=torch.float64)
    slack = (1 / n - plan.sum(1, dtype=torch.float64)).clamp_min(0)
    value = torch.sum(plan * (cost - weight / 2 * pull), dtype=torch.float64)
    value += epsilon * (torch.xlogy(plan, plan).sum(dtype=torch.float64) + torch.xlogy(slack, slack).sum())
    if math.isfinite(gamma):
        value += gamma * (torch.xlogy(columns, columns * (k / rho)).sum() - columns.sum() + rho)
    return float(value)


# ---------------------------------------------------------------------------
# Input
# ---------------------------------------------------------------------------


def _check_cost(cost: Tensor) -> Tensor:
    if not isinstance(cost, Tensor) or not cost.is_floating_point():
        kind = cost.dtype if isinstance(cost, Tensor) else type(cost).__name__
        raise TypeError(f"cost must be a floating-point tensor, got {kind}")
    if cost.ndim < 2 or 0 in cost.shape:
        raise ValueError(f"cost must be (..., N, K) with no empty dimension, got {tuple(cost.shape)}")
    if cost.shape[-1] < 2:
        raise ValueError("cost has one column: transport to a single cluster (K = 1) decides nothing")
    if not bool(torch.isfinite(cost).all()):
        bad = (~torch.isfinite(cost)).nonzero()[0].tolist()
        raise ValueError(
            f"cost[{', '.join(map(str, bad))}] is {float(cost[tuple(bad)])}; costs must be finite"
        )
    return cost if cost.dtype == torch.float64 else cost.float()


def _check_settings(rho: float, epsilon: float, gamma: float, max_iter: int, tol: float) -> None:
    if not 0 < rho <= 1:
        raise ValueError(f"rho must be in (0, 1], got {rho}")
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
    if not gamma > 0:
        raise ValueError(f"gamma must be positive (math.inf for equal clusters), got {gamma}")
    if max_iter < 1:
        raise ValueError(f"max_iter must be 1 or more, got {max_iter}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")


def _check_potentials(potentials: Tensor | None, shape: tuple[int, ...]) -> list[Tensor | None]:
    if potentials is None:
        return [None] * math.prod(shape[:-1])
    if tuple(potentials.shape) != shape:
        raise ValueError(f"potentials are {tuple(potentials.shape)}, this cost takes {shape}")
    if not bool(torch.isfinite(potentials[..., :-1]).all()):
        raise ValueError("potentials of a warm start hold NaN or infinity")
    return list(potentials.double().reshape(-1, shape[-1]))


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
