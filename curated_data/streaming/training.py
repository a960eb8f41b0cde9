"""The state of a training stream: selection, order and position, and how checkpoints store them."""

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curated_data.cache.artifacts import MANIFEST, fingerprint, open_cache, read_array, read_manifest
from curated_data.cache.checksums import load_npy
from curated_data.cache.layout import SELECTION, STREAMING
from curated_data.cache.publishing import atomic_save
from curated_data.errors import CacheError, ConfigError
from curated_data.parallel import rank
from curated_data.streaming.mixture import AnyOrder
from curated_data.streaming.state import checked_state


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
        self._resumes = False  # whether it was loaded, and nothing trained since
        self.restart()

    def restart(
        self, epoch: int = 0, batch: int = 0, n_trained: int | None = None, *, resumes: bool = False
    ) -> None:
        """Move to `batch` of `epoch`, where the loop's count is `n_trained`; None: its present count."""
        self._epoch, self._batch, self._resumes = epoch, batch, resumes
        self._base = self.n_trained() if n_trained is None else n_trained

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch next; within the epoch that a state was loaded for, stay at its batch."""
        if not (self._resumes and not self.moved and epoch == self._epoch):
            self.restart(epoch, 0, self._count())

    def begin_at_least(self, epoch: int) -> bool:
        """Begin this epoch next, unless a state was loaded, or a later one comes; whether that is a move."""
        moves = not self._resumes and self._epoch < epoch
        if moves:
            self.restart(epoch, 0, self._count())
        return moves

    def now(self, n_batches: int) -> tuple[int, int]:
        """The epoch and its batch that come next, in epochs of `n_batches`."""
        # The count may have fallen: a checkpoint restores first the data module, then the loop.
        done = self._batch + max(0, self.n_trained() - self._base)
        return self._epoch + done // n_batches, done % n_batches

    @property
    def moved(self) -> bool:
        """Whether any batches were trained on since the loader was last started."""
        return self.n_trained() > self._base

    def begin(self, n_batches: int, *, whole_epochs: bool = False) -> tuple[int, int]:
        """The same as `now`, and record it as the place where the loader is started.

        Args:
            n_batches: of an epoch.
            whole_epochs: begin the next epoch instead of continuing within one, unless a loaded state says
            so.
        """
        resumes = self._resumes and not self.moved
        if whole_epochs and not resumes:
            self.skip_to_epoch(n_batches)
        epoch, batch = self.now(n_batches)
        self.restart(epoch, batch, self._count(), resumes=resumes)
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
        check_ids: returns the ids of a checkpoint, or raises an error if they do not fit the pool.

    Attributes:
        order: of the latest loader; None before the first one.
        owner: the Trainer whose batches the position counts, or None.
    """

    def __init__(
        self,
        n_trained: Callable[[], int],
        cache_dir: Path | None,
        check_ids: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.position = StreamPosition(n_trained)
        self.cache_dir = cache_dir
        self.check_ids = check_ids
        self.order: AnyOrder | None = None
        self.owner: object = None
        self._settings: Hashable = None  # of the order
        self._first: np.ndarray | None = None  # the run's own selection
        self._given: _Selection | None = None  # that replaced it outside a run, for all runs to come
        self._selected: np.ndarray | None = None
        self._name: str | Tensor | None = None  # for checkpoints; None: a resumed run selects it by itself
        self._next: _Selection | None = None
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

    def replace(self, ids: np.ndarray, *, artifact: str | None = None, for_this_run: bool = True) -> None:
        """Stream another selection from the next epoch on.

        Args:
            ids: (n,) int64.
            artifact: the name of the selection in the cache that has just these ids, to which checkpoints
                then refer; None: they are kept in the cache, or in the checkpoints if there is none.
            for_this_run: whether a new owner streams the run's own selection again.
        """
        name: str | Tensor = torch.from_numpy(ids.copy())
        if artifact is not None:
            name = artifact
        elif self.cache_dir is not None:
            name = fingerprint(selection=ids)
            path = _selection_path(self.cache_dir, name)
            if rank() == 0 and not path.exists():
                atomic_save(path, ids)
        if not for_this_run:
            self._given = ids, name
        if self.order is not None or self._resumes_inside:
            self._next = ids, name
            return
        self._selected, self._name = ids, name
        if self._loaded is not None:
            self._begin_resumed_epoch(self._loaded)

    def attach(self, owner: object) -> bool:
        """Count the batches of another owner from now on.

        Returns:
            Whether the owner is a new one and starts at the beginning of the run's own selection. One for
            which a state was loaded continues from there.
        """
        if self.owner is owner:
            return False
        resumed = self._loaded if self.owner is _Nobody else None
        self.owner = owner
        if resumed is not None:
            self.position.restart(resumed["epoch"], resumed["batch"], resumes=True)
            return False
        self._selected, self._name = self._given or (self._first, None)
        self.order = self._next = self._loaded = None
        self.position.restart()
        return True

    def prepare(
        self, owner: object, settings: Hashable, build: Callable[[np.ndarray | None], AnyOrder]
    ) -> AnyOrder:
        """The order for a new loader.

        Args:
            owner: the Trainer whose batches the position counts, or None, see `attach`.
            settings: what `build` depends on besides the selection; while they are equal, the order is kept.
            build: makes the order of a selection.

        Raises:
            ConfigError: an epoch would be resumed in the middle with another order than it began with.
        """
        self.attach(owner)
        if self._next is not None and self.order is not None:
            n_batches, resumes = self.order.n_batches, not self.position.moved
            between = None if self._resumes_inside else self._loaded  # the state, if taken between epochs
            if not resumes or between is not None or self.position.now(n_batches)[1] == 0:
                self.position.skip_to_epoch(n_batches)
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

    def load_state_dict(self, given: Any, owner: object) -> None:
        """Continue from where `state_dict` was taken; `owner` as for `prepare`.

        Raises:
            CacheError: the state is damaged, or a selection passed to `replace` is no longer in the cache, or
                damaged.
        """
        if given == {}:
            return
        state = checked_state(given)
        following = None
        if state["next_selection"] is not None:
            following = self._find(state["next_selection"]), state["next_selection"]
        name = state["selection"]
        self._selected, self._name = self._first if name is None else self._find(name), name
        self._next = following
        self.order = None
        self._loaded = state
        self.owner = owner if owner is not None else _Nobody
        # A Trainer restores its loops, and so the count, only after this, and may ask for a loader before.
        n_trained = None if owner is None else state["n_trained"]
        self.position.restart(state["epoch"], state["batch"], n_trained, resumes=True)
        if self._next is not None and not self._resumes_inside:
            (self._selected, self._name), self._next = self._next, None
            self._begin_resumed_epoch(state)

    def load_into(self, given: Any, order: AnyOrder) -> None:
        """Continue from where `state_dict` was taken, with a loader that has its order already.

        Raises:
            CacheError: see `load_state_dict`.
            ConfigError: the state is of another selection or, within an epoch, of another order.
        """
        state = checked_state(given)
        before = self._selected
        self.load_state_dict(state, None)
        if (before is None) != (self._selected is None) or not np.array_equal(
            np.asarray(before), np.asarray(self._selected)
        ):
            raise ConfigError(
                "the loader's state: is of a selection that was passed to set_selection; load it into the "
                "data module, and ask that for the loader"
            )
        self._check_resumed(order)
        self.order, self.owner = order, None

    @property
    def _resumes_inside(self) -> bool:
        """Whether the loaded state was taken within an epoch, which is to be continued."""
        state = self._loaded
        return state is not None and state["batch"] > 0 and not state["between_epochs"]

    def _begin_resumed_epoch(self, loaded: dict[str, Any]) -> None:
        """Begin the next epoch, with another selection, after a state that was taken between epochs."""
        epoch = loaded["epoch"] + (loaded["batch"] > 0)
        self._loaded = {**loaded, "epoch": epoch, "batch": 0}
        n_trained = None if self.owner is _Nobody else loaded["n_trained"]
        self.position.restart(epoch, 0, n_trained, resumes=True)

    def _check_resumed(self, order: AnyOrder) -> None:
        if self.position.moved:
            self._loaded = None
        loaded = self._loaded
        if loaded is None or loaded["batch"] == 0:
            return
        place = f"the checkpoint was written after batch {loaded['batch']} of epoch {loaded['epoch']}"
        if loaded["global_batch_size"] != order.batch_size:
            raise ConfigError(
                f"batch_size: {place} with {loaded['global_batch_size']} samples per global batch "
                f"(batch_size x ranks), now there are {order.batch_size}; keep it, or resume from the end "
                "of an epoch"
            )
        if loaded["order"] != order.fingerprint:
            raise ConfigError(
                f"resume: {place} of another order; use the selection, seed, shuffle and stratify_level of "
                "that run, or resume from the end of an epoch"
            )
        if loaded["batch"] >= order.n_batches:
            raise CacheError(
                f"the checkpoint's batch: {loaded['batch']} of an epoch of {order.n_batches}; the file is "
                "damaged, resume from another checkpoint"
            )

    def _find(self, name: str | Tensor) -> np.ndarray:
        if isinstance(name, Tensor):
            ids = name.numpy()
        else:
            ids = self._read(name)
        return ids if self.check_ids is None else self.check_ids(ids)

    def _read(self, name: str) -> np.ndarray:
        folder = None if self.cache_dir is None else self.cache_dir / SELECTION / name
        if folder is not None and (folder / MANIFEST).exists():
            return read_array(folder, "ids", read_manifest(folder, SELECTION), dtype=np.int64, shape=(None,))
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


_Selection = tuple[np.ndarray, str | Tensor]


def _selection_path(cache_dir: Path, name: str) -> Path:
    return open_cache(cache_dir) / STREAMING / f"{name}.npy"


class _Nobody:
    """The owner of a state that was loaded without a Trainer; a class, which copies and pickles as itself."""
