"""One partial-transport problem in its K + 1 column potentials, by accelerated scaling.

With v the potentials, the rows of the plan are Q_i = softmax((v - [C_i, 0]) / ε) / N, the last column being
the virtual one that takes the slack. What is left to solve is K + 1 equations,

    g(v)_j = sum_i Q_ij - β_j exp(-v_j / γ) = 0,   β = ρ/K   (real),        g(v)_0 = sum_i Q_i0 - (1 - ρ) = 0,

the gradient of a convex function. The scaling (Sinkhorn) map takes hundreds to thousands of passes over the
cost; with the best common shift of all potentials, known in closed form, and Anderson acceleration over the
last ten steps it takes ten to twenty. A pass is two products with the row softmax at some earlier potentials,
which is made again before the potentials have moved so far that a float could not hold their ratio: nothing
overflows, and no pass takes an exponential. At the methods' ε = 0.1 tens of passes are enough; where ε is
far smaller than the differences of costs, a thousand may not be, and `marginal_error` says so.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_ANDERSON_DEPTH = 10
# Sums in a pass are in float64 below this error, and after this many passes.
_SWITCH_TO_DOUBLE = 1e-4
_MOST_IN_FLOAT = 100


@dataclass(frozen=True)
class Solution:
    """Potentials of one problem.

    Attributes:
        potentials: (K + 1,) float64, the virtual column's last, -inf where ρ = 1.
        marginal_error: sum of absolute violations of the column marginals, relative to ρ.
        n_iter: passes over the cost that it took.
        plan: computes the plan, (N, K) in the cost's dtype.
    """

    potentials: Tensor
    marginal_error: float
    n_iter: int
    plan: Callable[[], Tensor]


def solve_semidual(
    cost: Tensor, rho: float, epsilon: float, gamma: float, max_iter: int, tol: float, start: Tensor | None
) -> Solution:
    """Solve one P²OT problem for a cost (N, K), from potentials of a similar one if there are any."""
    problem = _Problem(cost, rho, epsilon, gamma, max_iter)
    v = _with_virtual(problem, 0.0) if start is None else _warm_start(start, problem)
    kernel = _Kernel(problem, v)
    best = _anderson(problem, kernel, v, tol)
    return Solution(best.v, best.error, problem.passes, lambda: kernel.plan(best.v))


def _anderson(problem: "_Problem", kernel: "_Kernel", v: Tensor, tol: float) -> "_Point":
    """Scaling steps, extrapolated by the last steps' least-squares combination (Anderson's type II).

    Where an extrapolation diverges, they begin again at the best point found.
    """
    precise = problem.cost.dtype == torch.float64
    best: _Point | None = None
    steps: list[Tensor] = []
    residuals: list[Tensor] = []
    while not problem.exhausted:
        point = problem.point(v, kernel.columns(v, precise))
        problem.passes += 1
        if best is None or point.error < best.error:
            best = point
        if point.error <= tol and (precise or tol > 1e-5):
            return point
        if not point.error < 100 * best.error:  # diverging, or not a number
            point, steps, residuals = best, [], []
            v = point.v
        if not precise and (point.error < max(_SWITCH_TO_DOUBLE, tol) or problem.passes > _MOST_IN_FLOAT):
            precise = True
            if point.error <= tol:  # to be confirmed
                continue
        residual = problem.scaling_step(v, point.columns) - torch.where(problem.used, v, 0)
        steps = [*steps, torch.where(problem.used, v, 0)][-_ANDERSON_DEPTH - 1 :]
        residuals = [*residuals, residual][-_ANDERSON_DEPTH - 1 :]
        v = torch.where(problem.used, v + residual, v)
        if len(steps) > 1:
            moved = torch.stack(steps, 1).diff(dim=1)
            turned = torch.stack(residuals, 1).diff(dim=1)
            normal = turned.T @ turned
            normal.diagonal().add_(1e-10 * normal.diagonal().max().clamp_min(1e-300))
            v = v - (moved + turned) @ torch.linalg.solve(normal, turned.T @ residual)
    assert best is not None, "max_iter is 1 or more"
    return best


class _Kernel:
    """Row softmax at a centre; the plan at other potentials follows from it by scaling."""

    def __init__(self, problem: "_Problem", center: Tensor) -> None:
        self.problem = problem
        self._recenter(center)

    def columns(self, v: Tensor, precise: bool) -> Tensor:
        """Column sums of the plan (K + 1,)."""
        scale = self._scale(v)
        factor = scale if precise else scale.to(self.rows.dtype)
        columns = torch.zeros_like(scale)
        for block in _row_blocks(self.rows):
            rows = block.double() if precise else block
            columns += rows.T @ (rows @ factor).reciprocal()
        return columns * scale / len(self.rows)

    def plan(self, v: Tensor) -> Tensor:
        """The plan (N, K) in the cost's dtype."""
        scale = self._scale(v)
        plan = torch.empty_like(self.problem.cost)
        start = 0
        for block in _row_blocks(self.rows):
            rows = block.double() * scale
            plan[start : start + len(rows)] = rows[:, :-1] / (rows.sum(1, keepdim=True) * len(plan))
            start += len(rows)
        return plan

    def _scale(self, v: Tensor) -> Tensor:
        shift = torch.where(self.problem.used, v - self.center, 0) / self.problem.epsilon
        if float(shift.abs().max()) > 30:
            self._recenter(v)
            shift = torch.zeros_like(shift)
        return shift.exp()

    def _recenter(self, v: Tensor) -> None:
        self.center = v
        blocks = _row_blocks(self.problem.cost)
        self.rows = torch.cat([_row_softmax(block, v, self.problem.epsilon) for block in blocks])


@dataclass(frozen=True)
class _Point:
    """Potentials and what one pass over the cost tells of them."""

    v: Tensor
    columns: Tensor  # column sums of the plan
    error: float  # |g|_1 / ρ


class _Problem:
    """g(v) = 0 for one cost, and a count of the passes over it."""

    def __init__(self, cost: Tensor, rho: float, epsilon: float, gamma: float, max_iter: int) -> None:
        k = cost.shape[1]
        self.cost, self.rho, self.epsilon, self.gamma, self.max_iter = cost, rho, epsilon, gamma, max_iter
        self.beta = torch.full((k + 1,), rho / k, dtype=torch.float64, device=cost.device)
        self.beta[k] = 1 - rho
        self.softness = torch.full_like(self.beta, 1 / gamma)  # zero for a hard marginal
        self.softness[k] = 0
        self.used = self.beta > 0  # ρ = 1 leaves the virtual column out
        self.passes = 0

    @property
    def exhausted(self) -> bool:
        return self.passes >= self.max_iter

    def targets(self, v: Tensor) -> Tensor:
        return self.beta * torch.exp(-torch.where(self.used, v, 0) * self.softness)

    def point(self, v: Tensor, columns: Tensor) -> _Point:
        gradient = torch.where(self.used, columns - self.targets(v), 0)
        return _Point(v, columns, float(gradient.abs().sum()) / self.rho)

    def scaling_step(self, v: Tensor, columns: Tensor) -> Tensor:
        """One step of the generalised Sinkhorn map in v, then the best shift of all potentials."""
        change = self.epsilon * (self.targets(v).log() - columns.clamp_min(1e-300).log())
        v = torch.where(self.used, v + change / (1 + self.epsilon * self.softness), 0)
        if math.isinf(self.gamma):
            return v
        # The shift t at which the real targets add up to ρ: exp(-t / γ) times their sum.
        return v + self.gamma * torch.log(self.targets(v)[:-1].sum() / self.rho)


def _with_virtual(problem: _Problem, real: Tensor | float) -> Tensor:
    """Real potentials with the virtual one at which the virtual column holds its mass, by bisection."""
    cost, rho, epsilon = problem.cost, problem.rho, problem.epsilon
    v = torch.full_like(problem.beta, -math.inf)
    v[:-1] = real
    if rho < 1:
        rows = ((v[:-1] / epsilon).to(cost.dtype) - cost / epsilon).logsumexp(1).double()
        low, high = rows.min() - 50, rows.max() + 50
        for _ in range(50):
            middle = (low + high) / 2
            above = torch.sigmoid(middle - rows).mean() > 1 - rho
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        v[-1] = middle * epsilon
    return v


def _warm_start(start: Tensor, problem: _Problem) -> Tensor:
    """A start as another ρ may have left it: without a virtual column at ρ = 1, with one below."""
    start = start.to(problem.cost.device)
    if problem.rho == 1 or not math.isfinite(float(start[-1])):
        return _with_virtual(problem, start[:-1])
    return start


def _row_blocks(matrix: Tensor) -> list[Tensor]:
    """Views of rows: small enough for the caches of a CPU, large enough to fill a GPU."""
    entries = 2**18 if matrix.device.type == "cpu" else 2**26
    return list(matrix.split(max(1, entries // matrix.shape[1])))


def _row_softmax(cost: Tensor, v: Tensor, epsilon: float) -> Tensor:
    """softmax((v - [C, 0]) / ε), (n, K + 1)."""
    k = cost.shape[1]
    scores = torch.empty(len(cost), k + 1, dtype=cost.dtype, device=cost.device)
    torch.sub((v[:k] / epsilon).to(cost.dtype), cost, alpha=1 / epsilon, out=scores[:, :k])
    scores[:, k] = (v[k] / epsilon).to(cost.dtype)
    return scores.softmax(1)
