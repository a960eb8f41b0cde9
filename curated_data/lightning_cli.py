"""Command lines that train: LightningCLI with a `CuratedDataModule`, exact names, and `--dry-run`."""

import dataclasses
import difflib
import glob
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import lightning
import numpy as np
from jsonargparse import set_parsing_settings
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from curated_data.errors import ConfigError, CuratedDataError, first_line
from curated_data.pipeline.plan import duration, plan, plan_tables
from curated_data.stages.cost import Cost
from curated_data.training.datamodule import CuratedDataModule

_PROBE_STEPS = 8


def run_cli(
    arguments: list[str] | None = None,
    cli: type[LightningCLI] | None = None,
    *,
    description: str,
    **options: Any,
) -> LightningCLI:
    """Parse the command line, or `arguments`, and run.

    Args:
        arguments: None takes those of the process.
        cli: None takes `PlannedCLI`.
        description: for `--help`.
        options: of LightningCLI.
    """
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    return (cli or PlannedCLI)(
        lightning.LightningModule,
        CuratedDataModule,
        subclass_mode_model=True,
        parser_class=ExactParser,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"parser_mode": "omegaconf+", "description": description},
        seed_everything_default=0,
        args=arguments,
        **options,
    )


class ExactParser(LightningArgumentParser):
    """A parser that takes no option for an abbreviation of another, and names the nearest one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().parse_args(*args, **kwargs)
        except OmegaConfBaseException as error:  # a ${…} that leads nowhere
            key = str(error.full_key).removeprefix("fit.")
            raise ConfigError(f"{key}: {first_line(error)}") from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        unknown = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        if message.lower().startswith("unrecognized") and unknown:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, 1)
            message += f"; did you mean {near[0]}?" if near else ""
        super().error(message, ex)


class TrainingCLI(LightningCLI):
    """LightningCLI with one-line errors for settings that the module or the data module rejects.

    Checkpoints are also linked as `last.ckpt`, and `--ckpt_path last` is an error where there is none.

    `test` is not a subcommand: our modules have no `test_step`; `recipes/evaluate.py` evaluates.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name != "test"}

    def before_fit(self) -> None:
        if str(self.config.fit.ckpt_path) == "last":
            self.config_init.fit.ckpt_path = last_checkpoint(self.trainer)

    def before_validate(self) -> None:
        if not is_overridden("validation_step", self.model):
            raise ConfigError(
                f"validate: {type(self.model).__name__} has no validation_step; evaluate its checkpoint with "
                "recipes/evaluate.py checkpoint:FILE"
            )

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # The parser tries all types of a setting, and its error lists all of them and every value.
            cause = error.__cause__
            if isinstance(cause, ValueError | TypeError) and not isinstance(error, CuratedDataError):
                raise ConfigError(str(cause)) from error
            raise
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_last is None:
                callback.save_last = "link"


def last_checkpoint(trainer: lightning.Trainer) -> Path:
    """The newest `last.ckpt` of the runs of a Trainer's loggers, or in the folders of its callbacks.

    Lightning looks only into the folder of the run that begins, and continues without a checkpoint.

    Raises:
        ConfigError: there is none; names where it was looked for.
    """
    callbacks = [
        callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)
    ]
    folders = [Path(callback.dirpath) for callback in callbacks if callback.dirpath is not None]
    folders += [
        Path(logger.save_dir) / str(logger.name) / "*" / "checkpoints"
        for logger in trainer.loggers
        if logger.save_dir is not None
    ]
    folders.append(Path(trainer.default_root_dir) / "checkpoints")
    patterns = [folder / "last*.ckpt" for folder in folders]
    found = [Path(path) for each in patterns for path in glob.glob(str(each), include_hidden=True)]
    if not found:
        places = ", ".join(dict.fromkeys(map(str, patterns)))
        raise ConfigError(
            f"ckpt_path: there is no last checkpoint ({places}); give the file, or leave it out"
        )
    return max(found, key=lambda path: path.stat().st_mtime_ns)


class PlannedCLI(TrainingCLI):
    """The command line with `--dry-run`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="print sizes, memory and expected hours, and stop (only with fit)",
        )

    def before_fit(self) -> None:
        super().before_fit()
        if self.config.fit.dry_run:
            show_plan(self.model, self.datamodule, self.trainer, self.config.fit.trainer)
            raise SystemExit(0)


def show_plan(
    module: lightning.LightningModule, data: CuratedDataModule, trainer: lightning.Trainer, settings: Any
) -> None:
    """Print the plan of a run: the curation, then the training."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    training = training_stage(module, data, trainer, settings)
    curated = [source for source in data.sources if source.curation_config is not None]
    if not curated:
        console.print(f"no curation; {training.note}: {duration(training.seconds or 0)}")
        return
    for source in curated:
        assert source.curation_config is not None, "it is curated"
        assert source.embedder is not None, "a curation comes with one"
        assert source.cache_dir is not None, "a curation comes with one"
        found = plan(
            source.pool, source.curation_config, embedder=source.embedder, cache_dir=source.cache_dir,
            device=trainer.strategy.root_device, decoders=source.decoding.decoders,
        )  # fmt: skip
        if source.name:
            console.print(f"component {source.name}:")
        if source is curated[-1]:
            found.stages.append(training)
        for table in plan_tables(found):
            console.print(table)


def training_stage(
    module: lightning.LightningModule, data: CuratedDataModule, trainer: lightning.Trainer, settings: Any
) -> Cost:
    """The training as a stage: its number of steps, and their time by the median of a few on one device,
    without validation.
    """
    n_trained = sum(source.n_first for source in data.sources)
    if data.mixture is not None and data.mixture.epoch_size is not None:
        n_trained = data.mixture.epoch_size
    an_epoch = n_trained // (data.batch_size * trainer.world_size)
    steps = an_epoch * (trainer.max_epochs or 1000) if (trainer.max_epochs or 0) >= 0 else None
    if trainer.max_steps >= 0:
        steps = trainer.max_steps if steps is None else min(steps, trainer.max_steps)
    if steps is None:
        return Cost("train", False, None, f"{an_epoch:,} steps per epoch, without end")
    note = f"{steps:,} steps of {data.batch_size} x {trainer.world_size} samples"
    return Cost("train", False, steps * _step_seconds(module, data, settings), note)


class _Clock(lightning.Callback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(time.monotonic())


def _step_seconds(module: lightning.LightningModule, data: CuratedDataModule, settings: Any) -> float:
    """The median time from one step to the next, on random samples of the pool."""
    # SP²OT fills its buffer with an epoch's samples first.
    need = max(data.batch_size * _PROBE_STEPS, int(module.hparams.get("buffer_size") or 0) + data.batch_size)
    ids = np.random.default_rng(0).choice(len(data.pool), need, replace=len(data.pool) < need)
    probe = CuratedDataModule(
        data.pool, selection=ids, views=data.sources[0].views or data.views, batch_size=data.batch_size,
        seed=data.seed, image_size=data.image_size, loader=data.loader,
        decoding=dataclasses.replace(data.decoding, max_skipped=1.0, fields=None),
    )  # fmt: skip
    clock = _Clock()
    trainer = lightning.Trainer(
        accelerator=settings.accelerator, precision=settings.precision, devices=1, max_steps=_PROBE_STEPS,
        callbacks=[clock], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, probe)
    gaps = np.diff(clock.times)[1:]  # the first steps include one-time set-up
    return statistics.median(gaps.tolist())
