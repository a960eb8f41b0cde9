"""Other outputs of an embedder's network: patch tokens, and the outputs of its last blocks."""

import copy
import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tvf

from curated_data.embedding import Embedder
from curated_data.embedding.embedders import ModuleEmbedder
from curated_data.errors import EmbedderError

N_BLOCKS = 4


class TokenEmbedder(ModuleEmbedder):
    """Patch tokens of the whole image, resized to the network's square input: (B, h * w * d) rows.

    For a transformer these are the normalised patch tokens of its last block, for a convolutional network its
    last feature map, and for `pixels` the pixels.

    Attributes:
        grid: h, w, d.

    Raises:
        EmbedderError: a network of another kind, or a preprocessing whose crop cannot be disabled.
    """

    def __init__(self, embedder: Embedder) -> None:
        preprocess = Squeezed(embedder.preprocess)
        image = preprocess(torch.zeros(3, 64, 64, dtype=torch.uint8))[None]
        tokens = _tokens_of(embedder, image)
        with torch.inference_mode():
            grid = tokens.eval()(image).shape[1:]
        name = f"{_name(embedder)}, tokens"
        super().__init__(tokens, preprocess, dimension=grid.numel(), name=name)
        self.grid = tuple(grid)


class Squeezed:
    """A preprocessing that squeezes the image to a square instead of cropping it, to match maps of the whole
    image.
    """

    def __init__(self, preprocess: Any) -> None:
        size = preprocess(torch.zeros(3, 64, 64, dtype=torch.uint8)).shape[-1]
        self.size = size
        self.preprocess = copy.copy(preprocess)
        if hasattr(preprocess, "crop_ratio"):  # the embedders' own
            self.preprocess.crop_ratio = 1.0
        elif dataclasses.is_dataclass(preprocess) and hasattr(preprocess, "crop"):  # pretraining modules'
            self.preprocess = dataclasses.replace(self.preprocess, crop=1.0)
        elif hasattr(preprocess, "resize_size"):  # torchvision's
            self.preprocess.resize_size = [size]
        else:
            raise EmbedderError(
                f"dense tasks need a preprocessing without a crop, and {type(preprocess).__name__} has no "
                "crop_ratio to set"
            )

    def __call__(self, image: Tensor) -> Tensor:
        return self.preprocess(tvf.resize(image, [self.size, self.size], antialias=True))

    def __repr__(self) -> str:
        return f"Squeezed({self.size}, {self.preprocess!r})"


class BlockEmbedder(ModuleEmbedder):
    """The class tokens of a transformer's last 4 blocks (or of all, if it has fewer), and the mean patch
    token of the last: 5 d features.

    `kinds` selects the four kinds of features of the linear grid (arXiv 2304.07193, appendix B.3).
    """

    def __init__(self, embedder: Embedder) -> None:
        network = _transformer(embedder)
        if network is None:
            raise EmbedderError(f"{_name(embedder)}: no transformer with a class token")
        n = min(N_BLOCKS, len(network.blocks))
        super().__init__(
            _Blocks(network, n),
            embedder.preprocess,
            dimension=(n + 1) * network.embed_dim,
            name=f"{_name(embedder)}, blocks",
        )
        self.n_blocks = n

    def kinds(self, x: Tensor) -> dict[str, Tensor]:
        """(n, 5 d) to the features of each kind."""
        d = self.dimension // (self.n_blocks + 1)
        last = x[:, -2 * d : -d]
        return {
            "class token": last,
            "class token, average": x[:, -2 * d :],
            f"{self.n_blocks} blocks": x[:, :-d],
            f"{self.n_blocks} blocks, average": x,
        }


def block_embedder(embedder: Embedder) -> BlockEmbedder | None:
    """The embedder's last blocks, or None if it is not a transformer with a class token."""
    return BlockEmbedder(embedder) if _transformer(embedder) is not None else None


class _Blocks(nn.Module):
    def __init__(self, network: Any, n: int) -> None:
        super().__init__()
        self.network, self.n = network, n

    def forward(self, images: Tensor) -> Tensor:
        outputs = _last_blocks(self.network, images, self.n)
        return torch.cat([*(token for token, _ in outputs), outputs[-1][1].mean(1)], 1)


class _PatchTokens(nn.Module):
    """(B, h, w, d) of a vision transformer."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        tokens = _last_blocks(self.network, images, 1)[0][1]
        side = round(tokens.shape[1] ** 0.5)
        return tokens.view(len(tokens), side, side, -1)


class _LastMap(nn.Module):
    """(B, h, w, d) of a convolutional network: the output of the module at `path`."""

    def __init__(self, network: nn.Module, path: str) -> None:
        super().__init__()
        self.network, self.path = network, path

    def forward(self, images: Tensor) -> Tensor:
        found: list[Tensor] = []
        handle = self.network.get_submodule(self.path).register_forward_hook(
            lambda module, inputs, output: found.append(output)
        )
        try:
            self.network(images)
        finally:
            handle.remove()
        return found[-1].permute(0, 2, 3, 1)


class _PixelTokens(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.permute(0, 2, 3, 1)


def _tokens_of(embedder: Embedder, image: Tensor) -> nn.Module:
    network = _network_of(embedder)
    if isinstance(network, nn.Flatten):
        return _PixelTokens()
    transformer = _transformer(embedder)
    if transformer is not None:
        return _PatchTokens(transformer)
    paths: list[str] = []
    handles = [
        module.register_forward_hook(
            lambda module, inputs, output, path=path: (
                paths.append(path)
                if isinstance(output, Tensor) and output.ndim == 4 and output.shape[-1] > 1
                else None
            )
        )
        for path, module in network.named_modules()
        if path
    ]
    try:
        with torch.inference_mode():
            network.eval()(image)
    finally:
        for handle in handles:
            handle.remove()
    if not paths:
        raise EmbedderError(
            f"{_name(embedder)}: gives no patch tokens and no feature map, which dense tasks need"
        )
    return _LastMap(network, paths[-1])


def _transformer(embedder: Embedder) -> Any:
    """The vision transformer with a class token in an embedder, timm's or DINOv2's own, or None."""
    network = _network_of(embedder)
    for candidate in (network, getattr(getattr(network, "module", None), "backbone", None)):
        candidate = getattr(candidate, "net", candidate)
        if getattr(candidate, "cls_token", None) is not None and _asks_for_class_token(candidate):
            return candidate
    return None


def _asks_for_class_token(network: Any) -> str | None:
    """The option by which `get_intermediate_layers` gives class tokens, too: timm's, or that of DINOv2's hub
    entries; None where it has neither.
    """
    method = getattr(network, "get_intermediate_layers", None)
    known = inspect.signature(method).parameters if method is not None else {}
    return next((o for o in ("return_prefix_tokens", "return_class_token") if o in known), None)


def _last_blocks(network: Any, images: Tensor, n: int) -> list[tuple[Tensor, Tensor]]:
    """Class token (B, d) and patch tokens (B, N, d) of the last blocks, normalised, the last one last."""
    option = _asks_for_class_token(network)
    assert option is not None, "looked for with the transformer"
    outputs = network.get_intermediate_layers(images, n=n, norm=True, **{option: True})
    # timm gives the class token and the registers, (B, p, d)
    return [(token[:, 0] if token.ndim == 3 else token, patches) for patches, token in outputs]


def _network_of(embedder: Embedder) -> nn.Module:
    network = getattr(embedder, "network", None)
    if not isinstance(network, nn.Module):
        raise EmbedderError(f"{_name(embedder)}: no network in it that could give patch tokens")
    return network


def _name(embedder: Embedder) -> str:
    return str(getattr(embedder, "name", type(embedder).__name__))
