"""What a checkpoint holds of re-curations, checked before any of it is used."""

import contextlib
from dataclasses import dataclass, field
from typing import Any

from curated_data.cache.layout import SELECTION
from curated_data.cache.removal import artifact_name, is_fingerprint, shown
from curated_data.errors import CacheError

_COUNTS = ("n_recurations", "last_step", "epochs_without_gain")


@dataclass
class RecurationState:
    """What a run with a `RecurationCallback` changes, and its checkpoints have.

    Attributes:
        n_recurations: so far.
        last_step: at which the last one was.
        best: value of the monitored metric.
        epochs_without_gain: since that value.
        unfinished: the epoch and step of an epoch that is trained but has not ended, or whose re-curation is
            left to the resumed run.
        artifacts: of the last re-curation, relative to the cache.
        selection: the name of its selection in the cache.
    """

    n_recurations: int = 0
    last_step: int = 0
    best: float | None = None
    epochs_without_gain: int = 0
    unfinished: dict[str, int] | None = None
    artifacts: list[str] = field(default_factory=list)
    selection: str | None = None


def checked_state(state: object) -> RecurationState:
    """The callback's state as a checkpoint holds it.

    Raises:
        CacheError: a value is missing, of another type, or names something else than an artifact of a cache.
    """
    if not isinstance(state, dict):
        raise CacheError(f"RecurationCallback: the checkpoint holds {shown(state)} as its state")
    state = {"selection": None} | state  # which the first checkpoints lack
    unfinished, artifacts, best = (state.get(name) for name in ("unfinished", "artifacts", "best"))
    is_right = {name: _is_count(state.get(name)) for name in _COUNTS} | {
        "best": "best" in state and (best is None or type(best) in (int, float)),
        "unfinished": "unfinished" in state
        and (
            unfinished is None
            or (
                isinstance(unfinished, dict)
                and set(unfinished) == {"epoch", "step"}
                and all(map(_is_count, unfinished.values()))
            )
        ),
        "artifacts": isinstance(artifacts, list | tuple) and all(map(_is_removable, artifacts)),
        "selection": state["selection"] is None or is_fingerprint(state["selection"]),
    }
    for name, is_so in is_right.items():
        if not is_so:
            raise CacheError(
                f"RecurationCallback: the checkpoint holds {name} = {shown(state.get(name))}, which no "
                "re-curation writes; resume from another checkpoint"
            )
    known: dict[str, Any] = {name: state[name] for name in is_right}
    return RecurationState(**known | {"artifacts": list(known["artifacts"])})


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_removable(name: object) -> bool:
    with contextlib.suppress(CacheError):
        return artifact_name(name).partition("/")[0] != SELECTION  # which checkpoints refer to
    return False
