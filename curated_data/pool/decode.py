"""From the bytes of a sample's members to tensors, text and numbers.

JPEG goes through simplejpeg: 1.5 to 2 times as fast as Pillow at 256 and 500 pixels, with Pillow's very
pixels at full and at reduced scale. All else goes through Pillow. Not `torchvision.io`: it is as fast as
simplejpeg, but deprecated since torchvision 0.29, and its PNG decoder ends the process at some damaged files.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError

from curated_data.errors import SampleError

IMAGE_EXTENSIONS = (
    "jpg",
    "jpeg",
    "png",
    "webp",
    "gif",
    "bmp",
    "ppm",
    "pgm",
    "tif",
    "tiff",
    "jp2",
    "avif",
    "img",
    "image",
)
TEXT_EXTENSIONS = ("txt", "text")
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs

Decoders = Mapping[str, Callable[[bytes], Any]]


class EncodedImage(NamedTuple):
    """An image member that is still to be decoded."""

    member: str
    data: bytes


def decode_image(data: bytes, *, min_size: int | None = None) -> torch.Tensor:
    """Decode an image to RGB.

    Grey is repeated over the channels, palettes are looked up, CMYK is converted, alpha is dropped (all as
    Pillow's `convert("RGB")`); 16-bit values keep their upper byte. Of an animation the first frame is taken.

    Args:
        data: the encoded bytes of any format that Pillow reads.
        min_size: decode a JPEG at 1/2, 1/4 or 1/8 of its size where both sides stay at least this long, in
            pixels; None decodes it in full.

    Returns:
        uint8 (3, H, W), in memory as (H, W, 3).

    Raises:
        SampleError: no image, of no known format, truncated, damaged, or too large.
    """
    if not data:
        raise SampleError("is empty")
    pixels = _decode_jpeg(data, min_size) if data[:2] == b"\xff\xd8" else None
    if pixels is None:
        pixels = _decode_with_pillow(data, min_size)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def decode_array(data: bytes) -> np.ndarray:
    """Decode a `.npy` member; object arrays, which are pickles, are refused.

    Raises:
        SampleError: not a `.npy`, truncated, or an array of objects.
    """
    try:
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise SampleError(f"is no readable .npy array ({error})") from error


def decode_sample(
    sample: Mapping[str, Any],
    *,
    decoders: Decoders | None = None,
    image_extensions: Sequence[str] = IMAGE_EXTENSIONS,
    min_size: int | None = None,
    encoded: bool = False,
) -> dict[str, Any]:
    """Decode what a sample holds to the fields that embedding and training know.

    Args:
        sample: as `ShardPool.read` gives it: `__key__`, `__url__`, and bytes by extension.
        decoders: own decoders by extension, which win: `{"tif": read_bands}` is asked for `tif` and for
            `left.tif`. An extension that has no meaning here comes back under its own name.
        image_extensions: which members are images, the preferred first. Of several the preferred is taken, of
            those the first in the archive.
        min_size: see `decode_image`.
        encoded: leave an image for which there is no own decoder to the caller, as an `EncodedImage`.

    Returns:
        `image` uint8 (3, H, W), or what its decoder gave; where there is none, `array` (from `.npy`) or
        `text` (from `.txt`, or the field `text` or `caption` of a `.json`). Beside these, where the sample
        has them: `label`, an int from `.cls`; `caption`, the `.txt` beside an image or array; `metadata`, the
            `.json`.

    Raises:
        SampleError: no member that can be decoded (with what there is), or one that cannot; names shard, key,
            member.
    """
    decoders = decoders or {}
    members = {name: content for name, content in sample.items() if not name.startswith("__")}
    decoded: dict[str, Any] = {}

    def decode(name: str, default: Callable[[bytes], Any]) -> Any:
        decoder = decoders.get(name) or decoders.get(name.rpartition(".")[2]) or default
        try:
            return decoder(members[name])
        except Exception as error:  # whatever an own decoder raises is this sample's fault, and must name it
            raise undecodable(sample, name, error) from error

    image = _first(members, image_extensions)
    array = _first(members, ("npy",))
    text = _first(members, TEXT_EXTENSIONS)
    if image is not None:

        def default(data: bytes) -> Any:
            return EncodedImage(image, data) if encoded else decode_image(data, min_size=min_size)

        decoded["image"] = decode(image, default)
    if array is not None:
        decoded["array"] = decode(array, decode_array)
    if text is not None:
        decoded["caption" if decoded else "text"] = decode(text, lambda data: data.decode("utf-8"))
    if "cls" in members:
        decoded["label"] = decode("cls", _label)
    if "json" in members:
        decoded["metadata"] = decode("json", json.loads)
    known = {image, array, text, "cls", "json"}
    for name in members:
        if name not in known and (name in decoders or name.rpartition(".")[2] in decoders):
            decoded[name] = decode(name, bytes)
            known.add(name)
    if not decoded.keys() - {"label", "metadata"}:
        _text_from_metadata(decoded)
    if not decoded.keys() - {"label", "metadata"}:
        has = ", ".join(sample.get("__members__") or members) or "nothing"
        wanted = "/".join(image_extensions[:4])
        raise SampleError(
            f"{place_of(sample)}: no image member ({wanted}, ...), array or text; it has: {has}"
        )
    return decoded


def place_of(sample: Mapping[str, Any]) -> str:
    """How messages name a sample: by shard and key."""
    return f"{sample.get('__url__', 'sample')}: sample {sample.get('__key__', '?')!r}"


def undecodable(sample: Mapping[str, Any], member: str, error: Exception) -> SampleError:
    """The error for a member that cannot be decoded; names shard, key, member and reason."""
    reason = str(error) if isinstance(error, SampleError) else f"{type(error).__name__}: {error}"
    return SampleError(f"{place_of(sample)}, member {member!r}: {reason}")


def _decode_jpeg(data: bytes, min_size: int | None) -> np.ndarray | None:
    """(H, W, 3), or None for what is left to Pillow: CMYK, rare variants, and damage."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours in ("CMYK", "YCCK"):
            return None
        _check_pixels(width, height)
        scale = 8 if min_size is not None else 1
        while scale > 1 and min(width, height) < scale * min_size:  # as Pillow chooses it
            scale //= 2
        return simplejpeg.decode_jpeg(data, min_height=-(-height // scale), min_width=-(-width // scale))
    except SampleError:
        raise
    except Exception:  # ValueError for most damage, KeyError for some
        return None


def _decode_with_pillow(data: bytes, min_size: int | None) -> np.ndarray:
    """(H, W, 3) of any format."""
    try:
        image = Image.open(io.BytesIO(data))
        _check_pixels(image.width, image.height)
        if min_size is not None:
            image.draft("RGB", (min_size, min_size))
        if image.mode.startswith("I"):  # 16 bits, which convert("RGB") would clip to white
            values = np.asarray(image).astype(np.int64)
            if values.min() < 0 or values.max() > 0xFFFF:
                raise SampleError(
                    f"has 32-bit values ({values.min()} to {values.max()}); give a decoder for it"
                )
            return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
        if image.mode == "F":
            raise SampleError(
                "has floating-point values, whose scale only its owner knows; give a decoder for it"
            )
        return np.array(image.convert("RGB"))
    except SampleError:
        raise
    except Image.DecompressionBombError as error:
        raise SampleError(f"is too large ({error})") from error
    except UnidentifiedImageError as error:  # whose own words hold an address, another one each run
        raise SampleError(f"cannot be decoded (no known image format; starts {data[:8]!r})") from error
    except (
        Exception
    ) as error:  # Pillow's plugins raise OSError, ValueError, SyntaxError, struct.error and more
        raise SampleError(
            f"cannot be decoded ({str(error) or type(error).__name__}; starts {data[:8]!r})"
        ) from error


def _first(members: Mapping[str, bytes], extensions: Sequence[str]) -> str | None:
    """The member with the most preferred extension; `left.png` counts as `png` where no bare one is there."""
    for name in extensions:
        if name in members:
            return name
    for member in members:
        if "." in member and member.rpartition(".")[2] in extensions:
            return member
    return None


def _label(data: bytes) -> int:
    try:
        return int(data.decode("ascii"))
    except ValueError:
        raise SampleError(f"is no integer: {data[:40]!r}") from None


def _text_from_metadata(decoded: dict[str, Any]) -> None:
    metadata = decoded.get("metadata")
    for field in ("text", "caption"):
        if isinstance(metadata, dict) and isinstance(metadata.get(field), str):
            decoded["text"] = metadata[field]
            return


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise SampleError(f"is {width} x {height} pixels large, more than the limit of {MAX_PIXELS}")
