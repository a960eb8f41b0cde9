"""Sending a batch from a worker to the training process.

A tensor is sent as a file descriptor over a socket, which takes about a millisecond. That is fine for images,
but far too slow for sixty-four labels, which go through the pipe instead.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

_SMALL = 64 << 10  # bytes, the largest tensor that goes through the pipe
_PLAIN = (torch.int64, torch.bool)  # ids, labels, padding marks


class WorkerCollate:
    """Wraps a collate function for workers; the parent receives what `collate` returned.

    Args:
        collate: maps samples to a batch (a dict) and a report on it.
    """

    def __init__(self, collate: Callable[[Any], tuple[dict[str, Any], Any]]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> Any:
        batch, report = self.collate(samples)
        return (batch, report) if get_worker_info() is None else _Sent(batch, report)


class _Sent:
    """A batch in transit: pickled in a worker, it arrives as (batch, report)."""

    def __init__(self, batch: dict[str, Any], report: Any) -> None:
        self.report = report
        self.in_band = [
            name
            for name, value in batch.items()
            if isinstance(value, Tensor) and value.dtype in _PLAIN and value.nbytes <= _SMALL
        ]
        self.batch = batch | {name: batch[name].numpy() for name in self.in_band}

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (self.batch, self.report, self.in_band)


def _received(batch: dict[str, Any], report: Any, in_band: list[str]) -> tuple[dict[str, Any], Any]:
    for name in in_band:
        batch[name] = torch.from_numpy(batch[name])
    return batch, report
