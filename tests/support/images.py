"""Images as files."""

import io

import numpy as np
from PIL import Image


def png(array: np.ndarray) -> bytes:
    """An image array (H, W, 3) as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()
