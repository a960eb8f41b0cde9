"""Labels from outside the pool."""

import numpy as np
import torch

from curated_data.errors import ConfigError


class SampleLabels:
    """Labels for some samples of a pool, or for all.

    They are kept as tensors, which spawned workers share, where each would get a copy of an array.

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
        self._ids = None
        if ids is not None:
            unique, first, place = np.unique(ids, return_index=True, return_inverse=True)
            differing = np.flatnonzero(labels != labels[first][place])
            if len(differing):
                raise ConfigError(f"labels: sample {ids[differing[0]]} is selected twice with two labels")
            self._ids, labels = torch.from_numpy(unique.astype(np.int64)), labels[first]
        self._labels = torch.from_numpy(labels.astype(np.int64))

    def of(self, ids: np.ndarray) -> np.ndarray:
        """The label of each sample, (m,) int64.

        Raises:
            ConfigError: a sample has no label.
        """
        labels = self._labels.numpy()
        own = None if self._ids is None else self._ids.numpy()
        places = ids if own is None else np.searchsorted(own, ids)
        known = places < len(labels)
        if own is not None and known.all():
            known = own[places] == ids
        if not known.all():
            raise ConfigError(f"labels: sample {ids[~known][0]} has none; give one for each that is streamed")
        return labels[places]
