"""Feature networks by name: any network of timm or torchvision without its classifier, or our own ResNets.

`build_backbone("timm:vit_small_patch16_224", image_size=96, patch_size=8)` gives a `Backbone`: images
(B, 3, S, S) in, features (B, dimension) out.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from curated_data.errors import nearest
from curated_data.networks import drop_classifier, load_weights
from lightning_modules.resnet import RESNETS, ResNet, use_small_stem
from lightning_modules.vit import encode


def build_backbone(
    name: str,
    *,
    image_size: int | None = None,
    small_images: bool = False,
    pretrained: bool | str | Path = False,
    frozen_blocks: int = 0,
    **options: Any,
) -> "Backbone":
    """Build a feature network by name.

    Args:
        name: `timm:<model>`, `torchvision:<model>`, or a plain name: `resnet10/18/34/50` are this module's
            ResNets (torchvision's parameter names; they take `width`), others are looked up in torchvision,
            then in timm.
        image_size: side of the images in pixels; transformers need it where it is not their default.
        small_images: ResNets alone: 3x3 first convolution with stride 1 and no max-pool, for images of about
            32 pixels.
        pretrained: False; True for the library's own weights from its hub; or a file (.pth, .pt, .ckpt,
            .safetensors).
        frozen_blocks: the stem and this many first blocks keep their weights and their normalisation
            statistics; -1 freezes everything.
        options: passed to the network's constructor: `width`, `patch_size`, `depth`, `reg_tokens`,
            `drop_path_rate`, ...

    Raises:
        ValueError: unknown name, an image size that the network cannot take, a stem that cannot be replaced,
            weights that cannot be found or do not fit, or more frozen blocks than there are.

    Examples:
        >>> import torch
        >>> from lightning_modules.backbones import build_backbone
        >>> backbone = build_backbone("resnet10", image_size=32, small_images=True)
        >>> backbone(torch.zeros(2, 3, 32, 32)).shape, backbone.dimension
        (torch.Size([2, 512]), 512)
    """
    source, _, model = name.rpartition(":")
    if source not in ("", "timm", "torchvision"):
        raise ValueError(f"backbone {name!r}: unknown source {source!r}; use 'timm:' or 'torchvision:'")
    from_hub = pretrained is True
    if not source and model in RESNETS and not from_hub:
        net: nn.Module = ResNet(model, small_images=small_images, **options)
    else:
        source = source or ("torchvision" if model in torchvision.models.list_models() else "timm")
        build = _build_torchvision if source == "torchvision" else _build_timm
        net = build(model, image_size, from_hub, options)
        if small_images:
            use_small_stem(net, name)
    backbone = Backbone(net, name=name, image_size=image_size or _default_image_size(net))
    if pretrained and not isinstance(pretrained, bool):
        load_weights(net, pretrained, f"backbone {name}")
    backbone.freeze(frozen_blocks)
    return backbone


class Backbone(nn.Module):
    """A network without its classifier: images (B, 3, H, W) to features (B, `dimension`).

    Attributes:
        net: the network as its library built it.
        dimension: the number of features.
        image_size: the side of the images that it was built for, in pixels.
        patch_size: a transformer's patch side in pixels; None for other networks.
    """

    def __init__(self, net: nn.Module, *, name: str, image_size: int) -> None:
        super().__init__()
        self.net = net
        self.name = name
        self.image_size = image_size
        self.patch_size = _patch_size(net)
        self._n_frozen_layers = 0  # of the network's innermost modules, in order
        # Convolutions run up to 1.5 times faster on channels-last images. The weights stay contiguous:
        # kernels reorder them on the fly, and state dicts remain what every other tool expects.
        self._channels_last = self.patch_size is None
        if self.patch_size is not None and image_size % self.patch_size:
            nearest = max(image_size - image_size % self.patch_size, self.patch_size)
            raise ValueError(
                f"backbone {name!r}: image_size {image_size} is not a multiple of its patch size "
                f"{self.patch_size}; use {nearest}, or another patch_size"
            )
        self.dimension = self._probe_dimension()

    def forward(
        self, images: Tensor, *, as_tokens: bool = False, **masking: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Features (B, dimension); with `as_tokens` what `vit.encode` gives for a transformer, masked or not.

        Both go through `forward` because that is where FSDP gathers the weights of a sharded module.
        """
        if as_tokens:
            return encode(self.vision_transformer(), images, **masking)
        if self._channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.net(images)

    def vision_transformer(self) -> VisionTransformer:
        """The network, if it is a timm vision transformer with a class token, as masked methods need it.

        Raises:
            ValueError: it is not.
        """
        if not isinstance(self.net, VisionTransformer) or self.net.cls_token is None:
            raise ValueError(
                f"backbone {self.name!r}: this needs a timm vision transformer with a class token, like "
                "'timm:vit_small_patch16_224'"
            )
        return self.net

    def tokens(self, images: Tensor, n_last_blocks: int = 1) -> list[tuple[Tensor, Tensor]]:
        """A transformer's outputs for linear probes and dense tasks.

        Args:
            images: (B, 3, H, W).
            n_last_blocks: from how many of the last blocks.

        Returns:
            For each block, the last one last: class token (B, d) and patch tokens (B, h * w, d), normalised.

        Raises:
            ValueError: the backbone is not a timm vision transformer with a class token.
        """
        net = self.vision_transformer()
        outputs = net.get_intermediate_layers(images, n=n_last_blocks, return_prefix_tokens=True, norm=True)
        return [(prefix[:, 0], patches) for patches, prefix in outputs]

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated units in order: residual blocks, transformer blocks, or else the network's stages."""
        return _blocks(self.net)

    def freeze(self, n_blocks: int) -> None:
        """Stop training of the stem and the first `n_blocks` blocks, normalisation included; -1: of all."""
        if n_blocks == 0:
            return
        blocks = self.blocks
        if not -1 <= n_blocks <= len(blocks):
            raise ValueError(
                f"frozen_blocks {n_blocks}: backbone {self.name!r} has {len(blocks)} blocks (-1: freeze all)"
            )
        if n_blocks == -1:
            self._n_frozen_layers = len(_layers(self.net))
            self.net.requires_grad_(False)
        else:
            # Registration order is execution order up to the blocks: what comes first is the stem.
            inside = {id(p) for block in blocks[:n_blocks] for p in block.parameters()}
            last = max(i for i, p in enumerate(self.net.parameters()) if id(p) in inside)
            for parameter in list(self.net.parameters())[: last + 1]:
                parameter.requires_grad_(False)
            last_block = set(blocks[n_blocks - 1].modules())
            self._n_frozen_layers = 1 + max(
                i for i, layer in enumerate(_layers(self.net)) if layer in last_block
            )
        self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        # Frozen BatchNorm keeps its statistics, frozen dropout drops nothing. Layers are counted, not kept: a
        # Trainer's sync_batchnorm puts others in their places. A block goes with its layers, since some read
        # their own mode.
        frozen = set(_layers(self.net)[: self._n_frozen_layers])
        for module in self.net.modules() if frozen else ():
            if frozen.issuperset(_layers(module)):
                module.training = False
        return self

    @torch.no_grad()
    def _probe_dimension(self) -> int:
        was_training = self.training
        self.eval()
        parameter = next(self.net.parameters())
        image = torch.zeros(
            1, 3, self.image_size, self.image_size, device=parameter.device, dtype=parameter.dtype
        )
        try:
            features = self(image)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"backbone {self.name!r} cannot take images of {self.image_size} x {self.image_size}: {error}"
            ) from error
        finally:
            self.train(was_training)
        if not isinstance(features, Tensor) or features.ndim != 2:
            raise ValueError(f"backbone {self.name!r} gives no (B, d) features; use a classification network")
        return features.shape[1]


def _build_timm(model: str, image_size: int | None, from_hub: bool, options: Mapping[str, Any]) -> nn.Module:
    base = model.split(".")[0]
    if not timm.is_model(base):
        raise ValueError(f"timm has no model {model!r}{nearest(base, timm.list_models(), n=3)}")
    options = dict(options)
    default = timm.get_pretrained_cfg(base)  # None for a user's own network
    if image_size is not None and default is not None and default.fixed_input_size:
        options.setdefault("img_size", image_size)
    try:
        return timm.create_model(model, pretrained=from_hub, num_classes=0, **options)
    except TypeError as error:
        raise ValueError(f"timm:{model}: an option does not fit: {error}") from error
    except Exception as error:
        if not from_hub:
            raise ValueError(f"timm:{model}: cannot be built with {options}: {error}") from error
        where = (default.hf_hub_id or default.url) if default is not None else None
        raise ValueError(_hub_help(f"timm:{model}", error, where)) from error


def _build_torchvision(
    model: str, image_size: int | None, from_hub: bool, options: Mapping[str, Any]
) -> nn.Module:
    known = torchvision.models.list_models(module=torchvision.models)
    if model not in known:
        raise ValueError(f"torchvision has no classification model {model!r}{nearest(model, known, n=3)}")
    options = dict(options)
    if image_size is not None and model.startswith("vit_"):
        options.setdefault("image_size", image_size)
    if image_size is not None and model.startswith("maxvit"):
        options.setdefault("input_size", (image_size, image_size))
    if model in ("inception_v3", "googlenet"):
        # Auxiliary classifiers are not part of the features; pretrained weights insist on building them
        # first.
        options = {"aux_logits": from_hub, "transform_input": False, **options}
        if not from_hub:
            options.setdefault("init_weights", True)
    weights = torchvision.models.get_model_weights(model).DEFAULT if from_hub else None
    try:
        net = torchvision.models.get_model(model, weights=weights, **options)
    except TypeError as error:
        raise ValueError(f"torchvision:{model}: an option does not fit: {error}") from error
    except Exception as error:
        if weights is None:
            raise ValueError(f"torchvision:{model}: cannot be built with {options}: {error}") from error
        raise ValueError(_hub_help(f"torchvision:{model}", error, weights.url)) from error
    if getattr(net, "aux_logits", False):
        net.aux_logits = False
        for auxiliary in ("AuxLogits", "aux1", "aux2"):
            if hasattr(net, auxiliary):
                setattr(net, auxiliary, None)
    drop_classifier(net, f"torchvision:{model}")
    return net


def _layers(net: nn.Module) -> list[nn.Module]:
    """The modules that hold no others, in the order of registration."""
    return [module for module in net.modules() if next(module.children(), None) is None]


def _blocks(net: nn.Module) -> list[nn.Module]:
    stages = [
        getattr(net, f"layer{i}")
        for i in range(1, 9)
        if isinstance(getattr(net, f"layer{i}", None), nn.Module)
    ]
    if stages:
        return [block for stage in stages for block in stage.children()]
    for path in ("blocks", "encoder.layers", "stages", "layers", "features"):
        try:
            found = list(net.get_submodule(path).children())
        except AttributeError:
            continue
        # timm's EfficientNets nest blocks in stages: count the inner ones
        if found and all(isinstance(child, nn.Sequential) for child in found) and path == "blocks":
            return [block for stage in found for block in stage.children()]
        return found
    return list(net.children())


def _patch_size(net: nn.Module) -> int | None:
    """A plain vision transformer's patch side; None for networks that take (nearly) any size."""
    size = getattr(getattr(net, "patch_embed", None), "patch_size", None) if hasattr(net, "blocks") else None
    if size is None and hasattr(net, "conv_proj") and hasattr(net, "encoder"):  # torchvision's
        size = net.patch_size
    if isinstance(size, Sequence):
        size = size[0]
    return size


def _default_image_size(net: nn.Module) -> int:
    embed = getattr(net, "patch_embed", None)
    size = getattr(embed, "img_size", None) or getattr(net, "image_size", None)
    if size is None:
        size = (getattr(net, "default_cfg", None) or {}).get("input_size", (3, 224, 224))[-1]
    return size[0] if isinstance(size, Sequence) else size


def _hub_help(name: str, error: Exception, where: str | tuple[str, str] | None) -> str:
    return (
        f"{name}: pretrained weights cannot be fetched ({type(error).__name__}: {error}). "
        f"On a machine with network, fetch {where or 'the weights'}, and give pretrained='/path/to/the/file'"
    )
