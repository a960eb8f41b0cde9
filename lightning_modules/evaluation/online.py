"""Callbacks that probe the backbone while it trains, without touching what it learns."""

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from curated_data.parallel import rank, world_size
from lightning_modules.distributed import all_reduce
from lightning_modules.evaluation.knn import knn
from lightning_modules.evaluation.linear import LinearSettings, linear

log = logging.getLogger(__name__)

Source = DataLoader | Dataset | Callable[[], DataLoader | Dataset]
Labelled = tuple[Tensor, Tensor]  # features (n, d) and labels (n,)


class _OnlineProbe(L.Callback):
    """What the probes share: when they run, each rank's share of the features, and failures that end no
    run.
    """

    name = ""

    def __init__(
        self, train: Source, test: Source, *, every_n_epochs: int, batch_size: int, num_workers: int
    ) -> None:
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}")
        self.train, self.test = train, test
        self.every_n_epochs = every_n_epochs
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.history: list[dict[str, float]] = []

    def scores(self, train: Labelled, test: Labelled, device: torch.device) -> dict[str, float]:
        """The figures to log, the same on every rank, from this rank's share of features and labels."""
        raise NotImplementedError

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        is_last = epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if trainer.sanity_checking or (epoch % self.every_n_epochs and not is_last):
            return
        scores = self._probe(trainer, pl_module)
        if scores is not None:
            self.history.append({"epoch": epoch, **scores})
            pl_module.log_dict(scores, sync_dist=True, batch_size=1)
            log.info(
                "epoch %d: %s", epoch, ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            )

    def _probe(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float] | None:
        sets: list[Labelled] = []
        error: Exception | None = None
        try:
            with evaluation_mode(pl_module), trainer.precision_plugin.forward_context():
                sets = [
                    embed_share(
                        pl_module, source() if callable(source) else source, self.batch_size, self.num_workers
                    )
                    for source in (self.train, self.test)
                ]
                if not all(bool(torch.isfinite(features).all()) for features, _ in sets):
                    raise ValueError("the module's features are not finite")
        except Exception as caught:  # whatever goes wrong in a probe must not end a training of days
            error = caught
        # The ranks agree before the comparison's first collective, or one would wait for another for ever.
        failed = int(all_reduce(torch.tensor([int(error is not None)], device=pl_module.device)))
        if error is not None:
            self._warn(f"on rank {rank()}", error)
        if failed:
            return None
        # A rank without a sample may not know how long features are; the others do.
        longest = max(features.shape[1] for features, _ in sets)
        longest = int(all_reduce(torch.tensor([longest], device=pl_module.device), "max"))
        train, test = ((x if len(x) else x.new_zeros(0, longest), labels) for x, labels in sets)
        try:  # what is checked here is the same on every rank, so all raise or none
            return self.scores(train, test, pl_module.device)
        except Exception as caught:
            self._warn("", caught)
            return None

    def _warn(self, where: str, error: Exception) -> None:
        log.warning(
            "%s probe failed%s, training continues: %s: %s",
            self.name, f" {where}" if where else "", type(error).__name__, error,
        )  # fmt: skip


class OnlineKNN(_OnlineProbe):
    """k-NN accuracy of the module's `embed` every few epochs.

    Logged as `knn/<k>` and `knn/class_average_<k>`, the same on every rank, so that `ModelCheckpoint` may
    monitor it.

    Each rank embeds its share of both sets. Features are taken in evaluation mode, without gradient, and
    every submodule's mode is put back, so BatchNorm statistics, frozen parts and random numbers of the
    training are what they would be without the callback. If a probe fails on any rank, all ranks skip it, the
    run continues, and the reason is logged.

    Args:
        train, test: labelled sets, or functions that give them when the fit starts: a map-style dataset of
            {"image": (3, S, S), "label": int} (as `eval_transform` makes images) or of pairs, or a
            `DataLoader` over one, whose batch size, workers and collation are kept. Samples with label -1 are
            left out.
        every_n_epochs: 1 probes after each epoch; the last epoch of a run is always probed.
        k: numbers of neighbours.
        temperature: of the votes.
        batch_size, num_workers: of the embedding, where the sets are not loaders.

    Examples:
        >>> import torch
        >>> from lightning import Trainer
        >>> from lightning_modules.evaluation import OnlineKNN
        >>> images = [{"image": torch.rand(3, 32, 32), "label": number % 2} for number in range(20)]
        >>> probe = OnlineKNN(images, images, every_n_epochs=5, k=(1, 5))
        >>> trainer = Trainer(max_epochs=10, callbacks=[probe], logger=False)
    """

    name = "k-NN"

    def __init__(
        self,
        train: Source,
        test: Source,
        *,
        every_n_epochs: int = 1,
        k: int | Sequence[int] = 20,
        temperature: float = 0.07,
        batch_size: int = 256,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            train, test, every_n_epochs=every_n_epochs, batch_size=batch_size, num_workers=num_workers
        )
        self.k = [k] if isinstance(k, int) else list(k)
        self.temperature = temperature

    def scores(self, train: Labelled, test: Labelled, device: torch.device) -> dict[str, float]:
        result = knn(*train, *test, k=self.k, temperature=self.temperature, device=device)
        return {f"knn/{k}": result.accuracy[k] for k in self.k} | {
            f"knn/class_average_{k}": result.class_accuracy[k] for k in self.k
        }


class OnlineLinear(_OnlineProbe):
    """Accuracy of a linear head on the module's `embed` every few epochs, fitted again each time.

    Logged as `linear/accuracy`, `linear/class_average` and `linear/held_out` (of the part of train that the
    head is chosen on, which a monitor may use without looking at the test set). What `OnlineKNN` says of the
    training holds here too: it is what it would be without the callback.

    Args:
        train, test, every_n_epochs, batch_size, num_workers: see `OnlineKNN`.
        settings: of the head; its first protocol counts. The default is the grid of learning rates with 1,000
            steps.

    Examples:
        >>> import torch
        >>> from lightning import Trainer
        >>> from lightning_modules.evaluation import OnlineLinear
        >>> images = [{"image": torch.rand(3, 32, 32), "label": number % 2} for number in range(20)]
        >>> probe = OnlineLinear(images, images, every_n_epochs=5)
        >>> trainer = Trainer(max_epochs=10, callbacks=[probe], logger=False)
    """

    name = "linear"

    def __init__(
        self,
        train: Source,
        test: Source,
        *,
        every_n_epochs: int = 1,
        settings: LinearSettings | None = None,
        batch_size: int = 256,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            train, test, every_n_epochs=every_n_epochs, batch_size=batch_size, num_workers=num_workers
        )
        self.settings = settings or LinearSettings(n_iter=1000)
        if self.settings.protocols[0] == "few_shot":
            raise ValueError("an online probe takes the protocol 'sgd' or 'logistic'")

    def scores(self, train: Labelled, test: Labelled, device: torch.device) -> dict[str, float]:
        head = linear(*train, *test, settings=self.settings, device=device).heads[0]
        return {f"linear/{name}": head[name] for name in ("accuracy", "class_average", "held_out")}


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; submodules' modes and the random states of torch, numpy and Python
    are put back after.
    """
    modes = [(m, m.training) for m in module.modules()]
    devices = [p.device for p in module.parameters() if p.device.type == "cuda"][:1]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        for m, mode in modes:
            m.training = mode  # not .train(mode): it would reach into children that are frozen


def embed_share(
    module: L.LightningModule, source: DataLoader | Dataset, batch_size: int = 256, num_workers: int = 0
) -> tuple[Tensor, Tensor]:
    """This rank's share of a labelled set's features (n, d) and labels (n,), by `module.embed`.

    Samples r, r + world, r + 2 world, ... belong to rank r. All ranks embed as many batches, the last sample
    once more where the set cannot be shared out evenly: in a sharded module (FSDP) each is a collective.

    Raises:
        TypeError: no map-style dataset, samples without image and label, or a module that has no `embed`.
    """
    embed = getattr(module, "embed", None)
    if not callable(embed):
        raise TypeError(
            f"a probe calls the module's embed(images), which gives (B, d): {type(module).__name__} has none"
        )
    collate = None
    if isinstance(source, DataLoader):
        batch_size = source.batch_size or getattr(source.batch_sampler, "batch_size", None) or batch_size
        num_workers, collate, source = source.num_workers, source.collate_fn, source.dataset
    if isinstance(source, IterableDataset) or not hasattr(source, "__len__"):
        raise TypeError(
            f"a probe needs a map-style dataset, which ranks can share out; got {type(source).__name__}"
        )
    places = range(rank(), -(-len(source) // world_size()) * world_size(), world_size())
    n_own = len(range(rank(), len(source), world_size()))
    share = Subset(source, [min(place, len(source) - 1) for place in places])
    # A generator of its own: a loader draws its workers' seed from the global one otherwise.
    loader = DataLoader(
        share, batch_size=batch_size, num_workers=num_workers, collate_fn=collate, generator=torch.Generator()
    )
    features, labels = [], []
    for batch in loader:
        images, targets = _image_and_label(batch)
        images = images.to(module.device)
        if getattr(module, "_trainer", None) is not None:
            # Weights may be of another type than images, as by "bf16-true".
            images = module.trainer.precision_plugin.convert_input(images)
        embedded = embed(images)
        known = (targets >= 0) & (torch.arange(len(targets), device=targets.device) < n_own)
        n_own -= len(targets)
        features.append(embedded.float()[known.to(embedded.device)])
        labels.append(targets[known])
    if not features:
        return torch.zeros(0, getattr(module, "embedding_dimension", 0)), torch.zeros(0, dtype=torch.int64)
    return torch.cat(features), torch.cat(labels)


def _image_and_label(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch; a label of -1 stands for none, as for padding that a loader marks."""
    if isinstance(batch, Mapping) and "image" in batch and "label" in batch:
        labels = torch.as_tensor(batch["label"])
        return batch["image"], labels.masked_fill(batch["padding"], -1) if "padding" in batch else labels
    if isinstance(batch, Sequence) and len(batch) == 2:
        if isinstance(batch[0], Mapping):  # a batch, and what a loader notes beside it
            return _image_and_label(batch[0])
        return batch[0], torch.as_tensor(batch[1])
    found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
    raise TypeError(f"a probe needs batches of 'image' and 'label', got {found}")
