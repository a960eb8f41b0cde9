"""P²OT and SP²OT solvers beside the papers' scaling iterations, in one run: `python -m benchmarks.transport`.

The peer is the iteration as the papers print it, in float32, dense: at most 1000 scaling steps to
|b - b_prev| < 1e-6, and for SP²OT such a solve, from a cold start, for every outer step. Times are CPU
seconds of the process on one thread, medians over the repeats; the mass error |sum(Q) - ρ| / ρ is
summed in float64 from both plans. `--quick` leaves out the large problems.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.machine import print_machine
from lightning_modules.transport import gaussian_similarity, solve_p2ot, solve_sp2ot

N = 5120


def scaling_p2ot(
    cost: Tensor, rho: float, epsilon: float = 0.1, gamma: float = 1.0, max_iter: int = 1000
) -> tuple[Tensor, int]:
    n, k = cost.shape
    kernel = torch.exp(-torch.cat([cost, cost.new_zeros(n, 1)], 1) / epsilon)
    target = cost.new_full((k + 1,), rho / k)
    target[k] = 1 - rho
    exponent = cost.new_full((k + 1,), gamma / (gamma + epsilon))
    exponent[k] = 1
    b = torch.ones_like(target)
    for n_iter in range(1, max_iter + 1):  # noqa: B007
        a = (1 / n) / (kernel @ b)
        previous, b = b, (target / (kernel.T @ a)) ** exponent
        if float((b - previous).norm()) < 1e-6:
            break
    a = (1 / n) / (kernel @ b)
    return (a[:, None] * kernel * b)[:, :k], n_iter


def scaling_sp2ot(
    cost: Tensor, similarity: Tensor, rho: float, weight: float, max_outer: int = 100
) -> tuple[Tensor, int, int]:
    n, k = cost.shape
    plan = torch.full_like(cost, rho / (n * k))
    last, total = math.inf, 0
    both = similarity + similarity.T
    for outer in range(1, max_outer + 1):  # noqa: B007
        plan, n_iter = scaling_p2ot(cost - weight * (both @ plan), rho)
        total += n_iter
        value = objective(plan, cost, both, rho, weight)
        if abs(value - last) < 1e-6:
            break
        last = value
    return plan, outer, total


def objective(plan: Tensor, cost: Tensor, both: Tensor, rho: float, weight: float) -> float:
    n, k = plan.shape
    columns = plan.sum(0)
    slack = (1 / n - plan.sum(1)).clamp_min(0)
    entropy = torch.xlogy(plan, plan).sum() + torch.xlogy(slack, slack).sum()
    divergence = torch.xlogy(columns, columns * k / rho).sum() - columns.sum() + rho
    return float((plan * (cost - weight / 2 * (both @ plan))).sum() + divergence + 0.1 * entropy)


def mass_error(plan: Tensor, rho: float) -> float:
    return abs(float(plan.double().sum()) - rho) / rho


def logits(kind: str, k: int) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and features (N, 64); the long tail has class frequencies from 1 down to 1/100."""
    generator = torch.Generator().manual_seed(0)
    frequency = 0.01 ** (torch.arange(k) / (k - 1))
    classes = torch.multinomial(frequency, N, replacement=True, generator=generator)
    centres = torch.nn.functional.normalize(torch.randn(k, 64, generator=generator), dim=1)
    features = centres[classes] + 0.15 * torch.randn(N, 64, generator=generator)
    features = torch.nn.functional.normalize(features, dim=1)
    noise = torch.randn(N, k, generator=generator)
    weights = torch.nn.functional.normalize(torch.randn(k, 64, generator=generator), dim=1)
    return noise if kind == "normal logits" else 10 * features @ weights.T, features


def timed(function: Callable, repeats: int) -> tuple[float, tuple]:
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = function()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="K = 100 alone, one repeat")
    arguments = parser.parse_args()
    print_machine()
    sizes, repeats = ((100,), 1) if arguments.quick else ((100, 500), 3)
    torch.set_num_threads(1)  # idle threads that spin would count as CPU seconds
    solve_p2ot(torch.rand(64, 4), 0.5)  # the first call pays for lazy initialisation

    print("Scaling and ours: iterations or passes / CPU seconds / mass error (ours: / marginal error).\n")
    print("| P²OT input | K | ρ | scaling | ours | times faster |\n|---|---|---|---|---|---|")
    for k in sizes:
        for kind in ("normal logits", "10·cos, long tail"):
            cost = -logits(kind, k)[0].log_softmax(1)
            for rho in (0.1, 0.5, 0.99):
                peer_seconds, (peer, n_iter) = timed(lambda: scaling_p2ot(cost, rho), repeats)  # noqa: B023
                seconds, found = timed(lambda: solve_p2ot(cost, rho, tol=1e-9), repeats)  # noqa: B023
                theirs = f"{n_iter} / {peer_seconds:.2f} / {mass_error(peer, rho):.0e}"
                ours = f"{found.n_iter} / {seconds:.3f} / {mass_error(found.plan, rho):.0e}"
                ours += f" / {found.marginal_error:.0e}"
                print(f"| {kind} | {k} | {rho} | {theirs} | {ours} | {peer_seconds / seconds:.1f} |")

    print("\n| SP²OT, K | ρ | scaling: outer x inner | ours | objective, scaling and ours | times faster |")
    print("|---|---|---|---|---|---|")
    for k, rho in [(100, 0.1), (100, 0.5), (100, 0.9)] + ([] if arguments.quick else [(500, 0.5)]):
        scores, features = logits("10·cos, long tail", k)
        cost, weight = -scores.log_softmax(1), 1000 * (1 - rho)
        similarity = gaussian_similarity(features)
        dense = torch.zeros(N, N).scatter_(1, *similarity)
        peer_seconds, found = timed(lambda: scaling_sp2ot(cost, dense, rho, weight), 1)  # noqa: B023
        peer, outer, inner = found
        seconds, found = timed(
            lambda: solve_sp2ot(cost, similarity, rho, weight=weight, marginal_tol=1e-8),  # noqa: B023
            repeats,
        )
        ours_outer = len(found.objective) - 1
        theirs = f"{outer} x {inner / outer:.0f} / {peer_seconds:.1f} / {mass_error(peer, rho):.0e}"
        ours = f"{ours_outer} x {found.n_iter / ours_outer:.1f} / {seconds:.2f}"
        ours += f" / {mass_error(found.plan, rho):.0e}"
        ours += f" / {found.marginal_error:.0e}"
        values = [objective(plan, cost, dense + dense.T, rho, weight) for plan in (peer, found.plan)]
        ratio = peer_seconds / seconds
        print(f"| {k} | {rho} | {theirs} | {ours} | {values[0]:.5f}, {values[1]:.5f} | {ratio:.0f} |")


if __name__ == "__main__":
    main()
