"""Evaluations of frozen features, one file each, and the callbacks that run them during training.

Each function takes the name of its file here: `from lightning_modules.evaluation import knn` is the function.
"""

from typing import TYPE_CHECKING, Any

from lightning_modules.evaluation.clustering import clustering
from lightning_modules.evaluation.comparison import comparison
from lightning_modules.evaluation.dense import DenseSettings
from lightning_modules.evaluation.depth import depth
from lightning_modules.evaluation.fairness import fairness
from lightning_modules.evaluation.health import health
from lightning_modules.evaluation.knn import knn
from lightning_modules.evaluation.linear import LinearSettings, linear
from lightning_modules.evaluation.longtail import longtail
from lightning_modules.evaluation.map_quality import map_quality
from lightning_modules.evaluation.multilabel import multilabel
from lightning_modules.evaluation.ranking import ranking
from lightning_modules.evaluation.retrieval import retrieval
from lightning_modules.evaluation.robustness import ShiftedSet, robustness
from lightning_modules.evaluation.segmentation import segmentation
from lightning_modules.evaluation.suite import Figure, SuiteDataset, suite

if TYPE_CHECKING:
    from lightning_modules.evaluation.online import OnlineKNN, OnlineLinear

__all__ = [
    "DenseSettings",
    "Figure",
    "LinearSettings",
    "OnlineKNN",
    "OnlineLinear",
    "ShiftedSet",
    "SuiteDataset",
    "clustering",
    "comparison",
    "depth",
    "fairness",
    "health",
    "knn",
    "linear",
    "longtail",
    "map_quality",
    "multilabel",
    "ranking",
    "retrieval",
    "robustness",
    "segmentation",
    "suite",
]


def __getattr__(name: str) -> Any:
    """The callbacks load on first use: they import Lightning, which takes seconds."""
    if name not in ("OnlineKNN", "OnlineLinear"):
        raise AttributeError(f"module 'lightning_modules.evaluation' has no attribute {name!r}")
    from lightning_modules.evaluation import online

    return getattr(online, name)
