"""Reading back: what was written, or one error that names the file, whatever is in its place."""

import contextlib
import errno
import os
import socket
import stat
import threading
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curated_data.cache import checksums
from curated_data.cache.artifacts import (
    MANIFEST,
    open_cache,
    read_array,
    read_json,
    read_manifest,
    with_checksum,
    write_manifest,
)
from curated_data.cache.checksums import check_file, check_once, file_checksum, load_npy, load_npz, reading
from curated_data.cache.publishing import atomic_path, atomic_write_json
from curated_data.clustering.checkpoint import Checkpoint
from curated_data.errors import CacheError

ANY_FOLDER = settings(
    max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
ARRAYS = st.sampled_from(
    [
        np.arange(5),
        np.zeros((0, 3), np.float32),
        np.arange(12, dtype=np.float16).reshape(3, 4),
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.array([b"abc", b"d"], "S20"),
        np.array(3, np.int32),
        np.array([True, False]),
        np.arange(4, dtype=">f8"),
    ]
)


@contextlib.contextmanager
def no_error_but_of(path):
    """The block may raise a `CacheError` that names the path, in one line."""
    try:
        yield
    except CacheError as error:
        message = str(error)
    else:
        return
    assert str(path) in message
    assert len(message) < 1000


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and (found == expected).all()


@given(ARRAYS)
@ANY_FOLDER
def test_arrays_come_back_as_numpy_wrote_them(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", x=array, y=np.arange(3))
    for mode in (None, "r", "c"):
        assert same(load_npy(tmp_path / "a.npy", "", map_mode=mode), np.load(tmp_path / "a.npy"))
    assert same(load_npz(tmp_path / "a.npz", ["x"], "")["x"], array)


@given(ARRAYS, st.data())
@ANY_FOLDER
def test_damaged_arrays_are_one_error_or_no_larger_than_their_file(tmp_path, array, data):
    """Bytes that are changed, cut or inserted anywhere: no other error, and no length but the file's."""
    for suffix in ("npy", "npz"):
        path = tmp_path / f"a.{suffix}"
        np.save(path, array) if suffix == "npy" else np.savez(path, x=array)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            start = data.draw(st.integers(0, len(content)))
            stop = min(len(content), start + data.draw(st.integers(0, 8)))
            content[start:stop] = data.draw(st.binary(max_size=8))
        path.write_bytes(content)
        for mode in (None, "r") if suffix == "npy" else (None,):
            with no_error_but_of(path):
                if suffix == "npy":
                    found = load_npy(path, "do", map_mode=mode)
                else:
                    found = load_npz(path, ["x"], "do")["x"]
                assert found.nbytes <= len(content)


def test_a_header_that_promises_more_than_the_file_has_is_damaged(tmp_path):
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
    for shape in (
        "(1000000000000,)",
        "(-1,)",
        "(-1, -8)",
        "(2**62,)",
        "(99999999999999999999,)",
        "(3, 0, 9)",
    ):
        for kind in ("<f8", "O", "V0", "S0", "|u1"):
            text = header.replace("(1000000000000,)", shape).replace("<f8", kind).encode() + b"\n"
            magic = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little")
            (tmp_path / "a.npy").write_bytes(magic + text + bytes(8))
            for mode in (None, "r"):
                with pytest.raises(CacheError, match=r"a\.npy: "):
                    load_npy(tmp_path / "a.npy", "", map_mode=mode)


def test_an_archive_cannot_unpack_to_more_than_it_holds(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(10**7))
    with pytest.raises(CacheError, match=r"a\.npz: .*'x'.*compressed"):
        load_npz(tmp_path / "a.npz", ["x"], "")


@given(st.sampled_from([b"[" * 100_000, b"1" * 5000, b"\xff", b"", b"null", b"[]", b'"x"']))
@ANY_FOLDER
def test_json_that_is_none_of_ours_is_one_error(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CacheError, match=r"a\.json: "):
        read_json(tmp_path / "a.json")


RAISED = [
    ValueError, KeyError, EOFError, TypeError, SyntaxError, RecursionError, IndexError, AttributeError,
    OverflowError, NotImplementedError, RuntimeError, ZeroDivisionError, zlib.error, UnicodeError,
    AssertionError, MemoryError, OSError,
]  # fmt: skip


@pytest.mark.parametrize("kind", RAISED)
def test_whatever_a_reader_raises_names_the_file(tmp_path, kind):
    with pytest.raises(CacheError, match=r"a\.npy: "), reading(tmp_path / "a.npy", "remove it"):
        raise kind("what went wrong")


def test_what_the_system_or_the_memory_refuses_is_not_called_damage(tmp_path, monkeypatch):
    for code, words in (
        (errno.EIO, os.strerror(errno.EIO)),
        (errno.EACCES, os.strerror(errno.EACCES)),
        (errno.EMFILE, "ulimit"),
    ):
        with (
            pytest.raises(CacheError, match=f"/a: .*{words}") as caught,
            reading(tmp_path / "a", "remove it"),
        ):
            raise OSError(code, os.strerror(code))
        assert "remove it" not in str(caught.value)
        assert "written" not in str(caught.value)
    (tmp_path / "a").write_bytes(b"123")

    class Small:
        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def read(self, size=-1):
            raise MemoryError

    checksum = file_checksum(tmp_path / "a")
    monkeypatch.setattr(checksums, "open_regular", lambda path: Small())
    with pytest.raises(CacheError, match=r"/a: .*memory") as caught:
        check_file(tmp_path / "a", checksum, "remove it")
    assert "remove it" not in str(caught.value)


def test_an_interrupt_is_no_damage(tmp_path):
    with pytest.raises(KeyboardInterrupt), reading(tmp_path / "a", ""):
        raise KeyboardInterrupt


def pipe(path):
    os.mkfifo(path)


def bind(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


THINGS = {
    "pipe": pipe,
    "socket": bind,
    "folder": os.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "nothing": lambda path: path.symlink_to("nowhere"),
    "itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("thing", THINGS)
def test_what_is_no_file_never_blocks_a_reader(thing, tmp_path):
    path = tmp_path / "a.npy"
    THINGS[thing](path)
    checksum = {"bytes": 3, "crc32": 0}
    readers = [
        lambda: load_npy(path, ""),
        lambda: load_npy(path, "", map_mode="r"),
        lambda: load_npz(path, ["x"], ""),
        lambda: read_json(path),
        lambda: check_file(path, checksum, ""),
        lambda: check_once(path, checksum, ""),
    ]
    for read in readers:
        with pytest.raises(CacheError, match=r"a\.npy: "):
            read()


@pytest.mark.parametrize("thing", THINGS)
def test_a_cache_whose_marker_is_no_file_is_one_error(thing, tmp_path):
    THINGS[thing](tmp_path / "cache.json")
    with pytest.raises(CacheError, match=r"cache\.json: "):
        open_cache(tmp_path)


def test_a_mapped_file_is_read_whole_once_until_it_changes(tmp_path, monkeypatch):
    folder = tmp_path / "x"
    folder.mkdir()
    np.save(folder / "a.npy", np.arange(1000))
    write_manifest(folder, "x", {})
    manifest = read_manifest(folder, "x")
    read = []
    original = checksums.file_checksum
    monkeypatch.setattr(checksums, "file_checksum", lambda path: read.append(path) or original(path))
    for _ in range(3):
        array = read_array(folder, "a", manifest, map_mode="r")
        assert isinstance(array, np.memmap)
        assert array.sum() == 499500
    assert len(read) == 1
    status = (folder / "a.npy").stat()
    content = bytearray((folder / "a.npy").read_bytes())
    content[-5] ^= 1
    (folder / "a.npy").write_bytes(content)
    os.utime(folder / "a.npy", ns=(status.st_atime_ns, status.st_mtime_ns))  # what hides it from `make`
    for _ in range(2):
        with pytest.raises(CacheError, match=r"a\.npy: .*checksum"):
            read_array(folder, "a", manifest, map_mode="r")


@given(st.data())
@ANY_FOLDER
def test_one_bit_of_a_checkpoint_never_passes(tmp_path, data):
    """Anywhere in a piece, the headers of its arrays and its manifest included."""
    saved = Checkpoint(tmp_path / "c", "run")
    pieces = {"centroids": np.arange(6, dtype="<f4").reshape(2, 3) + 1, "assignment": np.arange(4)}
    if saved.load("piece") is None:
        saved.save("piece", pieces)
    path = data.draw(st.sampled_from(sorted((tmp_path / "c" / "piece").iterdir())))
    content = path.read_bytes()
    place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    path.write_bytes(changed)
    with no_error_but_of(tmp_path / "c" / "piece"):
        found = saved.load("piece")
        assert found.keys() == pieces.keys()  # the bit was in a space of the manifest
        assert all(same(array, pieces[name]) for name, array in found.items())
    path.write_bytes(content)


def test_what_a_killed_run_left_is_not_sealed(tmp_path):
    """Two kills: one leaves a manifest under a temporary name, the next run checksums what it finds."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / ".tmp-0123456789ab-manifest.json").write_text("{}")  # the first kill
    for _ in range(3):
        saved = Checkpoint(folder, "run")
    saved.save("piece", {"x": np.arange(3)})
    np.testing.assert_array_equal(Checkpoint(folder, "run").load("piece")["x"], np.arange(3))
    assert read_manifest(folder, "clustering-checkpoint")["files"] == {}
    # And what an earlier version has with_checksum is no more missed.
    content = {"stage": "clustering-checkpoint", "format": 1, "run": "run"}
    files = {".tmp-0123456789ab-manifest.json": {"bytes": 2, "crc32": 0}}
    atomic_write_json(folder / MANIFEST, with_checksum(content | {"files": files}))
    np.testing.assert_array_equal(Checkpoint(folder, "run").load("piece")["x"], np.arange(3))


@given(st.sets(st.sampled_from([".tmp-a", ".tmp-0123456789ab-x.npy", "x.npy", "y", "manifest.json"])))
@ANY_FOLDER
def test_a_manifest_seals_files_but_no_leftovers(tmp_path, names):
    folder = tmp_path / str(sorted(names))
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(name)
    write_manifest(folder, "x", {})
    assert set(read_manifest(folder, "x")["files"]) == names & {"x.npy", "y"}


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_an_error_of_the_disk_while_something_is_built_is_not_called_one_of_writing(code, tmp_path):
    named = pytest.raises(CacheError, match=f"^{tmp_path}: .*{os.strerror(code)}")
    with named as caught, atomic_path(tmp_path / "artifact"):
        raise OSError(code, os.strerror(code))
    assert "cannot be written" not in str(caught.value)
    with pytest.raises(PermissionError), atomic_path(tmp_path / "artifact"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/pool.tar")


def test_a_reader_of_a_pipe_returns_while_a_writer_waits(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    ended = threading.Event()

    def write():
        with contextlib.suppress(OSError):
            handle = os.open(tmp_path / "a.json", os.O_RDWR)
            ended.wait(20)
            os.close(handle)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        with pytest.raises(CacheError, match=r"a\.json: .*regular file"):
            read_json(tmp_path / "a.json")
    finally:
        ended.set()
        thread.join()
    assert stat.S_ISFIFO((tmp_path / "a.json").stat().st_mode)


def test_a_member_is_checked_to_its_end(tmp_path):
    """Fewer rows by one changed byte of a member's header: numpy itself then stops before the checksum."""
    np.savez(tmp_path / "a.npz", x=np.arange(8))
    content = (tmp_path / "a.npz").read_bytes()
    assert content.count(b"(8,)") == 1
    (tmp_path / "a.npz").write_bytes(content.replace(b"(8,)", b"(7,)"))
    with pytest.raises(CacheError, match=r"a\.npz: .*'x\.npy'"):
        load_npz(tmp_path / "a.npz", ["x"], "")
