"""A callback that logs a curation's figures, plots and tables to the Trainer's loggers."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from curated_data.errors import ConfigError
from curated_data.report import figures
from curated_data.selection.metrics import checked_labels, class_balance, cluster_balance, read_labels
from curated_data.stages.curation import Curation
from curated_data.training.components import Source
from curated_data.training.datamodule import CuratedDataModule
from curated_data.training.options import check_fields

log = logging.getLogger(__name__)

_READ_LABELS = 200_000


class CurationLogger(pl.Callback):
    """Logs each curation once, when training on it begins: the first, and those of a `RecurationCallback`.

    Every logger gets the numbers, as `curation/…`: sizes, failures, near-duplicates, and for each level of
    the tree the perplexity, the Gini coefficient and the share of clusters covered, for the pool and for the
    selection; class entropies if there are labels. TensorBoard and Weights & Biases also get plots of cluster
    sizes by rank and of the classes, and a table of the levels.

    Rank zero draws and writes, which takes seconds for a pool of any size; the others wait at the next step.

    Args:
        labels: (n,) integer class of each sample, -1 for none; of a mixture, these by the names of its
            components, each of which logs as `curation/NAME/…`. None reads the pool's `.cls` members, if it
            has them and at most 200,000 samples. Where these are not integers a warning says so.
        class_names: for the plot.

    Raises:
        ConfigError: a Trainer without a `CuratedDataModule` that curates, or labels of another length than
            the pool or that are not integers.

    Examples:
        >>> from curated_data import CurationLogger
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[CurationLogger()])
    """

    def __init__(
        self,
        labels: np.ndarray | Mapping[str, np.ndarray] | None = None,
        *,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.labels, self.class_names = labels, class_names
        self._without_labels: set[str] = set()  # sources whose pools have none, as far as is known
        self._logged: list[str] = []  # names of selections, so that a resumed run logs none twice

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        sources = _sources(trainer)
        known = [source.name for source in sources]
        if isinstance(self.labels, Mapping):
            check_fields(self.labels, known, "CurationLogger.labels")
        elif self.labels is not None and known != [""]:
            raise ConfigError(
                f"CurationLogger.labels: expected those of each of {', '.join(known)}, by its name"
            )
        for source in sources:
            labels = self._given(source)
            if labels is not None and np.shape(labels) != (len(source.pool),):
                raise ConfigError(
                    f"CurationLogger.labels: expected shape ({len(source.pool)},), got {np.shape(labels)}"
                )
            if labels is not None:
                try:
                    checked_labels(labels)
                except ValueError as error:
                    raise ConfigError(f"CurationLogger.labels: {error}") from error

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for source in _sources(trainer):
            assert source.curation is not None, "made before training begins"
            selection = source.curation.folders["selection"].name
            name = f"{source.name}/{selection}" if source.name else selection
            if name in self._logged:
                continue
            self._logged.append(name)
            if trainer.is_global_zero and trainer.loggers:
                self._log(trainer, source, source.curation)

    def state_dict(self) -> dict[str, Any]:
        return {"logged": self._logged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._logged = list(state_dict["logged"])

    def _log(self, trainer: pl.Trainer, source: Source, curation: Curation) -> None:
        prefix = f"curation/{source.name}" if source.name else "curation"
        labels = self._labels(source)
        values = curation_metrics(curation, labels, prefix=prefix)
        plots = {f"{prefix}/cluster_sizes": figures.size_curves(curation.tree, curation.ids)}
        balance = None if labels is None else class_balance(labels, curation.ids)
        if balance is not None:
            counts = {"pool": balance.before, "selected": balance.after}
            plots[f"{prefix}/classes"] = figures.class_balance(
                counts, class_names=balance.names(self.class_names)
            )
        header, rows = level_table(curation)
        step = trainer.global_step
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
            _show(logger, plots, f"{prefix}/levels", header, rows, step)

    def _given(self, source: Source) -> np.ndarray | None:
        return self.labels.get(source.name) if isinstance(self.labels, Mapping) else self.labels

    def _labels(self, source: Source) -> np.ndarray | None:
        given = self._given(source)
        if given is not None:
            return checked_labels(given)
        if source.name in self._without_labels or len(source.pool) > _READ_LABELS:
            return None
        labels = read_labels(source.pool)
        if labels is None:  # else it would be told again after each re-curation
            self._without_labels.add(source.name)
        return labels


def _sources(trainer: pl.Trainer) -> list[Source]:
    """The sources that have a curation."""
    data = getattr(trainer, "datamodule", None)
    sources = data.sources if isinstance(data, CuratedDataModule) else []
    curated = [source for source in sources if source.curation_config is not None]
    if not curated:
        raise ConfigError("CurationLogger: needs a CuratedDataModule with a `curation`")
    return curated


def curation_metrics(
    curation: Curation, labels: np.ndarray | None = None, *, prefix: str = "curation"
) -> dict[str, float]:
    """The numbers of a curation, by the names under which they are logged.

    Args:
        curation: what `curate` returned.
        labels: (n,) class of each sample, -1 for none.
        prefix: of the names.
    """
    names = ("samples", "failed", "near_duplicates", "fresh", "selected", "distinct")
    values = {name: curation.report[name] for name in names if name in curation.report}
    for level in cluster_balance(curation.tree, curation.ids):
        kept = ("n_clusters", "perplexity", "selected_perplexity", "gini", "selected_gini", "covered")
        values |= {f"level_{level.level}/{name}": getattr(level, name) for name in kept}
    balance = None if labels is None else class_balance(labels, curation.ids)
    if balance is not None:
        values |= {"class_entropy": balance.entropy_before, "selected_class_entropy": balance.entropy_after}
    return {f"{prefix}/{name}": float(value) for name, value in values.items()}


def level_table(curation: Curation) -> tuple[list[str], list[list[float]]]:
    """Column names and a row for each level of the tree, from the lowest up."""
    rows = [dataclasses.asdict(level) for level in cluster_balance(curation.tree, curation.ids)]
    return list(rows[0]), [list(row.values()) for row in rows]


def _show(
    logger: Any,
    plots: dict[str, Figure],
    name_of_table: str,
    header: list[str],
    rows: list[list[float]],
    step: int,
) -> None:
    """Log plots and table to a logger that can: TensorBoard's writer, or the methods of `WandbLogger`."""
    writer: Any = getattr(logger, "experiment", None)
    if hasattr(writer, "add_figure"):
        for name, figure in plots.items():
            writer.add_figure(name, figure, global_step=step)
        writer.add_text(name_of_table, _markdown(header, rows), global_step=step)
    elif hasattr(logger, "log_image"):
        for name, figure in plots.items():
            logger.log_image(name, [_pixels(figure)], step=step)
        if hasattr(logger, "log_table"):
            logger.log_table(name_of_table, columns=header, data=rows, step=step)


def _markdown(header: list[str], rows: list[list[float]]) -> str:
    lines = [header, ["---:"] * len(header), *[[f"{value:,.4g}" for value in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _pixels(figure: Figure) -> np.ndarray:
    """A figure as uint8 (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
