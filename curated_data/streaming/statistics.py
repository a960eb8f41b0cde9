"""Counts of what streaming read and skipped: for one batch, and for all batches of a process."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from curated_data.errors import SampleError

log = logging.getLogger(__name__)

_SHARE_COUNTS_FROM = 1000  # samples; of fewer, a few bad ones would be a large share


class Skipped(NamedTuple):
    """A sample that was skipped; the reason names its shard, key and member."""

    shard: str
    reason: str


class BatchReport(NamedTuple):
    """What loading one batch took; sent by the worker with the batch."""

    n_samples: int
    bytes_read: int
    bytes_needed: int
    skipped: list[Skipped]
    of_source: tuple[int, ...] = ()  # samples of each component of a mixture


@dataclass
class StreamStatistics:
    """Counts of all that this process has streamed.

    Attributes:
        max_skipped: the share of skipped samples above which `add` raises.
        n_samples, n_batches: given out.
        n_skipped: samples that could not be decoded.
        bytes_read: read from shards, including the gaps between samples.
        bytes_needed: asked for.
        skipped_by_shard: `n_skipped` by shard.
        of_component: `n_samples` of each component of a mixture, by name.
    """

    max_skipped: float = 0.01
    n_samples: int = 0
    n_batches: int = 0
    n_skipped: int = 0
    bytes_read: int = 0
    bytes_needed: int = 0
    skipped_by_shard: dict[str, int] = field(default_factory=dict)
    of_component: dict[str, int] = field(default_factory=dict)

    def add(self, report: BatchReport) -> None:
        """Count a batch; log the first skipped sample of each shard.

        Raises:
            SampleError: more were skipped than `max_skipped` allows.
        """
        self.n_samples += report.n_samples
        self.n_batches += 1
        self.bytes_read += report.bytes_read
        self.bytes_needed += report.bytes_needed
        for name, count in zip(self.of_component, report.of_source, strict=False):
            self.of_component[name] += count
        self.skip(report.skipped)

    def skip(self, skipped: Sequence[Skipped]) -> None:
        """Count samples that were skipped, as `add` does."""
        self.n_skipped += len(skipped)
        for shard, reason in skipped:
            if shard not in self.skipped_by_shard:
                log.warning("skipped a sample (later ones of the same shard are not logged): %s", reason)
            self.skipped_by_shard[shard] = self.skipped_by_shard.get(shard, 0) + 1
        if skipped and self.n_skipped > self.max_skipped * max(self.n_samples, _SHARE_COUNTS_FROM):
            shard, count = max(self.skipped_by_shard.items(), key=lambda item: item[1])
            raise SampleError(
                f"{self.n_skipped} of {self.n_samples} samples could not be decoded, more than max_skipped="
                f"{self.max_skipped:g} allows; most of them ({count}) in {shard}; the last: "
                f"{skipped[-1].reason}"
            )

    def summary(self) -> str:
        """One line for the log."""
        read = f"read {self.bytes_read / 1e6:,.1f} MB for {self.bytes_needed / 1e6:,.1f} MB needed"
        if not self.n_skipped:
            return f"{self.n_samples} samples, {read}"
        shards = len(self.skipped_by_shard)
        return f"{self.n_samples} samples, {self.n_skipped} skipped in {shards} shards, {read}"
