"""Transparency, EXIF orientation and the limit on pixels, against Pillow and plain arithmetic."""

import io
import logging
import struct
import warnings
import zlib

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from curated_data.errors import ConfigError, SampleError
from curated_data.pool import ShardPool, decode_image, decode_sample
from curated_data.pool.image import COUNTS, ImageSettings, oriented
from curated_data.pool.orientation import jpeg_orientation


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(header: tuple[int, ...], rows: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of raw rows, written here by the standard: (width, height, depth, colour type)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [
            chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0)),
            *(chunk(*one) for one in chunks),
            chunk(b"IDAT", zlib.compress(raw)),
            chunk(b"IEND", b""),
        ]
    )


def on(background: int, colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """(H, W, 3) colours over a grey, by the definition."""
    share = alpha[..., None] / 255
    return colour * share + background * (1 - share)


class TestTransparency:
    @pytest.mark.parametrize("background", [128, 255, 0])
    @pytest.mark.parametrize(
        ("mode", "format", "options"),
        [
            ("RGBA", "PNG", {}),
            ("LA", "PNG", {}),
            ("RGBA", "WEBP", {"lossless": True, "exact": True}),
            ("RGBA", "TIFF", {}),
            ("RGBA", "JPEG2000", {"irreversible": False}),
            ("LA", "TIFF", {}),
        ],
    )
    def test_alpha_is_put_on_the_background(self, mode, format, options, background):
        rng = np.random.default_rng(0)
        pixels = Image.fromarray(rng.integers(0, 256, (9, 7, 4), np.uint8), "RGBA").convert(mode)
        values = np.asarray(pixels.convert("RGBA")).astype(float)
        found = decode_image(encoded(pixels, format, **options), settings=ImageSettings((background,) * 3))
        expected = on(background, values[..., :3], values[..., 3])
        assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() <= 1

    def test_palettes_with_an_alpha_for_each_colour(self):
        rng = np.random.default_rng(0)
        palette, alphas = rng.integers(0, 256, (16, 3), np.uint8), rng.integers(0, 256, 16, np.uint8)
        numbers = rng.integers(0, 16, (9, 7), np.uint8)
        data = png((7, 9, 8, 3), numbers, (b"PLTE", palette.tobytes()), (b"tRNS", alphas.tobytes()))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # as Pillow's about palettes
            found = decode_image(data)
        expected = on(128, palette[numbers].astype(float), alphas[numbers])
        assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() <= 1

    @pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
    def test_grey_with_a_transparent_value(self, depth):
        rng = np.random.default_rng(depth)
        values = rng.integers(0, min(2**depth, 5), (6, 8)) * (1 if depth < 16 else 300)
        key = int(values[2, 3])
        if depth == 16:
            rows = values.astype(">u2")
        else:
            bits = ((values[..., None] >> np.arange(depth - 1, -1, -1)) & 1).astype(np.uint8)
            rows = np.packbits(bits.reshape(6, -1), axis=1)
        found = decode_image(png((8, 6, depth, 0), rows, (b"tRNS", struct.pack(">H", key))))
        grey = values >> 8 if depth == 16 else values * 255 // (2**depth - 1)
        expected = np.where(values == key, 128, grey)
        assert np.array_equal(found[0].numpy(), expected)
        assert (found == found[:1]).all()

    @pytest.mark.parametrize("depth", [8, 16])
    def test_colours_with_a_transparent_one(self, depth):
        values = np.random.default_rng(0).integers(0, 2, (6, 8, 3)) * (200 if depth == 8 else 51_400)
        key = values[1, 1]
        rows = values.astype(np.uint8 if depth == 8 else ">u2")
        found = decode_image(png((8, 6, depth, 2), rows, (b"tRNS", struct.pack(">3H", *key))))
        is_clear = (values == key).all(-1)
        expected = np.where(is_clear[..., None], 128, values if depth == 8 else values >> 8)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)

    def test_gif(self):
        image = Image.new("P", (4, 4), 0)
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.putpixel((1, 2), 1)
        found = decode_image(encoded(image, "GIF", transparency=0))
        assert found[:, 2, 1].tolist() == [255, 0, 0]
        assert found[:, 0, 0].tolist() == [128, 128, 128]

    def test_drawings_on_a_clear_ground_differ(self):
        """Black lines, on nothing: without a background all of them are black squares."""
        found = []
        for column in range(4):
            pixels = np.zeros((8, 8, 4), np.uint8)
            pixels[:, column, 3] = 255
            found.append(decode_image(encoded(Image.fromarray(pixels, "RGBA"), "PNG")))
        assert all(not torch.equal(found[0], other) for other in found[1:])

    def test_only_what_is_transparent_counts(self):
        before = COUNTS.transparent
        decode_image(encoded(Image.new("RGBA", (4, 4), (1, 2, 3, 255)), "PNG"))
        decode_image(encoded(Image.new("RGB", (4, 4)), "PNG"))
        assert COUNTS.transparent == before
        decode_image(encoded(Image.new("RGBA", (4, 4), (1, 2, 3, 254)), "PNG"))
        assert COUNTS.transparent == before + 1

    def test_settings_are_checked(self, small_pool):
        assert ShardPool(small_pool).images == ImageSettings((128, 128, 128), True)
        assert ShardPool(small_pool, background=[1, 2, 3]).images.background == (1, 2, 3)
        for wrong in (256, -1, (1, 2), "red", 0.5, (0, 0, 300)):
            with pytest.raises(ConfigError, match="background"):
                ShardPool(small_pool, background=wrong)


def photo(orientation: object, format: str = "JPEG", size=(21, 13), **more) -> bytes:
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    exif[0x0112] = orientation
    return encoded(image, format, exif=exif, **more)


def upright(data: bytes) -> torch.Tensor:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


class TestOrientation:
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_is_pillows(self, orientation, format):
        data = photo(orientation, format)
        found = decode_image(data)
        assert torch.equal(found, upright(data))
        assert found.permute(1, 2, 0).is_contiguous()
        if format != "TIFF":  # which Pillow always turns
            plain = decode_image(data, settings=ImageSettings(exif_orientation=False))
            assert plain.shape == (3, 13, 21)
            assert torch.equal(oriented(plain, orientation), found)

    @pytest.mark.parametrize("orientation", [1, 6])
    def test_at_a_reduced_size(self, orientation):
        data = photo(orientation, size=(480, 360))
        shape = (90, 120) if orientation == 1 else (120, 90)
        assert decode_image(data, min_size=50).shape == (3, *shape)

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def test_of_any_damaged_data(self, data):
        """Pillow's, or what was written where damage beside it hides it from Pillow. Pixels stay."""
        written = data.draw(st.sampled_from([0, 1, 3, 6, 8, 9, 300]))
        whole = bytearray(photo(written))
        at = whole.index(b"Exif\0\0")
        for _ in range(data.draw(st.integers(0, 4))):
            whole[at + data.draw(st.integers(6, 51))] = data.draw(st.integers(0, 255))
        try:
            with warnings.catch_warnings(record=True):
                expected = Image.open(io.BytesIO(whole)).getexif().get(0x0112)
        except Exception:
            expected = 1
        with warnings.catch_warnings(record=True):
            found = jpeg_orientation(bytes(whole))
            decode_image(bytes(whole))
        assert found in range(1, 9)
        assert found == (expected if expected in range(1, 9) else 1) or found == written

    def test_of_xmp_alone(self):
        xmp = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf tiff:Orientation=\"6\"/></x:xmpmeta>"
        image = Image.new("RGB", (8, 4))
        data = encoded(image, "JPEG")
        block = b"http://ns.adobe.com/xap/1.0/\0" + xmp
        data = data[:2] + struct.pack(">2sH", b"\xff\xe1", 2 + len(block)) + block + data[2:]
        assert decode_image(data).shape == upright(data).shape
        if int(PIL.__version__.split(".")[0]) >= 11:  # earlier ones do not look there
            assert decode_image(data).shape == (3, 8, 4)


class TestLimit:
    def test_is_pillows_own(self, monkeypatch):
        for format in ("JPEG", "PNG"):
            data = encoded(Image.new("RGB", (100, 100)), format)
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000)
            with pytest.raises(SampleError, match=r"100 x 100|10000"):
                decode_image(data)
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6_000)
            with pytest.warns(Image.DecompressionBombWarning):
                decode_image(data)
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with pytest.raises(SampleError):
                    decode_sample({"__key__": "k", "img": data})
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
            assert decode_image(data).shape == (3, 100, 100)


def test_warnings_of_decoders_name_the_sample_once(caplog):
    def decoder(data: bytes) -> int:
        warnings.warn(f"odd value {len(data)}", stacklevel=1)
        return 1

    with caplog.at_level(logging.WARNING), warnings.catch_warnings(record=True) as shown:
        for number in range(3):
            decode_sample(
                {"__key__": f"k{number}", "__url__": "a.tar", "jpg": bytes(number)}, decoders={"jpg": decoder}
            )
    assert not shown
    (message,) = [record.getMessage() for record in caplog.records]
    assert "'k0'" in message
    assert "odd value 0" in message
