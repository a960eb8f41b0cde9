"""Clustering of fixed embeddings by transport labels: an alternative to k-means for long-tailed data."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from curated_data.matrix import Matrix, read_rows
from lightning_modules.transport import gaussian_similarity, solve_p2ot, solve_sp2ot

METHODS = ("sp2ot", "p2ot", "ot")


@dataclass(frozen=True)
class TransportClusters:
    """A clustering of embeddings.

    Attributes:
        assignment: (n,) int64, the cluster whose prototype has the largest cosine.
        prototypes: (K, d) float32 of unit length.
        center: (d,) float32, what was taken from the embeddings first; zero unless asked for.
        inertia: mean of 1 - cosine to the own prototype.
    """

    assignment: np.ndarray
    prototypes: np.ndarray
    center: np.ndarray
    inertia: float


@torch.no_grad()
def cluster_embeddings(
    x: Matrix,
    n_clusters: int,
    *,
    method: str = "sp2ot",
    n_iter: int = 30,
    rho_start: float = 0.1,
    epsilon: float = 0.1,
    gamma: float = 1.0,
    similarity_strength: float = 1000.0,
    n_neighbors: int = 20,
    scale: float = 10.0,
    center: bool = False,
    sample_size: int = 50_000,
    block_size: int = 65_536,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> TransportClusters:
    """Cluster embeddings with P²OT or SP²OT labels.

    Starting at random prototypes, n_iter times: transport labels of a random sample of the embeddings, with ρ
    on the methods' schedule and the cosines to the prototypes times `scale` for logits; then each prototype
    becomes the direction of its labels' weighted mean. Last, every embedding goes to its nearest prototype.
    Embeddings are read by blocks of rows, so that a memory map of any size will do; memory is sample_size x
    (n_clusters + d).

    Args:
        x: (n, d) array, memory map or tensor, any float type.
        n_clusters: K, from 2 to the number of samples.
        method: "sp2ot", "p2ot", or "ot": equal clusters, every sample labelled from the first.
        n_iter: steps in which ρ rises to 1.
        rho_start, epsilon, gamma, n_neighbors, scale: as of `SP2OT`; similarity_strength is its
            `similarity_weight`.
        center: take the mean off first.
        sample_size: labelled at a time; all samples where there are no more.
        block_size: rows read at once for the last step.
        seed: of the sample and the first prototypes.
        device: where to work.

    Raises:
        ValueError: an unknown method, K below 2 or above the number of samples, NaN (with the rows), a wrong
            shape.

    Examples:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> labels = np.repeat([0, 1, 2], 20)
        >>> features = np.eye(3)[labels] + 0.1 * rng.normal(size=(60, 3))
        >>> from lightning_modules.transport_clustering import cluster_embeddings
        >>> found = cluster_embeddings(features, 3, method="p2ot")
        >>> len(np.unique(found.assignment))
        3
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: expected one of {METHODS}")
    if len(x.shape) != 2:
        raise ValueError(f"embeddings must be (n, d), got {tuple(x.shape)}")
    n = len(x)
    if not 2 <= n_clusters <= min(n, sample_size):
        raise ValueError(f"n_clusters must lie in 2..{min(n, sample_size)} (the samples), got {n_clusters}")
    if n_iter < 1:
        raise ValueError(f"n_iter must be 1 or more, got {n_iter}")
    generator = np.random.default_rng(seed)
    chosen = np.arange(n) if n <= sample_size else np.sort(generator.choice(n, sample_size, replace=False))
    sample = _rows(x, chosen, device)
    mean = sample.mean(0) if center else torch.zeros_like(sample[0])
    points = F.normalize(sample - mean, dim=1, eps=_eps(sample)).float()
    similarity = gaussian_similarity(sample.float(), n_neighbors=n_neighbors) if method == "sp2ot" else None
    # Random directions, as the classifier begins: seeds among the samples start most prototypes in the head
    # classes.
    prototypes = torch.from_numpy(generator.standard_normal((n_clusters, sample.shape[1]))).to(points)
    prototypes = F.normalize(prototypes, dim=1)
    potentials = None
    for step in range(1, n_iter + 1):
        rho = 1.0 if method == "ot" else rho_start + (1 - rho_start) * math.exp(-5 * (1 - step / n_iter) ** 2)
        cost = -(scale * points @ prototypes.T).log_softmax(1)
        if similarity is None:
            weight = math.inf if method == "ot" else gamma
            result = solve_p2ot(cost, rho, epsilon=epsilon, gamma=weight, potentials=potentials)
        else:
            weight = similarity_weight(similarity_strength, rho, len(points))
            result = solve_sp2ot(
                cost,
                similarity,
                rho,
                weight=weight,
                epsilon=epsilon,
                gamma=gamma,
                max_iter=20,
                tol=1e-5,
                potentials=potentials,
            )
        potentials = result.potentials
        moved = result.plan.T @ points
        # A cluster that got no mass keeps its prototype.
        prototypes = torch.where(moved.norm(dim=1, keepdim=True) > 0, F.normalize(moved, dim=1), prototypes)
    assignment, total = np.empty(n, np.int64), 0.0
    for start in range(0, n, block_size):
        block = _rows(x, np.arange(start, min(start + block_size, n)), device)
        cosine, nearest = (F.normalize(block - mean, dim=1, eps=_eps(block)).float() @ prototypes.T).max(1)
        assignment[start : start + len(block)] = nearest.cpu().numpy()
        total += float((1 - cosine).sum(dtype=torch.float64))
    return TransportClusters(assignment, prototypes.cpu().numpy(), mean.float().cpu().numpy(), total / n)


def similarity_weight(strength: float, rho: float, n: int) -> float:
    """SP²OT's λ for n samples: the paper's strength (1 - ρ), stated for 5120, in proportion to n.

    Plans have rows of 1/n, so the pull of a sample's neighbours on its cost is then the same for any n.
    """
    return strength * (1 - rho) * n / 5120


def _rows(x: Matrix, rows: np.ndarray, device: str | torch.device) -> Tensor:
    """Rows on the device as float32, or as float64 if they are, or their squares would leave float32's range;
    they must be finite.
    """
    block = read_rows(x, rows).to(device)
    finite = torch.isfinite(block).all(1)
    if not bool(finite.all()):
        bad = rows[(~finite).cpu().numpy()]
        raise ValueError(f"embeddings of rows {bad[:10].tolist()} ({len(bad)} in all) hold NaN or infinity")
    largest = float(block.abs().amax()) if block.numel() else 0.0
    return block if not largest or 1e-15 < largest < 1e15 else block.double()


def _eps(rows: Tensor) -> float:
    """The least norm to divide by."""
    return 1e-12 if rows.dtype == torch.float32 else 1e-300
