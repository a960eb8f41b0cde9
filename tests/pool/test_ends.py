"""Where archives end: zeroed pages, archives joined by `cat`, no marker, long padding."""

import io
import logging
import pickle
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curated_data.errors import CacheError, PoolError
from curated_data.pool import ShardPool, index_shard

PAGE = 4096


def archive(n: int, format: int = tarfile.USTAR_FORMAT, *, long: bool = False, largest: int = 3000) -> bytes:
    """A shard of n samples of two members, of random sizes."""
    rng = np.random.default_rng(n)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as writer:
        for number in range(n):
            for extension in ("jpg", "cls"):
                info = tarfile.TarInfo(f"{'d' * 150 + '/' if long else ''}{number:05d}.{extension}")
                info.size = int(rng.integers(1, largest)) if extension == "jpg" else 1
                writer.addfile(info, io.BytesIO(bytes([1 + number % 250]) * info.size))
    return buffer.getvalue()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 60), st.integers(0, 70), st.integers(1, 40), st.sampled_from(["ustar", "gnu", "pax"]))
def test_zeroed_pages_anywhere_never_lose_a_sample_unnoticed(tmp_path, n, page, n_pages, kind):
    """Pages of zeros raise, are noted, or lie in data alone, which has no checksum to tell."""
    format = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}[kind]
    data = bytearray(archive(n, format, long=kind != "ustar"))
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    whole = index_shard(path)
    assert not whole.notes
    start = page % (1 + len(data) // PAGE) * PAGE
    stop = min(len(data), start + n_pages * PAGE)
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)
    try:
        found = index_shard(path)
    except PoolError:
        return
    if found.notes.keys() & {"cut", "zeros"}:
        assert whole.keys()[: len(found)] == found.keys()
        return
    if not any(data[start:]) and len(found.member_size) < len(whole.member_size):
        return  # no more zeros up to the very end than tar pads with: an end like any other
    assert found.keys() == whole.keys()
    assert np.array_equal(found.member_offset, whole.member_offset)
    assert np.array_equal(found.member_size, whole.member_size)


def test_a_shard_cut_by_a_zeroed_page_is_named_and_counted_at_every_opening(tmp_path, caplog):
    data = bytearray(archive(200))
    index_before = 16 * 2  # members of 16 samples
    path = tmp_path / "zeroed.tar"
    path.write_bytes(data)
    whole = index_shard(path)
    start = int(whole.member_offset[index_before]) - 512
    data[start : start + PAGE] = bytes(PAGE)
    path.write_bytes(data)
    for _ in range(3):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            pool = ShardPool(path, cache_dir=tmp_path / "cache")
            assert len(pool) == 16
        (message,) = [record.getMessage() for record in caplog.records]
        assert "zeroed.tar" in message
        assert f"offset {start}" in message
        count = pool.index().notes["cut"].number
        assert f"{count} members" in message
        assert 360 <= count <= 368  # of the 368, all whose headers are left
    caplog.clear()
    assert len(pickle.loads(pickle.dumps(pool)).index()) == 16  # as in a worker
    assert not caplog.records
    with pytest.raises(PoolError, match=rf"zeroed\.tar: .*{start}"):
        len(ShardPool(path, cache_dir=tmp_path / "cache", strict=True))
    with pytest.raises(PoolError, match=rf"zeroed\.tar: .*{start}"):
        len(ShardPool(path, strict=True))


@pytest.mark.parametrize("kind", ["marker", "cat", "long"])
@pytest.mark.parametrize("cached", [True, False])
def test_other_ends_are_said_at_every_opening_and_refused_if_strict(tmp_path, caplog, kind, cached):
    whole = archive(5)
    end = whole.rstrip(b"\0")
    end += bytes(-len(end) % 512)
    data = {"marker": end, "cat": whole + archive(7), "long": whole + bytes(40_000)}[kind]
    path = tmp_path / "odd.tar"
    path.write_bytes(data)
    cache = tmp_path / "cache" if cached else None
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(ShardPool(path, cache_dir=cache)) == 5
        assert ["odd.tar" in record.getMessage() for record in caplog.records] == [True]
    with pytest.raises(PoolError, match=r"odd\.tar"):
        len(ShardPool(path, cache_dir=cache, strict=True))
    if kind == "cat":
        assert ShardPool(path).index().notes["cut"].number == 14


def test_usual_ends_are_not_mentioned(tmp_path):
    whole = archive(5)
    end = whole.rstrip(b"\0")
    end += bytes(-len(end) % 512)
    path = tmp_path / "a.tar"
    for zeros in (512, 1024, 5 * 512, 10_240 + 512):
        path.write_bytes(end + bytes(zeros))
        assert index_shard(path).notes == {}


def damage_of(name: str, array: np.ndarray) -> np.ndarray:
    """An array of the same type and shape that cannot be right."""
    array = array.copy()
    if name.endswith("_start"):
        array[len(array) // 2] = array[-1] + 5
    elif name == "member_extension":
        array[1] = 99
    else:
        array[1] = -3
    return array


@pytest.mark.parametrize(
    "name", ["key_start", "member_start", "member_extension", "member_offset", "member_size", "shard_start"]
)
def test_damaged_arrays_of_an_index_are_noticed_when_it_is_opened(tmp_path, name):
    """The sizes of the files stay, so only their content tells."""
    for number, n in enumerate((4, 5, 6)):
        (tmp_path / f"{number}.tar").write_bytes(archive(n))
    cache = tmp_path / "cache"
    assert len(ShardPool(str(tmp_path / "*.tar"), cache_dir=cache)) == 15
    (path,) = cache.glob(f"pool/*/{name}.npy")
    np.save(path, damage_of(name, np.load(path)))
    with pytest.raises(CacheError, match=rf"{path.parent.name}.*{name}"):
        len(ShardPool(str(tmp_path / "*.tar"), cache_dir=cache))
