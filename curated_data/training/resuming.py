"""What a Trainer resumes from a checkpoint: the stream of its data module, and its own progress."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.trainer.states import TrainerFn

from curated_data.errors import ConfigError
from curated_data.streaming.state import is_state
from curated_data.training.trainer import is_running


class StreamResuming(pl.Callback):
    """Resumes the stream of a data module with the loop. The data module adds it to its Trainer.

    Lightning gives a data module its state by the name of its class, and says nothing if the checkpoint has
    none of that name. Here the state is found whatever the class was called then.

    Lightning also miscounts. Resumed after the last batch of an epoch, it does not count the next epoch as
    begun, and takes a checkpoint from within that one for one of its end. A batch that failed stays counted.
    An epoch that `max_steps` or a signal has cut short counts as trained.
    """

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        loops = checkpoint.get("loops")
        if trainer.state.fn != TrainerFn.FITTING or data is None or not isinstance(loops, dict):
            return
        name = type(data).__qualname__
        if name not in checkpoint:
            states = {key: value for key, value in checkpoint.items() if is_state(value)}
            n_trained = loops["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
            if len(states) == 1:
                data.load_state_dict(next(iter(states.values())))
            elif n_trained:
                raise ConfigError(
                    f"ckpt_path: the loop resumes after batch {n_trained}, and the stream of {name} has no "
                    f"state: {_found(states)}. Resume with the data module of that run, or load only the "
                    "weights to train from the start"
                )
        settle_progress(loops["fit_loop"])


def resume_stream(trainer: pl.Trainer) -> None:
    """Give a Trainer the callback that resumes the stream, once."""
    if not _has_callback(trainer):
        _callbacks(trainer).insert(0, StreamResuming())


def is_tuned(trainer: pl.Trainer | None) -> bool:
    """Whether a Tuner tries something out, for which it takes the Trainer's callbacks away, or will."""
    if trainer is None or not is_running(trainer):
        return False
    return not _has_callback(trainer) or any(
        isinstance(callback, BatchSizeFinder) for callback in _callbacks(trainer)
    )


def _has_callback(trainer: pl.Trainer) -> bool:
    return any(isinstance(callback, StreamResuming) for callback in _callbacks(trainer))


def _callbacks(trainer: Any) -> list[pl.Callback]:
    """Of a Trainer, which Lightning sets outside the class."""
    return trainer.callbacks


def _found(states: dict[str, Any]) -> str:
    if states:
        return f"the checkpoint has those of {' and '.join(states)}"
    return "the checkpoint was written without a CuratedDataModule, as by a bare loader"


def settle_progress(fit_loop: dict[str, Any]) -> None:
    """Make Lightning's counts in a checkpoint those of a loop that stands between two epochs, or in one.

    Args:
        fit_loop: its state in the checkpoint, changed in place.
    """
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    for counts in (epochs["total"], epochs["current"]):
        counts["ready"] = counts["started"]
    for counts in (batches["total"], batches["current"]):  # a batch that failed is trained again
        counts["ready"] = counts["started"] = counts["processed"]
    total, current = epochs["total"], batches["current"]
    has_validated = current["completed"] == current["processed"] and total["processed"] < total["started"]
    if batches["is_last_batch"]:
        if has_validated:
            return  # Lightning ends that epoch itself
        if current["completed"] < current["processed"]:  # saved as the batch ended
            batches["total"]["completed"] += 1
            _steps(fit_loop)
        for counts in (epochs["total"], epochs["current"]):
            _set(counts, counts["started"])
        for progress in _within_an_epoch(fit_loop):
            _set(progress["current"], 0)
        _set(fit_loop["epoch_loop.val_loop.batch_progress"]["total"], 0)
        batches["is_last_batch"] = False
    elif current["processed"] and total["processed"] == total["started"]:
        for counts in (epochs["total"], epochs["current"]):
            counts["processed"] = counts["completed"] = counts["started"] - 1


def _set(counts: dict[str, int], value: int) -> None:
    for name in counts:
        counts[name] = value


def _steps(fit_loop: dict[str, Any]) -> None:
    """Count the last batch's step for loggers, which Lightning does after it has ended."""
    state = fit_loop["epoch_loop.state_dict"]
    state["_batches_that_stepped"] = state.get("_batches_that_stepped", 0) + 1


def _within_an_epoch(fit_loop: dict[str, Any]) -> list[dict[str, Any]]:
    """The counts that begin again with each epoch."""
    optimizer = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    names = ("batch_progress", "scheduler_progress")
    return [fit_loop[f"epoch_loop.{name}"] for name in names] + [optimizer["step"], optimizer["zero_grad"]]
