"""The state of a training stream: selection, order and position, and how checkpoints store them."""

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curated_data.cache import atomic_save, fingerprint, open_cache
from curated_data.errors import CacheError, ConfigError
from curated_data.removal import is_fingerprint, shown
from curated_data.seals import load_npy
from curated_data.streaming.order import EpochOrder

_COUNTS = ("epoch", "batch", "n_trained")


class StreamPosition:
    """The position of a training run: how many global batches of which epoch it has trained on.

    The stream consists of the epochs of an `EpochOrder`, one after the other. The position is stored as the
    place where the loader was last started, plus the number of batches trained on since. A training loop that
    starts again therefore gets the batches after those it has trained on, wherever its own epoch ended: with
    ours, at `limit_train_batches`, or where `max_steps` or a signal stopped it.

    Args:
        n_trained: returns the total number of batches trained on, which never decreases.
    """

    def __init__(self, n_trained: Callable[[], int]) -> None:
        self.n_trained = n_trained
        self.restart()

    def restart(self, epoch: int = 0, batch: int = 0, n_trained: int | None = None) -> None:
        """Move to `batch` of `epoch`, where the loop's count is `n_trained`; None: its present count."""
        self._epoch, self._batch = epoch, batch
        self._base = self.n_trained() if n_trained is None else n_trained

    def now(self, n_batches: int) -> tuple[int, int]:
        """The epoch and its batch that come next, in epochs of `n_batches`."""
        # The count may have fallen: a checkpoint restores first the data module, then the loop.
        done = self._batch + max(0, self.n_trained() - self._base)
        return self._epoch + done // n_batches, done % n_batches

    @property
    def moved(self) -> bool:
        """Whether any batches were trained on since the loader was last started."""
        return self.n_trained() > self._base

    def begin(self, n_batches: int) -> tuple[int, int]:
        """The same as `now`, and record it as the place where the loader is started."""
        epoch, batch = self.now(n_batches)
        self.restart(epoch, batch, self._count())
        return epoch, batch

    def skip_to_epoch(self, n_batches: int) -> None:
        """Move to the start of the next epoch, or stay if no batch of this one is done."""
        epoch, batch = self.now(n_batches)
        self.restart(epoch + (batch > 0), 0, self._count())

    def _count(self) -> int:
        return max(self._base, self.n_trained())


class TrainingStream:
    """The current selection and the next one, the order, and the position.

    Args:
        n_trained: see `StreamPosition`.
        cache_dir: where to store the selections that checkpoints refer to; None: checkpoints contain them.

    Attributes:
        order: of the latest loader; None before the first one.
        resumed_between_selections: whether the run resumes between the last batch of one selection and the
            first of the next.
    """

    def __init__(self, n_trained: Callable[[], int], cache_dir: Path | None) -> None:
        self.position = StreamPosition(n_trained)
        self.cache_dir = cache_dir
        self.order: EpochOrder | None = None
        self.resumed_between_selections = False
        self._settings: Hashable = None  # of the order
        self._first: np.ndarray | None = None  # the run's own selection
        # What was set outside of any run, with which a new run begins.
        self._own: tuple[np.ndarray, str | Tensor] | None = None
        self._selected: np.ndarray | None = None
        self._name: str | Tensor | None = None  # for checkpoints; None: a resumed run selects it by itself
        self._next: tuple[np.ndarray, str | Tensor] | None = None
        self._owner: object = None
        self._loaded: dict[str, Any] | None = None

    @property
    def selection(self) -> np.ndarray | None:
        """The ids of the next epoch; None: the whole pool."""
        return self._selected if self._next is None else self._next[0]

    @property
    def waiting(self) -> bool:
        """Whether a new selection is waiting for the next epoch."""
        return self._next is not None

    def start_with(self, ids: np.ndarray | None) -> None:
        """Set the run's own selection, which one from a checkpoint or `replace` overrides."""
        self._first = ids
        if self._name is None:
            self._selected = ids

    def begin_run(self, owner: object) -> bool:
        """Before a run of `owner`: forget what the run of another owner has selected; whether it was another.

        A checkpoint that is loaded afterwards says what the run streams.
        """
        if self._owner is None or self._owner is owner or self._owner is _Nobody:
            return False
        self._selected, self._name = (self._first, None) if self._own is None else self._own
        self._next, self.order, self._loaded = None, None, None
        return True

    def replace(self, ids: np.ndarray, *, in_a_run: bool = False) -> None:
        """Stream another selection from the next epoch on; if it is set in a run, only until that ends."""
        name: str | Tensor = torch.from_numpy(ids.copy())
        if self.cache_dir is not None:
            name = fingerprint(selection=ids)
            path = _selection_path(self.cache_dir, name)
            if not path.exists():
                atomic_save(path, ids)
        if not in_a_run:
            self._own = ids, name
        if self.order is not None or self._resumes_inside:
            self._next = ids, name
            return
        self._selected, self._name = ids, name
        if self._loaded is not None:
            self._begin_resumed_epoch(self._loaded)

    def prepare(
        self, owner: object, settings: Hashable, build: Callable[[np.ndarray | None], EpochOrder]
    ) -> EpochOrder:
        """The order for a new loader.

        Args:
            owner: the Trainer whose batches the position counts, or None. A new owner starts the stream from
                the beginning, unless a state was loaded for it.
            settings: what `build` depends on besides the selection; while they are equal, the order is kept.
            build: makes the order of a selection.

        Raises:
            ConfigError: an epoch would be resumed in the middle with another order than it began with.
        """
        self._attach(owner)
        if self._next is not None and self.order is not None:
            n_batches, resumes = self.order.n_batches, not self.position.moved
            between = None if self._resumes_inside else self._loaded  # the state, if taken between epochs
            if not resumes or between is not None or self.position.now(n_batches)[1] == 0:
                self.position.skip_to_epoch(n_batches)
                if resumes and between is not None and between["n_trained"] > 0:
                    self.resumed_between_selections = True
                self._loaded = None
                (self._selected, self._name), self._next = self._next, None
                self.order = None
        if self.order is None or self._settings != settings:
            self.order, self._settings = build(self._selected), settings
        self._check_resumed(self.order)
        return self.order

    def state_dict(self, between_epochs: bool = False) -> dict[str, Any]:
        """The position in the stream: what was trained on, not what was prefetched.

        Args:
            between_epochs: whether the training loop has ended its epoch, wherever in ours.
        """
        names = {"selection": self._name, "next_selection": None if self._next is None else self._next[1]}
        if self.order is None and self._loaded is not None:  # nothing was trained since it was loaded
            return self._loaded | names
        epoch, batch = (0, 0) if self.order is None else self.position.now(self.order.n_batches)
        return names | {
            "epoch": epoch,
            "batch": batch,
            "global_batch_size": None if self.order is None else self.order.batch_size,
            "order": None if self.order is None else self.order.fingerprint,
            "n_trained": self.position.n_trained(),
            "between_epochs": between_epochs,
        }

    def load_state_dict(self, state: dict[str, Any], owner: object) -> None:
        """Continue from where `state_dict` was taken; `owner` as for `prepare`.

        Raises:
            CacheError: a selection passed to `replace` is no longer in the cache, or damaged.
        """
        if not state:
            return
        state = _checked(state)
        name = state["selection"]
        self._selected, self._name = self._first if name is None else self._find(name), name
        self._next = None
        if state["next_selection"] is not None:
            self._next = self._find(state["next_selection"]), state["next_selection"]
        self.order = None
        self._loaded = state
        self._owner = owner if owner is not None else _Nobody
        # A Trainer restores its loops, and so the count, only after this, and may ask for a loader before.
        self.position.restart(state["epoch"], state["batch"], None if owner is None else state["n_trained"])
        if self._next is not None and not self._resumes_inside:
            (self._selected, self._name), self._next = self._next, None
            self._begin_resumed_epoch(state)

    @property
    def _resumes_inside(self) -> bool:
        """Whether the loaded state was taken within an epoch, which is to be continued."""
        state = self._loaded
        return state is not None and state["batch"] > 0 and not state.get("between_epochs", False)

    def _begin_resumed_epoch(self, loaded: dict[str, Any]) -> None:
        """Begin the next epoch, with another selection, after a state that was taken between epochs."""
        epoch = loaded["epoch"] + (loaded["batch"] > 0)
        self._loaded = {**loaded, "epoch": epoch, "batch": 0}
        n_trained = None if self._owner is _Nobody else loaded["n_trained"]
        self.position.restart(epoch, 0, n_trained)
        self.resumed_between_selections = loaded["n_trained"] > 0

    def _attach(self, owner: object) -> None:
        if self._owner is owner:
            return
        loaded = self._loaded if self._owner is _Nobody and self._loaded else {"epoch": 0, "batch": 0}
        self.position.restart(loaded["epoch"], loaded["batch"])
        self._owner = owner

    def _check_resumed(self, order: EpochOrder) -> None:
        if self.position.moved:
            self._loaded = None
        loaded = self._loaded
        if loaded is None or loaded["batch"] == 0:
            return
        place = f"the checkpoint was written after batch {loaded['batch']} of epoch {loaded['epoch']}"
        if loaded["global_batch_size"] != order.batch_size:
            raise ConfigError(
                f"batch_size: {place} with {loaded['global_batch_size']} samples a global batch "
                f"(batch_size x ranks), now there are {order.batch_size}; keep it, or resume from the end "
                "of an epoch"
            )
        if loaded["order"] != order.fingerprint:
            raise ConfigError(
                f"resume: {place} of another order; use the selection, seed, shuffle and stratify_level of "
                "that run, or resume from the end of an epoch"
            )

    def _find(self, name: str | Tensor) -> np.ndarray:
        if isinstance(name, Tensor):
            return name.numpy()
        path = None if self.cache_dir is None else _selection_path(self.cache_dir, name)
        if path is None or not path.exists():
            raise CacheError(
                f"the checkpoint was trained on a selection passed to set_selection, and "
                f"{path or 'its cache'} does not exist; pass the cache_dir of that run"
            )
        remedy = "remove it and pass that selection to set_selection again, or resume from another checkpoint"
        ids = load_npy(path, remedy)
        if fingerprint(selection=ids) != name:
            raise CacheError(f"{path}: damaged (its ids do not match its name); {remedy}")
        return ids


def _checked(state: object) -> dict[str, Any]:
    """A stream's state as a checkpoint holds it, before any of it is used.

    Raises:
        CacheError: a value is missing or of another type.
    """
    if not isinstance(state, dict):
        raise CacheError(f"the checkpoint holds {shown(state)} as the data module's state")
    is_right = {name: type(state.get(name)) is int and state[name] >= 0 for name in _COUNTS}
    for name in ("selection", "next_selection"):
        ids = state.get(name)
        is_right[name] = name in state and (ids is None or is_fingerprint(ids) or _are_ids(ids))
    for name, kind in (("global_batch_size", int), ("order", str)):
        is_right[name] = name in state and (state[name] is None or type(state[name]) is kind)
    is_right["between_epochs"] = type(state.get("between_epochs", False)) is bool  # new in later versions
    for name, is_so in is_right.items():
        if not is_so:
            raise CacheError(
                f"the data module's state in the checkpoint holds {name} = {shown(state.get(name))}, which "
                "no run writes; resume from another checkpoint"
            )
    return state


def _are_ids(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.int64 and value.ndim == 1


def _selection_path(cache_dir: Path, name: str) -> Path:
    return open_cache(cache_dir) / "streaming" / f"{name}.npy"


class _Nobody:
    """The owner of a state that was loaded without a Trainer; a class, which copies and pickles as itself."""
