"""Decoding an image to RGB.

JPEGs are decoded by simplejpeg, which is 1.5 to 2 times as fast as Pillow at 256 and 500 pixels and gives the
same pixels, at full and at reduced scale. Other formats are decoded by Pillow. `torchvision.io` is as fast as
simplejpeg, but deprecated since torchvision 0.29, and its PNG decoder crashes on some damaged files.
"""

import io
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from curated_data.errors import SampleError
from curated_data.pool.orientation import jpeg_orientation, orientation_of, turns
from curated_data.pool.passing import is_samples

_MEBIBYTE = 1 << 20


class ImageSettings(NamedTuple):
    """How images become RGB.

    Attributes:
        background: the colour under transparent pixels, red, green and blue, 0 to 255.
        exif_orientation: whether an image is turned as its EXIF data say, as viewers show it.
    """

    background: tuple[int, int, int] = (128, 128, 128)
    exif_orientation: bool = True


@dataclass
class DecodeCounts:
    """What was decoded by this process.

    Attributes:
        transparent: images with transparent pixels, put on the background.
    """

    transparent: int = 0


COUNTS = DecodeCounts()
DEFAULT_SETTINGS = ImageSettings()


def decode_image(
    data: bytes, *, min_size: int | None = None, settings: ImageSettings = DEFAULT_SETTINGS
) -> torch.Tensor:
    """Decode an image to RGB.

    Grey is repeated over the channels, palettes are looked up and CMYK is converted, as in Pillow's
    `convert("RGB")`; transparent pixels are put on the background; 16-bit values keep their upper byte. The
    image is turned as its EXIF data say, as by Pillow's `ImageOps.exif_transpose`. Of an animation, the first
    frame is used.

    Args:
        data: the encoded bytes, in any format that Pillow reads without another program.
        min_size: decode a JPEG at 1/2, 1/4 or 1/8 of its size if both sides keep at least this many pixels;
            None always decodes at full size.
        settings: the background, and whether EXIF data are heeded.

    Returns:
        uint8 (3, H, W), laid out in memory as (H, W, 3).

    Raises:
        SampleError: not an image, of an unknown format, truncated, damaged, or of more pixels than twice
            Pillow's `Image.MAX_IMAGE_PIXELS`.
    """
    if not data:
        raise SampleError("is empty")
    pixels = _decode_jpeg(data, min_size, settings) if data[:2] == b"\xff\xd8" else None
    if pixels is None:
        pixels = _decode_with_pillow(data, min_size, settings)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def oriented(image: Tensor, orientation: int) -> Tensor:
    """An image (3, H, W) turned from an EXIF orientation to the usual one."""
    transposed, flips_rows, flips_columns = turns(orientation)
    if transposed:
        image = image.transpose(-1, -2)
    dims = [dim for dim, flips in ((-2, flips_rows), (-1, flips_columns)) if flips]
    return image.flip(dims) if dims else image


def check_pixels(width: int, height: int) -> None:
    """Heed `Image.MAX_IMAGE_PIXELS` as Pillow does: a warning above it, an error above twice as many.

    Raises:
        SampleError: the image is too large.
    """
    limit, pixels = Image.MAX_IMAGE_PIXELS, width * height
    if limit is None or pixels <= limit:
        return
    if pixels > 2 * limit:
        raise SampleError(
            f"is {width} x {height} pixels large, more than the limit of {2 * limit}, twice "
            "PIL.Image.MAX_IMAGE_PIXELS"
        )
    warnings.warn(
        f"an image of {width} x {height} pixels exceeds PIL.Image.MAX_IMAGE_PIXELS = {limit}",
        Image.DecompressionBombWarning,
        stacklevel=2,
    )


def _oriented(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, 3), turned from an EXIF orientation to the usual one."""
    transposed, flips_rows, flips_columns = turns(orientation)
    if transposed:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels[:: -1 if flips_rows else 1, :: -1 if flips_columns else 1])


def _decode_jpeg(data: bytes, min_size: int | None, settings: ImageSettings) -> np.ndarray | None:
    """(H, W, 3), or None to leave it to Pillow: CMYK, rare variants, and damaged files."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours in ("CMYK", "YCCK"):
            return None
        check_pixels(width, height)
        scale = 1
        if min_size is not None:  # the same choice as Pillow's
            scale = 8
            while scale > 1 and min(width, height) < scale * min_size:
                scale //= 2
        pixels = simplejpeg.decode_jpeg(data, min_height=-(-height // scale), min_width=-(-width // scale))
    except (SampleError, Image.DecompressionBombWarning):
        raise
    except Exception as error:  # ValueError for most damage, KeyError for some
        if not is_samples(error):
            raise
        return None
    return _oriented(pixels, jpeg_orientation(data)) if settings.exif_orientation else pixels


def _decode_with_pillow(data: bytes, min_size: int | None, settings: ImageSettings) -> np.ndarray:
    """(H, W, 3), from any format."""
    try:
        image = Image.open(io.BytesIO(data))
        if image.format == "EPS":  # a program, which Pillow has Ghostscript run
            raise SampleError("is an EPS file, which only Ghostscript can render; give a decoder for it")
        if min_size is not None:
            image.draft("RGB", (min_size, min_size))
        scale = _key_scale(image)
        image.load()
        orientation = orientation_of(image) if settings.exif_orientation else 1
        return _oriented(_as_rgb(image, settings.background, scale), orientation)
    except SampleError:
        raise
    except Image.DecompressionBombError as error:
        raise SampleError(f"is too large ({error})") from error
    except UnidentifiedImageError as error:  # whose message contains a memory address
        raise SampleError(f"cannot be decoded (no known image format; starts {data[:8]!r})") from error
    except Exception as error:  # Pillow's plugins raise OSError, ValueError, SyntaxError, struct.error, …
        if not is_samples(error) and not _claims_memory(error):
            raise
        raise SampleError(
            f"cannot be decoded ({str(error) or type(error).__name__}; starts {data[:8]!r})"
        ) from (None if _claims_memory(error) else error)


def _claims_memory(error: Exception) -> bool:
    """Whether a codec reports too little memory only because the file's sizes are impossible.

    Pillow's codecs report sizes that overflow so. Pixels are limited in number and were allocated before.
    """
    if type(error) not in (OSError, RuntimeError) or "out of memory" not in str(error).lower():
        return False
    try:
        bytearray(64 * _MEBIBYTE)
    except MemoryError:
        return False
    return True


def _as_rgb(image: Image.Image, background: tuple[int, int, int], scale: int) -> np.ndarray:
    """The pixels of a loaded image, (H, W, 3)."""
    if image.mode.startswith("I"):  # 16 bits, which convert("RGB") would clip to white
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise SampleError(f"has 32-bit values ({values.min()} to {values.max()}); give a decoder for it")
        grey = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
        key = image.info.get("transparency")
        is_clear = values == key if isinstance(key, int) else np.zeros(values.shape, bool)
        if is_clear.any():
            COUNTS.transparent += 1
            grey[is_clear] = background
        return grey
    if image.mode == "F":
        raise SampleError("has floating-point values, whose scale is unknown; give a decoder for it")
    if not image.has_transparency_data:
        return np.array(image.convert("RGB"))
    key = image.info.get("transparency")
    if scale != 1 and image.mode in ("L", "RGB"):  # Pillow scales the values to 8 bits, but not the key
        scaled = [scale * k if scale > 0 else k >> 8 for k in (key if isinstance(key, tuple) else (key,))]
        image.info["transparency"] = tuple(scaled) if isinstance(key, tuple) else scaled[0]
    if image.mode == "1" and key == 1:  # as older versions of Pillow give it for white
        image.info["transparency"] = 255
    if image.mode in ("La", "RGBa"):  # which convert to nothing but their own kind
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    image = image.convert("RGBA")
    if image.getchannel("A").histogram()[255] == image.width * image.height:
        return np.array(image.convert("RGB"))
    COUNTS.transparent += 1
    ground = Image.new("RGBA", image.size, (*background, 255))
    return np.array(Image.alpha_composite(ground, image).convert("RGB"))


def _key_scale(image: Image.Image) -> int:
    """By what the transparent value of a PNG is to be multiplied for its 8-bit pixels; -1: shift it right."""
    tile = getattr(image, "tile", None)
    raw = tile[0][3] if tile and image.format == "PNG" else ""
    raw = raw[0] if isinstance(raw, tuple) else raw
    return {"L;2": 85, "L;4": 17, "RGB;16B": -1, "L;16B": -1}.get(raw, 1)
