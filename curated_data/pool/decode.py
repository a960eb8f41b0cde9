"""Decoding the members of a sample to tensors, text and numbers."""

import io
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from curated_data.errors import ConfigError, CuratedDataError, SampleError, first_line
from curated_data.pool.image import DEFAULT_SETTINGS, ImageSettings, decode_image
from curated_data.pool.passing import is_samples

log = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "ppm", "pgm", "tif", "tiff", "jp2", "avif",
                    "img", "image")  # fmt: skip
TEXT_EXTENSIONS = ("txt", "text")
_WARNED: set[str] = set()  # warnings that this process has passed on

Decoders = Mapping[str, Callable[[bytes], Any]]


class EncodedImage(NamedTuple):
    """An image member that is not decoded yet."""

    member: str
    data: bytes


def decode_array(data: bytes) -> np.ndarray:
    """Decode a `.npy` member; object arrays, which are pickles, are rejected.

    Raises:
        SampleError: not a `.npy` file, truncated, or an object array.
    """
    try:
        length = 2 if data[6:7] == b"\x01" else 4  # of what says how long the header is
        start = 8 + length + int.from_bytes(data[8 : 8 + length], "little")
        shape, fortran_order, dtype = _array_header(data[:start])
        n_bytes = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or (not dtype.hasobject and n_bytes > len(data) - start):
            raise SampleError(f"not a readable .npy array: {shape} {dtype} in {len(data)} bytes; truncated?")
        if dtype.hasobject or dtype.names is not None:  # which it refuses; names
            return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        return np.ndarray(shape, dtype, data, start, order="F" if fortran_order else "C").copy("K")
    except SampleError:
        raise
    except Exception as error:  # numpy parses the header as Python, which raises many kinds
        if not is_samples(error):
            raise
        raise SampleError(f"not a readable .npy array ({error})") from error


def decode_sample(
    sample: Mapping[str, Any],
    *,
    decoders: Decoders | None = None,
    image_extensions: Sequence[str] = IMAGE_EXTENSIONS,
    min_size: int | None = None,
    encoded: bool = False,
    settings: ImageSettings = DEFAULT_SETTINGS,
) -> dict[str, Any]:
    """Decode a sample to the fields that embedding and training use.

    Args:
        sample: as returned by `ShardPool.read`: `__key__`, `__url__`, and bytes by extension.
        decoders: custom decoders by extension, which take precedence: `{"tif": read_bands}`, or `".TIF"`,
            decodes `tif` and `left.tif`. The result for an extension that is not known here is returned under
            that extension.
        image_extensions: the extensions of images, in order of preference; of several with the same
            extension, the first in the archive is used.
        min_size, settings: see `decode_image`.
        encoded: return an image that has no own decoder as an `EncodedImage`, undecoded.

    Returns:
        `image`, uint8 (3, H, W), or what its decoder returned; without an image, `array` (from `.npy`) or
        `text` (from `.txt`, or the field `text` or `caption` of a `.json`). Also, if the sample has them:
        `label`, an int from `.cls`; `caption`, the `.txt` beside an image or array; `metadata`, from `.json`.

    Raises:
        SampleError: no member can be decoded (lists those there are), or decoding one fails; names the shard,
            key and member.
        ConfigError: see `as_decoders`.
        Exception: any other error than those of the bytes, see `is_samples`; a note names the sample.
    """
    if tuple(image_extensions) != IMAGE_EXTENSIONS:  # nor need those of every pool be looked at again
        image_extensions = as_extensions(image_extensions, "image_extensions")
    parts = _parts(sample, as_decoders(decoders) or {}, image_extensions)
    decode: Callable[[bytes], Any] = partial(decode_image, min_size=min_size, settings=settings)
    decoded: dict[str, Any] = {}
    for field, part in parts.items():
        image = partial(EncodedImage, part.member) if encoded else decode
        decoded[field] = _decode(sample, part, _DEFAULTS.get(field, image))
    if not decoded.keys() - {"label", "metadata"}:
        text = _text_of(decoded.get("metadata"))
        if text is None:
            raise _lacking(sample, f"image member ({'/'.join(image_extensions[:4])}, ...), array or text")
        decoded["text"] = text
    return decoded


def decode_content(
    sample: Mapping[str, Any],
    *,
    decoders: Decoders | None = None,
    image_extensions: Sequence[str] = IMAGE_EXTENSIONS,
    needs_image: bool = False,
    settings: ImageSettings = DEFAULT_SETTINGS,
) -> Any:
    """What embedding takes of a sample: its image, or without one its array or text.

    Nothing else is decoded, so that a label or caption that cannot be does no harm.

    Args:
        sample, decoders, image_extensions, settings: as for `decode_sample`.
        needs_image: see `check_has_image`.

    Raises:
        SampleError: there is nothing of the kind, or decoding it fails; names the shard, key and member.
        Exception: any other error than those of the bytes, see `is_samples`; a note names the sample.
    """
    parts = _parts(sample, decoders or {}, image_extensions)
    if needs_image:
        _check_image(sample, parts)
    field = _content(parts)
    if field is not None:
        image = partial(decode_image, settings=settings)
        value = _decode(sample, parts[field], _DEFAULTS.get(field, image))
        if value is None:
            raise undecodable(sample, parts[field].member, SampleError("its decoder gave None"))
        return value
    text = None
    if parts.keys() in ({"metadata"}, {"metadata", "label"}):
        text = _text_of(_decode(sample, parts["metadata"], json.loads))
    if text is None:
        raise _lacking(sample, f"image member ({'/'.join(image_extensions[:4])}, ...), array or text")
    return text


def decode_encoded(
    image: EncodedImage, sample: Mapping[str, Any], *, min_size: int | None, settings: ImageSettings
) -> Any:
    """Decode an image that `decode_sample` left undecoded.

    Raises:
        SampleError: its bytes cannot be decoded; names the shard, key and member.
        Exception: any other error; a note names the sample.
    """
    decode = partial(decode_image, min_size=min_size, settings=settings)
    return _decode({**sample, image.member: image.data}, _Part(image.member, None), decode)


def check_beside(
    sample: Mapping[str, Any],
    fields: Collection[str],
    *,
    decoders: Decoders | None = None,
    image_extensions: Sequence[str] = IMAGE_EXTENSIONS,
) -> None:
    """Decode what training will decode of a sample besides its content, so that it does not fail later.

    Args:
        sample, decoders, image_extensions: as for `decode_sample`.
        fields: those that training asks for.

    Raises:
        SampleError: one cannot be decoded; names the shard, key and member.
    """
    for field, part in _parts(sample, decoders or {}, image_extensions).items():
        if field in ("image", "array", "text"):
            continue
        if field in fields or field.rpartition(".")[2] in fields:
            _decode(sample, part, _label_or_name if field == "label" else _DEFAULTS.get(field, bytes))


def as_extensions(given: str | Iterable[str], name: str) -> tuple[str, ...]:
    """Extensions as members have them, in lower case and without the dot that they may be given with.

    Args:
        given: one or several.
        name: of the argument.

    Raises:
        ConfigError: one is empty, or no text.
    """
    found = []
    for extension in [given] if isinstance(given, str) else given:
        plain = extension.lower().removeprefix(".") if isinstance(extension, str) else ""
        if not plain:
            raise ConfigError(f"{name}: expected extensions such as 'jpg', found {extension!r}")
        found.append(plain)
    return tuple(found)


def as_decoders(decoders: Decoders | None) -> Decoders | None:
    """Decoders by the extensions that members have, see `as_extensions`.

    Raises:
        ConfigError: an extension is empty or given twice, or its decoder is not a function.
    """
    found: dict[str, Callable[[bytes], Any]] = {}
    for given, decoder in (decoders or {}).items():
        (extension,) = as_extensions([given], "decoders")
        if extension in found:
            raise ConfigError(f"decoders: two are for {extension!r}, as {given!r} is the same; keep one")
        if not callable(decoder):
            raise ConfigError(f"decoders[{given!r}]: expected a function of bytes, found {decoder!r}")
        found[extension] = decoder
    return found or None


def has_images(extensions: Collection[str], image_extensions: Sequence[str] = IMAGE_EXTENSIONS) -> bool:
    """Whether members with these extensions, as of a pool's index, are a pool of images."""
    return _first(extensions, image_extensions) is not None


def check_has_image(
    sample: Mapping[str, Any],
    *,
    decoders: Decoders | None = None,
    image_extensions: Sequence[str] = IMAGE_EXTENSIONS,
) -> None:
    """Check a sample of a pool of images, in which an array or a text only goes with an image.

    Args:
        sample, decoders, image_extensions: as for `decode_sample`.

    Raises:
        SampleError: it has no image, nor an array or text with a custom decoder, which may make one.
    """
    _check_image(sample, _parts(sample, decoders or {}, image_extensions))


def place_of(sample: Mapping[str, Any]) -> str:
    """The name of a sample in messages: its shard and key."""
    return f"{sample.get('__url__', 'sample')}: sample {sample.get('__key__', '?')!r}"


def undecodable(sample: Mapping[str, Any], member: str, error: Exception) -> SampleError:
    """The error for a member that cannot be decoded; names shard, key, member and reason."""
    reason = str(error) if isinstance(error, SampleError) else f"{type(error).__name__}: {error}"
    return SampleError(f"{place_of(sample)}, member {member!r}: {reason}")


class _Part(NamedTuple):
    """The member that a field is decoded from, and the user's decoder for it."""

    member: str
    own: Callable[[bytes], Any] | None


def _parts(
    sample: Mapping[str, Any], decoders: Decoders, image_extensions: Sequence[str]
) -> dict[str, _Part]:
    """What there is to decode in a sample, by field."""
    members = [name for name in sample if not name.startswith("__")]
    parts: dict[str, _Part] = {}

    def add(field: str, member: str) -> None:
        parts[field] = _Part(member, decoders.get(member) or decoders.get(member.rpartition(".")[2]))

    image = _first(members, image_extensions)
    array = _first(members, ("npy",))
    text = _first(members, TEXT_EXTENSIONS)
    if image is not None:
        add("image", image)
    if array is not None:
        add("array", array)
    if text is not None:
        add("caption" if parts else "text", text)
    if "cls" in members:
        add("label", "cls")
    if "json" in members:
        add("metadata", "json")
    known = {image, array, text, "cls", "json"}
    for name in members:
        if name not in known and (name in decoders or name.rpartition(".")[2] in decoders):
            add(name, name)
    return parts


def _content(parts: Mapping[str, _Part]) -> str | None:
    """The field that is embedded."""
    return next((name for name in ("image", "text", "array") if name in parts), None)


def _check_image(sample: Mapping[str, Any], parts: Mapping[str, _Part]) -> None:
    field = _content(parts)
    if field is None or (field != "image" and parts[field].own is None):
        raise _lacking(sample, "image member")


def _decode(sample: Mapping[str, Any], part: _Part, default: Callable[[bytes], Any]) -> Any:
    try:
        with warnings.catch_warnings(record=True) as caught:
            value = (part.own or default)(sample[part.member])
    except Exception as error:  # custom decoders may raise anything; the error must name the sample
        if is_samples(error):
            raise undecodable(sample, part.member, error) from error
        if isinstance(error, SampleError):  # because of another error, which it must not hide
            raise CuratedDataError(
                f"{place_of(sample)}, member {part.member!r}: {error}, because of another error "
                f"({first_line(error.__cause__ or error.__context__ or error, with_type=True)})"
            ) from error
        error.add_note(f"while {place_of(sample)}, member {part.member!r}, was decoded")
        raise
    if caught:
        _pass_on(caught, sample, part.member)
    return value


def _pass_on(caught: Sequence[warnings.WarningMessage], sample: Mapping[str, Any], member: str) -> None:
    """Log warnings of a decoder, as Pillow's about palettes, with the sample's name; each of them once."""
    for warning in caught:
        text = f"{warning.category.__name__}: {' '.join(str(warning.message).split())}"
        kind = re.sub(r"\d+", "0", text)
        if kind not in _WARNED:
            _WARNED.add(kind)
            log.warning(
                "%s, member %r: %s (further warnings of this kind are not shown)",
                place_of(sample),
                member,
                text,
            )


def _lacking(sample: Mapping[str, Any], what: str) -> SampleError:
    members = sample.get("__members__") or [name for name in sample if not name.startswith("__")]
    return SampleError(f"{place_of(sample)}: no {what}; it has: {', '.join(members) or 'nothing'}")


def _first(members: Collection[str], extensions: Sequence[str]) -> str | None:
    """The member with the most preferred extension; `left.png` counts as `png` if there is no plain one."""
    for name in extensions:
        if name in members:
            return name
    for member in members:
        if "." in member and member.rpartition(".")[2] in extensions:
            return member
    return None


def _label(data: bytes) -> int:
    try:
        label = int(data.decode("ascii"))
    except ValueError:
        raise SampleError(f"is not an integer: {data[:40]!r}") from None
    if not -(1 << 63) <= label < 1 << 63:
        raise SampleError(f"does not fit into a 64-bit integer: {data[:40]!r}")
    return label


@lru_cache(maxsize=64)
def _array_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and type; kept, because numpy compiles a header as Python.

    Versions 2 and 3 only differ in how they encode names of fields.
    """
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def _label_or_name(data: bytes) -> int | str:
    """A class, by its number or its name."""
    name = data.decode("utf-8").strip()
    if not name:
        raise SampleError("is empty")
    try:
        int(data.decode("ascii"))
    except ValueError:
        return name
    return _label(data)


def _text(data: bytes) -> str:
    return data.decode("utf-8")


def _text_of(metadata: Any) -> str | None:
    for field in ("text", "caption"):
        if isinstance(metadata, dict) and isinstance(metadata.get(field), str):
            return metadata[field]
    return None


_DEFAULTS: dict[str, Callable[[bytes], Any]] = {
    "array": decode_array,
    "text": _text,
    "caption": _text,
    "label": _label,
    "metadata": json.loads,
}
