"""Shards as written: readable by webdataset, reproducible, whole or absent."""

import io
import json
import multiprocessing
import os
import signal
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curated_data.errors import PoolError
from curated_data.pool import ShardPool, ShardWriter, import_folder


def shards_in(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*.tar"))}


def samples(count):
    return [{"__key__": f"folder/{i:03d}", "txt": f"text {i}", "cls": i % 7} for i in range(count)]


def test_stock_webdataset_reads_what_was_written(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    written = [
        {
            "__key__": "a",
            "jpg": b"\xff\xd8",
            "cls": 3,
            "txt": "für",
            "json": {"b": [1, None], "a": "x"},
            "npy": array,
        },
        {"__key__": "deep/er/" + "k" * 150, "jpg": b"", "__url__": "left out", "seg.png": bytearray(b"png")},
        {"__key__": "zoë/2", "cls": np.int64(-1), "txt": "t"},
    ]
    with ShardWriter(tmp_path / "out") as writer:
        for sample in written:
            writer.write(sample)
    assert [path.name for path in writer.shards] == ["shard-000000.tar"]
    found = list(webdataset.WebDataset(str(writer.shards[0]), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [sample["__key__"] for sample in written]
    first, second, third = (
        {name: content for name, content in sample.items() if not name.startswith("__")} for sample in found
    )
    assert np.array_equal(np.load(io.BytesIO(first.pop("npy"))), array)
    assert json.loads(first.pop("json")) == {"b": [1, None], "a": "x"}
    assert first == {"jpg": b"\xff\xd8", "cls": b"3", "txt": "für".encode()}
    assert second == {"jpg": b"", "seg.png": b"png"}
    assert third == {"cls": b"-1", "txt": b"t"}
    pool = ShardPool(writer.shards)
    own = pool.read(np.arange(3))
    assert [{k: v for k, v in sample.items() if k != "__local_path__"} for sample in found] == own


def test_equal_samples_give_equal_bytes(tmp_path, monkeypatch):
    for name in ("a", "b"):
        monkeypatch.setattr("time.time", lambda name=name: 1e9 if name == "a" else 2e9)
        with ShardWriter(tmp_path / name, max_samples=4) as writer:
            for sample in samples(10):
                writer.write(sample)
    assert shards_in(tmp_path / "a") == shards_in(tmp_path / "b")
    assert list(shards_in(tmp_path / "a")) == [f"shard-00000{i}.tar" for i in range(3)]
    with tarfile.open(tmp_path / "a" / "shard-000000.tar") as archive:
        assert {(info.mtime, info.uid, info.gid, info.uname) for info in archive} == {(0, 0, 0, "")}


def test_shards_keep_to_their_limits(tmp_path):
    with ShardWriter(tmp_path / "x-%03d.tar", max_bytes=10_000) as writer:
        for i, size in enumerate([100, 9000, 50_000, 10, 10, 10]):
            writer.write({"__key__": str(i), "bin": bytes(size)})
    counts = [len(ShardPool(path)) for path in writer.shards]
    assert counts == [1, 1, 1, 3]
    assert writer.shards[3] == tmp_path / "x-003.tar"
    assert writer.n_samples == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"x-00{i}.tar" for i in range(4)]


key = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key, st.text(st.sampled_from("abzA./_é"), min_size=1, max_size=5), st.booleans())
def test_a_sample_is_read_back_or_refused(tmp_path, read_by_webdataset, key, extension, latin):
    if latin:
        raw = "".join(chr(0xDC80 + ord(letter) % 128) for letter in key)  # bytes, mostly no UTF-8
        key = raw.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    with ShardWriter(tmp_path / "p-%d.tar", overwrite=True) as writer:
        try:
            writer.write({"__key__": key, extension: b"content"})
        except PoolError:
            return
    expected = [{"__key__": key, "__url__": str(writer.shards[0]), extension: b"content"}]
    assert read_by_webdataset(writer.shards[0]) == expected
    assert ShardPool(writer.shards).read([0]) == expected


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"jpg": b""}, "'__key__'.*None"),
        ({"__key__": "a"}, "'a' has no member"),
        ({"__key__": "a.b", "jpg": b""}, r"'a\.b\.jpg'.*'a\.b'"),
        ({"__key__": "a", "JPG": b""}, r"'a\.JPG'"),
        ({"__key__": "__a__/b", "jpg": b""}, r"'__a__/b\.jpg'"),
        ({"__key__": "a", "jpg": 1.5}, "'a', member 'jpg': .*float"),
        ({"__key__": "a", "npy": np.array([{}])}, "'a', member 'npy': .*ndarray"),
        ({"__key__": "last", "jpg": b""}, "'last'"),
    ],
)
def test_what_cannot_be_read_back_is_refused(tmp_path, sample, message):
    with ShardWriter(tmp_path / "out") as writer:
        writer.write({"__key__": "last", "txt": ""})
        with pytest.raises(PoolError, match=message):
            writer.write(sample)
    assert len(ShardPool(writer.shards)) == 1


@pytest.mark.parametrize("pattern", ["out.tar", "a-%d-%d.tar", "%d/x.tar", "x-%d-%s.tar"])
def test_bad_patterns(tmp_path, pattern):
    with pytest.raises(PoolError, match=repr(str(tmp_path / pattern))):
        ShardWriter(tmp_path / pattern)


def test_finished_shards_are_not_replaced_unasked(tmp_path):
    def write(count, **options):
        with ShardWriter(tmp_path / "out", max_samples=2, **options) as writer:
            for sample in samples(count):
                writer.write(sample)

    write(5)
    before = shards_in(tmp_path / "out")
    with pytest.raises(PoolError, match=r"shard-000000\.tar: 3 "):
        write(2)
    assert shards_in(tmp_path / "out") == before
    write(2, overwrite=True)  # the surplus of the longer run goes
    assert list(shards_in(tmp_path / "out")) == ["shard-000000.tar"]


@pytest.mark.parametrize("end", ["error", "kill"])
def test_an_unfinished_run_is_begun_again(tmp_path, end):
    """Stopped in its second shard, it leaves the first one whole; the next run ends as if alone."""

    def write(folder, stop_at=None):
        with ShardWriter(tmp_path / folder, max_samples=3) as writer:
            for i, sample in enumerate(samples(8)):
                if i == stop_at:
                    if end == "error":
                        raise RuntimeError("stop")
                    os.kill(os.getpid(), signal.SIGKILL)
                writer.write(sample)

    if end == "error":
        with pytest.raises(RuntimeError, match="stop"):
            write("out", 5)
    else:
        run = multiprocessing.get_context("fork").Process(target=write, args=("out", 5))
        run.start()
        run.join()
        assert run.exitcode == -signal.SIGKILL
    assert list(shards_in(tmp_path / "out")) == ["shard-000000.tar"]
    write("whole")
    assert (
        shards_in(tmp_path / "out")["shard-000000.tar"] == shards_in(tmp_path / "whole")["shard-000000.tar"]
    )
    write("out")
    assert shards_in(tmp_path / "out") == shards_in(tmp_path / "whole")


class TestImport:
    def make(self, root, names, photo):
        for i, name in enumerate(names):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photo(i))

    def test_classes(self, tmp_path, photo):
        names = ["dog/2.jpg", "dog/1.JPEG", "cat/sub/3.png", "cat/0.jpg", "eel/x.webp"]
        self.make(tmp_path / "in", names, photo)
        (tmp_path / "in" / "cat" / "notes.txt").write_text("no image")
        (tmp_path / "in" / "cat" / ".DS_Store").write_text("")
        (tmp_path / "in" / "README").write_text("")
        shards = import_folder(tmp_path / "in", tmp_path / "out", max_samples=2)
        assert len(shards) == 3
        assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["cat", "dog", "eel"]
        pool = ShardPool(shards)
        found = pool.read(np.arange(len(pool)))
        assert [sample["__key__"] for sample in found] == ["cat/0", "cat/sub/3", "dog/1", "dog/2", "eel/x"]
        assert pool.labels(np.arange(5)).tolist() == [0, 0, 1, 1, 2]
        assert json.loads(found[1]["json"]) == {"class_name": "cat"}
        assert found[1]["png"] == (tmp_path / "in" / "cat/sub/3.png").read_bytes()
        assert found[2]["jpeg"] == (tmp_path / "in" / "dog/1.JPEG").read_bytes()

    @pytest.mark.slow  # importing torchvision takes seconds
    def test_agrees_with_torchvision(self, tmp_path, photo):
        from torchvision.datasets import ImageFolder

        self.make(tmp_path / "in", ["b/1.jpg", "a/2.png", "c/d/e.jpg", "a/10.jpg", "B/1.jpg"], photo)
        expected = ImageFolder(tmp_path / "in")
        pool = ShardPool(import_folder(tmp_path / "in", tmp_path / "out"))
        keys = [os.path.relpath(path, tmp_path / "in").rpartition(".")[0] for path, _ in expected.samples]
        assert pool.keys(np.arange(len(pool))) == keys
        assert pool.labels(np.arange(len(pool))).tolist() == expected.targets

    def test_no_classes(self, tmp_path, photo):
        self.make(tmp_path / "in", ["b.jpg", "a.png"], photo)
        pool = ShardPool(import_folder(tmp_path / "in", tmp_path / "out-%d.tar"))
        assert pool.keys([0, 1]) == ["a", "b"]
        assert pool.labels([0, 1]).tolist() == [-1, -1]
        assert not list(tmp_path.glob("*.json"))

    def test_names_that_would_collide(self, tmp_path, photo):
        names = [
            "c/a.jpg",
            "c/a.png",
            "c/a.v1.jpg",
            "c/a%2Ev1.jpg",
            "c.d/x.jpg",
            "c/__m__.jpg",
            "c/b.jpg",
            "c/b.JPG",
        ]
        self.make(tmp_path / "in", names, photo)
        pool = ShardPool(import_folder(tmp_path / "in", tmp_path / "out"))
        keys = pool.keys(np.arange(len(pool)))
        assert len(pool) == len(set(keys)) == len(names)
        assert "c.d/x" in keys
        assert {"c/a%2Ejpg", "c/a%2Epng", "c/b%2EJPG", "c/b%2Ejpg"} < set(keys)
        one_kind = ShardPool(import_folder(tmp_path / "in", tmp_path / "jpg", image_extensions=".JPG"))
        assert len(one_kind) == len(names) - 1

    @pytest.mark.parametrize(
        ("names", "message"), [([], "/in'"), (["a/x.txt"], "/in'"), (["a/x.jpg", "y.jpg"], r"y\.jpg: .*'a'")]
    )
    def test_bad_folders(self, tmp_path, photo, names, message):
        (tmp_path / "in").mkdir()
        self.make(tmp_path / "in", names, photo)
        with pytest.raises(PoolError, match=message):
            import_folder(tmp_path / "in", tmp_path / "out")
        with pytest.raises(PoolError, match=r"nowhere"):
            import_folder(tmp_path / "nowhere", tmp_path / "out")

    def test_what_cannot_be_read_is_named_and_nothing_left_out(self, tmp_path, photo, monkeypatch):
        self.make(tmp_path / "in", ["a/x.jpg"], photo)
        (tmp_path / "in" / "a" / "y.jpg").symlink_to("y.jpg")  # a loop, which no rights open
        with pytest.raises(PoolError, match=r"in/a/y\.jpg: "):
            import_folder(tmp_path / "in", tmp_path / "out")
        (tmp_path / "in" / "a" / "y.jpg").unlink()
        listed = os.scandir

        def scandir(place):
            if os.fspath(place).endswith("/a"):
                raise PermissionError(13, "Permission denied", os.fspath(place))
            return listed(place)

        monkeypatch.setattr(os, "scandir", scandir)
        with pytest.raises(PoolError, match=r"in/a: .*Permission denied"):
            import_folder(tmp_path / "in", tmp_path / "out")
        with pytest.raises(PoolError, match=r"in/a: .*Permission denied"):
            import_folder(tmp_path / "in" / "a", tmp_path / "out")
