"""Archives to test on, and webdataset's own reading of them as the oracle."""

import contextlib
import io
import tarfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander


@pytest.fixture
def write_tar(tmp_path: Path) -> Callable[..., Path]:
    """Write an archive: members are (name, bytes) or ready `TarInfo`s with bytes."""

    def write(
        name: str, members: Iterable[tuple[str | tarfile.TarInfo, bytes]], format: int = tarfile.USTAR_FORMAT
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=format, encoding="utf-8", errors="surrogateescape") as archive:
            for member, content in members:
                info = tarfile.TarInfo(member) if isinstance(member, str) else member
                info.size = len(content) if info.isreg() else 0
                archive.addfile(info, io.BytesIO(content))
        return path

    return write


@pytest.fixture
def read_by_webdataset() -> Callable[[Path], list[dict]]:
    """The samples as webdataset's own iterators group them."""

    def read(path: Path) -> list[dict]:
        with open(path, "rb") as stream:
            return list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))

    return read


@pytest.fixture
def photo() -> Callable[..., bytes]:
    """An encoded image of smooth noise."""

    def encode(
        seed: int = 0, size: tuple[int, int] = (32, 24), format: str = "JPEG", mode: str = "RGB"
    ) -> bytes:
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer, format)
        return buffer.getvalue()

    return encode


@pytest.fixture
def small_pool(write_tar: Callable[..., Path]) -> list[Path]:
    """Three shards of 5, 0 and 4 samples with members txt and cls; the last sample has no cls."""

    def members(first: int, count: int) -> list[tuple[str, bytes]]:
        found = []
        for i in range(first, first + count):
            found.append((f"key{i:03d}.txt", f"text {i} ".encode() * (i + 1)))
            if i != 8:
                found.append((f"key{i:03d}.cls", str(i % 3).encode()))
        return found

    return [
        write_tar(f"pool-{number:06d}.tar", members(first, count))
        for number, (first, count) in enumerate([(0, 5), (5, 0), (5, 4)])
    ]


@pytest.fixture
def bucket() -> Iterator[str]:
    """A folder of fsspec's memory file system, which this process alone sees."""
    name = f"memory://test-{uuid.uuid4().hex}"
    yield name
    with contextlib.suppress(FileNotFoundError):
        fsspec.filesystem("memory").rm(name.removeprefix("memory:/"), recursive=True)
