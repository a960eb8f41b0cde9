"""k-means on an accelerator, and who is ahead.

    python -m benchmarks.kmeans gpu

Assignments on the same rows: ours; faiss on the GPU; and flash-kmeans's fused kernel where it can be imported
(`pip install flash-kmeans`). Then seeding, against that by cells on the CPU; reading ahead: rows in host
memory, read in blocks, against the transfers and the work one after the other; a whole k-means; and a tree.

Without a device the program itself can be tried: `gpu("cpu", shrink=500)`.
"""

import functools
import time
from collections.abc import Callable

import numpy as np
import torch

from curated_data.clustering import Level, hierarchical_kmeans, kmeans
from curated_data.clustering.kmeans import full_precision, prepare
from curated_data.clustering.nearest import Centroids
from curated_data.clustering.rows import BLOCK, blocks
from curated_data.clustering.seeding import greedy_kmeans_plus_plus

SHAPES = ((500_000, 10_000, 256), (200_000, 50_000, 768), (1_000_000, 1_000, 64))
STREAMED = (4_000_000, 256, 4_000)
WHOLE = (1_000_000, 256, 5_000)
TREE = (100_000, 256, (5_000, 1_000), (10, 3))
PRODUCTS = ("float32", "tf32", "bf16")  # in which peers multiply


def gpu(device: str = "cuda", shrink: int = 1) -> None:
    """All of it; `shrink` divides numbers of rows and centroids, to try the program without a device."""
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu: skipped, no CUDA device here")
        return
    peak = {products: product_rate(products, device, 8192 // min(shrink, 32)) for products in PRODUCTS}
    print("one large product, TFLOP/s: " + ", ".join(f"{name} {rate:.1f}" for name, rate in peak.items()))
    for n, k, d in SHAPES:
        assignments(n // shrink, k // shrink, d, device, peak)
    seeding(*(size // shrink for size in (WHOLE[0] // 10, WHOLE[2])), WHOLE[1], device)
    read_ahead(*(size // shrink for size in STREAMED[:1]), *STREAMED[1:], device)
    whole(shrink, device)


def whole(shrink: int, device: str) -> None:
    """A k-means and a tree."""
    n, d, k = WHOLE
    x, _ = clusters(n // shrink, k // shrink, d, "cpu")
    one = functools.partial(kmeans, x.numpy(), k // shrink, seed=0, device=device)
    n, d, levels, sample_sizes = TREE
    y, _ = clusters(n // shrink, levels[0] // shrink, d, "cpu")
    sizes = [Level(k // shrink or 1, 10, r) for k, r in zip(levels, sample_sizes, strict=True)]
    tree = functools.partial(hierarchical_kmeans, y.numpy(), sizes, seed=0, device=device)
    print(f"k-means of {len(x)} x {d}, k = {k // shrink}, and tree of {len(y)} x {d}, levels {levels}")
    result, seconds = timed(one, device)
    print(
        f"  {seconds:.2f} s, {result.n_iter} iterations, inertia {result.inertia:.6g}; "
        f"tree {timed(tree, device)[1]:.2f} s"
    )


def clusters(n: int, k: int, d: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of an overlapping mixture around a few far centres, and centroids near its components' centres."""
    generator = torch.Generator(device).manual_seed(0)
    draw = {"generator": generator, "device": device}
    centres = torch.randn(50, d, **draw)[torch.randint(50, (k,), **draw)]
    centres += 0.6 / d**0.5 * torch.randn(k, d, **draw)
    x = centres[torch.randint(k, (n,), **draw)]
    x += 0.25 * torch.randn(n, d, **draw)
    return x, centres + 0.05 * torch.randn(k, d, **draw)


@full_precision()
def assignments(n: int, k: int, d: int, device: str, peak: dict[str, float]) -> None:
    """One assignment by each, with its rate, share of the product's own peak, and agreement with float32."""
    x, centroids = clusters(n, k, d, device)
    print(f"assignment {n} x {d} to {k}")
    ready = Centroids(centroids)
    expected = ready.nearest(x)
    peers: dict[str, tuple[Callable[[], np.ndarray], str]] = {"ours": (lambda: ready.nearest(x), "float32")}
    peers |= other_peers(x, centroids)
    for name, (run, products) in peers.items():
        try:
            found = run()
        except Exception as error:  # a peer's failure is a line of the table, not the end of it
            print(f"  {name:34} failed: {str(error).splitlines()[0]}")
            continue
        seconds = float(np.median([timed(run, device)[1] for _ in range(5)]))
        rate = 2 * n * k * d / seconds / 1e12
        print(
            f"  {name:34} {1e3 * seconds:8.1f} ms {rate:7.1f} TFLOP/s, "
            f"{rate / peak[products]:4.0%} of its peak, {(found == expected).mean():.4%} as float32"
        )


def other_peers(x: torch.Tensor, centroids: torch.Tensor) -> dict[str, tuple[Callable[[], np.ndarray], str]]:
    """The peers that are there."""
    peers: dict[str, tuple[Callable[[], np.ndarray], str]] = {}
    try:
        import faiss
        import faiss.contrib.torch_utils

        resources = faiss.StandardGpuResources()
        peers["faiss.knn_gpu, 1"] = (
            lambda: faiss.knn_gpu(resources, x, centroids, 1)[1][:, 0].cpu().numpy(), "float32"
        )  # fmt: skip
    except (ImportError, AttributeError) as error:
        print(f"  faiss on the GPU: not there ({error})")
    try:
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton

        for dtype, products in ((torch.float32, "tf32"), (torch.float16, "bf16")):
            rows, centres = x.to(dtype)[None], centroids.to(dtype)[None]
            norms = x.square().sum(1)[None]
            peers[f"flash-kmeans, {dtype}"] = (
                lambda rows=rows, centres=centres, norms=norms: (
                    euclid_assign_triton(rows, centres, norms)[0].long().cpu().numpy()
                ),
                products,
            )
    except ImportError as error:
        print(f"  flash-kmeans: not there ({error})")
    return peers


@full_precision()
def seeding(n: int, k: int, d: int, device: str) -> None:
    """Greedy k-means++ of rows on the device, and by cells on all of the machine's cores."""
    x, _ = clusters(n, k, d, "cpu")
    settings = {"metric": "l2", "valid": None, "nonfinite": "raise", "max_memory": None}
    for name in (device, "cpu"):
        rows = prepare(x, device=name, **settings).hold()
        choose = functools.partial(greedy_kmeans_plus_plus, rows, k, np.random.default_rng(0))
        choose()
        seconds = float(np.median([timed(choose, name)[1] for _ in range(3)]))
        print(f"seeding {k} of {n} x {d} on {name}: {seconds:.2f} s")


@full_precision()
def read_ahead(n: int, d: int, k: int, device: str) -> None:
    """Rows in host memory that are not held: transfers, work, one after the other, and overlapped."""
    x = np.random.default_rng(0).standard_normal((n, d), dtype=np.float32)
    settings = {"metric": "l2", "device": device, "valid": None, "nonfinite": "raise"}
    rows = prepare(x, max_memory=3 << 20, **settings)
    held = prepare(x, max_memory=3 * 4 * n * d, **settings).hold()
    ready, size = Centroids(held.take(np.arange(k))), BLOCK * 16
    pieces = list(blocks(n, size))
    found = {}
    for name, run in {
        "transfers alone": lambda: [rows.block(a, b) for a, b in pieces][-1].sum().item(),
        "work alone": lambda: held.map(lambda a, b, block: ready.nearest(block), size),
        "one after the other": lambda: [ready.nearest(rows.block(a, b)) for a, b in pieces],
        "read ahead": lambda: rows.map(lambda a, b, block: ready.nearest(block), size),
    }.items():
        run()
        found[name] = float(np.median([timed(run, device)[1] for _ in range(3)]))
    print(
        f"{n} x {d} in host memory to {k}: "
        + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found.items())
    )


@full_precision()
def product_rate(products: str, device: str, n: int) -> float:
    """TFLOP/s of one large product."""
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    if products == "bf16":
        a, b = a.bfloat16(), b.bfloat16()
    torch.set_float32_matmul_precision("high" if products == "tf32" else "highest")
    torch.mm(a, b)
    seconds = float(np.median([timed(lambda: torch.mm(a, b), device)[1] for _ in range(5)]))
    return 2 * n**3 / seconds / 1e12


def timed(run: Callable[[], object], device: str) -> tuple[object, float]:
    """A result and its seconds, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - began
