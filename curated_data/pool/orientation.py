"""The EXIF orientation of images, as Pillow finds it."""

import io
import struct

from PIL import Image

from curated_data.pool.passing import is_samples

_TAG = 0x0112
_START_OF_SCAN = 0xDA
_MOST_ENTRIES = 512

# Whether to transpose, and then flip the rows and the columns, by orientation.
_TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


def turns(orientation: int) -> tuple[bool, bool, bool]:
    """Whether to transpose an image, and then to flip its rows and its columns, to show it upright."""
    return _TURNS.get(orientation, _TURNS[1])


def orientation_of(image: Image.Image) -> int:
    """The orientation of an image, 1 to 8; 1 if it has none, or none that makes sense."""
    try:
        value = image.getexif().get(_TAG)
    except Exception as error:  # damaged EXIF data beside good pixels
        if not is_samples(error):
            raise
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def jpeg_orientation(data: bytes) -> int:
    """The orientation of a JPEG, 1 to 8, from the segments before its pixels."""
    segments = _application_segments(data)
    exif = [segment for segment in segments if segment[:6] == b"Exif\0\0"]
    if not exif and not any(b"tiff:Orientation" in segment for segment in segments):
        return 1
    if len(exif) == 1:
        found = _plain_orientation(exif[0][6:])
        if found is not None:
            return found
    try:  # rare: several segments, XMP alone, or a table that is not as usual
        return orientation_of(Image.open(io.BytesIO(data)))
    except Exception as error:
        if not is_samples(error):
            raise
        return 1


def _application_segments(data: bytes) -> list[bytes]:
    """The contents of a JPEG's APP1 segments."""
    found = []
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill
            at += 1
            continue
        if marker == _START_OF_SCAN:
            break
        length = data[at + 2] << 8 | data[at + 3]
        if marker == 0xE1:
            found.append(data[at + 4 : at + 2 + length])
        at += 2 + length
    return found


def _plain_orientation(exif: bytes) -> int | None:
    """The orientation in a TIFF structure of the usual kind; None if it is another or has none."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    try:
        if order is None:
            return None
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(min(count, _MOST_ENTRIES)):
            tag, kind, n, value = struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * entry)
            if tag == _TAG:
                return value if kind == 3 and n == 1 and value in _TURNS else None
    except struct.error:
        return None
    return None
