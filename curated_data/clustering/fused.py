"""The two nearest centroids of every row by one kernel, which keeps scores in registers (Triton).

The search over tiles in `curated_data.clustering.nearest` writes each score to the device's memory and reads
it twice. In half precision that takes several times as long as the product. This kernel only writes what it
found, as attention kernels do: a program holds some rows and goes through all centroids, a tile at a time.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

ALIGNMENT = 16  # columns are padded to a multiple of it, so that every row begins at a vector load
_HELD = 256  # rows of at most so many columns are loaded once, longer ones again for each tile of centroids


def search(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    skip: torch.Tensor | None = None,
    tiles: tuple[int, int, int, int, int] | None = None,
) -> tuple[torch.Tensor, ...]:
    """The lowest and second lowest of the scores bias + rows @ weight.T of each row.

    Args:
        rows: (m, d) float32, multiplied in TF32, or bfloat16; contiguous, see `padded`.
        weight: (k, d), likewise.
        bias: (k,) float32.
        skip: (m,) int64, a column to leave out for each row, -1 for none.
        tiles: rows, centroids and columns of a tile, warps, and tiles in flight; None takes `tile_sizes`.

    Returns:
        (m,) int64 column of the lowest score, -1 if none is left, any of equal ones; its score, (m,) float32;
        the second lowest, (m,) float32, inf for none; with `skip` also the score left out, nan for none.
    """
    if rows.device.type != "cuda":  # Triton's interpreter, which reads bfloat16 as integers
        rows, weight = rows.float(), weight.float()
    (m, d), k, device = rows.shape, len(weight), rows.device
    index = torch.empty(m, dtype=torch.int64, device=device)
    best, second, skipped = (torch.empty(m, dtype=torch.float32, device=device) for _ in range(3))
    if m:
        n_rows, n_centroids, n_columns, warps, stages = tiles or tile_sizes(
            d, rows.element_size(), shared_memory(device)
        )
        with torch.cuda.device_of(rows):  # a kernel starts on the current device
            _two_nearest[(triton.cdiv(m, n_rows),)](
                rows, weight, bias, index if skip is None else skip, index, best, second, skipped, m, k, d,
                SKIP=skip is not None, HELD=n_columns >= d,
                ROWS=n_rows, CENTROIDS=n_centroids, COLUMNS=n_columns, num_warps=warps, num_stages=stages,
            )  # fmt: skip
    return (index, best, second) if skip is None else (index, best, second, skipped)


def padded(x: torch.Tensor) -> torch.Tensor:
    """The same products from columns of zeros added up to `ALIGNMENT`; contiguous."""
    return F.pad(x, (0, -x.shape[1] % ALIGNMENT)).contiguous()


def tile_sizes(d: int, item_size: int, shared_memory: int) -> tuple[int, int, int, int, int]:
    """The largest tiles that the shared memory of a multiprocessor, in bytes, has place for.

    By rule, not by trial, so that a run can be repeated on the same kind of device.
    """
    width = max(triton.next_power_of_2(d), 32)
    if d <= _HELD:
        for n_centroids, stages in ((128, 3), (128, 2), (64, 2)):
            if width * item_size * (128 + stages * n_centroids) <= shared_memory:
                return 128, n_centroids, width, 8, stages
    stages = 3 if shared_memory >= 3 * 256 * 128 else 2
    return 128, 128, 128 // item_size, 8, stages


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take, with a little left for the search."""
    if device.type != "cuda":  # Triton's interpreter
        return 227 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin - 2048


@triton.jit
def _two_nearest(
    rows, weight, bias, skip, index, best, second, skipped, m, k, d,
    SKIP: tl.constexpr, HELD: tl.constexpr,
    ROWS: tl.constexpr, CENTROIDS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = at_row < m
    at_centroid = tl.arange(0, CENTROIDS)
    at_column = tl.arange(0, COLUMNS)
    row_pointers = rows + at_row[:, None] * d + at_column[None, :]

    best_at = tl.full((ROWS,), -1, tl.int32)
    lowest = tl.full((ROWS,), float("inf"), tl.float32)
    next_lowest = tl.full((ROWS,), float("inf"), tl.float32)
    left_out = tl.full((ROWS,), float("inf"), tl.float32)
    if SKIP:
        omit = tl.load(skip + at_row, mask=inside, other=-1).to(tl.int32)
    if HELD:
        x = tl.load(row_pointers, mask=inside[:, None] & (at_column[None, :] < d), other=0.0)

    for start in range(0, k, CENTROIDS):
        known = start + at_centroid < k
        weight_pointers = weight + (start + at_centroid)[None, :].to(tl.int64) * d + at_column[:, None]
        if HELD:
            w = tl.load(weight_pointers, mask=known[None, :] & (at_column[:, None] < d), other=0.0)
            scores = tl.dot(x, w, input_precision="tf32")
        else:
            scores = tl.zeros((ROWS, CENTROIDS), tl.float32)
            for step in range(0, d, COLUMNS):
                there = at_column < d - step
                x = tl.load(row_pointers + step, mask=inside[:, None] & there[None, :], other=0.0)
                w = tl.load(weight_pointers + step, mask=known[None, :] & there[:, None], other=0.0)
                scores = tl.dot(x, w, scores, input_precision="tf32")
        scores += tl.load(bias + start + at_centroid, mask=known, other=float("inf"))[None, :]

        if SKIP:
            own = start + at_centroid[None, :] == omit[:, None]
            left_out = tl.minimum(left_out, tl.min(tl.where(own, scores, float("inf")), axis=1))
            scores = tl.where(own, float("inf"), scores)
        low, at = tl.min(scores, axis=1, return_indices=True)
        next_low = tl.min(tl.where(at_centroid[None, :] == at[:, None], float("inf"), scores), axis=1)
        better = low < lowest
        next_lowest = tl.minimum(tl.minimum(next_lowest, next_low), tl.where(better, lowest, low))
        best_at = tl.where(better, start + at, best_at)
        lowest = tl.where(better, low, lowest)

    tl.store(index + at_row, best_at, mask=inside)
    tl.store(best + at_row, lowest, mask=inside)
    tl.store(second + at_row, next_lowest, mask=inside)
    if SKIP:
        tl.store(skipped + at_row, tl.where(omit < 0, float("nan"), left_out), mask=inside)
