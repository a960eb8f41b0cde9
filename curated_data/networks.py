"""Networks without classifier, and their weights: from a hub or a file, with one error for what is wrong."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from curated_data.errors import EmbedderError, first_line

log = logging.getLogger(__name__)

Result = TypeVar("Result")


def with_hub_weights(load: Callable[[], nn.Module], name: str, place: str) -> nn.Module:
    """Build a network whose weights a hub downloads.

    Args:
        load: builds it.
        name: the embedder's, for the error.
        place: a URL of the weights, or where else they are expected.

    Raises:
        EmbedderError: `load` failed for whatever reason; says where to put the weights.
    """
    try:
        return load()
    except Exception as error:  # the hubs raise everything from URLError to their own classes
        if place.startswith("http"):
            file = Path(torch.hub.get_dir()) / "checkpoints" / place.rsplit("/", 1)[-1]
            place = f"{place} to be fetched by hand and put at {file}, or its path given as '{name}@FILE'"
        raise EmbedderError(
            f"{name}: its weights could not be loaded ({first_line(error, with_type=True)}); it needs {place}"
        ) from error


def load_weights(network: nn.Module, path: str | Path, name: str) -> None:
    """Load a file's state dict into a network without classifier.

    The state dict may be part of a checkpoint; a common prefix of its names, and what else it holds (such as
    heads), are ignored. Position embeddings of a timm vision transformer are resampled to its grid.

    Raises:
        EmbedderError: the file is missing or unreadable, holds no state dict, or one of another network.

    Examples:
        >>> import tempfile
        >>> network, other = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        ...     torch.save({"state_dict": network.state_dict()}, file.name)
        ...     load_weights(other, file.name, "a linear layer")
        >>> torch.equal(network.weight, other.weight)
        True
    """
    state = read_weights(Path(path), name)
    for key in ("state_dict", "model", "teacher", "model_state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, Mapping) or not state or not all(isinstance(key, str) for key in state):
        raise EmbedderError(f"{path}: holds no state dict, names of tensors; save `network.state_dict()`")
    expected = network.state_dict()
    state = _without_prefix(dict(state), expected)
    state = {key: value for key, value in state.items() if key in expected or isinstance(value, Tensor)}
    if type(network).__module__ == "timm.models.vision_transformer":
        from timm.models.vision_transformer import checkpoint_filter_fn

        # Resamples position embeddings, renames DINOv2's own weights.
        transformer: Any = network
        state = fitted(lambda: checkpoint_filter_fn(state, transformer), path, name)
    for key in expected:  # BatchNorm's count of batches, which older and converted files lack
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, expected[key])
    missing = [key for key in expected if key not in state]
    wrong = [
        key for key in expected if key in state and getattr(state[key], "shape", None) != expected[key].shape
    ]
    # More layers of the network's own parts: a larger network's. Other parts are heads and the like.
    parts = {key.partition(".")[0] for key in expected} - {"fc", "head", "heads", "classifier"}
    unknown = [key for key in state if key not in expected and key.partition(".")[0] in parts]
    if missing or wrong or unknown:
        raise EmbedderError(
            f"{path}: does not fit {name}: {len(missing)} weights missing (as {missing[:1]}), "
            f"{len(wrong)} of another shape (as {wrong[:1]}), {len(unknown)} not known (as "
            f"{unknown[:1]}); give the weights of such a network"
        )
    fitted(lambda: network.load_state_dict({key: state[key] for key in expected}), path, name)
    log.info("%s: weights of %s", name, path)


def drop_classifier(network: nn.Module, name: str) -> None:
    """Replace a classifier by identity: the last linear layer or, where there is none, the last convolution.

    This holds for every classification network of torchvision.

    Raises:
        EmbedderError: the network has neither.

    Examples:
        >>> network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> drop_classifier(network, "two layers")
        >>> network(torch.zeros(1, 4)).shape
        torch.Size([1, 3])
    """
    layers = list(network.named_modules())
    found = [path for path, layer in layers if isinstance(layer, nn.Linear)]
    found = found or [path for path, layer in layers if isinstance(layer, nn.Conv2d)]
    if not found:
        raise EmbedderError(f"{name} has no classifier to remove; choose another model")
    network.set_submodule(found[-1], nn.Identity())


def fitted(load: Callable[[], Result], source: object, name: str) -> Result:
    """The result of a call that builds or fills a network by what a file holds.

    Raises:
        EmbedderError: it failed, for whatever reason: values of a file may be anything.
    """
    try:
        return load()
    except EmbedderError:
        raise
    except Exception as error:
        raise EmbedderError(
            f"{source}: does not fit {name} of this version ({first_line(error, with_type=True)}); give a "
            "file that was saved from such a network"
        ) from error


def read_weights(path: Path, name: str) -> Any:
    """What a file of plain tensors holds: `.safetensors`, or anything that `torch.save` has written.

    Pickled code in it is never run.

    Raises:
        EmbedderError: no such file, it cannot be read, is damaged, or is not one of plain tensors.
    """
    path = path.expanduser()
    if not path.is_file():
        raise EmbedderError(
            f"{name}: no file {path}; put the weights there, or give the path of a file that exists"
        )
    with readable(path):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn whatever reading a file of weights raises into one error.

    A damaged file makes zip, pickle, struct, safetensors and torch raise nearly every exception there is.

    Raises:
        EmbedderError: names the file, the cause, and what to do.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the system's
            raise _damaged(path, error) from error
        raise EmbedderError(
            f"{path}: cannot be read ({error.strerror}); check its permissions and its disk"
        ) from error
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> EmbedderError:
    return EmbedderError(
        f"{path}: not a file of plain tensors, or damaged ({first_line(error, with_type=True)}); fetch it "
        "again, or save a state dict; code in it is never run"
    )


def _without_prefix(state: dict[str, Any], expected: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state without the leading components that make most names fit."""
    best, best_hits = state, sum(key in state for key in expected)
    prefixes = {key[: -len(name)] for name in list(expected)[:3] for key in state if key.endswith("." + name)}
    for prefix in sorted(prefixes):
        stripped = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        hits = sum(key in stripped for key in expected)
        if hits > best_hits:
            best, best_hits = stripped, hits
    return best
