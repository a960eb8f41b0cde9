"""What pretraining modules share: a backbone, checked batches, rates by the step, and their checkpoints."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.data import AttributeDict
from torch import Tensor

from curated_data.parallel import rank, world_size
from lightning_modules.backbones import build_backbone
from lightning_modules.optim import mark_vectors
from lightning_modules.schedules import scaled_learning_rate, steps_of_run, warmup_cosine
from lightning_modules.views import EvalTransform, eval_transform

log = logging.getLogger(__name__)


class PretrainingModule(L.LightningModule):
    """A backbone that learns from batches {"views": [(B, 3, S, S), ...], "sample_id": (B,)}.

    A subclass gives `loss(batch)`, `views()`, and `configure_optimizers`; its `__init__` calls
    `save_hyperparameters()` with plain values only, so that its checkpoints load with `weights_only=True`.

    The learning rate is a pure function of the optimiser step, set before each batch: base rate, scaled to
    the global batch (per-rank batch x ranks x accumulated batches), linear warm-up, cosine to
    `final_learning_rate`. A parameter group's `lr_scale` multiplies it.
    """

    n_views: int | None = 2  # how many views a batch must hold; None: any number
    hparams: AttributeDict  # what `save_hyperparameters()` keeps

    def __init__(
        self,
        backbone: str,
        *,
        image_size: int,
        small_images: bool,
        pretrained: bool | str,
        frozen_blocks: int,
        backbone_options: Mapping[str, Any] | None,
        learning_rate: float,
        warmup_epochs: float,
        final_learning_rate: float = 0.0,
        learning_rate_scaling: str = "linear",
        reference_batch_size: int = 256,
    ) -> None:
        super().__init__()
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {learning_rate}: nothing would be learnt")
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must not be negative, got {warmup_epochs}")
        scaled_learning_rate(learning_rate, 1, rule=learning_rate_scaling)  # raises on an unknown rule
        self.image_size = image_size
        self.learning_rate = learning_rate
        self.final_learning_rate = final_learning_rate
        self.warmup_epochs = warmup_epochs
        self.learning_rate_scaling = learning_rate_scaling
        self.reference_batch_size = reference_batch_size
        self.global_batch_size: int | None = None  # of the run's first batch, kept when it is resumed
        self.draw = 0  # counts batches: what random draws of a step depend on besides the seed and the sample
        self._n_steps: int | None = None
        self._steps_ahead = 0  # of the schedules, before the optimiser's
        self.backbone = build_backbone(
            backbone,
            image_size=image_size,
            small_images=small_images,
            pretrained=pretrained,
            frozen_blocks=frozen_blocks,
            **(backbone_options or {}),
        )

    @property
    def embedding_dimension(self) -> int:
        """The number of features that `embed` gives."""
        return self.backbone.dimension

    def embed(self, images: Tensor) -> Tensor:
        """Features (B, embedding_dimension) of images (B, 3, S, S) as `eval_transform()` makes them."""
        return self.backbone(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(images)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """The features of a batch, for `Trainer.predict`.

        Args:
            batch: a mapping with `image` (B, 3, S, S), as `eval_transform()` makes them; or only the images.

        Returns:
            Of a mapping: `embedding` (B, embedding_dimension), and `sample_id` and `label` if it has them; of
            images: their features.

        Raises:
            TypeError: a mapping without `image`.
        """
        if not isinstance(batch, Mapping):
            return self.embed(batch)
        if not isinstance(batch.get("image"), Tensor):
            raise TypeError(
                "a batch to predict is a dict with 'image', a tensor (B, 3, S, S): give the loader "
                f"eval_transform(), which makes one image of each sample; got {sorted(batch)}"
            )
        known = {name: batch[name] for name in ("sample_id", "label") if name in batch}
        return known | {"embedding": self.embed(batch["image"])}

    def eval_transform(self) -> EvalTransform:
        """The deterministic transform uint8 (3, H, W) -> float (3, S, S) that `embed` expects."""
        return eval_transform(self.image_size)

    def views(self) -> Callable[[Tensor], list[Tensor]]:
        """The augmentation uint8 (3, H, W) -> list of float (3, S, S) that the module trains on."""
        raise NotImplementedError

    def loss(self, batch: Mapping[str, Any]) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch on this rank, and parts of it to be logged."""
        raise NotImplementedError

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        check_views(batch, self.n_views)
        size = tuple(batch["views"][0].shape[-2:])
        if self.backbone.patch_size is not None and size != (self.image_size, self.image_size):
            raise ValueError(
                f"the backbone takes images of {self.image_size} x {self.image_size}, the views are {size}"
            )
        self.draw = (self.current_epoch << 32) + batch_idx
        result = self.loss(batch)
        loss, parts = result if isinstance(result, tuple) else (result, {})
        if not torch.isfinite(loss):
            raise RuntimeError(self._explain_non_finite(batch, loss))
        n = len(batch["views"][0])
        self.log("loss", loss.detach(), prog_bar=True, batch_size=n)
        for name, value in parts.items():
            self.log(name, value.detach(), batch_size=n)
        return loss

    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        check_views(batch, self.n_views)
        begins = self.global_step == 0 and batch_idx == 0  # rather than continues from a checkpoint
        if self.global_batch_size is None or begins:
            self.global_batch_size = (
                len(batch["views"][0]) * world_size() * int(self.trainer.accumulate_grad_batches)
            )
            log.info(
                "global batch %d, peak learning rate %g", self.global_batch_size, self.peak_learning_rate
            )
        self._steps_ahead = self._find_steps_ahead(batch_idx)
        self.set_rates(self.schedule_step)

    def set_rates(self, step: int) -> None:
        """Set what depends on the optimiser step: here the learning rate of every parameter group."""
        rate = self.learning_rate_at(step)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        self.log("learning_rate", rate, rank_zero_only=True, batch_size=1)

    @property
    def peak_learning_rate(self) -> float:
        """The base rate scaled to the global batch."""
        assert self.global_batch_size is not None, "known from the first batch on"
        return scaled_learning_rate(
            self.learning_rate,
            self.global_batch_size,
            reference=self.reference_batch_size,
            rule=self.learning_rate_scaling,
        )

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of an optimiser step of the run."""
        peak = self.peak_learning_rate
        final = self.final_learning_rate * peak / self.learning_rate
        return warmup_cosine(step, total=self.n_steps, peak=peak, final=final, warmup=self.warmup_steps)

    @property
    def schedule_step(self) -> int:
        """The optimiser step that schedules are evaluated at.

        In a run limited by `max_epochs`, earlier epochs count as if they had the present one's length, so
        that schedules end with the run even if a re-curation has changed it. Where `max_steps` ends the run,
        and as long as no length has changed, it is `global_step`.
        """
        return self.global_step + self._steps_ahead

    def _find_steps_ahead(self, batch_idx: int) -> int:
        batches, every = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        if math.isinf(batches) or self.n_steps == self.trainer.max_steps:
            return 0
        began = self.global_step - batch_idx // every
        return self.current_epoch * math.ceil(batches / every) - began

    @property
    def n_steps(self) -> int:
        """Optimiser steps of the whole run, as schedules count them.

        Raises:
            ValueError: the Trainer has neither `max_epochs` nor `max_steps`, or `max_epochs` and a loader
                without a length, so no schedule can end.
        """
        if self._n_steps is None:
            self._n_steps = steps_of_run(self.trainer.estimated_stepping_batches)
        return self._n_steps

    def epochs_to_steps(self, epochs: float) -> int:
        """Optimiser steps in a number of epochs.

        Raises:
            ValueError: the loader has no length, so the length of an epoch is unknown.
        """
        batches = self.trainer.num_training_batches
        if epochs == 0:
            return 0
        if math.isinf(batches):
            raise ValueError(
                "the training loader has no length, so a warm-up and other times in epochs cannot be counted "
                "in steps: give the Trainer limit_train_batches, the batches of an epoch"
            )
        return round(epochs * math.ceil(batches / self.trainer.accumulate_grad_batches))

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up: of a run shorter than twice the warm-up, half the run."""
        return min(self.epochs_to_steps(self.warmup_epochs), self.n_steps // 2)

    def setup(self, stage: str) -> None:
        mark_vectors(self)  # the strategy, which may be FSDP, wraps the module after this

    def on_fit_start(self) -> None:
        self._n_steps = None  # another fit may be longer

    def on_train_epoch_start(self) -> None:
        self._n_steps = None  # so may an epoch after a re-curation

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["module_class"] = f"{type(self).__module__}.{type(self).__qualname__}"
        checkpoint["global_batch_size"] = self.global_batch_size
        # The weights are in the checkpoint: who loads it needs no hub and no file.
        if checkpoint.get("hyper_parameters", {}).get("pretrained"):
            checkpoint["hyper_parameters"]["pretrained"] = False

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.global_batch_size = checkpoint.get("global_batch_size")

    @staticmethod
    def sample_ids(batch: Mapping[str, Any]) -> Tensor:
        """The batch's sample ids; without any, places in the global batch."""
        if "sample_id" in batch:
            return batch["sample_id"]
        first = batch["views"][0]
        return torch.arange(len(first), device=first.device) + rank() * len(first)

    def _explain_non_finite(self, batch: Mapping[str, Any], loss: Tensor) -> str:
        """Why training stops: which samples are not finite, or that none is."""
        bad = torch.zeros(len(batch["views"][0]), dtype=torch.bool)
        for view in batch["views"]:
            bad |= ~torch.isfinite(view).flatten(1).all(1).cpu()
        where = f"step {self.global_step}, rank {rank()}: the loss is {float(loss.detach())}"
        if not bad.any():
            return (
                f"{where}, though this rank's images are finite: another rank's are not, or the learning "
                "rate or the precision is at fault; resume from the last checkpoint with a smaller rate or "
                "bf16-mixed"
            )
        ids = batch.get("sample_id")
        chosen = torch.nonzero(bad).flatten()
        names = (ids.cpu()[chosen] if ids is not None else chosen).tolist()
        kind = "sample ids" if ids is not None else "positions in the batch"
        return f"{where}; images with NaN or infinite values, {kind}: {names[:20]} ({len(names)} in all)"


def check_views(batch: Mapping[str, Any], n_views: int | None) -> None:
    """Raise a clear error unless the batch holds the views that the module trains on.

    Raises:
        TypeError: the batch is not a mapping with a list of image tensors under "views".
        ValueError: another number of views, views of different batch sizes, or (where `n_views` is given) of
            different image sizes, or a batch of one.
    """
    views = batch.get("views") if isinstance(batch, Mapping) else None
    if (
        not isinstance(views, Sequence)
        or not views
        or not all(isinstance(v, Tensor) and v.ndim == 4 for v in views)
    ):
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(
            "a training batch is a dict with 'views', a list of tensors (B, 3, S, S): give module.views() to "
            f"the loader; got {found}"
        )
    shapes = [tuple(view.shape) for view in views]
    if n_views is not None and len(views) != n_views:
        raise ValueError(
            f"expected {n_views} views of each sample, got {len(views)}; give module.views() to the loader"
        )
    if len({shape[0] for shape in shapes}) != 1 or (n_views is not None and len(set(shapes)) != 1):
        raise ValueError(f"the views of a batch differ in size: {shapes}")
    if shapes[0][0] < 2 and n_views != 1:
        raise ValueError(
            "a batch of 1 sample cannot be trained on; raise batch_size, or drop the last incomplete batch"
        )
