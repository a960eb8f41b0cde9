"""Curate multi-band arrays other than photographs: satellite bands, microscopy channels, spectrograms.

    uv run recipes/multiband_curation.py FOLDER --target-size 10000                  # FOLDER/**/*.npy
    uv run recipes/multiband_curation.py 's2-{000..199}.tar' --target-size 100000 --grid 8

Takes a folder of `.npy` arrays (C, H, W), float or integer, of any height and width but with the same number
of bands (its sub-folders are classes), or shards with `.npy` members. The features of an array are statistics
of its bands and their means over a coarse grid, standardised over a sample of the pool, so that no unit
outweighs another. They capture brightness, colour, contrast and layout, but not objects: if a network trained
on such bands exists, call `curate` with that network and its own `preprocess` instead.

Time: about 300 arrays of 13 x 64 x 64 per second and CPU core.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curated_data import ShardPool, ShardWriter
from curated_data.cache.artifacts import build_once, fingerprint, open_cache, write_manifest
from curated_data.errors import EmbedderError, PoolError, SampleError
from curated_data.pool.decode import decode_array
from curated_data.programs import (
    add_selection_options,
    described_parser,
    print_comparison,
    report_errors,
    walk_by_options,
)
from curated_data.progress import progress
from curated_data.report.comparison import Row

log = logging.getLogger("multiband_curation")

QUANTILES = (0.02, 0.25, 0.5, 0.75, 0.98)
N_FITTED = 2000
"""Samples, evenly spread over the pool, from which features are standardised."""


def main(arguments: list[str] | None = None) -> int:
    """Write shards if given a folder, curate, compare; returns the exit status."""
    parser = described_parser(__doc__)
    parser.add_argument("source", nargs="+", help="a folder of .npy files, or shards")
    parser.add_argument("--grid", type=int, default=4, help="cells per side (default: %(default)s)")
    add_selection_options(parser, "arrays")
    options = parser.parse_args(arguments)
    return report_errors("multiband_curation", lambda: print_comparison(run(options), "arrays"))


def run(options: argparse.Namespace) -> dict[str, Row]:
    """Curate; returns the rows of the table."""
    root = open_cache(options.cache_dir)
    folder = Path(options.source[0])
    is_folder = len(options.source) == 1 and folder.is_dir()
    pool = ShardPool(write_shards(folder, root) if is_folder else options.source, cache_dir=root)
    return walk_by_options(pool, BandEmbedder.fit(pool, grid=options.grid), options)


def band_features(array: Any, n_bands: int, grid: int) -> Tensor:
    """Mean, deviation and quantiles of each band, and its means over `grid` x `grid` cells.

    Non-finite pixels have no data, and are replaced by the median of their band.

    Args:
        array: (C, H, W) numbers.
        n_bands: the required C.
        grid: cells per side.

    Returns:
        (C * (2 + 5 + grid²),) float32.

    Raises:
        SampleError: another shape, a dtype that is not numeric, or a band without finite pixels.
    """
    if array.ndim != 3 or array.shape[0] != n_bands or not array.size:
        raise SampleError(f"has shape {array.shape}, expected ({n_bands}, H, W)")
    if not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)):
        raise SampleError(f"holds {array.dtype}, expected integers or floats")
    bands = torch.from_numpy(np.ascontiguousarray(array, np.float32))
    flat = bands.flatten(1)
    finite = flat.isfinite()
    if not finite.any(dim=1).all():
        empty = (~finite.any(dim=1)).nonzero()[0].item()
        raise SampleError(f"band {empty} has no finite pixel")
    if not finite.all():
        median = torch.where(finite, flat, torch.nan).nanmedian(dim=1, keepdim=True).values
        flat = torch.where(finite, flat, median)
    quantiles = np.quantile(flat.numpy(), QUANTILES, axis=1).astype(np.float32)
    cells = nn.functional.adaptive_avg_pool2d(flat.view_as(bands), grid)
    parts = (flat.mean(1), flat.std(1, correction=0), torch.from_numpy(quantiles).flatten(), cells.flatten())
    return torch.cat(parts)


class BandEmbedder(nn.Module):
    """`band_features`, standardised, as an embedder.

    Args:
        n_bands: of every array.
        grid: cells per side.
        mean, scale: (dimension,) of each feature over the pool.
    """

    name = "bands"
    mean: Tensor
    scale: Tensor

    def __init__(self, n_bands: int, grid: int, mean: Tensor, scale: Tensor):
        super().__init__()
        self.n_bands, self.grid = n_bands, grid
        self.dimension = len(mean)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.fingerprint = fingerprint(
            embedder="bands", bands=n_bands, grid=grid, mean=mean.numpy(), scale=scale.numpy(), version=1
        )

    @classmethod
    def fit(cls, pool: ShardPool, *, grid: int = 4) -> "BandEmbedder":
        """Take the number of bands from the first readable array, and the scale from all over the pool.

        Raises:
            PoolError: none of these samples can be used; names the first reason.
        """
        if grid < 1:
            raise EmbedderError(f"grid={grid}: give at least one cell per side")
        ids = np.unique(np.linspace(0, len(pool) - 1, N_FITTED).astype(np.int64))
        features: list[Tensor] = []
        n_bands, reason = 0, ""
        for block in np.array_split(ids, -(-len(ids) // 64)):
            for sample in pool.read(block):
                try:
                    if "npy" not in sample:
                        has = ", ".join(name for name in sample if not name.startswith("__"))
                        raise SampleError(f"no .npy member; it has {has}")
                    array = decode_array(sample["npy"])
                    features.append(band_features(array, n_bands or len(np.atleast_1d(array)), grid))
                    n_bands = n_bands or len(array)
                except SampleError as error:  # counted when the pool is embedded
                    reason = reason or f"{sample['__url__']}, key {sample['__key__']!r}: {error}"
        if not features:
            raise PoolError(f"no array to take the scale of bands from; {reason}")
        stacked = torch.stack(features).double()
        scale = stacked.std(0, correction=0)
        scale[scale <= 1e-6 * stacked.abs().amax(0)] = torch.inf  # constant up to rounding: no information
        log.info("%d bands, scaled by %d samples", n_bands, len(features))
        return cls(n_bands, grid, stacked.mean(0).float(), scale.float())

    def preprocess(self, array: Any) -> Tensor:
        """An array (C, H, W) to its features, not yet standardised."""
        if not isinstance(array, np.ndarray):
            raise EmbedderError(
                f"the embedder of bands takes .npy members, the pool gave a {type(array).__name__}; "
                "give a pool without images or text"
            )
        return band_features(array, self.n_bands, self.grid)

    def forward(self, batch: Tensor) -> Tensor:
        """(B, dimension), standardised; a feature that is constant over the pool gives 0."""
        return (batch - self.mean) / self.scale


def write_shards(folder: Path, root: Path) -> list[Path]:
    """A folder's `.npy` files as shards in the cache; its sub-folders are classes, sorted by name.

    Files are identified by name, size and modification time. Their bytes are copied unchanged; damaged ones
    are found, counted and excluded when the pool is embedded.

    Raises:
        PoolError: no `.npy` file below the folder.
    """
    files = sorted(path for path in folder.rglob("*.npy") if path.is_file())
    if not files:
        raise PoolError(f"{folder}: no .npy file in this folder or below it")
    places = [path.relative_to(folder) for path in files]
    classes = sorted({place.parts[0] for place in places if len(place.parts) > 1})
    stats = [path.stat() for path in files]
    name = fingerprint(
        folder=str(folder.resolve()),
        files=[
            [str(place), stat.st_size, stat.st_mtime_ns] for place, stat in zip(places, stats, strict=True)
        ],
    )

    def build(target: Path) -> None:
        with (
            ShardWriter(target / "bands-%06d.tar") as writer,
            progress("shards", len(files), "arrays") as advance,
        ):
            for number, (path, place) in enumerate(zip(files, places, strict=True)):
                label = {"cls": classes.index(place.parts[0])} if len(place.parts) > 1 else {}
                sample = {"__key__": f"{number:09d}", "npy": path.read_bytes(), "json": {"file": str(place)}}
                writer.write(sample | label)
                advance(1)
        write_manifest(target, "band_pool", {"inputs": {"folder": str(folder)}, "classes": classes})
        log.info("%s: %d arrays of %d classes", folder, len(files), len(classes))

    target, _ = build_once(root / "band_pool" / name, build)
    return sorted(target.glob("bands-*.tar"))


if __name__ == "__main__":
    sys.exit(main())
