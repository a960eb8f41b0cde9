"""The forward pass of an embedder: a batch of inputs to rows as they are stored, and why some cannot be."""

import math

import numpy as np
import torch
from torch import Tensor

from curated_data.devices import resolve_device
from curated_data.embedding.batches import complete, is_of_worker, worker_ended
from curated_data.embedding.embedders import Embedder, evaluating
from curated_data.errors import CuratedDataError, EmbedderError, first_line
from curated_data.threads import parallel_map

_PIXELS = 32 * 64 * 64  # of the images that a CPU embeds at once


class Forward:
    """An embedder on a device; calls give rows of a floating-point type.

    Args:
        embedder, dtype, device, precision: as for `embed_pool`.

    Raises:
        EmbedderError: its dimension is not a positive integer.
    """

    def __init__(self, embedder: Embedder, *, dtype: str, device: str | torch.device, precision: str) -> None:
        self.embedder, self.dtype, self.device = embedder, dtype, resolve_device(device)
        self.name = str(getattr(embedder, "name", type(embedder).__qualname__))
        if not isinstance(embedder.dimension, int) or embedder.dimension < 1:
            raise EmbedderError(
                f"{self.name}: its dimension is {embedder.dimension!r}, expected a positive integer"
            )
        automatic = precision == "auto" and self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.use_bf16 = precision == "bf16" or automatic
        self.is_parallel = self.device.type == "cpu" and getattr(embedder, "thread_safe", False)

    def move(self) -> None:
        """Move the embedder to the device."""
        if isinstance(self.embedder, torch.nn.Module):
            self.embedder.to(self.device)

    def __call__(self, inputs: Tensor | None, reasons: list[str]) -> tuple[np.ndarray, list[str]]:
        """Embed what could be read of B samples.

        Args:
            inputs: of the samples without a reason; None if there are none.
            reasons: why each sample could not be read; empty for the others.

        Returns:
            (B, d) rows, zeros for failed samples, and the reasons, with those of non-finite embeddings added.
        """
        values = np.zeros((len(reasons), self.embedder.dimension), self.dtype)
        if inputs is None:
            return values, reasons
        good = np.array([not reason for reason in reasons])
        output = self._forward(inputs)
        expected = (int(good.sum()), self.embedder.dimension)
        if tuple(output.shape) != expected:
            raise EmbedderError(f"{self.name}: gave shape {tuple(output.shape)}, expected {expected}")
        wide = output.float().cpu().numpy()
        with np.errstate(over="ignore"):  # values too large for float16 become inf, and are reported below
            rows = wide.astype(self.dtype)
        lost = ~np.isfinite(rows).all(axis=1) | (wide.any(axis=1) & ~rows.any(axis=1))
        rows[lost] = 0
        values[good] = rows
        reasons = list(reasons)
        for place, row in zip(np.flatnonzero(good)[lost].tolist(), wide[lost], strict=True):
            reasons[place] = _why_lost(row, self.dtype)
        return values, reasons

    def _forward(self, inputs: Tensor) -> Tensor:
        """Embed one batch in evaluation mode; errors are attributed to the embedder."""
        embedder, device = self.embedder, self.device
        network = embedder if isinstance(embedder, torch.nn.Module) else torch.nn.Identity()
        try:
            with evaluating(network), torch.inference_mode():
                parts = parallel_map(self._piece, self._pieces(inputs), None if self.is_parallel else 1)
                output = torch.cat(parts) if len(parts) > 1 else parts[0]
        except CuratedDataError:
            raise
        except torch.OutOfMemoryError as error:
            raise EmbedderError(
                f"{self.name}: out of memory on {device} with {len(inputs)} samples at once; lower "
                "embedding.batch_size"
            ) from error
        except Exception as error:  # the user's network may raise anything
            if is_of_worker(error):
                raise worker_ended(error) from error
            raise EmbedderError(
                f"{self.name}: fails on a batch of shape {tuple(inputs.shape)} on {device} "
                f"({first_line(error, with_type=True)}); is its `preprocess` the right one?"
            ) from error
        if not isinstance(output, Tensor) or output.is_complex():
            kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise EmbedderError(f"{self.name}: gave {kind}, expected a tensor of real numbers (B, d)")
        return output

    def _piece(self, piece: Tensor, memory_format: torch.memory_format | None) -> Tensor:
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.use_bf16):
            piece = complete(piece.to(self.device, non_blocking=True), self.embedder.preprocess)
            return self.embedder(piece.contiguous(memory_format=memory_format) if memory_format else piece)

    def _pieces(self, inputs: Tensor) -> list[tuple[Tensor, torch.memory_format | None]]:
        """A batch in the pieces, and the memory format, that a network on the CPU is fastest with for images.

        Pieces of about `_PIXELS` keep the activations of a network in the processor's cache; most networks
        compute fastest in `channels_last`. On one core, EfficientNet-Lite0 embeds two to four times as many
        images of 64 pixels this way as in batches of 256 (`benchmarks/embedding.py`). Both change rows by
        rounding alone, and neither depends on the number of cores.
        """
        if self.device.type != "cpu" or inputs.ndim != 4 or not isinstance(self.embedder, torch.nn.Module):
            return [(inputs, None)]
        pixels = math.prod(inputs.shape[-2:])
        in_rows = pixels < 128 * 128 and _has_wide_convolutions(self.embedder)
        memory_format = torch.contiguous_format if in_rows else torch.channels_last
        size = 1 << math.ceil(math.log2(max(_PIXELS / pixels, 1)))
        return [(piece, memory_format) for piece in inputs.split(size)]


def _has_wide_convolutions(network: torch.nn.Module) -> bool:
    """Whether it is like a ResNet, which is up to 1.4 times as fast in rows for images of 64 pixels."""
    return any(
        isinstance(part, torch.nn.Conv2d)
        and part.groups == 1
        and min(part.kernel_size) > 1
        and min(part.in_channels, part.out_channels) >= 256
        for part in network.modules()
    )


def _why_lost(row: np.ndarray, dtype: str) -> str:
    """Why an embedding cannot be stored: it is not finite, or overflows or vanishes in the stored dtype.

    Equal reasons have equal words, so that they are counted together.
    """
    if not np.isfinite(row).all():
        return "its embedding is not finite"
    limits = np.finfo(dtype)
    what = f"exceeds {limits.max:g}" if np.abs(row).max() > 1 else f"is below {limits.smallest_subnormal:.0e}"
    return f"its embedding {what}, beyond what {dtype} can hold; set embedding.dtype to float32"
