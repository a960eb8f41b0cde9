"""Trainers that write and show nothing."""

from typing import Any

import lightning as L

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def quiet_trainer(**options: Any) -> L.Trainer:
    """A Trainer on the CPU; options come before what keeps it quiet."""
    return L.Trainer(**(QUIET | options))
