"""The fused kernel in Triton's interpreter on the CPU, and as compiled for devices that are not here."""

import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from curated_data.clustering.nearest import Centroids
from tests.oracles.clustering import squared_distances

from .test_nearest import KINDS, hard_data

triton = pytest.importorskip("triton")  # comes with torch for Linux
fused = importlib.import_module("curated_data.clustering.fused")

PLACE = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes of shared memory that a program may take


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs_the_kernel = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="runs in Triton's interpreter, or on a CUDA device"
)
compiles_the_kernel = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.mark.long
@compiles_the_kernel
def test_in_the_interpreter():
    """All tests of this file that run the kernel: Triton decides at its import whether to interpret."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "", "-rs", __file__]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "runs in Triton's interpreter" not in done.stdout


@pytest.mark.gpu
@runs_the_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("m", "k", "d"), [(300, 500, 40), (129, 257, 300), (5, 1, 3), (7, 3, 600), (0, 4, 8)]
)
@pytest.mark.parametrize("skipping", [False, True])
def test_finds_what_sorting_all_scores_finds(dtype, m, k, d, skipping):
    generator = torch.Generator().manual_seed(m)
    rows, weight = (torch.randn(count, d, generator=generator).to(dtype) for count in (m, k))
    bias = torch.randn(k, generator=generator)
    skip = torch.randint(-1, k, (m,), generator=generator) if skipping else None
    found = fused.search(
        fused.padded(rows).to(DEVICE),
        fused.padded(weight).to(DEVICE),
        bias.to(DEVICE),
        None if skip is None else skip.to(DEVICE),
    )
    found = [part.cpu() for part in found]

    scores = (bias.double() + rows.double() @ weight.double().T).numpy()
    if skip is not None:
        own = np.where(skip < 0, np.nan, scores[np.arange(m), skip.clamp(min=0)])
        np.testing.assert_allclose(found[3], own, rtol=1e-4, atol=1e-4)
        scores[np.arange(m)[skip >= 0], skip[skip >= 0]] = np.inf
    order = np.sort(np.column_stack([scores, np.full(m, np.inf)]), axis=1)
    np.testing.assert_allclose(found[1], order[:, 0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[2], order[:, 1], rtol=1e-4, atol=1e-4)
    left = np.isfinite(order[:, 0])
    np.testing.assert_array_equal(found[0], np.where(left, scores.argmin(1), -1))


@pytest.mark.gpu
@runs_the_kernel
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("products", ["bf16", "tf32", "bf16x3"])
def test_decides_as_float32(kind, products):
    x, centroids = hard_data(kind)
    x = x[:128]
    index, best, second = Centroids(centroids).two_nearest(x)
    ready = Centroids(centroids.to(DEVICE), products=products, fused=True)
    found, low, next_low = ready.two_nearest(x.to(DEVICE))
    gaps = squared_distances(x.numpy(), centroids.numpy())
    rounding = 2e-6 * (x.square().sum(1).numpy() + centroids.square().sum(1).max().item())
    as_near = gaps[np.arange(len(x)), found] <= gaps.min(1) + rounding
    assert ((found == index) | as_near).all()
    np.testing.assert_allclose(low, best, rtol=1e-5, atol=rounding.max())
    assert (next_low <= second + rounding).all()  # a lower bound
    if kind == "duplicates":
        assert (found % 2 == 0).all()  # the lowest of equal ones
    if kind == "clusters":
        assert ready.n_rechecked < {"bf16": 0.4, "tf32": 0.2, "bf16x3": 0.15}[products] * len(x)


@compiles_the_kernel
@pytest.mark.parametrize("place", PLACE.values())
@pytest.mark.parametrize("item_size", [2, 4])
@pytest.mark.parametrize("d", [16, 64, 96, 128, 192, 256, 384, 768, 2304])
def test_tiles_fit_the_device(d, item_size, place):
    n_rows, n_centroids, n_columns, _, stages = fused.tile_sizes(d, item_size, place)
    held = n_rows * n_columns if n_columns >= d else stages * n_rows * n_columns
    assert item_size * (held + stages * n_centroids * n_columns) <= place
    assert n_columns == triton.next_power_of_2(n_columns)


@compiles_the_kernel
@pytest.mark.parametrize(
    ("architecture", "dtype", "d"),
    [
        (90, "bf16", 256),
        *(
            pytest.param(architecture, dtype, d, marks=pytest.mark.slow)
            for architecture in PLACE
            for dtype in ("bf16", "fp32")
            for d in (64, 128, 256, 768)
        ),
    ],
)
def test_compiles_for_the_tensor_cores(architecture, dtype, d, tmp_path):
    """Without a device: the machine code multiplies on them, and keeps everything in registers."""
    compiled = machine_code(architecture, dtype, d)
    assert compiled.metadata.shared <= PLACE[architecture]
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tools = triton.backends.nvidia.__path__[0] + "/bin/"
    listing = output(tools + "nvdisasm", "-c", tmp_path / "kernel.cubin")
    assert ("HGMMA" if architecture == 90 else "HMMA") in listing
    assert "FFMA" not in listing  # no products outside them
    assert "STACK:0 " in output(tools + "cuobjdump", "-res-usage", tmp_path / "kernel.cubin")


def machine_code(architecture: int, dtype: str, d: int):
    """The kernel compiled as `search` would call it."""
    n_rows, n_centroids, n_columns, warps, stages = fused.tile_sizes(
        d, 2 if dtype == "bf16" else 4, PLACE[architecture] - 2048
    )
    signature = {"rows": f"*{dtype}", "weight": f"*{dtype}", "bias": "*fp32", "skip": "*i64", "index": "*i64"}
    signature |= {"best": "*fp32", "second": "*fp32", "skipped": "*fp32", "m": "i32", "k": "i32", "d": "i32"}
    constants = {"SKIP": False, "HELD": n_columns >= d}
    constants |= {"ROWS": n_rows, "CENTROIDS": n_centroids, "COLUMNS": n_columns}
    aligned = {(place,): [["tt.divisibility", 16]] for place in (*range(8), 10)}
    source = triton.compiler.ASTSource(
        fused._two_nearest, signature | dict.fromkeys(constants, "constexpr"), constants, aligned
    )
    target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target, {"num_warps": warps, "num_stages": stages})


def output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout
