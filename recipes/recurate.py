r"""Pretrain on a selection that is renewed during training, with the features of the model in training.

    uv run recipes/recurate.py fit --config configs/base.yaml --config configs/pretrain/simclr_fashion.yaml
    uv run recipes/recurate.py fit --config configs/base.yaml --config configs/pretrain/simclr_fashion.yaml \
        --recuration.every_n_epochs 5 --recuration.start_epoch 4 --recuration.most 3

Like recipes/pretrain.py, with a RecurationCallback set by the options --recuration.* (listed by `fit
--help`),
by default every ten epochs. At the end it prints what each re-curation changed: how much of the selection is
new, and how evenly it is spread over the clusters and, if the pool has labels, over the classes; labels are
used for nothing else. A killed run continues with --ckpt_path.
"""

if __name__ == "__main__":  # before Lightning and torch are imported, which takes some fifteen seconds
    import sys

    from curated_data.early import check_keys
    from curated_data.errors import ConfigError

    try:
        check_keys(sys.argv[1:], also=["recuration"])
    except ConfigError as error:
        sys.exit(f"recurate: {error}")

import sys

import lightning
import numpy as np
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table

from curated_data import CuratedDataModule, RecurationCallback
from curated_data.errors import ConfigError, CuratedDataError
from curated_data.lightning_cli import TrainingCLI, run_cli
from curated_data.programs import labels_of
from curated_data.selection.metrics import class_balance


class History(lightning.Callback):
    """The selections that a training streamed, in order.

    Attributes:
        selections: (epoch, ids) for each epoch whose selection differs from the previous one.
        perplexities: for each selection, of the samples selected from each lowest cluster of its tree.
    """

    def __init__(self) -> None:
        self.selections: list[tuple[int, np.ndarray]] = []
        self.perplexities: list[float] = []

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        assert isinstance(data, CuratedDataModule)
        ids, curation = data.selection, data.curation
        assert ids is not None, "training has begun, on a selection"
        if self.selections and np.array_equal(ids, self.selections[-1][1]):
            return
        self.selections.append((trainer.current_epoch, ids))
        lowest = curation.report["levels"][0] if curation is not None else {}
        self.perplexities.append(lowest.get("selected_perplexity", float("nan")))


class RecurationCLI(TrainingCLI):
    """The command line with the callback's settings as options, and `fit` alone."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": TrainingCLI.subcommands()["fit"]}

    def before_instantiate_classes(self) -> None:
        given = self.config.fit.trainer.callbacks or []
        for callback in given if isinstance(given, list) else [given]:
            path = str(getattr(callback, "class_path", ""))
            if path.rpartition(".")[2] == RecurationCallback.__name__:
                raise ConfigError(
                    f"trainer.callbacks: has a {path}, of which this recipe makes one of its own from the "
                    "options --recuration.*; take it out of the YAML, or run recipes/pretrain.py with it"
                )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RecurationCallback, "recuration")
        parser.set_defaults({"recuration.every_n_epochs": 10})


def main(arguments: list[str] | None = None) -> Table:
    """Train, then print and return the table of what changed."""
    history = History()
    description = "Pretrain on a selection that is renewed during training. `fit --help` lists every setting."
    cli = run_cli(
        arguments, RecurationCLI, description=description, trainer_defaults={"callbacks": [history]}
    )
    table = changes(history, labels_of(cli.datamodule.pool))
    if cli.trainer.is_global_zero:
        Console(width=None if sys.stdout.isatty() else 110).print(table)
    return table


def changes(history: History, labels: np.ndarray) -> Table:
    """One row per selection: what is new in it, and how balanced it is."""
    has_labels = bool((labels >= 0).any())
    table = Table(title="What each re-curation changed")
    headings = ["from epoch", "samples", "new", "Jaccard with the last", "cluster perplexity"]
    for heading in headings + ["class entropy, nats", "head / tail"] * has_labels:
        table.add_column(heading, justify="right")
    before: np.ndarray | None = None
    for (epoch, ids), perplexity in zip(history.selections, history.perplexities, strict=True):
        distinct = np.unique(ids)
        cells = [f"{epoch}", f"{len(ids):,}", "", "", f"{perplexity:,.1f}"]
        if before is not None:
            shared = len(np.intersect1d(before, distinct, assume_unique=True))
            cells[2] = f"{1 - shared / len(distinct):.1%}"
            cells[3] = f"{shared / (len(before) + len(distinct) - shared):.3f}"
        if (balance := class_balance(labels, ids)) is not None:
            cells += [f"{balance.entropy_after:.3f}", f"{balance.ratio_after:,.1f}"]
        table.add_row(*cells)
        before = distinct
    return table


if __name__ == "__main__":
    try:
        main()
    except CuratedDataError as error:
        sys.exit(f"recurate: {error}")
