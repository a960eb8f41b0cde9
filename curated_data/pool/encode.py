"""The bytes of a member, from the values that a writer takes."""

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from curated_data.errors import PoolError


def encode_member(content: Any, what: str = "member", extension: str = "") -> bytes:
    """The bytes of a member with this content, see `ShardWriter.write`."""
    if isinstance(content, bytes | bytearray | memoryview):
        return bytes(content)
    if isinstance(content, str):
        return content.encode("utf-8", "surrogateescape")
    if isinstance(content, int | np.integer) and not isinstance(content, bool):
        return str(int(content)).encode("ascii")
    if isinstance(content, Mapping | list | tuple):
        return json.dumps(content, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogateescape")
    if isinstance(content, np.ndarray) and not content.dtype.hasobject:
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, content, allow_pickle=False)
        return buffer.getvalue()
    if isinstance(content, Image.Image):
        return _png(content, what, extension)
    raise PoolError(
        f"{what}: cannot write a {type(content).__name__}; give bytes, str, int, dict, list, a numpy array, "
        "or a PIL image"
    )


def _png(image: Image.Image, what: str, extension: str) -> bytes:
    """Without loss, so that nothing depends on an encoder's quality."""
    if extension.rpartition(".")[2] != "png":
        raise PoolError(f"{what}: a PIL image is written as PNG; name the member 'png', or give its bytes")
    buffer = io.BytesIO()
    try:
        image.save(buffer, "PNG")
    except (OSError, ValueError) as error:  # of a mode that PNG does not have
        raise PoolError(
            f"{what}: a PIL image of mode {image.mode!r} cannot be written as PNG ({error}); convert it"
        ) from error
    return buffer.getvalue()
