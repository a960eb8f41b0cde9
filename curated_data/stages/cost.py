"""What a stage is expected to cost, and the measured rates from which that is extrapolated."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Of one stage.

    Attributes:
        name: embed, near_duplicates, cluster, sample, or train.
        cached: whether all of it is in the cache.
        seconds: expected on the machine that was measured; 0 if cached, None if it was not measured.
        note: what the stage does, in words.
        memory: bytes that it holds at its peak, mapped files left out.
    """

    name: str
    cached: bool
    seconds: float | None
    note: str
    memory: int = 0


@dataclass(frozen=True)
class Rates:
    """What one process does per second.

    Attributes:
        samples: embedded; None if the probe could embed none.
        kmeans: units of `kmeans_work`.
    """

    samples: float | None
    kmeans: float
