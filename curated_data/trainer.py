"""What the data module asks of the Trainer that it is attached to, if any, and what it tells it."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

from curated_data.parallel import rank, world_size
from curated_data.processes import n_cores


def ranks(trainer: pl.Trainer | None) -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    return (rank(), world_size()) if trainer is None else (trainer.global_rank, trainer.world_size)


def cores_a_rank(trainer: pl.Trainer | None) -> int:
    """CPU cores available to this rank."""
    n_local = 1 if trainer is None else trainer.num_devices
    return max(1, n_cores() // n_local)


def setting(trainer: pl.Trainer | None, name: str) -> Any:
    """An argument of the Trainer; 0 without a Trainer."""
    return 0 if trainer is None else getattr(trainer, name)


def change_setting(trainer: pl.Trainer, name: str, value: Any) -> Any:
    """Set an argument of the Trainer; returns what it was."""
    old = getattr(trainer, name)
    setattr(trainer, name, value)
    return old


def from_module(trainer: pl.Trainer | None, name: str) -> Callable[[Any], Any] | None:
    """What a method of the module in training returns; None if there is no such method."""
    module = None if trainer is None else getattr(trainer, "lightning_module", None)
    factory = getattr(module, name, None)
    return factory() if callable(factory) else None


def n_trained(trainer: pl.Trainer) -> int:
    """The number of batches whose optimizer step is done."""
    return _batch_progress(trainer).total.processed


def is_fitting(trainer: pl.Trainer) -> bool:
    """Whether `Trainer.fit` runs now, be it in a validation."""
    return trainer.state.fn == TrainerFn.FITTING and trainer.state.status == TrainerStatus.RUNNING


def is_between_epochs(trainer: pl.Trainer) -> bool:
    """Whether the Trainer has finished the batches of an epoch, and not begun the next."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    return _batch_progress(trainer).is_last_batch or epochs.processed == epochs.ready > 0


def forget_loader(trainer: pl.Trainer) -> None:
    """Make the Trainer ask for the training loader again, if it has one from before it resumed.

    Strategies that restore a checkpoint late (FSDP, ModelParallel, DeepSpeed) first let the module ask for
    `estimated_stepping_batches`, which creates and starts the loader.
    """
    trainer.fit_loop._combined_loader = None  # like Lightning's own learning rate finder


def epochs_to_come(trainer: pl.Trainer | None, n_batches: int) -> int:
    """How many more epochs of `n_batches` will be read, by the Trainer's limits; 1 if it has none."""
    if trainer is None:
        return 1
    limits = []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        limits.append(trainer.max_epochs - trainer.current_epoch)
    if trainer.max_steps is not None and trainer.max_steps > 0:
        batches = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        limits.append(-(-batches // n_batches))
    return max(1, min(limits, default=1))


def end_resumed_epoch(trainer: pl.Trainer, n_batches: int) -> bool:
    """Make a Trainer that resumes after an epoch's last batch treat that epoch as complete.

    The Trainer compares its progress with the length of the loader, which by now is that of the next
    selection.

    Args:
        n_batches: the length of the loader.

    Returns:
        Whether that was possible. It is not before the Trainer has restored its progress, after which it asks
        for a loader again.
    """
    progress = _batch_progress(trainer)
    if not progress.is_last_batch:
        return False
    if progress.current.completed < progress.current.processed:  # saved as that batch ended
        progress.current.completed = max(progress.current.completed, n_batches)
    return True


def _batch_progress(trainer: pl.Trainer) -> Any:
    """Lightning's counts of batches, which have more fields than the types that it declares."""
    return trainer.fit_loop.epoch_loop.batch_progress
