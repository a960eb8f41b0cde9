"""The index against webdataset's own reading of the same archives, and what it refuses."""

import gzip
import io
import re
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curated_data.errors import PoolError
from curated_data.pool.index import ShardIndex, concatenate, count_duplicate_keys, index_shard
from curated_data.pool.index_files import (
    load_pool_index,
    save_shard_index,
    write_pool_index,
)
from curated_data.pool.tar import local_source, read_members


def samples_of(path: Path, index: ShardIndex) -> list[dict]:
    """The samples that an index describes, read back in the plainest way."""
    data = path.read_bytes()
    samples = []
    for row, key in enumerate(index.keys()):
        sample = {"__key__": key, "__url__": str(path)}
        for member in range(index.member_start[row], index.member_start[row + 1]):
            start = index.member_offset[member]
            name = index.extensions[index.member_extension[member]]
            sample[name] = data[start : start + index.member_size[member]]
        samples.append(sample)
    return samples


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = "a.jpg"
    return info


ODD = {
    "dots in folders": ["v1.0/a.jpg", "v1.0/a.cls", "v1.0/b.c/d.jpg", "x.y/.z/e.txt", "./f.jpg", "./f.cls"],
    "capitals": ["a.JPG", "a.Cls", "B.jpg", "b.jpg", "c.JpEg"],
    "several dots": ["a.seg.png", "a.jpg", "a.b.c.txt", "b..txt", "c.", "d.tar.gz"],
    "dot-files": [
        ".hidden",
        ".hidden.jpg",
        "d/.hidden.jpg",
        "d/e/.x",
        "d.1/e/.x.y",
        "/.r",
        "a.jpg",
        "e/.jpg",
    ],
    "no extension": ["README", "a.jpg", "Makefile", "a.cls", "d.x/plain", "b.jpg"],
    "metadata": [
        "__index__",
        "__meta__/a.jpg",
        "__a__b.jpg",
        "__x.jpg",
        "a/__b__.jpg",
        "__c__.d",
        "__.e",
        "____.x",
    ],
    "interleaved": ["a.jpg", "b.jpg", "a.cls", "b.cls", "a.txt"],
    "odd slashes": ["/abs/a.jpg", "a//b.jpg", "../up/c.jpg", "a/./b.jpg", "//x.jpg"],
    "odd letters": ["ä/ö.jpg", "日本.JPG", "a b.txt", "new\nline.jpg", "d\nir/x.jpg", "tab\t.jpg", "ß.ÄÖ"],
    "not UTF-8": ["caf\udce9.jpg", "caf\udce9.cls", "b.\udcff\udcfe"],
    "empty": [],
    "empty members": ["a.jpg", "a.cls"],
    "long names": [
        "n" * 99 + ".jpg",
        "n" * 100 + ".jpg",
        "d" * 60 + "/" + "n" * 80 + ".jpg",
        "d" * 60 + "/" + "n" * 80 + ".cls",
        "d.d/" * 50 + "x" * 101 + ".jpg",
        "ü" * 120 + ".jpg",
    ],
}
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("odd", ODD)
def test_groups_as_webdataset_does(odd, format, write_tar, read_by_webdataset):
    names = ODD[odd]
    if format == "ustar" and odd == "long names":
        names = [
            name for name in names if len(name) < 160 and "ü" not in name and len(name.split("/")[-1]) <= 100
        ]
    contents = [
        b"" if odd == "empty members" else f"<{i}>".encode() * (i * 97 + 1) for i in range(len(names))
    ]
    path = write_tar("odd.tar", zip(names, contents), FORMATS[format])
    found = samples_of(path, index_shard(path))
    assert found == read_by_webdataset(path)
    assert odd in ("empty", "metadata") or found


def test_members_that_are_no_files_are_passed_over(write_tar, read_by_webdataset):
    kinds = [tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
    members = [(special(f"between{i}.jpg", kind), b"") for i, kind in enumerate(kinds)]
    contiguous = special("a.json", tarfile.CONTTYPE)
    path = write_tar(
        "kinds.tar",
        [("a.jpg", b"1"), *members, ("a.cls", b"2"), (contiguous, b"{}"), ("b.jpg", b"3")],
        tarfile.PAX_FORMAT,
    )
    index = index_shard(path)
    found = samples_of(path, index)
    assert found == read_by_webdataset(path)
    assert [set(sample) - {"__key__", "__url__"} for sample in found] == [{"jpg", "cls", "json"}, {"jpg"}]
    assert index.notes["special"].number == 2  # folders are no loss


def test_pax_headers_of_every_kind(tmp_path, read_by_webdataset):
    """Float times, a global header, sizes and paths that override the header's."""
    path = tmp_path / "pax.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "global"}) as archive:
        for i in range(40):
            info = tarfile.TarInfo(f"k{i}.jpg")
            content = bytes([i]) * (i * 100)
            info.size, info.mtime = len(content), 1.25 + i
            if i % 3 == 0:
                info.pax_headers = {"path": f"long/{'x' * i}/k{i}.png", "size": str(len(content))}
            archive.addfile(info, io.BytesIO(content))
    found = samples_of(path, index_shard(path))
    assert found == read_by_webdataset(path)
    assert len(found) == 40


def test_old_headers(tmp_path, read_by_webdataset):
    """V7 headers, folders as files with a slash, base-256 sizes, signed checksums, unknown types."""

    def header(name: bytes, size: bytes, kind: bytes, signed: bool = False, prefix: bytes = b"") -> bytes:
        fields = [name.ljust(100, b"\0"), b"0000644\0", b"0000000\0", b"0000000\0", size, b"00000000000\0"]
        block = b"".join(fields) + b" " * 8 + kind + bytes(100) + b"ustar  \0" + bytes(64 + 16)
        block += prefix.ljust(155, b"\0")
        block = block.ljust(512, b"\0")
        total = sum(struct.unpack("512b" if signed else "512B", block))
        return block[:148] + b"%06o\0 " % total + block[156:]

    def octal(size: int) -> bytes:
        return b"%011o\0" % size

    archive = b"".join(
        [
            header(b"old.jpg", octal(3), b"\0") + b"old".ljust(512, b"\0"),
            header(b"folder/", octal(700), b"\0"),
            header(b"big.jpg", b"\x80" + (600).to_bytes(11, "big"), b"0") + (b"b" * 600).ljust(1024, b"\0"),
            header(b"spaces.jpg", b"        12 \0", b"0") + b"x".ljust(512, b"\0"),
            header(b"twelve.jpg", b"000000000005", b"0") + b"12345".ljust(512, b"\0"),
            header(b"no\xefe.jpg", octal(1), b"0", signed=True) + b"s".ljust(512, b"\0"),
            header(b"pre.jpg", octal(1), b"0", prefix=b"some/folder.d") + b"p".ljust(512, b"\0"),
            header(b"unknown.jpg", octal(5), b"V") + b"?????".ljust(512, b"\0"),
            header(b"after.jpg", octal(2), b"0") + b"ok".ljust(512, b"\0"),
            bytes(1024),
        ]
    )
    path = tmp_path / "old.tar"
    path.write_bytes(archive)
    found = samples_of(path, index_shard(path))
    assert found == read_by_webdataset(path)
    assert [sample["__key__"] for sample in found] == [
        "old",
        "big",
        "spaces",
        "twelve",
        "no\udcefe",
        "some/folder.d/pre",
        "after",
    ]


name_part = st.text(st.sampled_from("aAb._/é\n _"), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(name_part, st.binary(max_size=700)), max_size=12),
    st.sampled_from(list(FORMATS.values())),
)
def test_any_archive_groups_as_webdataset_does(write_tar, read_by_webdataset, members, format):
    of_macos = re.compile(r"(^|/)\._[^/]+$")  # left out, see test_apart.py
    members = [(name, content) for name, content in members if name.strip("/") and not of_macos.search(name)]
    path = write_tar("any.tar", members, format)
    try:
        expected = read_by_webdataset(path)
    except ValueError:  # two members of one extension in a sample: both refuse
        with pytest.raises(PoolError, match="two members"):
            index_shard(path)
    else:
        assert samples_of(path, index_shard(path)) == expected


def test_two_members_of_one_extension_are_refused(write_tar, read_by_webdataset):
    path = write_tar("twice.tar", [("a.jpg", b"1"), ("a.txt", b"2"), ("a.JPG", b"3")])
    with pytest.raises(ValueError):
        read_by_webdataset(path)
    with pytest.raises(PoolError, match=r"twice\.tar.*'a'.*'jpg'.*'a\.JPG'.*2560"):
        index_shard(path)


def test_many_members_and_windows(write_tar, read_by_webdataset):
    """Members below and far above the read window, and more headers than are verified at once."""
    rng = np.random.default_rng(0)
    sizes = np.concatenate([rng.integers(0, 900, 300), [400_000, 3, 90_000, 5], rng.integers(0, 20_000, 60)])
    path = write_tar(
        "mixed.tar", [(f"{i:05d}.bin", bytes([i % 251]) * int(size)) for i, size in enumerate(sizes)]
    )
    assert samples_of(path, index_shard(path)) == read_by_webdataset(path)
    path = write_tar("many.tar", [(f"{i:06d}.x", b"") for i in range(17_000)])
    index = index_shard(path)
    assert len(index) == 17_000
    assert index.keys([0, 16_999]) == ["000000", "016999"]
    assert np.array_equal(index.member_offset, np.arange(17_000) * 512 + 512)


def test_reads_headers_only(write_tar):
    """Data of large members are never read."""
    path = write_tar("large.tar", [(f"{i}.bin", bytes(1_000_000)) for i in range(20)])
    read = []
    with open(path, "rb") as file:
        source = local_source(path, file.fileno())

        def counted(offset: int, length: int) -> bytes:
            data = source.read(offset, length)
            read.append(len(data))
            return data

        assert sum(len(block.names) for block in read_members(source._replace(read=counted))) == 20
    assert sum(read) < 200_000


def test_a_truncated_archive_is_named_with_the_offset(write_tar):
    path = write_tar("cut.tar", [("a.jpg", bytes(1000)), ("b.jpg", bytes(3000))])
    whole = path.read_bytes()
    path.write_bytes(whole[: 512 + 1024 + 512 + 2000])
    with pytest.raises(PoolError, match=r"cut\.tar: .*'b\.jpg'.*1536.*5048.*4048"):
        index_shard(path)
    path.write_bytes(whole[: 512 + 1024 + 100])  # within a header
    with pytest.raises(PoolError, match=r"cut\.tar: .*1536.*1636"):
        index_shard(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 20_000))
def test_a_cut_anywhere_is_noticed(write_tar, cut):
    """A shortened archive raises, or gives the first samples and says that its end marker is missing."""
    path = write_tar("cut.tar", [(f"{i}.jpg", bytes([i]) * 700 * i) for i in range(6)], tarfile.PAX_FORMAT)
    whole = path.read_bytes()
    keys = index_shard(path).keys()
    path.write_bytes(whole[: min(cut, len(whole) - 1)])
    try:
        index = index_shard(path)
    except PoolError:
        pass
    else:
        assert index.keys() == keys[: len(index)]
        assert len(index) == len(keys) or "unmarked" in index.notes


def test_a_garbled_header_is_named_with_the_offset(write_tar):
    """webdataset 1.0 loses every sample behind it without a word."""
    path = write_tar("garbled.tar", [(f"{i}.jpg", bytes(300)) for i in range(10)])
    data = bytearray(path.read_bytes())
    data[3 * 1024 + 10 : 3 * 1024 + 20] = b"garbage!!!"
    path.write_bytes(data)
    with pytest.raises(PoolError, match=r"garbled\.tar: .*3072"):
        index_shard(path)
    data[3 * 1024 + 124 : 3 * 1024 + 136] = b"not a number"
    path.write_bytes(data)
    with pytest.raises(PoolError, match=r"garbled\.tar: .*3072"):
        index_shard(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"hello", "5 bytes"),
        (b"<!DOCTYPE html>" + b"x" * 2000, "DOCTYPE"),
        (gzip.compress(b"x" * 3000, mtime=0), "gzip.*`curated-data import .*no.tar NEW`"),
        (b"\x28\xb5\x2f\xfd" + bytes(1000), "zstd"),
    ],
)
def test_what_is_no_tar_is_refused(tmp_path, content, message):
    path = tmp_path / "no.tar"
    path.write_bytes(content)
    with pytest.raises(PoolError, match=r"no\.tar.*" + message):
        index_shard(path)


def test_missing_file(tmp_path):
    with pytest.raises(PoolError, match=r"gone\.tar: .*No such file"):
        index_shard(tmp_path / "gone.tar")


def test_sparse_members_are_refused(write_tar):
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
    path = write_tar("sparse.tar", [(info, b"x" * 600)], tarfile.PAX_FORMAT)
    with pytest.raises(PoolError, match=r"'a\.jpg'.*sparse"):
        index_shard(path)


def test_appended_archives_are_reported(write_tar, read_by_webdataset):
    path = write_tar("one.tar", [("a.jpg", b"1")])
    path.write_bytes(path.read_bytes() + write_tar("two.tar", [("b.jpg", b"2")]).read_bytes())
    index = index_shard(path)
    assert samples_of(path, index) == read_by_webdataset(path)
    assert index.notes["cut"].number == 1
    assert "'b.jpg'" in index.notes["cut"].example


@pytest.mark.parametrize("block", [1, 3, 100])
def test_keys_of_any_samples_in_any_order(write_tar, monkeypatch, block):
    monkeypatch.setattr("curated_data.pool.index._BLOCK", block)
    keys = ["a", "bcd", "folder/é", "\udcff", "f" * 90]
    index = index_shard(write_tar("a.tar", [(f"{key}.jpg", b"1") for key in keys]))
    assert index.keys() == keys
    rows = [3, 0, 0, 4, 2, 1]
    assert index.keys(rows) == [keys[row] for row in rows]
    assert index.keys([]) == []


def test_index_is_saved_and_joined_without_change(write_tar, tmp_path):
    paths = [
        write_tar("a.tar", [("a.jpg", b"1"), ("a.cls", b"2"), ("b.png", b"3")]),
        write_tar("b.tar", []),
        write_tar("c.tar", [("c.cls", b"4"), ("c.txt", b"5"), ("d.jpg", b"6"), ("a.jpg", b"7")]),
    ]
    indexes = [index_shard(path) for path in paths]
    folders = [tmp_path / "index" / str(number) for number in range(3)]
    for folder, index, path in zip(folders, indexes, paths):
        save_shard_index(folder, index, url=str(path))
    pool_folder = tmp_path / "pool"
    pool_folder.mkdir()
    write_pool_index(pool_folder, folders)
    for pool in (concatenate(indexes), load_pool_index(pool_folder)):
        assert pool.keys() == ["a", "b", "c", "d", "a"]
        assert pool.shard_start.tolist() == [0, 2, 2, 5]
        assert pool.extensions == ["jpg", "cls", "png", "txt"]
        assert pool.shard_of(np.arange(5)).tolist() == [0, 0, 2, 2, 2]
        assert (pool.n_duplicate_keys, pool.duplicate_example) == (1, "a")
        names = [pool.extensions[number] for number in pool.member_extension]
        assert names == ["jpg", "cls", "png", "cls", "txt", "jpg", "jpg"]
        assert pool.member_start.tolist() == [0, 2, 3, 5, 6, 7]


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=5), max_size=60))
def test_duplicate_keys_are_counted(keys):
    start = np.zeros(len(keys) + 1, np.int64)
    np.cumsum([len(key) for key in keys], out=start[1:])
    count, example = count_duplicate_keys(start, np.frombuffer(b"".join(keys), np.uint8))
    assert count == len(keys) - len(set(keys))
    assert (example is None) == (count == 0)
