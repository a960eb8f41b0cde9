"""What the data module asks of the Trainer that it is attached to, if any, and what it tells it."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

from curated_data.parallel import rank, world_size
from curated_data.processes import n_cores


def ranks(trainer: pl.Trainer | None) -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    return (rank(), world_size()) if trainer is None else (trainer.global_rank, trainer.world_size)


def cores_per_rank(trainer: pl.Trainer | None) -> int:
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
    """A transform of the module in training: what its method of that name returns, or the attribute itself.

    None if it has neither. A function, method or class that takes no arguments makes the transform; any other
    function or object, such as torchvision's, is one.
    """
    found = getattr(getattr(trainer, "lightning_module", None), name, None)
    if not callable(found):
        return None
    return found() if _makes_transforms(found) else found


def _makes_transforms(found: Callable[..., Any]) -> bool:
    if not isinstance(found, type | functools.partial) and not inspect.isroutine(found):
        return False
    try:
        inspect.signature(found).bind()
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True


def n_trained(trainer: pl.Trainer) -> int:
    """The number of batches whose optimizer step is done."""
    return _batch_progress(trainer).total.processed


def is_between_epochs(trainer: pl.Trainer) -> bool:
    """Whether the Trainer has trained the last batch of its epoch, and not begun the next. An epoch that a
    limit or a signal has cut short has not ended.
    """
    progress = _batch_progress(trainer)
    return progress.is_last_batch or progress.current.ready == 0


def is_running(trainer: pl.Trainer | None) -> bool:
    """Whether the Trainer is within `fit`."""
    return (
        trainer is not None
        and trainer.state.fn == TrainerFn.FITTING
        and trainer.state.status == TrainerStatus.RUNNING
    )


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


def _batch_progress(trainer: pl.Trainer) -> Any:
    """Lightning's counts of batches, which have more fields than the types that it declares."""
    return trainer.fit_loop.epoch_loop.batch_progress
