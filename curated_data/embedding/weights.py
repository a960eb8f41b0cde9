"""Weights for an embedder's network: from a hub or from a file, with one error that says what is missing."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from curated_data.errors import EmbedderError, first_line

Result = TypeVar("Result")

_WRAPPERS = ("state_dict", "model", "teacher", "student")  # keys under which training scripts save a network
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.", "encoder.")


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


def load_weights(network: nn.Module, source: str, name: str) -> None:
    """Load a state dict from the file `source`; "random" leaves the network as it was built.

    Raises:
        EmbedderError: the file is missing or unreadable, or does not fit, apart from a classifier's weights.
    """
    if source == "random":
        return
    state = read_weights(Path(source), name)
    state = unwrapped(state, network)
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise EmbedderError(f"{source}: holds no state dict, names of tensors; save `network.state_dict()`")
    missing, unexpected = fitted(lambda: network.load_state_dict(dict(state), strict=False), source, name)
    head = ("fc.", "head.", "heads.", "classifier.")  # a classifier that we take off may be there or not
    missing = [key for key in missing if not key.startswith(head)]
    unexpected = [key for key in unexpected if not key.startswith(head)]
    if missing or unexpected:
        raise EmbedderError(
            f"{source}: does not fit {name}: {len(missing)} tensors missing (as {missing[:1]}), "
            f"{len(unexpected)} not known (as {unexpected[:1]})"
        )


def unwrapped(state: Any, network: nn.Module) -> Any:
    """The state dict of a network within what training scripts save around it.

    Mappings under `model`, `state_dict`, `teacher` or `student` are opened, and prefixes such as `module.`
    and `backbone.` taken off, until the names are those of the network.
    """
    names = network.state_dict().keys()
    for _ in range(4):
        if not isinstance(state, Mapping) or any(name in names for name in state):
            return state
        inner = next((state[n] for n in _WRAPPERS if isinstance(state.get(n), Mapping)), None)
        prefix = next((p for p in _PREFIXES if any(str(name).startswith(p) for name in state)), None)
        if inner is not None:
            state = inner
        elif prefix is not None:
            state = {str(n).removeprefix(prefix): v for n, v in state.items() if str(n).startswith(prefix)}
        else:
            return state
    return state


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
            f"{path}: cannot be read ({error.strerror}); see to its permissions and its disk"
        ) from error
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> EmbedderError:
    return EmbedderError(
        f"{path}: not a file of plain tensors, or damaged ({first_line(error, with_type=True)}); fetch it "
        "again, or save a state dict; code in it is never run"
    )


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The same random weights every time, without touching the caller's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()
