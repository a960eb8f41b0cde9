"""Archives repacked as shards, against what tarfile reads from the originals."""

import bz2
import contextlib
import errno
import gzip
import io
import logging
import lzma
import multiprocessing
import os
import re
import shlex
import tarfile
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curated_data.cli import main
from curated_data.errors import CacheError, PoolError
from curated_data.pool import ShardPool, import_archives
from tests.support.server import Server

PACK = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    "tar": bytes,
}
UNPACK = {
    "gz": gzip.decompress,
    "bz2": bz2.decompress,
    "xz": lzma.decompress,
    "zst": lambda data: zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read(),
    "tar": bytes,
}


def archive(members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def read_by_tarfile(data: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar if info.isfile()]


def samples(pool: ShardPool) -> list[dict]:
    return [
        {name: value for name, value in sample.items() if name != "__url__"}
        for sample in pool.read(np.arange(len(pool)))
    ]


@pytest.mark.parametrize("kind", [*PACK, "pipe", "http", "http without ranges", "memory"])
def test_members_are_those_of_the_originals(kind, small_pool, tmp_path):
    packed = []
    for path in (small_pool[0], small_pool[2]):
        if kind == "pipe":
            packed.append(f"pipe:gzip -c {shlex.quote(str(path))}")
        else:
            packed.append(tmp_path / "packed" / f"{path.name}.{kind[:4]}")
            packed[-1].parent.mkdir(exist_ok=True)
            packed[-1].write_bytes(PACK.get(kind, gzip.compress)(path.read_bytes()))
    server = None
    if kind.startswith("http"):
        pytest.importorskip("aiohttp")
        server = Server(tmp_path / "packed", ranges=kind == "http")
        packed = [f"{server.url}/{path.name}" for path in packed]
    if kind == "memory":
        memory = fsspec.filesystem("memory")
        for path in packed:
            memory.pipe(f"/repack/{path.name}", path.read_bytes())
        packed = [f"memory://repack/{path.name}" for path in packed]
    shards = import_archives(packed, tmp_path / "new", max_samples=4)
    assert [path.name for path in shards] == [f"shard-{number:06d}.tar" for number in range(3)]
    found = [member for path in shards for member in read_by_tarfile(path.read_bytes())]
    assert found == [member for path in small_pool for member in read_by_tarfile(path.read_bytes())]
    assert samples(ShardPool(shards)) == samples(ShardPool(small_pool))
    if server is not None:
        server.close()


CONTENT = st.binary(max_size=700)
KEY = st.sampled_from(["a", "b", "d/a", "./c", "ä/ü", "n" * 120, "a b"])
EXTENSION = st.sampled_from(["jpg", "cls", "seg.png", "json", "ö"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(KEY, EXTENSION, CONTENT), min_size=1, max_size=12, unique_by=lambda member: member[:2]
    ),
    st.sampled_from(sorted(PACK)),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    st.lists(st.integers(0, 20_000), max_size=3),
    st.integers(0, 600),
)
def test_any_order_gives_whole_samples(tmp_path, members, kind, format, cuts, n_zeros):
    """Also of compressed streams in a row, as parallel compressors write, with zeros behind them."""
    plain = archive([(f"{key}.{extension}", content) for key, extension, content in members], format)
    edges = [0, *sorted(min(cut, len(plain)) for cut in cuts), len(plain)]
    packed = b"".join(PACK[kind](plain[start:stop]) for start, stop in pairwise(edges))
    path = tmp_path / f"any.tar.{kind}"
    path.write_bytes(packed + bytes(4 * n_zeros if kind == "xz" else n_zeros) * (kind != "tar"))
    expected: dict[str, dict] = {}
    for name, content in read_by_tarfile(UNPACK[kind](packed)):
        folder, slash, base = name.rpartition("/")
        key, _, extension = base.partition(".")
        expected.setdefault(folder + slash + key, {"__key__": folder + slash + key})[extension] = content
    pool = ShardPool(import_archives(path, tmp_path / "new", overwrite=True), strict=True)
    assert samples(pool) == list(expected.values())


def test_samples_that_share_an_extension_are_not_joined(write_tar, tmp_path):
    """Nobody knows which parts belong together; they stay apart even where they come side by side."""
    names = ["b.jpg", "a.jpg", "b.cls", "a.jpg", "c.jpg", "a.cls"]
    path = write_tar("twice.tar", [(name, b"%d" % number) for number, name in enumerate(names)])
    found = samples(ShardPool(import_archives(path, tmp_path / "new")))
    assert found == [
        {"__key__": "b", "jpg": b"0", "cls": b"2"},
        {"__key__": "a", "jpg": b"1"},
        {"__key__": "a", "jpg": b"3"},
        {"__key__": "c", "jpg": b"4"},
        {"__key__": "a", "cls": b"5"},
    ]


def test_equal_keys_at_the_seam_of_two_archives_are_two_samples(tmp_path):
    paths = [tmp_path / f"{number}.tar" for number in range(2)]
    for number, path in enumerate(paths):
        path.write_bytes(archive([("a.jpg", b"%d" % number)]))
    found = samples(ShardPool(import_archives(paths, tmp_path / "new")))
    assert found == [{"__key__": "a", "jpg": b"0"}, {"__key__": "a", "jpg": b"1"}]


def test_what_the_warning_about_parts_promises(write_tar, tmp_path, caplog):
    """Images first, labels later: the command that the warning names gives whole samples."""
    n = 7
    path = write_tar(
        "apart.tar", [(f"{i}.jpg", b"%d" % i) for i in range(n)] + [(f"{i}.cls", b"1") for i in range(n)]
    )
    with caplog.at_level(logging.WARNING):
        len(ShardPool(path))
    assert "`curated-data import" in caplog.text
    caplog.clear()
    assert main(["import", str(path), str(tmp_path / "new")]) == 0
    pool = ShardPool(tmp_path / "new" / "*.tar", strict=True)
    assert samples(pool) == [{"__key__": str(i), "jpg": b"%d" % i, "cls": b"1"} for i in range(n)]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_links_are_the_files_that_they_lead_to(write_tar, tmp_path):
    link = tarfile.TarInfo("b.jpg")
    link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
    plain = write_tar("links.tar", [("a.jpg", b"image"), (link, b"")])
    packed = tmp_path / "links.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    with tarfile.open(packed) as tar:
        expected = [{"__key__": info.name[0], "jpg": tar.extractfile(info).read()} for info in tar]
    assert samples(ShardPool(import_archives(packed, tmp_path / "new"))) == expected


def test_what_is_left_out_is_counted(tmp_path, caplog):
    path = tmp_path / "more.tar.gz"
    names = ["README", "a.jpg", "__notes__/x.txt", "__MACOSX/a.jpg", ".hidden"]
    path.write_bytes(gzip.compress(archive([(name, b"1") for name in names])))
    assert len(ShardPool(import_archives(path, tmp_path / "new"))) == 1
    assert "more.tar.gz: left out 3 files" in caplog.text
    assert "1 members are macOS's own" in caplog.text


class TestFaults:
    """An archive that is not whole is an error that names it, and gives no shard of it."""

    @pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
    def test_cut_anywhere(self, kind, tmp_path):
        rng = np.random.default_rng(0)
        whole = PACK[kind](archive([(f"{i}.jpg", rng.bytes(400)) for i in range(20)]))
        path = tmp_path / f"cut.tar.{kind}"
        for length in [1, 5, *range(100, len(whole), 331), *range(len(whole) - 12, len(whole))]:
            path.write_bytes(whole[:length])
            with pytest.raises(PoolError, match=r"cut\.tar"):
                import_archives(path, tmp_path / "new")
            assert not list(tmp_path.glob("new/*.tar"))
        path.write_bytes(whole)
        assert len(ShardPool(import_archives(path, tmp_path / "new"))) == 20

    @pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
    def test_a_changed_byte(self, kind, tmp_path):
        """All of these have checksums."""
        rng = np.random.default_rng(0)
        whole = PACK[kind](archive([(f"{i}.jpg", rng.bytes(400)) for i in range(20)]))
        path = tmp_path / f"flipped.tar.{kind}"
        for place in range(200, len(whole) - 40, 997):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
            with pytest.raises(PoolError, match=r"flipped\.tar"):
                import_archives(path, tmp_path / "new")
        assert not list(tmp_path.glob("new/*.tar"))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "empty"),
            (gzip.compress(b""), "empty"),
            (gzip.compress(b"hello" * 300), "b'hello"),
            (gzip.compress(gzip.compress(archive([("a.jpg", b"1")]))), "gzip"),
            (gzip.compress(archive([("a.jpg", b"1" * 3000)])[:2000]), r"'a\.jpg'.*3512.*2000"),
            (gzip.compress(archive([("README", b"1")])), "no sample"),
            (gzip.compress(archive([("a.jpg", b"1")])) + b"more", "to its end"),
        ],
        ids=["no bytes", "nothing", "text", "twice", "cut", "no sample", "more bytes"],
    )
    def test_other_content(self, content, message, tmp_path):
        path = tmp_path / "odd.tar.gz"
        path.write_bytes(content)
        with pytest.raises(PoolError, match=rf"odd\.tar\.gz.*{message}"):
            import_archives(path, tmp_path / "new")

    @pytest.mark.parametrize(
        "command", ["exit 3", "head -c 1500 {}; exit 1", "cat {}; false", "no-such-command"]
    )
    def test_a_command_that_fails(self, command, tmp_path):
        (tmp_path / "whole.tar").write_bytes(archive([("a.jpg", b"1")]))
        url = "pipe:" + command.format(shlex.quote(str(tmp_path / "whole.tar")))
        with pytest.raises(PoolError, match=f"^{re.escape(url)}: .*exit status"):
            import_archives(url, tmp_path / "new")
        assert not list(tmp_path.glob("new/*.tar"))

    def test_a_full_disk(self, tmp_path, monkeypatch):
        path = tmp_path / "a.tar.gz"
        path.write_bytes(gzip.compress(archive([("a.jpg", bytes(100_000))])))

        class Full(io.BytesIO):
            def write(self, data):
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Full())
        with pytest.raises(CacheError, match=os.strerror(errno.ENOSPC)):
            import_archives(path, tmp_path / "new")

    def test_the_originals_are_never_replaced(self, tmp_path):
        path = tmp_path / "shard-000000.tar"
        path.write_bytes(archive([("a.jpg", b"1"), ("b.jpg", b"1"), ("a.cls", b"1")]))
        before = path.read_bytes()
        (tmp_path / "other").symlink_to(tmp_path)
        for out in (tmp_path, tmp_path / "other", f"{tmp_path}/shard-%06d.tar"):
            for overwrite in (True, False):
                with pytest.raises(PoolError, match=r"shard-000000\.tar"):
                    import_archives(path, out, overwrite=overwrite)
        assert path.read_bytes() == before
        assert len(import_archives(path, f"{tmp_path}/new-%06d.tar")) == 1

    def test_a_killed_import_leaves_nothing_but_its_shards_and_marker(self, tmp_path):
        """Killed while the second archive is unpacked; the next run gives what a whole one gives."""
        first, second, late = tmp_path / "first.tar", tmp_path / "second.tar", tmp_path / "late"
        first.write_bytes(archive([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"3")]))
        second.write_bytes(archive([("c.jpg", b"4" * 9000)]))
        os.mkfifo(late)
        archives = [first, f"pipe:cat {shlex.quote(str(second))} {shlex.quote(str(late))}"]
        run = multiprocessing.get_context("fork").Process(
            target=import_archives, args=(archives, tmp_path / "new"), kwargs={"max_samples": 1}
        )
        run.start()
        while not (tmp_path / "new" / "shard-000000.tar").exists():
            assert run.is_alive()
            time.sleep(0.01)
        run.kill()
        run.join()
        with contextlib.suppress(OSError):  # ends its command, if that had been started
            os.close(os.open(late, os.O_WRONLY | os.O_NONBLOCK))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["first.tar", "late", "new", "second.tar"]
        late.unlink()
        late.touch()
        again = import_archives(archives, tmp_path / "new", max_samples=1)
        whole = import_archives(archives, tmp_path / "whole", max_samples=1)
        assert [path.read_bytes() for path in again] == [path.read_bytes() for path in whole]
        names = sorted(path.name for path in (tmp_path / "new").iterdir())
        assert names == [path.name for path in whole]

    def test_nothing_else_is_left_in_the_folder(self, tmp_path):
        path = tmp_path / "a.tar.gz"
        path.write_bytes(gzip.compress(archive([("a.jpg", b"1")])))
        import_archives(path, tmp_path / "deep" / "new")
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.tar.gz", "deep"]
        assert [entry.name for entry in (tmp_path / "deep" / "new").iterdir()] == ["shard-000000.tar"]


def test_a_pool_names_the_command_that_repacks(tmp_path, monkeypatch):
    """The command in the error's text works as it is."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "an old one.tar.gz"
    path.write_bytes(gzip.compress(archive([("a.jpg", b"1")])))
    for urls in ("an old one.tar.gz", f"pipe:cat {shlex.quote(str(path))}"):
        with pytest.raises(PoolError) as raised:
            len(ShardPool(urls))
        program, *arguments = shlex.split(str(raised.value).split("`")[1])
        assert program == "curated-data"
        assert main([*arguments, "--overwrite"]) == 0
        assert ShardPool("NEW/*.tar").keys([0]) == ["a"]


def test_a_plain_archive_that_begins_like_a_compressed_one(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(archive([("BZh91.jpg", b"1")]))
    assert ShardPool(path).keys([0]) == ["BZh91"]


def test_frames_that_a_parallel_compressor_marks(tmp_path):
    """pzstd begins each frame with one to skip, which has its size."""
    plain = archive([("a.jpg", b"1" * 5000)])
    packed = b""
    for part in (plain[:3000], plain[3000:]):
        frame = PACK["zst"](part)
        packed += b"\x50\x2a\x4d\x18\x04\0\0\0" + len(frame).to_bytes(4, "little") + frame
    path = Path(tmp_path / "a.tar.zst")
    path.write_bytes(packed)
    assert samples(ShardPool(import_archives(path, tmp_path / "new"))) == [
        {"__key__": "a", "jpg": b"1" * 5000}
    ]
