"""P²OT and SP²OT: deep clustering of long-tailed data with pseudo-labels by partial optimal transport.

P²OT (arXiv 2401.09266) labels the most confident share ρ of the samples, with clusters of any size, and lets
ρ grow. SP²OT (arXiv 2404.03446) also pulls samples that were near in the initial features to the same
cluster. The solvers are in `lightning_modules.transport`; `cluster_embeddings` clusters fixed embeddings with
them, without training.
"""

import copy
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from curated_data.parallel import rank
from lightning_modules.distributed import all_gather_rows, all_reduce
from lightning_modules.evaluation.online import evaluation_mode
from lightning_modules.optim import build_optimizer, parameter_groups
from lightning_modules.pretraining.base import PretrainingModule
from lightning_modules.transport import gaussian_similarity, solve_p2ot, solve_sp2ot
from lightning_modules.transport_clustering import METHODS, cluster_embeddings, similarity_weight
from lightning_modules.views import Augmentation, Views

__all__ = ["SP2OT", "cluster_embeddings"]

log = logging.getLogger(__name__)


class SP2OT(PretrainingModule):
    """A backbone with cosine classifiers: each view is trained on the transport labels of the other.

    Every step, the logits of both views of the global batch enter a FIFO buffer; the labels of a view are the
    rows of the transport plan of all that is in the buffer. A buffer in use from epoch
    0 is filled in evaluation mode before the first step, a later one by the epochs before. A row's sum is its
    sample's weight: rows are not renormalised.

    Each epoch logs `selection`, the lowest mean loss / ρ over the heads, which picks the head (`best_head`)
    and, with `ModelCheckpoint(monitor="selection", mode="min")`, the epoch.

    Args:
        n_clusters: K; as many as there are classes, or more.
        backbone: name of the network (`lightning_modules.backbones.build_backbone`); the paper's is a DINO
            ViT-B/16.
        image_size: side of the views in pixels.
        small_images, pretrained, frozen_blocks, backbone_options: as in `build_backbone`. The paper trains
            the last block alone; with frozen blocks a transformer's final norm stays as it is too.
        method: "sp2ot", "p2ot", or "ot": equal clusters and ρ = 1, the classical baseline.
        n_heads: independent classifiers; the paper's P²OT has 2 on CIFAR-100, otherwise 1.
        rho_start: ρ rises from about this to 1 over the run, ρ0 + (1 - ρ0) exp(-5 (1 - t/T)²).
        epsilon, gamma: entropy, and weight of the KL term on cluster sizes.
        similarity_weight: SP²OT's λ is this times (1 - ρ), for a buffer of 5120 samples, and in proportion to
            it.
        n_neighbors: SP²OT: neighbours of each sample.
        buffer_size: samples in the buffer, at least `n_clusters`; 10 batches in the paper.
        buffer_from_epoch: first epoch that uses it; None: 0 for SP²OT, else 1.
        scale: of the cosine, in the logits.
        learning_rate, final_learning_rate: of Adam, not scaled to the batch unless `learning_rate_scaling`
            says so.
        weight_decay, warmup_epochs: 0 in the paper.
        augmentation: replaces fields of `lightning_modules.views.Augmentation`, from random crop and flip.

    Examples:
        >>> from curated_data import CuratedDataModule
        >>> from lightning import Trainer
        >>> from lightning_modules import SP2OT
        >>> module = SP2OT(
        ...     4, "resnet10", backbone_options={"width": 16}, image_size=32, small_images=True,
        ...     buffer_size=32
        ... )
        >>> data = CuratedDataModule(
        ...     "pool-{000..001}.tar", views=module.views(), batch_size=16, loader={"num_workers": 0}
        ... )
        >>> quiet = {"enable_progress_bar": False, "enable_model_summary": False}
        >>> Trainer(fast_dev_run=2, accelerator="cpu", **quiet).fit(module, data)
        >>> module.embedding_dimension
        128
    """

    def __init__(
        self,
        n_clusters: int,
        backbone: str = "timm:vit_base_patch16_224",
        *,
        image_size: int = 224,
        small_images: bool = False,
        pretrained: bool | str = False,
        frozen_blocks: int = 0,
        backbone_options: Mapping[str, Any] | None = None,
        method: str = "sp2ot",
        n_heads: int = 1,
        rho_start: float = 0.1,
        epsilon: float = 0.1,
        gamma: float = 1.0,
        similarity_weight: float = 1000.0,
        n_neighbors: int = 20,
        buffer_size: int = 5120,
        buffer_from_epoch: int | None = None,
        scale: float = 10.0,
        learning_rate: float = 5e-4,
        final_learning_rate: float = 5e-7,
        learning_rate_scaling: str = "none",
        weight_decay: float = 0.0,
        warmup_epochs: float = 0.0,
        augmentation: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            backbone,
            image_size=image_size,
            small_images=small_images,
            pretrained=pretrained,
            frozen_blocks=frozen_blocks,
            backbone_options=backbone_options,
            learning_rate=learning_rate,
            final_learning_rate=final_learning_rate,
            learning_rate_scaling=learning_rate_scaling,
            warmup_epochs=warmup_epochs,
        )
        self.save_hyperparameters()
        if method not in METHODS:
            raise ValueError(f"method {method!r}: expected one of {METHODS}")
        if n_clusters < 2:
            raise ValueError(f"n_clusters must be 2 or more, got {n_clusters}: one cluster decides nothing")
        if n_heads < 1:
            raise ValueError(f"n_heads must be 1 or more, got {n_heads}")
        if not 0 < rho_start <= 1:
            raise ValueError(f"rho_start must be in (0, 1], got {rho_start}")
        if buffer_size and buffer_size < n_clusters:
            raise ValueError(
                f"buffer_size {buffer_size} is smaller than n_clusters {n_clusters}: raise it, or 0 for no "
                f"buffer"
            )
        if frozen_blocks:
            for name in ("norm", "fc_norm"):
                if isinstance(module := getattr(self.backbone.net, name, None), nn.Module):
                    module.requires_grad_(False)
        self.buffer_from_epoch = (
            buffer_from_epoch if buffer_from_epoch is not None else int(method != "sp2ot")
        )
        self.prototypes = nn.Parameter(torch.randn(n_heads, n_clusters, self.backbone.dimension))
        self.best_head = 0
        self.best: dict[str, float] | None = None  # epoch, head and value of the lowest loss / ρ so far
        self.state: dict[str, Tensor] = {}  # what checkpoints hold besides weights; equal on all ranks
        self.views()

    def views(self) -> Views:
        options = {
            k: tuple(v) if isinstance(v, list) else v for k, v in (self.hparams.augmentation or {}).items()
        }
        area = (224 / 256) ** 2  # resize the shorter side to 256, crop 224
        settings: dict[str, Any] = {
            "scale": (area, area),
            "of_square": True,
            "ratio": (1.0, 1.0),
            "jitter": (0.0,) * 4,
            "grey": 0.0,
        }
        return Views((Augmentation(self.image_size, **(settings | options)),) * 2)

    def logits(self, images: Tensor) -> Tensor:
        """(heads, B, K): `scale` times the cosine of features and prototypes."""
        return self._classify(self.backbone(images))

    def assign(self, images: Tensor) -> Tensor:
        """Clusters (B,) int64 of images as `eval_transform()` makes them, by the last epoch's best head."""
        return self.logits(images)[self.best_head].argmax(1)

    def rho_at(self, step: int) -> float:
        """The share of samples that an optimiser step labels."""
        if self.hparams.method == "ot":
            return 1.0
        start = self.hparams.rho_start
        return start + (1 - start) * math.exp(-5 * (1 - min(step / self.n_steps, 1.0)) ** 2)

    def loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.backbone(torch.cat(batch["views"]))
        logits = self._classify(features).unflatten(1, (2, -1)).float()  # (heads, 2, B, K)
        rho = self.rho_at(self.schedule_step)
        labels = self._labels(logits.detach(), self._ids(batch), rho)
        a, b = logits.log_softmax(-1).unbind(1)
        from_a, from_b = labels.unbind(1)
        losses = -0.5 * ((from_b * a).sum(-1) + (from_a * b).sum(-1)).mean(1)  # (heads,)
        # Summed over ranks at once, since rank zero alone saves it.
        self._add("selection_sum", all_reduce(torch.cat([losses.detach() / rho, losses.new_ones(1)])))
        return losses.sum(), {"rho": losses.new_tensor(rho)}

    def on_train_start(self) -> None:
        # Once: the neighbours of a large set, from a checkpoint or `set_neighbors`, take long to move.
        self.state = {name: value.to(self.device) for name, value in self.state.items()}
        uses_buffer = self.hparams.buffer_size and self.buffer_from_epoch <= self.current_epoch
        needs_neighbors = self.hparams.method == "sp2ot" and "neighbor_ids" not in self.state
        if (uses_buffer and "buffer_ids" not in self.state) or needs_neighbors:
            self._first_pass(bool(uses_buffer), needs_neighbors)

    def on_train_epoch_end(self) -> None:
        if "selection_sum" not in self.state:
            return
        total = self.state.pop("selection_sum")
        means = (total[:-1] / total[-1]).tolist()
        self.best_head = min(range(len(means)), key=means.__getitem__)
        value = means[self.best_head]
        if self.best is None or value < self.best["value"]:
            self.best = {"epoch": float(self.current_epoch), "head": float(self.best_head), "value": value}
        self.log("selection", value, batch_size=1)  # equal on all ranks, as a checkpoint callback needs it

    def set_neighbors(self, ids: Tensor, features: Tensor) -> None:
        """Give SP²OT's similarity the features of the training set, for example a pool's cached embeddings.

        Without this call they are taken from the initial backbone, in one pass over the training loader.

        Args:
            ids: (N,) sample ids, each once.
            features: (N, d), not normalised.

        Raises:
            ValueError: shapes that do not match, repeated ids, non-finite features.
        """
        ids, features = torch.as_tensor(ids), torch.as_tensor(features)
        if ids.ndim != 1 or len(features) != len(ids):
            raise ValueError(f"ids {tuple(ids.shape)} and features {tuple(features.shape)} do not match")
        ids, order = ids.sort()
        if bool((ids[1:] == ids[:-1]).any()):
            raise ValueError("set_neighbors: each sample id may be given once")
        indices, weights = gaussian_similarity(features[order], n_neighbors=self.hparams.n_neighbors)
        self.state |= {"neighbor_ids": ids, "neighbor_indices": indices, "neighbor_weights": weights}

    def configure_optimizers(self) -> Optimizer:
        heads = nn.ParameterList([self.prototypes])
        groups = parameter_groups([self.backbone, heads], self.hparams.weight_decay)
        return build_optimizer("adam", groups, learning_rate=self.learning_rate)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["sp2ot"] = {
            "best_head": self.best_head,
            "best": self.best,
            "state": {name: value.cpu() for name, value in self.state.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["sp2ot"]
        self.best_head, self.best = saved["best_head"], saved["best"]
        self.state = {name: value.to(self.device) for name, value in saved["state"].items()}

    def _ids(self, batch: Mapping[str, Any]) -> Tensor:
        if self.hparams.method == "sp2ot" and "sample_id" not in batch:
            raise ValueError(
                "SP²OT finds a sample's neighbours by its id, and the batch has none: give each sample a "
                "'sample_id', or take method='p2ot'"
            )
        return self.sample_ids(batch)

    def _classify(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):  # ten times a cosine in bfloat16 is coarse
            cosine = F.normalize(features.float(), dim=-1) @ F.normalize(self.prototypes.float(), dim=-1).mT
            return self.hparams.scale * cosine

    @torch.no_grad()
    def _labels(self, logits: Tensor, ids: Tensor, rho: float) -> Tensor:
        """Transport labels (heads, 2, B, K) of this rank's batch; a row's sum, at most 1, is its weight."""
        n_own, k = logits.shape[2:]
        # Rows first: ranks join along the samples.
        joined = all_gather_rows(logits.permute(2, 0, 1, 3).contiguous())
        joined_ids = all_gather_rows(ids)
        bad = ~torch.isfinite(joined).flatten(1).all(1)
        if bool(bad.any()):
            raise RuntimeError(
                f"step {self.global_step}: the logits of samples {joined_ids[bad].tolist()[:20]} are not "
                f"finite "
                f"({int(bad.sum())} in all): their images hold NaN or infinity, or the training has diverged"
            )
        n_batch = len(joined)
        if self.hparams.buffer_size:
            self._push(joined, joined_ids)
            if self.current_epoch >= self.buffer_from_epoch:
                joined, joined_ids = self.state["buffer"], self.state["buffer_ids"]
                if len(joined) < self.hparams.buffer_size:
                    raise RuntimeError(self._explain_short_buffer(len(joined)))
        n = len(joined)
        largest = torch.as_tensor(n, device=joined.device)
        if "largest" in self.state:
            largest = torch.maximum(largest, self.state["largest"].to(joined.device))
        self.state["largest"] = largest
        if n < k and int(largest) < k:  # the last batch of an epoch may be shorter
            raise ValueError(
                f"{n} samples (the global batch) cannot be shared out to n_clusters={k}: raise batch_size, "
                f"or use the "
                "buffer from epoch 0 (buffer_from_epoch=0)"
            )
        cost = -joined.permute(1, 2, 0, 3).log_softmax(-1)
        potentials = self.state.get("potentials")
        if self.hparams.method == "sp2ot":
            result = solve_sp2ot(
                cost,
                self._similarity_among(joined_ids),
                rho,
                weight=similarity_weight(self.hparams.similarity_weight, rho, n),
                epsilon=self.hparams.epsilon,
                gamma=self.hparams.gamma,
                potentials=potentials,
            )
        else:
            gamma = math.inf if self.hparams.method == "ot" else self.hparams.gamma
            result = solve_p2ot(cost, rho, epsilon=self.hparams.epsilon, gamma=gamma, potentials=potentials)
        self.state["potentials"] = result.potentials
        first = n - n_batch + rank() * n_own
        return (result.plan[:, :, first : first + n_own] * n).to(logits.dtype)

    def _push(self, rows: Tensor, ids: Tensor) -> None:
        """Put samples (n, heads, 2, K) at the end of the buffer; the oldest leave."""
        for name, new in (("buffer", rows), ("buffer_ids", ids)):
            old = self.state.get(name, new[:0]).to(new.device)  # a checkpoint is loaded on the CPU
            self.state[name] = torch.cat([old, new])[-max(self.hparams.buffer_size, len(new)) :]

    def _add(self, name: str, value: Tensor) -> None:
        self.state[name] = self.state[name].to(value.device) + value if name in self.state else value

    def _similarity_among(self, ids: Tensor) -> Tensor:
        """The sparse similarity matrix (n, n) of samples by id; unknown ids have an empty row."""
        known, indices, weights = (
            self.state[f"neighbor_{name}"].to(ids.device) for name in ("ids", "indices", "weights")
        )
        place = torch.searchsorted(known, ids).clamp_max(len(known) - 1)
        found = known[place] == ids
        row = found.nonzero().flatten()
        neighbor = known[indices[place[row]]].flatten()
        weight = weights[place[row]].flatten()
        row = row.repeat_interleave(indices.shape[1])
        # A sample may lie in the buffer more than once, where one epoch ends and the next begins.
        sorted_ids, order = ids.sort(stable=True)
        first = torch.searchsorted(sorted_ids, neighbor)
        count = torch.searchsorted(sorted_ids, neighbor, right=True) - first
        entry = torch.arange(len(row), device=ids.device).repeat_interleave(count)
        within = torch.arange(len(entry), device=ids.device) - (count.cumsum(0) - count)[entry]
        column = order[first[entry] + within]
        size = (len(ids), len(ids))
        return torch.sparse_coo_tensor(
            torch.stack([row[entry], column]), weight[entry], size, check_invariants=False
        )

    @torch.no_grad()
    def _first_pass(self, fill_buffer: bool, find_neighbors: bool) -> None:
        """Read the training loader in evaluation mode: logits for the buffer, features for the similarity."""
        # With workers of its own: the Trainer's may be kept from epoch to epoch, and are reading already.
        loader = copy.copy(self.trainer.train_dataloader)
        assert loader is not None, "called while fitting"
        if isinstance(loader, DataLoader):
            loader._iterator = None
        features, ids, n_seen = [], [], 0
        purpose = "buffer and neighbours" if find_neighbors else "the buffer"
        log.info("one pass over the training loader for %s", purpose)
        with evaluation_mode(self), self.trainer.precision_plugin.forward_context():
            for batch in loader:
                batch = self.trainer.strategy.batch_to_device(batch)
                batch = self.trainer.precision_plugin.convert_input(batch)
                own = torch.stack([self.backbone(view).float() for view in batch["views"]], 1)  # (B, 2, d)
                batch_ids = all_gather_rows(self._ids(batch))
                n_seen += len(batch_ids)
                if fill_buffer:
                    logits = self._classify(own.flatten(0, 1)).unflatten(1, own.shape[:2]).permute(1, 0, 2, 3)
                    self._push(all_gather_rows(logits.float().contiguous()), batch_ids)
                if find_neighbors:
                    features.append(own.mean(1))
                    ids.append(self._ids(batch))
                elif n_seen >= self.hparams.buffer_size:
                    break
        if not n_seen:
            raise RuntimeError("the training loader gave no batch to fill the buffer with")
        if fill_buffer and len(self.state["buffer"]) < self.hparams.buffer_size:
            raise RuntimeError(self._explain_short_buffer(len(self.state["buffer"])))
        if find_neighbors:
            joined_ids, joined = all_gather_rows(torch.cat(ids)), all_gather_rows(torch.cat(features))
            finite = torch.isfinite(joined).all(1)
            if not bool(finite.all()):
                raise RuntimeError(f"samples {joined_ids[~finite].tolist()[:20]} have no finite features")
            if len(joined) < 2:
                raise RuntimeError("SP²OT needs two samples or more")
            # Of a sample that the loader repeats, the first.
            kept = torch.from_numpy(np.unique(joined_ids.cpu().numpy(), return_index=True)[1])
            self.set_neighbors(joined_ids[kept.to(joined_ids.device)], joined[kept.to(joined.device)])

    def _explain_short_buffer(self, n: int) -> str:
        return (
            f"the buffer holds {n} of buffer_size={self.hparams.buffer_size} samples: the training loader "
            f"gives no more "
            "an epoch; make buffer_size smaller"
        )
