"""Labels from outside the pool."""

import numpy as np

from curated_data.errors import ConfigError


class SampleLabels:
    """Labels for some samples of a pool, or for all.

    Args:
        ids: (n,) int64 samples; None: the whole pool.
        labels: (n,) integers.

    Raises:
        ConfigError: not one label per id, or two different labels for one id.
    """

    def __init__(self, ids: np.ndarray | None, labels: np.ndarray) -> None:
        labels = np.asarray(labels)
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or (ids is not None and len(ids) != len(labels)):
            wanted = "one integer per sample" if ids is None else f"{len(ids)} integers, one per id"
            raise ConfigError(f"labels: expected {wanted}, found {labels.dtype} of shape {labels.shape}")
        self.ids, self.labels = ids, labels.astype(np.int64)
        if ids is not None:
            self.ids, first, place = np.unique(ids, return_index=True, return_inverse=True)
            differing = np.flatnonzero(labels != labels[first][place])
            if len(differing):
                raise ConfigError(f"labels: sample {ids[differing[0]]} is selected twice with two labels")
            self.labels = self.labels[first]

    def of(self, ids: np.ndarray) -> np.ndarray:
        """The label of each sample, (m,) int64.

        Raises:
            ConfigError: a sample has no label.
        """
        places = ids if self.ids is None else np.searchsorted(self.ids, ids)
        known = places < len(self.labels)
        if self.ids is not None and known.all():
            known = self.ids[places] == ids
        if not known.all():
            raise ConfigError(f"labels: sample {ids[~known][0]} has none; give one for each that is streamed")
        return self.labels[places]
