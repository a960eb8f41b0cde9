"""Re-curation: select new training data, using the features of the model in training."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from curated_data.checks import check_choice, whole_number
from curated_data.clustering.tree import EXCLUDED
from curated_data.config import CurationConfig
from curated_data.embedding import Embedder, resolve_embedder
from curated_data.embedding.sharded import unsharded
from curated_data.errors import CacheError, ConfigError
from curated_data.parallel import barrier, broadcast, rank, together
from curated_data.pipeline.curate import curate
from curated_data.pipeline.recurate import levels_of_share, recurate
from curated_data.pipeline.reopen import reopen, tree_of
from curated_data.stages.curation import Curation
from curated_data.stages.tree import check_levels
from curated_data.training.components import Source
from curated_data.training.datamodule import CuratedDataModule
from curated_data.training.recurating import agree_on_buffers, compared, drop_unheld, replaced_artifacts
from curated_data.training.recuration_state import RecurationState, checked_state
from curated_data.training.trainer import is_between_epochs

log = logging.getLogger(__name__)


class RecurationCallback(pl.Callback):
    """Embeds the pool again with the model in training, rebuilds the tree, and draws a new selection.

    The stream continues with the new selection at the next epoch, in the same process, on all ranks. Step
    counts and progress bars follow its size; a schedule computed for the first size does not. The tree is
    built from a fresh seeding: warm starts harm the method. All ranks share the embedding, while training
    waits. A run that is killed during or after a re-curation resumes with the same selection and sample.
    One that is due as the run ends is made when the run is extended, from its checkpoint or in its Trainer.

    With `share` below 1 only that share of the samples, drawn again each time, is embedded with the model;
    the rest follow their clusters of the first curation, whose features cover the pool (see `recurate`).

    Under FSDP each rank embeds with a full copy of the module, which needs memory.

    Logged each time, as `recuration/…`: `jaccard` with the previous selection, `new` (the share of samples
    that were not in it), `perplexity` of the lowest clusters in the pool, `selected_perplexity`, `size` and
    `minutes`.

    Args:
        every_n_epochs: re-curate at the end of every n-th epoch.
        every_n_steps: re-curate at the end of an epoch if at least n optimizer steps were made since the last
            time.
        monitor: re-curate at the end of an epoch if this logged metric has not improved for `patience`
            epochs, by its value on rank zero.
        mode: "min" or "max", which direction of the metric is better.
        patience: see `monitor`.
        start_epoch: the first epoch, counted from 0, that may end in a re-curation.
        most: the largest number of re-curations.
        share: of the samples that are embedded again, in (0, 1].
        embedder: a function from the module in training to an embedder; None uses the module's `embed` and
            `eval_transform`, which embed with the teacher in methods that have an EMA teacher.
        on_failure: "keep" the old selection and log a warning, or "stop" the run with the error. On several
            ranks a failure of one is that of all.
        component: of a mixture: the one whose pool is embedded and whose selection is replaced. The others go
            on where they are, and the length of an epoch stays. Give a callback for each that changes.
        keep_artifacts: keep the embeddings and trees of earlier re-curations in the cache. Selections are
            always kept, because checkpoints refer to them, and so is what another run or a `Curation` still
            uses.

    Raises:
        ConfigError: no trigger or several, values out of range, or a Trainer without a `CuratedDataModule`
            that curates, or of a mixture whose component does not.

    Examples:
        >>> from curated_data import RecurationCallback
        >>> from lightning import Trainer
        >>> trainer = Trainer(max_epochs=4, callbacks=[RecurationCallback(every_n_epochs=2)], logger=False)
    """

    def __init__(
        self,
        every_n_epochs: int | None = None,
        *,
        every_n_steps: int | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        start_epoch: int = 0,
        most: int | None = None,
        share: float = 1.0,
        embedder: Callable[[pl.LightningModule], str | nn.Module | Embedder] | None = None,
        on_failure: Literal["keep", "stop"] = "stop",
        keep_artifacts: bool = False,
        component: str | None = None,
    ) -> None:
        triggers = {"every_n_epochs": every_n_epochs, "every_n_steps": every_n_steps, "monitor": monitor}
        given = {name: value for name, value in triggers.items() if value is not None}
        if len(given) != 1:
            raise ConfigError(f"RecurationCallback: give one of {', '.join(triggers)}, got {given or 'none'}")
        for name, value, least in (
            ("every_n_epochs", every_n_epochs, 1),
            ("every_n_steps", every_n_steps, 1),
            ("patience", patience, 1),
            ("start_epoch", start_epoch, 0),
            ("most", most, 0),
        ):
            if value is not None:
                whole_number(f"RecurationCallback.{name}", value, least)
        check_choice("RecurationCallback.mode", mode, ("min", "max"))
        check_choice("RecurationCallback.on_failure", on_failure, ("keep", "stop"))
        if not (embedder is None or callable(embedder)):
            raise ConfigError(
                "RecurationCallback.embedder: expected a function of the module in training that gives an "
                f"embedder, got {embedder!r}; for one that stays the same give `lambda module: {embedder!r}`"
            )
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.monitor, self.mode, self.patience = monitor, mode, patience
        if not 0 < share <= 1:
            raise ConfigError(f"RecurationCallback.share: expected more than 0 and at most 1, got {share}")
        self.start_epoch, self.most = start_epoch, most
        self.share = share
        self.embedder = embedder
        self.on_failure = on_failure
        self.keep_artifacts = keep_artifacts
        self.component = component
        self.state = RecurationState()
        self._resuming: tuple[pl.Trainer, pl.LightningModule] | None = None
        self._is_loaded = False  # from a checkpoint, and not trained yet
        self._finished_epoch: int | None = None  # the epoch that was ended when the run resumed

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        data = self._data(trainer)
        if data.curation_config is None:
            what = "CuratedDataModule" if self.component is None else f"component {self.component!r}"
            raise ConfigError(f"RecurationCallback: the {what} has no `curation`; give it one")
        if self.share < 1 and data.base_curation is not None:
            levels = levels_of_share(data.curation_config, data.base_curation, self.share)
            n_usable = int((data.base_curation.tree.parent[1] != EXCLUDED).sum())
            check_levels(levels, math.ceil(self.share * n_usable))
        if self.embedder is None:
            missing = [name for name in ("embed", "eval_transform") if not hasattr(pl_module, name)]
            if missing:
                raise ConfigError(
                    f"RecurationCallback: {type(pl_module).__name__} has no {' and no '.join(missing)}; give "
                    "`embedder`, a function from the module to what embeds"
                )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._resuming = trainer, pl_module  # for `load_state_dict`, which follows

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        resumes, self._is_loaded = self._is_loaded, False
        if not resumes and trainer.global_step == 0:
            self.state = RecurationState()
        if (
            self.state.unfinished is not None
            and not resumes
            and trainer.global_step != self.state.unfinished["step"]
        ):
            self.state.unfinished = None  # of another Trainer's run
        self._finish_interrupted_epoch(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self.state.unfinished = {"epoch": trainer.current_epoch, "step": trainer.global_step}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        made_up, self._finished_epoch = self._finished_epoch, None
        if not is_between_epochs(trainer):  # cut short by a limit or a signal: a resumed run will end it
            return
        if made_up == trainer.current_epoch:
            self.state.unfinished = None
            return
        figures = self._end_epoch(trainer, pl_module, trainer.current_epoch, trainer.global_step)
        if figures:
            # Equal on all ranks but for the minutes; every rank has them, for callbacks that monitor one.
            pl_module.log_dict(figures, sync_dist=True)

    @property
    def n_recurations(self) -> int:
        """Re-curations so far, of this run and those that it resumed."""
        return self.state.n_recurations

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = checked_state(state_dict)
        self._is_loaded = True
        if self._resuming is not None:
            (trainer, pl_module), self._resuming = self._resuming, None
            self._restore(self._data(trainer))
            if trainer.strategy.restore_checkpoint_after_setup:  # and so after `on_fit_start`
                self._is_loaded = False
                self._finish_interrupted_epoch(trainer, pl_module)

    @property
    def state_key(self) -> str:
        if self.component is None:
            return super().state_key
        return self._generate_state_key(component=self.component)

    def _data(self, trainer: pl.Trainer) -> Source:
        """What is curated again: the data module's one selection, or a component of its mixture."""
        data = _datamodule(trainer)
        if self.component is not None:
            return data.component(self.component)
        if data.mixture is not None:
            names = ", ".join(data.mixture.names)
            raise ConfigError(f"RecurationCallback.component: missing; name one of the mixture's, {names}")
        return data.sources[0]

    def _finish_interrupted_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End an epoch that was saved after its last batch, before the loader is built.

        Lightning itself only ends such an epoch if it was saved after a validation; then it must not be ended
        twice.
        """
        if self.state.unfinished is not None:
            epoch, step = self.state.unfinished["epoch"], self.state.unfinished["step"]
            self._finished_epoch = epoch
            figures = self._end_epoch(trainer, pl_module, epoch, step)
            for logger in trainer.loggers if figures else ():
                logger.log_metrics(figures, step=step)

    def _end_epoch(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int, step: int
    ) -> dict[str, float]:
        """Re-curate if it is due; returns the figures to log, none if nothing was done."""
        self.state.unfinished = None
        if not self._is_due(trainer, epoch, step):
            return {}
        if _has_ended(trainer, epoch, step):  # nothing will be trained on it, unless the run is extended
            self.state.unfinished = {"epoch": epoch, "step": step}
            return {}
        started = time.monotonic()
        data = self._data(trainer)
        old = data.selection
        assert old is not None, "the data module is set up, and has a curation"
        curation = self._recurate(trainer, pl_module, data, epoch)
        if curation is None:
            return {}
        data.curation, data.lost_tree = curation, None
        self.state.selection = curation.folders["selection"].name
        data.stream_curation(curation)
        if not self.keep_artifacts:
            self._drop_earlier(data)
        self.state.n_recurations += 1
        self.state.last_step = step
        self.state.epochs_without_gain = 0
        figures = compared(old, curation) | {"minutes": (time.monotonic() - started) / 60}
        log.info(
            "re-curation %d after epoch %d: %d samples, Jaccard %.3f with the last, %.1f %% new, %.1f min",
            self.n_recurations,
            epoch,
            figures["size"],
            figures["jaccard"],
            100 * figures["new"],
            figures["minutes"],
        )
        if len(old) != len(curation.ids) and trainer.max_steps < 0 and self.component is None:
            log.warning(
                "the selection went from %d to %d samples; a schedule computed from "
                "estimated_stepping_batches still assumes the first size. Set max_steps to fix the number of "
                "steps (docs/troubleshooting.md)",
                len(old),
                len(curation.ids),
            )
        return {f"recuration/{name}": float(value) for name, value in figures.items()}

    def _restore(self, data: Source) -> None:
        """In a resumed run, make the data module's `curation` the one that it streams, not the first one."""
        current = data.curation.folders["selection"].name if data.curation is not None else None
        data.lost_tree = None
        if self.state.selection is None:
            data.curation = data.base_curation
        if self.state.selection is None or self.state.selection == current:
            return
        assert data.cache_dir is not None, "a curation comes with one"
        try:
            data.curation = reopen(data.cache_dir, self.state.selection)
        except CacheError as error:
            # A later re-curation removed its tree; what is streamed is kept elsewhere.
            data.curation = data.base_curation
            data.lost_tree = tree_of(data.cache_dir, self.state.selection).name
            log.warning(
                "the tree of the resumed selection is gone, figures show the first curation: %s", error
            )

    def _is_due(self, trainer: pl.Trainer, epoch: int, step: int) -> bool:
        stalled = self._has_stalled(trainer)  # counts every epoch, due or not
        if epoch < self.start_epoch or (self.most is not None and self.n_recurations >= self.most):
            return False
        if self.every_n_epochs is not None:
            return (epoch + 1) % self.every_n_epochs == 0
        if self.every_n_steps is not None:
            return step - self.state.last_step >= self.every_n_steps
        return stalled

    def _has_stalled(self, trainer: pl.Trainer) -> bool:
        if self.monitor is None:
            return False
        logged = trainer.callback_metrics
        seen = np.array([len(logged) > 0, self.monitor in logged, float(logged.get(self.monitor, 0))])
        # Decided by rank zero: ranks may log different values, or none, but must not diverge.
        any_logged, found, value = broadcast(seen).tolist()
        if not any_logged:  # resuming, nothing is logged yet
            return self.state.epochs_without_gain >= self.patience
        if not found:
            known = ", ".join(sorted(logged)) or "none"
            raise ConfigError(f"RecurationCallback.monitor: nothing logs {self.monitor!r}; logged: {known}")
        better = not math.isnan(value) and (
            self.state.best is None
            or (value < self.state.best if self.mode == "min" else value > self.state.best)
        )
        if better:
            self.state.best, self.state.epochs_without_gain = value, 0
        else:
            self.state.epochs_without_gain += 1
        return self.state.epochs_without_gain >= self.patience

    def _recurate(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, data: Source, epoch: int
    ) -> Curation | None:
        """A curation with the module's features; None if it failed and the old selection is kept."""
        first, base, cache_dir = data.curation_config, data.base_curation, data.cache_dir
        assert first is not None, "checked in `setup`"
        assert base is not None, "made before the first epoch"
        assert cache_dir is not None, "a curation comes with one"
        config = dataclasses.replace(first, seed=first.seed + self.n_recurations + 1)
        failure: Exception | None = None
        curation: Curation | None = None
        try:
            with together():  # all keep the old selection, or none does
                curation = self._curated(trainer, pl_module, data, config, base, cache_dir)
        except Exception as error:  # of any kind: on_failure decides what becomes of the run
            if self.on_failure == "stop":
                raise
            failure = error
        if failure is None and curation is not None:
            return curation
        reason = f"{type(failure).__name__}: {failure}"
        log.warning("re-curation after epoch %d failed, the old selection stays: %s", epoch, reason)
        return None

    def _curated(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        data: Source,
        config: CurationConfig,
        base: Curation,
        cache_dir: Path,
    ) -> Curation:
        """A curation with the module's features."""
        agree_on_buffers(pl_module)
        module = unsharded(pl_module, trainer.model)
        settings: dict[str, Any] = {
            "embedder": resolve_embedder(self.embedder(module) if self.embedder else module),
            "cache_dir": cache_dir,
            "device": trainer.strategy.root_device,
            "decoders": data.decoding.decoders,
            "fields": data.decoding.fields,
        }
        if self.share == 1:
            return curate(data.pool, config, **settings)
        return recurate(data.pool, config, base=base, share=self.share, **settings)

    def _drop_earlier(self, data: Source) -> None:
        """Remove the last re-curation's artifacts from the cache, but for those that somebody uses.

        What another run still reads, or this one with the new curation, stays. It is looked at again after
        the next re-curation.
        """
        assert data.cache_dir is not None, "a curation comes with one"
        assert data.curation is not None, "made just now"
        assert data.base_curation is not None, "made before the first epoch"
        first = replaced_artifacts(data.base_curation)  # later re-curations build on it
        new = [name for name in replaced_artifacts(data.curation) if name not in first]
        earlier = [name for name in dict.fromkeys(self.state.artifacts) if name not in {*new, *first}]
        barrier()  # from here on no rank holds the last curation
        # Rank zero's list is the one that checkpoints hold.
        left = [name for name in earlier if not drop_unheld(data.cache_dir, name)] if rank() == 0 else []
        self.state.artifacts = new + left


def _datamodule(trainer: pl.Trainer) -> CuratedDataModule:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, CuratedDataModule):
        kind = "none" if data is None else type(data).__name__
        raise ConfigError(
            f"RecurationCallback: needs `trainer.fit(module, datamodule=CuratedDataModule(...))`, got {kind}"
        )
    return data


def _has_ended(trainer: pl.Trainer, epoch: int, step: int) -> bool:
    """Whether a limit of the Trainer ends the run with this epoch."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    return (epochs is not None and 0 <= epochs <= epoch + 1) or 0 <= steps <= step
