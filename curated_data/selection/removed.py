"""The samples removed before clustering, as copies of other samples or of held-out ones."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from curated_data.cache import read_array, read_manifest
from curated_data.errors import CacheError
from curated_data.layout import NEAR_DUPLICATES


@dataclass(frozen=True)
class Removed:
    """Near-duplicates in a pool of n samples, as stored in the cache.

    Attributes:
        keep: (n,) bool, whether the sample was kept.
        near: (n,) int64, the kept sample that a removed one is a copy of; -1 for samples that were kept
            themselves, were not compared, or are copies of held-out ones.
        held_out: (n,) int64, the sample of the held-out pool that it is a copy of, -1 for none.
        cosine: (n,) float32, with the one that it is a copy of; NaN for none.
    """

    keep: np.ndarray
    near: np.ndarray
    held_out: np.ndarray
    cosine: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> "Removed":
        """Read from the folder of a near-duplicates artifact.

        Raises:
            CacheError: it is missing or damaged, or an earlier version wrote it.
        """
        manifest = read_manifest(folder, NEAR_DUPLICATES)
        if "near.npy" not in manifest["files"]:
            raise CacheError(
                f"{folder}: an earlier version wrote it, and did not record what each sample is a copy of; "
                "run the curation again"
            )
        keep = read_array(folder, "keep", manifest, dtype=bool, shape=(None,))
        near, cosine = (
            read_array(folder, name, manifest, dtype=dtype, shape=keep.shape)
            for name, dtype in (("near", np.int64), ("cosine", np.float32))
        )
        if "held_out.npy" not in manifest["files"]:
            return cls(keep, near, np.broadcast_to(np.int64(-1), keep.shape), cosine)
        return cls(
            keep, near, read_array(folder, "held_out", manifest, dtype=np.int64, shape=keep.shape), cosine
        )

    def save(self, folder: Path) -> None:
        """Write the arrays, before the folder's manifest; `held_out` only if there are matches."""
        for name in ("keep", "near", "cosine"):
            np.save(folder / f"{name}.npy", getattr(self, name))
        if (self.held_out >= 0).any():
            np.save(folder / "held_out.npy", self.held_out)
