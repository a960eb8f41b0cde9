"""What the data module asks the Trainer that it is attached to, which may be none, and what it tells it."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from curated_data.distributed import rank, world_size
from curated_data.processes import n_cores


def ranks(trainer: pl.Trainer | None) -> tuple[int, int]:
    """This process's rank and how many there are."""
    return (rank(), world_size()) if trainer is None else (trainer.global_rank, trainer.world_size)


def cores_a_rank(trainer: pl.Trainer | None) -> int:
    """CPU cores that this rank may count as its own."""
    n_local = 1 if trainer is None else trainer.num_devices
    return max(1, n_cores() // n_local)


def setting(trainer: pl.Trainer | None, name: str) -> Any:
    """An argument that the Trainer was given; 0 without one."""
    return 0 if trainer is None else getattr(trainer, name)


def from_module(trainer: pl.Trainer | None, name: str) -> Callable[[Any], Any] | None:
    """What a method of the module that is trained gives, where it has such a method."""
    module = None if trainer is None else getattr(trainer, "lightning_module", None)
    factory = getattr(module, name, None)
    return factory() if callable(factory) else None


def n_trained(trainer: pl.Trainer) -> int:
    """Batches whose optimizer step is done."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed


def is_between_epochs(trainer: pl.Trainer) -> bool:
    """Whether the Trainer has taken the last batch of its epoch, and none of the next."""
    epochs = trainer.fit_loop.epoch_progress.current
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch or epochs.processed == epochs.ready > 0


def forget_loader(trainer: pl.Trainer) -> None:
    """Have the Trainer ask for the training loader again, where it holds one from before it resumed.

    Strategies that restore a checkpoint late (FSDP, ModelParallel, DeepSpeed) have by then let a module ask
    for its `estimated_stepping_batches`, for which the loader is made and begins to be read.
    """
    trainer.fit_loop._combined_loader = None  # as Lightning's own learning rate finder does


def epochs_to_come(trainer: pl.Trainer | None, n_batches: int) -> int:
    """How many epochs of `n_batches` will be read, as far as the Trainer's limits tell; 1 if they do not."""
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
    """Tell a Trainer that resumes after an epoch's last batch that it was the last.

    It compares what was done with the length of the loader, which is the next selection's by now.

    Args:
        n_batches: that length.

    Returns:
        Whether it has been told; not before its progress is restored, and a loader is asked for once more
        after that.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    if not progress.is_last_batch:
        return False
    if progress.current.completed < progress.current.processed:  # it was saved as that batch ended
        progress.current.completed = max(progress.current.completed, n_batches)
    return True
