"""The samples removed before clustering, as copies of other samples or of held-out ones."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from curated_data.cache import read_array, read_manifest


@dataclass(frozen=True)
class Removed:
    """Near-duplicates in a pool of n samples, as stored in the cache.

    Attributes:
        keep: (n,) bool, whether the sample was kept.
        group: (n,) int64, the smallest id of the sample's group of copies, -1 if it was not compared.
        held_out: (n,) int64, the sample of the held-out pool that it is a copy of, -1 for none.
    """

    keep: np.ndarray
    group: np.ndarray
    held_out: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> "Removed":
        """Read from the folder of a near-duplicates artifact.

        Raises:
            CacheError: it is missing or damaged.
        """
        manifest = read_manifest(folder, "near_duplicates")
        keep, group = (read_array(folder, name, manifest) for name in ("keep", "group"))
        if "held_out.npy" not in manifest["files"]:
            return cls(keep, group, np.broadcast_to(np.int64(-1), keep.shape))
        return cls(keep, group, read_array(folder, "held_out", manifest))

    def save(self, folder: Path) -> None:
        """Write the arrays, before the folder's manifest; `held_out` only if there are matches."""
        np.save(folder / "keep.npy", self.keep)
        np.save(folder / "group.npy", self.group)
        if (self.held_out >= 0).any():
            np.save(folder / "held_out.npy", self.held_out)

    def copy_of(self, ids: np.ndarray) -> np.ndarray:
        """(m,) int64: for each of the ids (m,), the sample that was kept in its place; -1 for samples that
        were kept themselves, were not compared, or are copies of held-out ones.
        """
        stayed = np.full(len(self.keep), -1, np.int64)
        kept = np.flatnonzero(self.keep & (self.group >= 0))
        stayed[self.group[kept]] = kept
        left = ~self.keep[ids] & (self.group[ids] >= 0) & (self.held_out[ids] < 0)
        return np.where(left, stayed[self.group[ids]], -1)
