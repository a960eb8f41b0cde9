"""Decoding against Pillow, and what cannot be decoded."""

import contextlib
import io
import json
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from curated_data.errors import ConfigError, SampleError
from curated_data.pool import decode_image, decode_sample
from curated_data.pool.decode import decode_array


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> torch.Tensor:
    """Pillow's pixels, transparent ones on mid-grey."""
    image = Image.open(io.BytesIO(data))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (128, 128, 128, 255)), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def picture(mode: str, size=(37, 23)) -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 4), np.uint8), "RGBA").resize(
        size, Image.Resampling.BICUBIC
    )
    return coarse.convert("RGB").quantize(16) if mode == "P" else coarse.convert(mode)


@pytest.mark.parametrize(
    ("mode", "format", "options"),
    [
        *((mode, "JPEG", {}) for mode in ("RGB", "L", "CMYK")),
        ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
        *((mode, "PNG", {}) for mode in ("RGB", "L", "LA", "RGBA", "P", "1")),
        ("P", "PNG", {"transparency": 3}),
        ("RGB", "WEBP", {"lossless": True}),
        ("RGBA", "WEBP", {"lossless": True, "exact": True}),
        *((mode, "TIFF", {}) for mode in ("RGB", "L", "CMYK", "RGBA")),
        *((mode, "BMP", {}) for mode in ("RGB", "P", "L")),
        ("RGB", "PPM", {}),
        ("P", "GIF", {}),
    ],
)
def test_pixels_are_pillows(mode, format, options):
    data = encoded(picture(mode), format, **options)
    image = decode_image(data)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 23, 37)
    assert torch.equal(image, by_pillow(data))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_upper_byte(format):
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    image = decode_image(encoded(Image.fromarray(values), format))
    assert torch.equal(image, torch.from_numpy((values >> 8).astype(np.uint8)).expand(3, 64, 64))


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for format in ("GIF", "WEBP"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        red, green, blue = decode_image(data).float().mean((1, 2)).tolist()
        assert (red > 250, green < 5, blue < 5) == (True, True, True)


@pytest.mark.parametrize(
    ("min_size", "shape"), [(None, (360, 480)), (200, (360, 480)), (180, (180, 240)), (50, (90, 120))]
)
def test_reduced_scale(photo, min_size, shape):
    data = photo(size=(480, 360))
    image = decode_image(data, min_size=min_size)
    assert image.shape == (3, *shape)
    full = by_pillow(data).float()
    expected = torch.nn.functional.interpolate(full[None], shape, mode="area")[0]
    assert (image.float() - expected).abs().mean() < 2


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 7), st.data())
def test_damaged_bytes_raise_or_decode_but_never_crash(seed, data):
    """A cut raises unless every pixel is there; flipped bytes raise or give an image."""
    format = ["JPEG", "PNG", "WEBP"][seed % 3]
    whole = encoded(picture("RGB", (40 + seed, 30)), format)
    cut = data.draw(st.integers(0, len(whole) - 13))
    with contextlib.suppress(SampleError):
        assert torch.equal(decode_image(whole[:cut]), decode_image(whole))
    flipped = bytearray(whole)
    flipped[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        image = decode_image(bytes(flipped))
    except SampleError:
        return
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3


def test_what_is_no_image():
    for data in (b"", b"hello", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"<svg></svg>", bytes(100)):
        with pytest.raises(SampleError):
            decode_image(data)
    with pytest.raises(SampleError, match="floating-point"):
        decode_image(encoded(Image.new("F", (4, 4)), "TIFF"))
    with pytest.raises(SampleError, match="1048576"):
        decode_image(encoded(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF"))


def test_pixel_bombs_are_refused():
    png = bytearray(encoded(Image.new("1", (8, 8)), "PNG"))
    png[16:24] = (50_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    jpeg = bytearray(encoded(Image.new("L", (8, 8)), "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = (50_000).to_bytes(2, "big") * 2
    for data in (png, jpeg):
        with pytest.raises(SampleError, match=r"2500000000|50000 x 50000"):
            decode_image(bytes(data))


def npy(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


class TestSample:
    place = {"__key__": "dir/a", "__url__": "pool-7.tar"}  # noqa: RUF012

    def test_image_with_everything(self, photo):
        fields = {"cls": b"12\n", "txt": "grün".encode(), "json": b'{"w": 1}', "xyz": b"?"}
        sample = decode_sample({**self.place, "jpg": photo(), **fields})
        assert torch.equal(sample.pop("image"), by_pillow(photo()))
        assert sample == {"label": 12, "caption": "grün", "metadata": {"w": 1}}
        assert type(decode_sample({**self.place, "png": photo(format="PNG"), "cls": b"1"})["label"]) is int

    def test_which_image(self, photo):
        both = {"seg.png": photo(1, format="PNG"), "png": photo(2, format="PNG"), "jpg": photo(3)}
        assert torch.equal(decode_sample({**self.place, **both})["image"], by_pillow(photo(3)))
        image = decode_sample({**self.place, **both}, image_extensions=["png"])["image"]
        assert torch.equal(image, by_pillow(both["png"]))
        image = decode_sample({**self.place, "0001.seg.png": both["seg.png"], "txt": b""})["image"]
        assert torch.equal(image, by_pillow(both["seg.png"]))

    def test_text(self):
        assert decode_sample({**self.place, "txt": b"words"}) == {"text": "words"}
        found = decode_sample({**self.place, "json": b'{"text": "words", "n": 1}', "cls": b"3"})
        assert found == {"text": "words", "metadata": {"text": "words", "n": 1}, "label": 3}
        assert decode_sample({**self.place, "json": b'{"caption": "c"}'})["text"] == "c"

    def test_arrays(self):
        bands = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
        sample = decode_sample({**self.place, "npy": npy(bands), "txt": b"a field"})
        assert np.array_equal(sample.pop("array"), bands)
        assert sample == {"caption": "a field"}
        with pytest.raises(SampleError, match=r"pool-7\.tar: sample 'dir/a', member 'npy': "):
            decode_sample({**self.place, "npy": npy(np.array([{}], object), allow_pickle=True)})
        with pytest.raises(SampleError, match=r"\(2, 3, 4\) uint16"):
            decode_array(npy(bands)[:-1])

    @settings(max_examples=100, deadline=None)
    @given(
        arrays(st.sampled_from(["f4", ">f8", "?", "U2", "S3", "M8[s]", "i2,f8"]), array_shapes(min_side=0)),
        st.booleans(), st.sampled_from([(1, 0), (2, 0), (3, 0)]),
    )  # fmt: skip
    def test_arrays_are_those_that_numpy_reads(self, array, fortran_order, version):
        stream = io.BytesIO()
        array = np.asfortranarray(array) if fortran_order else array
        np.lib.format.write_array(stream, array, version)
        data, expected = stream.getvalue(), np.load(io.BytesIO(stream.getvalue()))
        for _ in range(2):  # the header is parsed once
            found = decode_array(data)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert found.tobytes("A") == expected.tobytes("A")
            assert found.flags.writeable

    def test_own_decoders_win(self):
        decoders = {"npy": lambda data: "bands", "flac": len, "txt": str.upper}
        decoders["txt"] = lambda data: data.decode().upper()
        sample = decode_sample({**self.place, "b.npy": b"x", "flac": b"123", "txt": b"t"}, decoders=decoders)
        assert sample == {"array": "bands", "flac": 3, "caption": "T"}
        assert decode_sample({**self.place, "flac": b"123"}, decoders=decoders) == {"flac": 3}
        with pytest.raises(SampleError, match=r"sample 'dir/a', member 'tif': KeyError: 'band'"):
            decode_sample({**self.place, "tif": b""}, decoders={"tif": lambda data: {}["band"]})

    def test_extensions_in_any_spelling(self, photo):
        for spelling in ("png", ".png", "PNG", ".Png"):
            sample = {**self.place, "left.png": b"own", "jpg": photo()}
            found = decode_sample(sample, decoders={spelling: len}, image_extensions=[spelling])
            assert found == {"image": 3}
        for wrong, message in (
            ({"": len}, "^decoders: .*''"),
            ({".": len}, r"^decoders: .*'\.'"),
            ({3: len}, "^decoders: .*3"),
            ({"jpg": len, ".JPG": len}, r"^decoders: .*'jpg'.*'\.JPG'"),
            ({"jpg": 3}, r"^decoders\['jpg'\]: .*3"),
        ):
            with pytest.raises(ConfigError, match=message):
                decode_sample(sample, decoders=wrong)
        with pytest.raises(ConfigError, match=r"^image_extensions: .*''"):
            decode_sample(sample, image_extensions=[""])

    @pytest.mark.parametrize(
        ("members", "message"),
        [
            ({}, r"pool-7\.tar: sample 'dir/a': .*nothing"),
            ({"cls": b"1", "mp4": b""}, "'dir/a': .*cls, mp4"),
            ({"__members__": ["mp4", "srt"]}, "'dir/a': .*mp4, srt"),
            ({"json": b'{"a": 1}'}, "'dir/a': .*json"),
            ({"jpg": b"no"}, r"pool-7\.tar: sample 'dir/a', member 'jpg': .*b'no'"),
            ({"jpg": b""}, "sample 'dir/a', member 'jpg': .*empty"),
            ({"txt": b"t", "cls": b"cat"}, "member 'cls': .*b'cat'"),
            ({"txt": b"t", "cls": b"9" * 20}, "member 'cls': .*b'9999"),
            ({"txt": b"t", "json": b"{"}, r"member 'json': JSONDecodeError"),
            ({"txt": b"\xff"}, r"member 'txt': UnicodeDecodeError"),
        ],
    )
    def test_errors_name_shard_key_and_member(self, members, message):
        with pytest.raises(SampleError, match=message):
            decode_sample({**self.place, **members})

    def test_reads_samples_of_a_pool(self, write_tar, photo):
        from curated_data.pool import ShardPool

        path = write_tar(
            "p.tar", [("a.jpg", photo()), ("a.json", json.dumps({"k": 1}).encode()), ("b.mp4", b"")]
        )
        pool = ShardPool(path)
        assert decode_sample(pool.read([0])[0])["metadata"] == {"k": 1}
        with pytest.raises(SampleError, match=r"p\.tar: sample 'b': .*mp4"):
            decode_sample(pool.read([1], pool.image_extensions)[0])
