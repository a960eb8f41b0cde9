"""DINOv2: a student matches its own moving average on images, crops and masked patches (arXiv 2304.07193)."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.optim import AdamW, Optimizer

from curated_data.parallel import rank
from curated_data.randomness import seeded
from lightning_modules.backbones import Backbone
from lightning_modules.heads import PrototypeHead
from lightning_modules.losses import centered_targets, dino, ibot, koleo, sinkhorn_targets, updated_center
from lightning_modules.masking import block_mask
from lightning_modules.pretraining.base import PretrainingModule
from lightning_modules.randomness import mix
from lightning_modules.schedules import cosine, linear
from lightning_modules.views import Augmentation, Views

# For one machine and images of about 32 pixels: no more prototypes than a batch has global views, since
# Sinkhorn-Knopp gives every prototype an equal share of them; crops that still show something; a fast
# teacher, a short warm-up of its temperature, no rising weight decay. With the settings for large runs the
# loss of a small one stays at log(n_prototypes) for epochs. To a narrow network also give
# `backbone_options={"weight_init": "jax"}`: timm's default deviation of 0.02 is for wide ones.
SMALL: dict[str, Any] = {
    "n_local_views": 4,
    "global_scale": (0.4, 1.0),
    "local_scale": (0.15, 0.4),
    "n_prototypes": 128,
    "head_hidden": 256,
    "head_bottleneck": 64,
    "teacher_momentum": 0.98,
    "teacher_temperature_warmup_epochs": 3,
    "final_weight_decay": 0.04,
    "freeze_last_layer_epochs": 0.5,
    "layer_decay": 1.0,
    "patch_embed_rate": 1.0,
    "learning_rate": 4e-3,
    "warmup_epochs": 1,
}


# What FSDP shards, each whole: student and teacher are then cut alike, and the moving average stays local.
FSDP_UNITS = (Block, Backbone, PrototypeHead)


class DINOv2(PretrainingModule):
    """DINOv2's training method. `backbone` is the teacher, a moving average, and the one to use afterwards.

    The student sees two global views, with blocks of patches masked, and several local ones; its class tokens
    match the teacher's on the other global views (DINO), its masked patches the teacher's patches (iBOT), and
    KoLeo spreads the class tokens. Defaults are the paper's for a ViT-L, for a global batch of 1024 and more
    on 8 and more GPUs: `L.Trainer(precision="bf16-mixed", strategy="ddp")`, or where weights and averages do
    not fit into one GPU, `strategy=ModelParallelStrategy(data_parallel_size=8, tensor_parallel_size=1)`,
    which shards them over 8. For one small machine:
    `DINOv2("timm:vit_tiny_patch16_224", image_size=32, local_image_size=16, **SMALL)`.

    Args:
        backbone: a timm vision transformer with a class token; registers through
            `backbone_options={"reg_tokens": 4}`.
        image_size, local_image_size: sides of global and local views in pixels, multiples of the patch size.
        n_local_views: 0 or more.
        global_scale, local_scale: areas of the crops, as shares of the image's. The paper's are for
            photographs; a twentieth of a small image shows nothing.
        drop_path: of the student.
        n_prototypes, ibot_prototypes: K of the two heads; `ibot_prototypes` is `n_prototypes` unless given.
        head_hidden, head_bottleneck: widths of the heads.
        centering: "sinkhorn" (DINOv2) or "softmax" (DINO's moving centre).
        student_temperature; teacher_temperature, warmup_teacher_temperature: the teacher's rises linearly
            from the latter over `teacher_temperature_warmup_epochs`.
        ibot_weight, koleo_weight: of these losses beside DINO's.
        mask_probability, mask_ratio: share of the global views that are masked, and of their patches.
        teacher_momentum: of the moving average, a cosine from here to 1.
        learning_rate: for a global batch of 1024, scaled by the square root (paper: 4e-3 for ViT-L with drop
            path).
        weight_decay, final_weight_decay: a cosine from the first to the second.
        layer_decay: each block below the last learns slower by this factor; `patch_embed_rate` multiplies the
            patch embedding's.
        freeze_last_layer_epochs: the prototypes do not learn until then.
        gradient_clip: norm of the gradient, unless the Trainer's `gradient_clip_val` is given.
        augmentation: replaces fields of all views' augmentations.
        seed: of masks and of drop path.

    Examples:
        >>> from curated_data import CuratedDataModule
        >>> from lightning import Trainer
        >>> from lightning_modules import DINOv2
        >>> from lightning_modules.pretraining.dinov2 import SMALL
        >>> module = DINOv2(
        ...     "timm:vit_tiny_patch16_224", image_size=32, local_image_size=16, **SMALL
        ... )
        >>> data = CuratedDataModule(
        ...     "pool-{000..001}.tar", views=module.views(), batch_size=16, loader={"num_workers": 0}
        ... )
        >>> quiet = {"enable_progress_bar": False, "enable_model_summary": False}
        >>> Trainer(fast_dev_run=2, accelerator="cpu", **quiet).fit(module, data)
        >>> module.embedding_dimension
        192
    """

    n_views = None

    def __init__(
        self,
        backbone: str = "timm:vit_large_patch14_reg4_dinov2",
        *,
        image_size: int = 224,
        local_image_size: int = 98,
        n_local_views: int = 8,
        global_scale: Sequence[float] = (0.32, 1.0),
        local_scale: Sequence[float] = (0.05, 0.32),
        pretrained: bool | str = False,
        frozen_blocks: int = 0,
        backbone_options: Mapping[str, Any] | None = None,
        drop_path: float = 0.3,
        n_prototypes: int = 65536,
        ibot_prototypes: int | None = None,
        head_hidden: int = 2048,
        head_bottleneck: int = 256,
        centering: str = "sinkhorn",
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04,
        teacher_temperature_warmup_epochs: float = 30,
        ibot_weight: float = 1.0,
        koleo_weight: float = 0.1,
        mask_probability: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        teacher_momentum: float = 0.992,
        learning_rate: float = 4e-3,
        warmup_epochs: float = 10,
        weight_decay: float = 0.04,
        final_weight_decay: float = 0.4,
        layer_decay: float = 0.9,
        patch_embed_rate: float = 0.2,
        freeze_last_layer_epochs: float = 1,
        gradient_clip: float | None = 3.0,
        augmentation: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        if centering not in ("sinkhorn", "softmax"):
            raise ValueError(f"centering {centering!r}: expected 'sinkhorn' or 'softmax'")
        if n_prototypes < 2 or (ibot_prototypes is not None and ibot_prototypes < 2):
            raise ValueError(f"at least 2 prototypes are needed, got {n_prototypes}, {ibot_prototypes}")
        several_sizes = n_local_views > 0 and local_image_size != image_size
        super().__init__(
            backbone,
            image_size=image_size,
            small_images=False,
            pretrained=pretrained,
            frozen_blocks=frozen_blocks,
            backbone_options={"dynamic_img_size": several_sizes, **(backbone_options or {})},
            learning_rate=learning_rate,
            learning_rate_scaling="sqrt",
            reference_batch_size=1024,
            warmup_epochs=warmup_epochs,
            final_learning_rate=1e-6 if learning_rate > 1e-6 else 0.0,
        )
        self.save_hyperparameters()
        teacher = self.backbone.vision_transformer()
        self.patch_size: int = teacher.patch_embed.patch_size[0]
        if n_local_views and local_image_size % self.patch_size:
            raise ValueError(
                f"local_image_size {local_image_size} is not a multiple of the patch size {self.patch_size}"
            )
        self.grid = teacher.patch_embed.grid_size

        def head(k: int) -> PrototypeHead:
            return PrototypeHead(teacher.embed_dim, k, hidden=head_hidden, bottleneck=head_bottleneck)

        student = copy.deepcopy(self.backbone)
        if drop_path:
            set_drop_path(student.vision_transformer(), drop_path)
        self.student = nn.ModuleDict(
            {
                "backbone": student,
                "dino_head": head(n_prototypes),
                "ibot_head": head(ibot_prototypes or n_prototypes),
            }
        )
        self.mask_token = nn.Parameter(torch.zeros(teacher.embed_dim))
        self.dino_head = copy.deepcopy(self.student["dino_head"])
        self.ibot_head = copy.deepcopy(self.student["ibot_head"])
        for part in self.teacher_parts:
            part.requires_grad_(False)
        self.register_buffer("dino_center", torch.zeros(n_prototypes))
        self.register_buffer("ibot_center", torch.zeros(ibot_prototypes or n_prototypes))
        self.views()
        self.train()

    @property
    def teacher_parts(self) -> tuple[nn.Module, ...]:
        """The moving averages of the student's parts, in the student's order."""
        return self.backbone, self.dino_head, self.ibot_head

    def train(self, mode: bool = True) -> "DINOv2":
        super().train(mode)
        for part in self.teacher_parts:
            part.eval()
        return self

    def views(self) -> Views:
        small = self.image_size <= 64
        options = {"jitter": (0.4, 0.4, 0.2, 0.1), **(self.hparams.augmentation or {})}

        def view(size: int, scale: Sequence[float], blur: float, solarize: float) -> Augmentation:
            if small:
                blur = solarize = 0.0
            return Augmentation(
                size, **{"scale": tuple(scale), "blur": blur, "solarize": solarize, **options}
            )

        first = view(self.image_size, self.hparams.global_scale, blur=1.0, solarize=0.0)
        second = view(self.image_size, self.hparams.global_scale, blur=0.1, solarize=0.2)
        local = view(self.hparams.local_image_size, self.hparams.local_scale, blur=0.5, solarize=0.0)
        return Views((first, second, *[local] * self.hparams.n_local_views))

    def loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        views = batch["views"]
        self._check_sizes(views)
        n, hparams = len(views[0]), self.hparams
        images = torch.cat(views[:2])
        # Two masks per sample, one for each global view.
        ids = self.sample_ids(batch)
        mask = block_mask(
            torch.cat([2 * ids, 2 * ids + 1]),
            self.grid,
            seed=hparams.seed,
            draw=self.draw,
            probability=hparams.mask_probability,
            ratio=hparams.mask_ratio,
        )
        chosen = mask.flatten().nonzero().squeeze(1)

        with torch.no_grad():
            teacher_class, teacher_patches = self.backbone(images, as_tokens=True)
            # Each global view's targets teach the other one: no view matches itself.
            dino_targets = self._targets(self.dino_head(teacher_class), "dino_center").view(2, n, -1)
            ibot_targets = self._targets(self.ibot_head(teacher_patches.flatten(0, 1)[chosen]), "ibot_center")

        with self._student_randomness():
            backbone = self.student["backbone"]
            student_class, student_patches = backbone(
                images, as_tokens=True, mask=mask, mask_token=self.mask_token
            )
            class_tokens = [student_class]
            if len(views) > 2:
                class_tokens.append(backbone(torch.cat(views[2:]), as_tokens=True)[0])
            student_logits = self.student["dino_head"](torch.cat(class_tokens)).view(len(views), n, -1)
            ibot_logits = self.student["ibot_head"](student_patches.flatten(0, 1)[chosen])

        counts = mask.sum(1, keepdim=True).clamp_min(1)
        weights = (1.0 / (counts * len(mask))).expand_as(mask).flatten()[chosen]
        parts = {
            "dino_loss": dino(student_logits, dino_targets, temperature=hparams.student_temperature),
            "ibot_loss": ibot(ibot_logits, ibot_targets, weights, temperature=hparams.student_temperature),
            "koleo_loss": koleo(student_class[:n]) + koleo(student_class[n:]),
        }
        total = parts["dino_loss"] + hparams.ibot_weight * parts["ibot_loss"]
        return total + hparams.koleo_weight * parts["koleo_loss"], parts

    def set_rates(self, step: int) -> None:
        super().set_rates(step)
        decay = cosine(
            step, total=self.n_steps, start=self.hparams.weight_decay, final=self.hparams.final_weight_decay
        )
        frozen = step < self.epochs_to_steps(self.hparams.freeze_last_layer_epochs)
        for group in self.trainer.optimizers[0].param_groups:
            group["weight_decay"] = decay * group["decay_scale"]
            if frozen and group["last_layer"]:
                group["lr"] = 0.0

    def teacher_temperature_at(self, step: int) -> float:
        """The teacher's temperature at an optimiser step."""
        warmup = self.epochs_to_steps(self.hparams.teacher_temperature_warmup_epochs) if self._trainer else 0
        return linear(
            step,
            total=warmup,
            start=self.hparams.warmup_teacher_temperature,
            final=self.hparams.teacher_temperature,
        )

    def teacher_momentum_at(self, step: int) -> float:
        """The moving average's momentum at an optimiser step."""
        return cosine(step, total=self.n_steps, start=self.hparams.teacher_momentum, final=1.0)

    def configure_model(self) -> None:
        """Shard the weights where the Trainer has a `ModelParallelStrategy` (FSDP 2).

        Raises:
            ValueError: the strategy's default, which gives the GPUs of a node to tensor parallelism: they
                would train on different samples and never join their gradients; or `FSDPStrategy`.
        """
        if self._trainer is not None and isinstance(self.trainer.strategy, FSDPStrategy):
            raise ValueError(
                "DINOv2 cannot train with strategy='fsdp', which cuts teacher and student differently, so "
                "that no moving average can be taken: give ModelParallelStrategy(data_parallel_size="
                f"{self.trainer.world_size}, tensor_parallel_size=1)"
            )
        if self.device_mesh is None or isinstance(self.backbone, FSDPModule):
            return
        if (size := self.device_mesh["tensor_parallel"].size()) > 1:
            raise ValueError(
                f"DINOv2 has no tensor parallelism, but tensor_parallel_size is {size}: give "
                f"ModelParallelStrategy(data_parallel_size={self.device_mesh.size()}, tensor_parallel_size=1)"
            )
        for unit in [m for m in self.modules() if isinstance(m, FSDP_UNITS)][::-1]:  # inner units first
            fully_shard(unit, mesh=self.device_mesh["data_parallel"])
        fully_shard(self, mesh=self.device_mesh["data_parallel"])
        # FSDP gathers a module's own parameters, here the mask token, when `forward` is called; the Trainer
        # calls this instead.
        register_fsdp_forward_method(self, "training_step")

    def on_fit_start(self) -> None:
        super().on_fit_start()
        kind = self.mask_token.dtype
        if kind in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"DINOv2 cannot train with weights of {kind}: the moving average's steps are smaller than "
                "such numbers can tell, and the teacher would stand still; give precision='bf16-mixed'"
            )

    def configure_optimizers(self) -> Optimizer:
        backbone = self.student["backbone"]
        assert isinstance(backbone, Backbone)
        groups = layer_groups(
            backbone.vision_transformer(),
            [self.student["dino_head"], self.student["ibot_head"]],
            self.mask_token,
            decay=self.hparams.layer_decay,
            patch_embed_rate=self.hparams.patch_embed_rate,
        )
        return AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.999))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        limit = self.hparams.gradient_clip if gradient_clip_val is None else gradient_clip_val
        if limit is None:
            return
        self.clip_gradients(
            optimizer, gradient_clip_val=limit, gradient_clip_algorithm=gradient_clip_algorithm or "norm"
        )

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable | None = None
    ) -> None:
        momentum = self.teacher_momentum_at(self.schedule_step)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        for teacher, student in zip(self.teacher_parts, self.student.values()):
            update_average(teacher.parameters(), student.parameters(), momentum)
            for kept, new in zip(teacher.buffers(), student.buffers()):  # BatchNorm's, in a hybrid's stem
                kept.copy_(new)

    def _targets(self, logits: Tensor, center_name: str) -> Tensor:
        temperature = self.teacher_temperature_at(self.schedule_step)
        if self.hparams.centering == "sinkhorn":
            return sinkhorn_targets(logits, temperature)
        center = getattr(self, center_name)
        targets = centered_targets(logits, center, temperature)
        if self.training:
            setattr(self, center_name, updated_center(center, logits))
        return targets

    def _student_randomness(self) -> contextlib.AbstractContextManager[None]:
        """Drop path by seed, batch and rank: a resumed run drops what the whole run would have dropped."""
        if not self.hparams.drop_path:
            return contextlib.nullcontext()
        return seeded(mix(self.hparams.seed, self.draw, rank()), self.device)

    def _check_sizes(self, views: list[Tensor]) -> None:
        expected = [self.image_size] * 2 + [self.hparams.local_image_size] * self.hparams.n_local_views
        found = [tuple(view.shape[-2:]) for view in views]
        if found != [(size, size) for size in expected]:
            raise ValueError(
                f"expected views of sides {expected}, got {found}; give module.views() to the loader"
            )


@torch.no_grad()
def update_average(average: Iterable[Tensor], current: Iterable[Tensor], momentum: float) -> None:
    """average = momentum * average + (1 - momentum) * current, in place."""
    torch._foreach_lerp_(list(average), [p.detach() for p in current], 1 - momentum)


def set_drop_path(net: VisionTransformer, rate: float) -> None:
    """Give every block of a timm vision transformer the same drop path rate, as DINOv2 does."""
    from timm.layers import DropPath

    for block in net.blocks:
        for name in ("drop_path1", "drop_path2"):
            setattr(block, name, DropPath(rate))


def layer_groups(
    net: VisionTransformer,
    heads: list[nn.Module],
    mask_token: nn.Parameter,
    *,
    decay: float,
    patch_embed_rate: float,
) -> list[dict[str, Any]]:
    """Parameter groups of equal rate: `lr_scale` = decay ** (blocks above).

    Biases, norms, tokens and positions have no weight decay.
    Each group also says whether it is the prototypes (`last_layer`), which are frozen at first.
    """
    n_blocks = len(net.blocks)
    named = [(f"backbone.{name}", p) for name, p in net.named_parameters()]
    named += [(f"head{i}.{name}", p) for i, head in enumerate(heads) for name, p in head.named_parameters()]
    named.append(("backbone.mask_token", mask_token))
    groups: dict[tuple[float, float, bool], list[Tensor]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        layer = n_blocks + 1
        if name.startswith("backbone.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif name.startswith(
            ("backbone.patch_embed", "backbone.pos_embed", "backbone.mask_token")
        ) or name in ("backbone.cls_token", "backbone.reg_token"):
            layer = 0
        scale = decay ** (n_blocks + 1 - layer) * (patch_embed_rate if "patch_embed" in name else 1.0)
        decays = parameter.ndim > 1 and "token" not in name and "pos_embed" not in name
        key = (scale, 1.0 if decays else 0.0, "prototypes" in name)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "decay_scale": decays, "last_layer": last}
        for (scale, decays, last), parameters in groups.items()
    ]
