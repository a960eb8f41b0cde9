"""What goes to a dataset for one batch, and what comes back: from the batch sampler to `collate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from curated_data.streaming.statistics import BatchReport


@dataclass(frozen=True)
class BatchRequest:
    """One rank's samples of a global batch.

    Attributes:
        ids: of the samples.
        epoch: that the ids belong to; it seeds the views, together with the positions.
        positions: (b,) int64, in the order of the epoch; None: the ids themselves.
        spares: (b, s) int64 ids to try in order if a sample cannot be read; None: no spares.
        padding: (b,) bool, samples that only fill up the batch; None: this loader never pads.
        sources: (b,) int64, the component of a mixture that each is of; None: not from a mixture.
    """

    ids: list[int]
    epoch: int = 0
    positions: np.ndarray | None = None
    spares: np.ndarray | None = None
    padding: np.ndarray | None = None
    sources: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def of_pool(self, places: np.ndarray, first_id: int) -> "BatchRequest":
        """The request for a few of its places, of a pool whose ids begin at `first_id`."""
        positions = np.asarray(self.ids) if self.positions is None else self.positions
        return BatchRequest(
            [self.ids[place] - first_id for place in places.tolist()],
            self.epoch,
            positions[places],
            None if self.spares is None else self.spares[places] - first_id,
            None if self.padding is None else self.padding[places],
        )


def as_request(request: BatchRequest | Sequence[int]) -> BatchRequest:
    """A request, or one for plain ids, with the views of epoch 0."""
    return request if isinstance(request, BatchRequest) else BatchRequest(list(request))


@dataclass(frozen=True)
class LoadedBatch:
    """The samples of a batch before collation, and the report on them."""

    samples: list[dict[str, Any]]
    report: BatchReport
