"""Samples whose parts lie apart, and the files that macOS adds."""

import io
import logging
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curated_data.errors import PoolError
from curated_data.pool import ShardPool, index_shard


def test_images_first_then_labels_are_a_warning_at_every_opening(write_tar, tmp_path, caplog):
    members = [(f"{i}.jpg", b"1") for i in range(5)] + [(f"{i}.cls", b"1") for i in range(5)]
    path = write_tar("apart.tar", members)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            pool = ShardPool(path, cache_dir=tmp_path / "cache")
            assert len(pool) == 10
        messages = [record.getMessage() for record in caplog.records if "apart.tar" in record.getMessage()]
        assert len(messages) == 1
        assert "5 samples" in messages[0]
        assert "'0' with jpg and cls" in messages[0]
        assert "curated-data import" in messages[0]
    with pytest.raises(PoolError, match=r"apart\.tar.*'0' with jpg"):
        len(ShardPool(path, strict=True))


def test_the_same_key_with_the_same_extension_is_another_sample(write_tar):
    path = write_tar("twice.tar", [("a.jpg", b"1"), ("b.jpg", b"1"), ("a.jpg", b"2")])
    index = index_shard(path)
    assert "apart" not in index.notes
    assert len(index) == 3


@pytest.mark.parametrize("cached", [True, False])
def test_images_in_one_shard_and_labels_in_another(write_tar, tmp_path, caplog, cached):
    images = write_tar("images.tar", [(f"{i}.jpg", b"1") for i in range(6)] + [("x.jpg", b"1")])
    labels = write_tar(
        "labels.tar", [(f"{i}.cls", b"1") for i in range(5)] + [("x.jpg", b"2"), ("y.cls", b"1")]
    )
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            pool = ShardPool([images, labels], cache_dir=tmp_path / "cache" if cached else None)
            assert len(pool) == 14
        assert "5 samples have the key of one in another shard" in caplog.text
        assert "key '0'" in caplog.text
        assert pool.index().n_duplicate_keys == 6


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations([f"{key}.{extension}" for key in "abc" for extension in ("jpg", "cls", "txt")]))
def test_any_order_is_whole_or_said_to_be_apart(write_tar, read_by_webdataset, names):
    path = write_tar("any.tar", [(name, b"1") for name in names])
    index = index_shard(path)
    assert index.keys() == [sample["__key__"] for sample in read_by_webdataset(path)]
    count = index.notes["apart"].number if "apart" in index.notes else 0
    assert len(index) == 3 + count


def test_what_macos_adds_is_left_out_and_counted(write_tar, caplog):
    double = b"\0\x05\x16\x07" + bytes(60)
    members = []
    for i in range(4):
        for extension in ("jpg", "cls"):
            members += [(f"d/._{i}.{extension}", double), (f"d/{i}.{extension}", b"%d" % i)]
    members += [
        ("._d", double),  # of the folder
        ("d/.DS_Store", b"x"),
        (".DS_Store", b"x"),
        ("__MACOSX/d/._0.jpg", double),
        ("__MACOSX/plain.jpg", double),
        ("d/._alone.jpg", double),
    ]
    with caplog.at_level(logging.WARNING):
        pool = ShardPool(write_tar("mac.tar", members))
        assert pool.keys(range(4)) == [f"d/{i}" for i in range(4)]
    assert len(pool) == 4
    assert pool.labels(range(4)).tolist() == [0, 1, 2, 3]
    assert pool.index().notes["macos"].number == 14
    assert "14 members are macOS's own" in caplog.text
    len(ShardPool(write_tar("mac.tar", members), strict=True))  # nothing is lost


def test_a_sample_whose_name_begins_so_is_kept(write_tar, read_by_webdataset):
    """Without a file beside it, and without the first bytes of macOS's."""
    path = write_tar("odd.tar", [("d/._x.jpg", b"content"), ("y.jpg", b"1")])
    assert index_shard(path).keys() == [sample["__key__"] for sample in read_by_webdataset(path)]


def chunk(kind: bytes, payload: bytes, size: int | None = None) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, len(payload) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + payload + bytes(-len(payload) % 512)


def file(name: str, content: bytes = b"1") -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


def record(key: bytes, value: bytes) -> bytes:
    size = len(key) + len(value) + 3
    while size != len(key) + len(value) + 3 + len(str(size)) - 0:
        size = len(key) + len(value) + 3 + len(str(size))
    return b"%d %s=%s\n" % (size, key, value)


MIB = 1 << 20
SLOW = {
    "digits": chunk(b"x", b"0" * (MIB - 20) + b"1 path=b\n"),
    "ones": chunk(b"x", b"1" * (MIB - 10)),
    "no equals sign": chunk(b"x", b"9 " + b"a" * (MIB - 2)),
    "short lengths": chunk(b"x", b"1 =" * (MIB // 3)),
    "zero lengths": chunk(b"x", b"0 a=" * (MIB // 4)),
    "a length beyond the end": chunk(b"x", b"9999999 path=a\n"),
    "a record that is cut": chunk(b"x", b"20 path=a\n"),
    "zeros among records": chunk(b"x", record(b"mtime", b"1.5") + bytes(20)),
    "zeroed records": chunk(b"x", bytes(100)),
    "a negative size": chunk(b"x", record(b"size", b"-5")),
    "a huge size": chunk(b"x", record(b"size", b"9" * 18)),
    "a size of many digits": chunk(b"x", record(b"size", b"9" * 5000)),
    "a size with a line": chunk(b"x", record(b"size", b"1_0")),
    "too long": chunk(b"x", record(b"path", b"a" * (2 * MIB))),
    "a long name that is too long": chunk(b"L", b"a" * (2 * MIB)),
    "a zeroed long name": chunk(b"L", bytes(300)),
    "half a long name": chunk(b"L", b"a" * 100 + bytes(200)),
    "a long name with zeros in it": chunk(b"L", b"a" * 100 + bytes(50) + b"b" * 20 + b"\0"),
    "a chain": chunk(b"L", b"a.jpg\0") * 5000,
    "a chain of globals": chunk(b"g", record(b"comment", b"x")) * 5000,
    "a chain that is long": chunk(b"x", record(b"comment", b"x" * 60_000)) * 40,
    "a claim of terabytes": chunk(b"x", b"", size=7_000_000_000),
    "none": chunk(b"x", record(b"path", b"a.jpg")),
}


@pytest.mark.parametrize("name", SLOW)
def test_extended_headers_that_are_wrong_are_named(tmp_path, name):
    path = tmp_path / "slow.tar"
    path.write_bytes(
        file("first.jpg") + SLOW[name] + (b"" if name == "none" else file("a.jpg")) + bytes(1024)
    )
    with pytest.raises(PoolError, match=r"slow\.tar.*offset \d+"):
        len(ShardPool(path))


def test_long_but_honest_extended_headers(tmp_path):
    """Attributes of half a megabyte, a thousand global headers, each before a member."""
    path = tmp_path / "long.tar"
    blocks = [
        chunk(b"x", record(b"SCHILY.xattr.user.a", b"=\n " * 160_000) + record(b"path", b"p.jpg")) + file("a")
    ]
    for number in range(1000):
        blocks.append(chunk(b"g", record(b"GNU.sparsely" + b"%d" % number, b"x")) if number % 2 else b"")
        blocks.append(file(f"{number}.jpg"))
    blocks = [block.replace(b"GNU.sparsely", b"comment_long") for block in blocks]
    path.write_bytes(b"".join(blocks) + bytes(1024))
    with tarfile.open(path) as archive:
        names = archive.getnames()
    assert ShardPool(path).keys(range(len(names))) == [name.removesuffix(".jpg") for name in names]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["path", "linkpath", "comment", "mtime", "SCHILY.xattr.user.x"]),
            st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=300),
        ),
        max_size=5,
    )
)
def test_any_pax_records_are_read_as_by_tarfile(write_tar, records):
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = dict(records) | {"path": "folder/" + "n" * 150 + ".jpg", "mtime": "1.5"}
    path = write_tar("pax.tar", [(info, b"1")], tarfile.PAX_FORMAT)
    with tarfile.open(path) as archive:
        (member,) = archive.getmembers()
    index = index_shard(path)
    assert index.keys() == [member.name.removesuffix(".jpg")]
    assert index.member_offset.tolist() == [member.offset_data]


@pytest.mark.parametrize(
    "size", [b"\xff" * 12, b"\xff" + bytes(10) + b"\x01", b"\x80" + b"\xff" * 11, b"-0000000001\0"]
)
def test_sizes_that_no_archive_has(tmp_path, size):
    header = bytearray(file("a.jpg")[:512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "size.tar"
    path.write_bytes(bytes(header) + bytes(512 + 1024))
    with pytest.raises(PoolError, match=r"size\.tar.*offset 0"):
        index_shard(path)


def test_headers_are_io(tmp_path):
    """The helpers above write what tarfile reads."""
    stream = io.BytesIO(chunk(b"x", record(b"path", b"long/a.jpg")) + file("short.jpg", b"abc") + bytes(1024))
    with tarfile.open(fileobj=stream) as archive:
        assert archive.getnames() == ["long/a.jpg"]
