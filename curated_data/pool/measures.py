"""Measures of images by which pools are filtered: size, sharpness, brightness, entropy, flat areas."""

import io

import numpy as np
from PIL import Image
from scipy import ndimage

from curated_data.errors import CuratedDataError
from curated_data.pool.image import DEFAULT_SETTINGS, ImageSettings, decode_image
from curated_data.pool.orientation import orientation_of, turns
from curated_data.pool.passing import is_samples

OF_HEADER = ("width", "height", "aspect", "bytes")
OF_PIXELS = ("sharpness", "brightness", "entropy", "flat")
MEASURES = (*OF_HEADER, *OF_PIXELS)

_SIDE = 256  # pixels of the longer side, to which larger images are thinned out before they are measured
_ALIKE = 2  # grey levels, of 255, up to which neighbours belong to one flat area


def measure_image(
    data: bytes, *, pixels: bool, settings: ImageSettings = DEFAULT_SETTINGS
) -> dict[str, float | None]:
    """The measures of an encoded image; None for those of an image that cannot be decoded.

    Args:
        data: the encoded bytes.
        pixels: also those that need the pixels.
        settings: how images are decoded.

    Returns:
        `width` and `height` in pixels, `aspect` (the longer side divided by the shorter), `bytes`; with
        `pixels` also `sharpness` (the variance of the Laplacian of grey values in 0..255), `brightness` (the
        mean grey, 0..1), `entropy` (of the histogram of grey values, 0..8 bits) and `flat` (the share of the
        largest connected area in which neighbours are equal, near 1 for blank images and screenshots).
    """
    found: dict[str, float | None] = dict.fromkeys((*OF_HEADER, *(OF_PIXELS if pixels else ())))
    found["bytes"] = len(data)
    try:
        if pixels:
            image = decode_image(data, min_size=_SIDE, settings=settings)
            found |= measure_pixels(image.numpy())
        width, height = _size(data, settings)
    except Exception as error:  # of a decoder, for these bytes
        if not (isinstance(error, CuratedDataError) or is_samples(error)):
            raise
        return found
    found |= {"width": width, "height": height, "aspect": max(width, height) / max(min(width, height), 1)}
    return found


def measure_pixels(image: np.ndarray) -> dict[str, float]:
    """The measures of `OF_PIXELS`, of uint8 (3, H, W). Larger images are thinned out to 256 pixels first."""
    step = max(1, -(-max(image.shape[1:]) // _SIDE))
    red, green, blue = image[:, ::step, ::step].astype(np.float32)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    counts = np.bincount(np.round(grey).astype(np.uint8).ravel(), minlength=256)
    share = counts[counts > 0] / grey.size
    return {
        "sharpness": float(ndimage.laplace(grey).var()),
        "brightness": float(grey.mean() / 255),
        "entropy": float(max(-(share * np.log2(share)).sum(), 0.0)),
        "flat": _largest_flat(grey),
    }


def _largest_flat(grey: np.ndarray) -> float:
    """The share of the largest connected area of pixels that hardly differ from their right and lower
    neighbours.
    """
    right = np.abs(np.diff(grey, axis=1, append=grey[:, -1:])) <= _ALIKE
    below = np.abs(np.diff(grey, axis=0, append=grey[-1:])) <= _ALIKE
    areas, number = ndimage.label(right & below)
    return float(np.bincount(areas.ravel())[1:].max() / grey.size) if number else 0.0


def _size(data: bytes, settings: ImageSettings) -> tuple[int, int]:
    """Width and height by the header, turned as the image would be."""
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        transposed = settings.exif_orientation and turns(orientation_of(image))[0]
    return (height, width) if transposed else (width, height)
