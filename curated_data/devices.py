"""The device to work on, by name."""

import torch

from curated_data.errors import ConfigError, first_line


def resolve_device(device: str | torch.device = "auto", *, name: str = "device") -> torch.device:
    """The device with this name; "auto" is this process's CUDA device if there is one, else the CPU.

    Args:
        device: as torch names it, or "auto".
        name: of the argument, for the error.

    Raises:
        ConfigError: this machine has no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ConfigError(
            f'{name} {str(device)!r}: cannot be used here ({first_line(error)}); give "cpu" or "auto"'
        ) from error
