"""SP²OT's similarity of samples (arXiv 2404.03446): a Gaussian kernel, kept for the nearest ones alone."""

import math
import warnings

import torch
from torch import Tensor

# An (N, N) tensor, dense or sparse, or the neighbours' (N, k) indices and weights.
Similarity = Tensor | tuple[Tensor, Tensor]


@torch.no_grad()
def gaussian_similarity(
    features: Tensor, *, n_neighbors: int = 20, bandwidth: float = 2.0, block_size: int = 4096
) -> tuple[Tensor, Tensor]:
    """SP²OT's similarity: exp(-||x - y||² / (2 bandwidth² d)) to each sample's nearest neighbours.

    Args:
        features: (N, d) float, not normalised, on any device; the work is done there in blocks of rows.
        n_neighbors: entries kept per row; N - 1 where the set is smaller.
        bandwidth: of the kernel, in units of sqrt(d).
        block_size: rows compared with all others at once.

    Returns:
        (N, n_neighbors) int64 indices, nearest first, and (N, n_neighbors) float32 weights.

    Raises:
        ValueError: fewer than two samples, a wrong shape, NaN.

    Examples:
        >>> import torch
        >>> from lightning_modules.transport import gaussian_similarity
        >>> features = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
        >>> neighbors, weights = gaussian_similarity(features, n_neighbors=10)
        >>> neighbors.shape, weights.shape
        (torch.Size([100, 10]), torch.Size([100, 10]))
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be (N, d) with N of 2 or more, got shape {tuple(features.shape)}")
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features hold NaN or infinity; drop those samples first")
    x = features.float()
    x = x - x.mean(0)  # distances stay; the squared norms that cancel below become small
    n, dimension = x.shape
    n_neighbors = min(n_neighbors, n - 1)
    squared = (x * x).sum(1)
    indices = torch.empty(n, n_neighbors, dtype=torch.int64, device=x.device)
    weights = torch.empty(n, n_neighbors, device=x.device)
    for start in range(0, n, block_size):
        rows = slice(start, min(start + block_size, n))
        with torch.autocast(x.device.type, enabled=False):  # halves cannot tell near ones apart
            distance = torch.addmm(squared[None, :] + squared[rows, None], x[rows], x.T, alpha=-2)
        own = torch.arange(rows.start, rows.stop, device=x.device)
        distance[own - start, own] = math.inf
        nearest, indices[rows] = distance.topk(n_neighbors, dim=1, largest=False)
        weights[rows] = torch.exp(-nearest.clamp_min_(0) / (2 * bandwidth**2 * dimension))
    return indices, weights


def symmetrised(similarity: Similarity, n: int) -> Tensor:
    """S + Sᵀ as a CSR tensor."""
    if isinstance(similarity, tuple | list):
        indices, weights = (torch.as_tensor(part) for part in similarity)
        if indices.shape != weights.shape or indices.ndim != 2 or len(indices) != n:
            raise ValueError(
                f"similarity's indices {tuple(indices.shape)} and weights {tuple(weights.shape)} must be "
                f"(N, k) both, with N = {n}, the cost's number of samples"
            )
        rows = torch.arange(n, device=indices.device)[:, None].expand_as(indices)
        kept = indices >= 0
        rows, columns, weights = rows[kept], indices[kept].long(), weights[kept]
        if len(columns) and int(columns.max()) >= n:
            raise ValueError(f"similarity names sample {int(columns.max())}, but there are only N = {n}")
    elif isinstance(similarity, Tensor):
        if tuple(similarity.shape) != (n, n):
            raise ValueError(f"similarity is {tuple(similarity.shape)}, the cost asks for ({n}, {n})")
        coordinates = similarity if similarity.layout == torch.sparse_coo else similarity.to_sparse_coo()
        coordinates = coordinates.coalesce()
        rows, columns = coordinates.indices()
        weights = coordinates.values()
    else:
        raise TypeError(f"similarity must be a tensor or a pair of arrays, got {type(similarity).__name__}")
    if not bool(torch.isfinite(weights).all()):
        raise ValueError("similarity holds NaN or infinity")
    both = torch.stack([torch.cat([rows, columns]), torch.cat([columns, rows])])
    weights = torch.cat([weights, weights])
    weights = weights if weights.is_floating_point() else weights.float()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR")  # torch's note that the layout is in beta
        return (
            torch.sparse_coo_tensor(both, weights, (n, n), check_invariants=False).coalesce().to_sparse_csr()
        )
