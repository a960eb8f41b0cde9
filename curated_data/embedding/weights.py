"""Weights for an embedder's network: from a hub or from a file, with one error that says what is missing."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from curated_data.errors import EmbedderError, first_line


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
            f"{name}: its weights cannot be had ({first_line(error, with_type=True)}); it needs {place}"
        ) from error


def load_weights(network: nn.Module, source: str, name: str) -> None:
    """Load a state dict from the file `source`; "random" leaves the network as it was built.

    Raises:
        EmbedderError: the file is missing or unreadable, or does not fit, apart from a classifier's weights.
    """
    if source == "random":
        return
    state = read_weights(Path(source), name)
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    try:
        missing, unexpected = network.load_state_dict(state, strict=False)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise EmbedderError(f"{source}: does not fit {name} ({first_line(error, with_type=True)})") from error
    head = ("fc.", "head.", "heads.", "classifier.")  # a classifier that we take off may be there or not
    missing = [key for key in missing if not key.startswith(head)]
    unexpected = [key for key in unexpected if not key.startswith(head)]
    if missing or unexpected:
        raise EmbedderError(
            f"{source}: does not fit {name}: {len(missing)} tensors missing (as {missing[:1]}), "
            f"{len(unexpected)} not known (as {unexpected[:1]})"
        )


def read_weights(path: Path, name: str) -> Any:
    """What a file of plain tensors holds; pickled code in it is never run.

    Raises:
        EmbedderError: no such file, or it is not one of plain tensors.
    """
    if not path.is_file():
        raise EmbedderError(
            f"{name}: no file {path}; put the weights there, or give the path of a file that exists"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise EmbedderError(
            f"{path}: not a file of plain tensors ({first_line(error, with_type=True)}); save a state dict, "
            "code in it is never run"
        ) from error


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The same random weights every time, without touching the caller's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()
