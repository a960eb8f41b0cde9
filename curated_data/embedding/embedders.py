"""Embedders, which turn a decoded sample into a vector; `resolve` makes one of a name or of any network."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tvf

from curated_data.embedding.identity import module_fingerprint
from curated_data.errors import EmbedderError, first_line

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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


def of_pretraining_module(module: PretrainingModule, name: str) -> ModuleEmbedder:
    """An embedder by a module's `embed` and `eval_transform`."""
    dimension = getattr(module, "embedding_dimension", None)
    return ModuleEmbedder(_Embed(module), module.eval_transform(), dimension=dimension, name=name)


def of_image_tower(
    network: nn.Module, processor: Any, tokenizer: Callable[[], Any], name: str
) -> ModuleEmbedder:
    """An embedder by a network of transformers and its own processor.

    One that was trained with a text tower (CLIP, SigLIP) gives the features that both share.

    Args:
        tokenizer: makes the tokenizer of the texts, if there is such a tower.
        name: for the log and the manifests in the cache.
    """
    if hasattr(network, "get_text_features"):
        return TextImageEmbedder(network, _Processed(processor), tokenizer, name=name)
    return ModuleEmbedder(_Pooled(network), _Processed(processor), name=name)


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


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
