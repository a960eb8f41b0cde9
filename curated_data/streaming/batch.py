"""Collating samples to a batch."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from curated_data.errors import ConfigError
from curated_data.streaming.encoded import EncodedImages
from curated_data.streaming.envelopes import LoadedBatch
from curated_data.streaming.fields import BESIDE_IMAGES, MISSING
from curated_data.streaming.statistics import BatchReport


def collate(loaded: LoadedBatch) -> tuple[dict[str, Any], BatchReport]:
    """Collate samples to a batch: tensors and numbers to tensors; captions, metadata and members to lists.

    Outputs of custom decoders that are tensors, arrays or numbers become one tensor; of other types, or if a
    sample of the batch lacks its own, they are a list, with None where one is missing.

    Args:
        loaded: as `PoolDataset` gives it.

    Raises:
        ConfigError: samples differ in the number or shapes of their views, or in what they hold.
    """
    samples = loaded.samples
    names = dict.fromkeys(name for sample in samples for name in sample)
    batch: dict[str, Any] = {}
    for name in names:
        missing = MISSING.get(name)
        values = [sample.get(name, missing) for sample in samples]
        if name in ("image", "views", "array"):
            _check_alike(name, samples)
        if name == "views":
            views = zip(*values, strict=True)
            batch[name] = [_stack(f"views[{number}]", view) for number, view in enumerate(views)]
        elif name == "encoded":
            batch[name] = EncodedImages(values)
        elif all(isinstance(value, Tensor | np.ndarray) for value in values):
            batch[name] = _stack(name, values)
        elif name in ("sample_id", "source", "label", "view_seed"):
            batch[name] = torch.tensor(values, dtype=torch.int64)
        elif name == "padding":
            batch[name] = torch.tensor(values, dtype=torch.bool)
        elif name not in BESIDE_IMAGES and all(isinstance(value, int | float) for value in values):
            batch[name] = torch.tensor(values)
        else:
            batch[name] = values
    return batch, loaded.report


def as_views(views: Any, source: str) -> Tensor | list[Tensor]:
    """What a function of views gave, as one tensor or a list of tensors.

    Args:
        views: a tensor, an array, or a list, tuple or iterator of these.
        source: of the views, for the error.

    Raises:
        ConfigError: it is something else, or there is no view.
    """
    if isinstance(views, Tensor):
        return views
    if isinstance(views, np.ndarray):
        return _of_array(views, source)
    if isinstance(views, list | tuple | Iterator):
        found = list(views)
        if not found:
            raise ConfigError(f"{source}: gave no view, expected a tensor or a list of tensors")
        for number, view in enumerate(found):
            if not isinstance(view, Tensor | np.ndarray):
                raise ConfigError(
                    f"{source}: gave a list whose item {number} is a {type(view).__name__}, expected tensors"
                )
        return [v if isinstance(v, Tensor) else _of_array(v, source) for v in found]
    raise ConfigError(f"{source}: gave a {type(views).__name__}, expected a tensor or a list of tensors")


def _of_array(array: np.ndarray, source: str) -> Tensor:
    try:
        return torch.as_tensor(array.copy())  # torch takes neither negative strides nor read-only memory
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: gave an array of {array.dtype}, expected numbers") from error


def _check_alike(name: str, samples: Sequence[dict[str, Any]]) -> None:
    """Check that all samples have a field, and as many views."""
    first = samples[0]
    for sample in samples:
        if (name in first) != (name in sample):
            there, lacking = (first, sample) if name in first else (sample, first)
            raise ConfigError(
                f"{name}: sample {there['sample_id']} has it and sample {lacking['sample_id']} of the same "
                f"batch has {_content(lacking)}; a batch takes samples of one kind"
            )
        if name == "views" and len(sample[name]) != len(first[name]):
            raise ConfigError(
                f"views: gave {len(first[name])} for sample {first['sample_id']} and {len(sample[name])} for "
                f"sample {sample['sample_id']} of the same batch, expected as many for all"
            )


def _content(sample: dict[str, Any]) -> str:
    return ", ".join(name for name in ("image", "views", "array", "text") if name in sample) or "none"


def _tensor(value: Tensor | np.ndarray) -> Tensor:
    """A tensor; of an array that cannot be written, such as one over a member's bytes, a copy."""
    writable = not isinstance(value, np.ndarray) or value.flags.writeable
    return torch.as_tensor(value if writable else np.array(value))


def _stack(name: str, tensors: Sequence[Tensor | np.ndarray]) -> Tensor:
    tensors = [_tensor(tensor) for tensor in tensors]
    shapes = {tensor.shape for tensor in tensors}
    if len(shapes) > 1:
        found = sorted(map(tuple, shapes))[:4]
        raise ConfigError(
            f"{name}: cannot be stacked to a batch, shapes differ: {found}; resize or crop, or "
            "have the decoder give a list of what varies"
        )
    return default_collate(tensors)  # into shared memory, if this is a worker
