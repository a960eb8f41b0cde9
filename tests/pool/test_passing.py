"""Which errors are a sample's, and which stop the work."""

import contextlib
import errno
import gzip
import io
import json
import lzma
import re
import struct
import tarfile
import zipfile
import zlib
from concurrent.futures import BrokenExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from curated_data.errors import CuratedDataError, EmbedderError, PoolError, SampleError
from curated_data.pool import decode_image, decode_sample
from curated_data.pool.decode import decode_array, decode_content
from curated_data.pool.passing import is_samples

WORKER = "DataLoader worker (pid 12345) is killed by signal: Killed."


def of_a_package(*bases: type) -> type:
    """An exception class as packages with compiled decoders have them."""
    return type("error", bases or (Exception,), {"__module__": "cv2"})


OF_BYTES = [
    SampleError("bad"),
    ValueError("bad"),
    KeyError("field"),
    IndexError("index out of range"),
    TypeError("an integer is required"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    json.JSONDecodeError("Expecting value", "x", 0),
    RecursionError("maximum recursion depth exceeded"),
    ZeroDivisionError("division by zero"),
    SyntaxError("broken PNG file"),
    EOFError("no more data"),
    struct.error("unpack requires a buffer of 4 bytes"),
    zlib.error("Error -3 while decompressing data"),
    lzma.LZMAError("Corrupt input data"),
    gzip.BadGzipFile("CRC check failed"),
    zipfile.BadZipFile("File is not a zip file"),
    tarfile.ReadError("invalid header"),
    OSError("image file is truncated (3 bytes not processed)"),
    UnidentifiedImageError("cannot identify image file"),
    Image.DecompressionBombError("too many pixels"),
    RuntimeError("Error decoding JPEG: Not a JPEG file"),
    NotImplementedError("Unsupported BMP compression"),
    of_a_package()("bad data"),
    of_a_package(RuntimeError)("bad data"),
    of_a_package(ValueError)("bad data"),
]
OF_THE_MACHINE = [
    MemoryError(),
    KeyboardInterrupt(),
    SystemExit(1),
    GeneratorExit(),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.EMFILE, "Too many open files"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError("out of memory when reading image file"),
    PermissionError(errno.EACCES, "Permission denied"),
    FileNotFoundError("gone"),
    TimeoutError("timed out"),
    ConnectionResetError("peer"),
    BrokenPipeError(),
    RuntimeError(WORKER),
    RuntimeError("DataLoader worker (pid(s) 1, 2) exited unexpectedly"),
    RuntimeError("can't start new thread"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("unable to open shared memory object </torch_1> in read-write mode"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    BrokenExecutor("a child process died"),
    ImportError("cannot import name"),
    NameError("name 'x' is not defined"),
    SystemError("error return without exception set"),
    PoolError("changed"),
    EmbedderError("wrong"),
    CuratedDataError("other"),
    of_a_package(OSError)("cannot open"),
    of_a_package(MemoryError)("no memory"),
]


@pytest.mark.parametrize("error", OF_BYTES, ids=repr)
def test_errors_of_bytes_are_the_samples(error):
    assert is_samples(error)


@pytest.mark.parametrize("error", OF_THE_MACHINE, ids=repr)
def test_errors_of_the_machine_are_not(error):
    assert not is_samples(error)


@pytest.mark.parametrize("error", OF_THE_MACHINE, ids=repr)
def test_nor_what_is_raised_because_of_memory_the_system_or_a_worker(error):
    if not isinstance(error, MemoryError | OSError | RuntimeError) or isinstance(error, BrokenExecutor):
        return
    for wrapped in (ValueError("bad"), SampleError("bad"), OSError("truncated")):
        wrapped.__cause__ = error
        assert not is_samples(wrapped)


def test_what_was_raised_while_memory_ran_out_is_not_the_samples():
    def decoder(data: bytes) -> None:
        try:
            raise MemoryError
        except MemoryError:
            raise SampleError("cannot be decoded")  # noqa: B904

    with pytest.raises(CuratedDataError, match=r"sample 'k'.*MemoryError") as caught:
        decode_content({"__key__": "k", "jpg": b"1"}, decoders={"jpg": decoder})
    assert not isinstance(caught.value, SampleError)


@pytest.mark.parametrize(
    "error", [error for error in OF_THE_MACHINE if isinstance(error, Exception)], ids=repr
)
@pytest.mark.parametrize("decode", [decode_sample, decode_content])
def test_they_pass_through_decoding_with_the_samples_name(error, decode):
    def decoder(data: bytes) -> None:
        error.__context__ = error.__cause__ = None
        raise error

    with pytest.raises(type(error)) as caught:
        decode({"__key__": "k", "__url__": "a.tar", "jpg": b"1"}, decoders={"jpg": decoder})
    assert caught.value is error
    assert "'k'" in "".join(error.__notes__)


def encoded(image: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "I/O"), RuntimeError(WORKER)], ids=repr)
def test_the_decoders_of_images_let_them_pass(format, error, monkeypatch):
    data = encoded(Image.new("RGB", (8, 8)), format)

    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr("simplejpeg.decode_jpeg" if format == "JPEG" else "PIL.Image.Image.load", fails)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fails)
    with pytest.raises(type(error)):
        decode_image(data)


def test_a_codec_that_reads_impossible_sizes_from_the_file_is_not_out_of_memory(monkeypatch):
    def fails(self):
        raise OSError("out of memory when reading image file")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fails)
    with pytest.raises(SampleError, match="out of memory"):
        decode_content({"__key__": "k", "png": encoded(Image.new("RGB", (8, 8)), "PNG")})


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 10**12), max_size=4), st.sampled_from([np.uint8, np.float64, "U7", "i2,f8"]))
def test_arrays_that_say_they_are_huge_are_the_samples(shape, dtype):
    """Refused before numpy allocates what the header claims, which would be a `MemoryError`."""
    for version in ((1, 0), (2, 0), (3, 0)):
        stream = io.BytesIO()
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
        text = repr(header | {"shape": tuple(shape)}).encode() + b"\n"
        stream.write(np.lib.format.magic(*version))
        stream.write(struct.pack("<H" if version == (1, 0) else "<I", len(text)) + text + bytes(64))
        size = int(np.prod([int(n) for n in shape], dtype=object)) * np.dtype(dtype).itemsize
        if size == 0 and max(shape) > 1000:  # numpy itself refuses some of these
            with contextlib.suppress(SampleError):
                assert decode_array(stream.getvalue()).shape == tuple(shape)
        elif size <= 64:
            assert decode_array(stream.getvalue()).shape == tuple(shape)
        else:
            with pytest.raises(SampleError, match=re.escape(f"{tuple(shape)}")):
                decode_array(stream.getvalue())


def test_a_program_among_images_is_not_run():
    with pytest.raises(SampleError, match="EPS"):
        decode_image(encoded(Image.new("RGB", (8, 8)), "EPS"))
