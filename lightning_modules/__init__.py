"""Self-supervised pretraining modules for Lightning, and evaluations of what they learn."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules.pretraining.dinov2 import DINOv2
    from lightning_modules.pretraining.mae import MAE
    from lightning_modules.pretraining.simclr import SimCLR
    from lightning_modules.pretraining.sp2ot import SP2OT
    from lightning_modules.pretraining.tsimcne import TSimCNE

__all__ = ["MAE", "SP2OT", "DINOv2", "SimCLR", "TSimCNE"]


def __getattr__(name: str) -> Any:
    """Import a module on first use: each takes seconds, and few programs need more than one."""
    if name not in __all__:
        raise AttributeError(f"module 'lightning_modules' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"lightning_modules.pretraining.{name.lower()}"), name)
