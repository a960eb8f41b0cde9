"""What a re-curation during training does besides curating: ranks that agree, artifacts that go, figures."""

import logging
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from curated_data.cache.holds import remove_unheld
from curated_data.cache.removal import artifact_folder
from curated_data.errors import CacheError
from curated_data.parallel import is_distributed
from curated_data.stages.curation import Curation

log = logging.getLogger(__name__)

_REPLACED = ("embeddings", "fresh_embeddings", "near_duplicates", "tree")


def agree_on_buffers(module: nn.Module) -> None:
    """Give every rank the buffers of rank zero, as DDP does before its next forward pass anyway.

    Normalisation statistics differ between ranks after a step; embeddings, and the fingerprint of the
    weights, must not.
    """
    if not is_distributed():
        return
    with torch.no_grad():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def compared(old: np.ndarray, curation: Curation) -> dict[str, float]:
    """How a new selection differs from the old one, and its balance, as they are logged."""
    new = np.unique(curation.ids)
    before = np.unique(old)
    shared = len(np.intersect1d(before, new, assume_unique=True))
    lowest = curation.report["levels"][0]
    return {
        "jaccard": shared / max(len(before) + len(new) - shared, 1),
        "new": 1 - shared / max(len(new), 1),
        "perplexity": lowest["perplexity"],
        "selected_perplexity": lowest["selected_perplexity"],
        "size": len(curation.ids),
    }


def drop_unheld(root: Path, name: str) -> bool:
    """Remove an artifact that nobody uses; whether it is gone."""
    try:
        return remove_unheld(artifact_folder(root, name), below=root)
    except (OSError, CacheError) as error:
        log.warning("%s: an earlier re-curation's, is not needed any more, but stays: %s", name, error)
        return False


def replaced_artifacts(curation: Curation) -> list[str]:
    """The artifacts of a curation that a later one may remove, by their names in the cache."""
    folders = (curation.folders[name] for name in _REPLACED if name in curation.folders)
    return [f"{folder.parent.name}/{folder.name}" for folder in folders]
