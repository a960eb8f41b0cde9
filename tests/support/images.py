"""Images as files, and shards of samples."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from curated_data.pool import ShardWriter


def png(array: np.ndarray) -> bytes:
    """An image array (H, W, 3) as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def noise(n: int) -> list[bytes]:
    """n PNGs of 8 x 8 random pixels, the same in every call."""
    rng = np.random.default_rng(0)
    return [png(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(n)]


def write_samples(place: Path, samples: Iterable[Mapping[str, Any]], **options: Any) -> list[str]:
    """Write samples with the keys 000, 001, … unless they have their own; returns the shards' paths."""
    with ShardWriter(place, **options) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number:03d}"} | sample)
    return list(map(str, writer.shards))
