"""Collating samples to a batch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from curated_data.errors import ConfigError
from curated_data.streaming.encoded import EncodedImages
from curated_data.streaming.fields import MISSING
from curated_data.streaming.statistics import BatchReport


class LoadedSamples(list):
    """The samples of a batch before collation, with the report on them."""

    report: BatchReport


def collate(samples: list[dict[str, Any]]) -> tuple[dict[str, Any], BatchReport]:
    """Collate samples to a batch: tensors and numbers to tensors; captions, metadata and members to lists.

    Args:
        samples: `LoadedSamples`, as `PoolDataset` gives them.

    Raises:
        ConfigError: views of different shapes.
    """
    assert isinstance(samples, LoadedSamples)
    names = dict.fromkeys(name for sample in samples for name in sample)
    batch: dict[str, Any] = {}
    for name in names:
        missing = MISSING.get(name)
        values = [sample.get(name, missing) for sample in samples]
        if name == "views":
            batch[name] = [_stack(name, view) for view in zip(*values, strict=True)]
        elif name == "encoded":
            batch[name] = EncodedImages(values)
        elif isinstance(values[0], Tensor | np.ndarray):
            batch[name] = _stack(name, values)
        elif name in ("sample_id", "label", "view_seed"):
            batch[name] = torch.tensor(values, dtype=torch.int64)
        elif name == "padding":
            batch[name] = torch.tensor(values, dtype=torch.bool)
        else:
            batch[name] = values
    return batch, samples.report


def _stack(name: str, tensors: Sequence[Tensor | np.ndarray]) -> Tensor:
    tensors = [torch.as_tensor(tensor) for tensor in tensors]
    shapes = {tensor.shape for tensor in tensors}
    if len(shapes) > 1:
        found = sorted(map(tuple, shapes))[:4]
        raise ConfigError(f"{name}: cannot be stacked to a batch, shapes differ: {found}; resize or crop")
    return default_collate(tensors)  # into shared memory, if this is a worker
