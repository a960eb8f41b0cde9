"""Weights of a network from a file, whatever the file wraps them in."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

log = logging.getLogger(__name__)


def load_weights(net: nn.Module, path: str | Path, *, name: str) -> None:
    """Load a file of weights into a network; a classifier's and a common prefix of the names are put aside.

    Args:
        net: a network without classifier.
        path: a .pth, .pt, .ckpt or .safetensors file.
        name: of the network, for what is said of it.

    Raises:
        ValueError: no such file, not a file of tensors, or weights of another network (names some of them).
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(
            f"pretrained {str(path)!r}: no such file; give a .pth, .pt, .ckpt or .safetensors file"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated zip, a pickle, a text file: torch raises many kinds
        raise ValueError(
            f"pretrained {str(path)!r}: not a file of tensors that can be read safely "
            f"({_first_line(error)}); fetch it again, or save a state dict"
        ) from error
    state = _state_dict_of(content)
    if not state:
        raise ValueError(f"pretrained {str(path)!r}: holds no state dict")
    expected = net.state_dict()
    state = _strip_prefixes(state, expected)
    if isinstance(net, VisionTransformer):
        # Resamples position embeddings to another grid, renames DINOv2's own.
        state = _fitted(lambda: checkpoint_filter_fn(state, net), path, name)
    for key in expected:  # BatchNorm's count of batches, which files of before it and converted ones lack
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, expected[key])
    missing = [key for key in expected if key not in state]
    wrong = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    if missing or wrong:
        shown = [
            *missing[:3],
            *(f"{k} {tuple(state[k].shape)} != {tuple(expected[k].shape)}" for k in wrong[:3]),
        ]
        raise ValueError(
            f"pretrained {str(path)!r} does not fit backbone {name!r}: "
            f"{len(missing)} weights missing, {len(wrong)} of another shape, for example {shown}"
        )
    _fitted(lambda: net.load_state_dict({key: state[key] for key in expected}), path, name)
    log.info("backbone %s: weights of %s", name, path)


def _state_dict_of(content: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, or of the one inside a usual checkpoint."""
    if not isinstance(content, Mapping):
        return {}
    for key in ("state_dict", "model", "teacher", "model_state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _fitted(load: Callable[[], Any], path: Path, name: str) -> Any:
    """What a call gives that fits weights to a network; tensors of a file may be of any kind."""
    try:
        return load()
    except Exception as error:
        raise ValueError(
            f"pretrained {str(path)!r} does not fit backbone {name!r} ({_first_line(error)}); give the "
            "weights of such a network"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _strip_prefixes(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the leading components that make most names fit."""
    best, best_hits = state, sum(key in state for key in expected)
    prefixes = {key[: -len(name)] for name in list(expected)[:3] for key in state if key.endswith("." + name)}
    for prefix in sorted(prefixes):
        stripped = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        hits = sum(key in stripped for key in expected)
        if hits > best_hits:
            best, best_hits = stripped, hits
    return best
