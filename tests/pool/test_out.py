"""Where shards and exports go: folders, stores, `~`, and full disks."""

import errno
import io
import itertools
import multiprocessing
import os
import re
import signal
from pathlib import Path

import fsspec
import numpy as np
import pytest

from curated_data import CuratedDataModule, curate
from curated_data.cache.artifacts import open_cache
from curated_data.cli import main
from curated_data.errors import CacheError, ConfigError, CuratedDataError, PoolError
from curated_data.pipeline.export import export
from curated_data.pool import ShardPool, ShardWriter, import_folder, out
from curated_data.report.page import write_report
from tests.support.small_shards import contents, names_in, samples, write


class TestStores:
    def test_shards_go_to_memory(self, bucket, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        shards = write(f"{bucket}/deep/part-%03d.tar")
        assert shards == [f"{bucket}/deep/part-00{i}.tar" for i in range(3)]
        assert names_in(f"{bucket}/deep") == [f"part-00{i}.tar" for i in range(3)]
        pool = ShardPool(shards)
        assert contents(pool.read(np.arange(5))) == contents(
            ShardPool(write(tmp_path / "local")).read(range(5))
        )
        assert os.listdir(tmp_path) == ["local"]

    def test_shards_go_to_s3(self, s3, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        options, url = s3
        shards = write(f"{url}/pool", storage_options=options)
        assert shards == [f"{url}/pool/shard-00000{i}.tar" for i in range(3)]
        assert names_in(f"{url}/pool", **options) == [f"shard-00000{i}.tar" for i in range(3)]
        pool = ShardPool(f"{url}/pool/*.tar", storage_options=options)
        assert pool.labels(np.arange(5)).tolist() == [0, 1, 2, 0, 1]
        exported = export(pool, [3, 1], f"{url}/selected")  # with the options of the pool
        assert names_in(f"{url}/selected", **options) == ["ids.npy", "manifest.json", "shard-000000.tar"]
        assert len(ShardPool(exported, storage_options=options)) == 2
        with pytest.raises(PoolError, match=r"shard-000000\.tar: 3 "):
            write(f"{url}/pool", 1, storage_options=options)
        write(f"{url}/pool", 1, storage_options=options, overwrite=True)
        assert names_in(f"{url}/pool", **options) == ["shard-000000.tar"]
        assert not os.listdir(tmp_path)
        with pytest.raises(CacheError, match="no-such-bucket"):
            write("s3://no-such-bucket/pool", storage_options=options)

    def test_an_error_leaves_no_part_of_a_shard(self, bucket):
        with ShardWriter(bucket, max_samples=2) as writer:
            for sample in samples(3):
                writer.write(sample)
            writer.__exit__(RuntimeError, RuntimeError("stop"), None)
        assert names_in(bucket) == [".shard-#.tar.unfinished", "shard-000000.tar"]
        write(bucket)
        assert names_in(bucket) == [f"shard-00000{i}.tar" for i in range(3)]

    @pytest.mark.parametrize("scheme", ["file://", "local://"])
    def test_the_scheme_of_local_files(self, scheme, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        shards = write(f"{scheme}{tmp_path}/out")
        assert shards[0] == tmp_path / "out" / "shard-000000.tar"
        assert os.listdir(tmp_path) == ["out"]
        assert open_cache(f"{scheme}{tmp_path}/cache") == tmp_path / "cache"

    def test_a_url_in_a_path(self, bucket, tmp_path, monkeypatch):
        """`Path` makes one slash of two."""
        monkeypatch.chdir(tmp_path)
        assert write(Path(f"{bucket}/x"))[0] == f"{bucket}/x/shard-000000.tar"
        assert len(ShardPool(Path(f"{bucket}/x/*.tar"))) == 5
        assert not os.listdir(tmp_path)

    @pytest.mark.parametrize(
        "place", ["http://127.0.0.1:1/x", "nosuch://x/y", "simplecache::memory://x", "pipe:cat"]
    )
    def test_what_cannot_be_written_is_named(self, place, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for use in (write, lambda place: import_folder(tmp_path, place)):
            (tmp_path / "a.jpg").write_bytes(b"x")
            with pytest.raises(CuratedDataError, match=re.escape(place)):
                use(place)
        assert os.listdir(tmp_path) == ["a.jpg"]

    def test_where_files_grow_in_sight_they_are_renamed_when_whole(self, bucket, monkeypatch):
        """As on SFTP or HDFS: a shard never stands under its name in part."""
        from fsspec.implementations.memory import MemoryFileSystem

        monkeypatch.setattr(out, "_WHOLE", ())
        seen = []
        put = MemoryFileSystem.put_file

        def put_file(self, local, remote, **options):
            seen.append(remote.rpartition("/")[2])
            return put(self, local, remote, **options)

        monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
        shards = write(f"{bucket}/deep")
        assert all(name.startswith(".tmp-") for name in seen)
        assert names_in(f"{bucket}/deep") == [f"shard-00000{i}.tar" for i in range(3)]
        assert len(ShardPool(shards)) == 5
        fsspec.filesystem("memory").pipe(
            f"{bucket}/deep/.tmp-{'0' * 12}-shard-000007.tar", b"of a killed run"
        )
        write(f"{bucket}/deep", 1, overwrite=True)
        assert names_in(f"{bucket}/deep") == ["shard-000000.tar"]

    def test_a_store_that_fails_is_one_error(self, bucket, monkeypatch):
        from fsspec.implementations.memory import MemoryFileSystem

        monkeypatch.setattr("time.sleep", lambda seconds: None)
        calls = []

        def refuse(self, *arguments, **options):
            calls.append(arguments)
            raise OSError("503 slow down" + "\n" + "\0binary" * 1000)

        with ShardWriter(bucket) as writer:
            writer.write(samples(1)[0])
            monkeypatch.setattr(MemoryFileSystem, "put_file", refuse)
            with pytest.raises(CacheError, match=r"shard-000000\.tar: .*503") as caught:
                writer.publish()
            with pytest.raises(PoolError, match=f"{bucket}: .*closed"):
                writer.write(samples(1)[0])
        assert len(calls) == 3
        assert len(str(caught.value)) < 500
        monkeypatch.undo()
        assert names_in(bucket) == [".shard-#.tar.unfinished"]  # not taken for finished

    def test_import_export_and_report_from_the_command_line(self, bucket, write_pool, tmp_path, monkeypatch):
        shards = write_pool([12])
        place = ["--cache-dir", str(tmp_path / "cache"), "--embedder", "pixels:4", "--target-size", "3"]
        monkeypatch.chdir(tmp_path)
        before = {*os.listdir(tmp_path), "cache"}
        assert main(["-q", "export", *shards, *place, "--out", f"{bucket}/out"]) == 0
        beside = ["README.md", "clusters.npy", "croissant.json", "curation.parquet", "curation.png"]
        assert names_in(f"{bucket}/out") == [*beside, "ids.npy", "manifest.json", "shard-000000.tar"]
        assert main(["-q", "report", *shards, *place, "--out", f"{bucket}/report.html"]) == 0
        assert main(["-q", "curate", *shards, *place, "--ids", f"{bucket}/ids.npy"]) == 0
        memory = fsspec.filesystem("memory")
        assert memory.cat(f"{bucket}/report.html").startswith(b"<!")
        ids = np.load(io.BytesIO(memory.cat(f"{bucket}/ids.npy")))
        assert np.array_equal(np.sort(np.load(io.BytesIO(memory.cat(f"{bucket}/out/ids.npy")))), ids)
        assert set(os.listdir(tmp_path)) == before


class TestLocalOnly:
    def test_a_url_for_a_cache_is_refused(self, write_pool, tmp_path, monkeypatch):
        shards = write_pool([6])
        monkeypatch.chdir(tmp_path)
        before = os.listdir(tmp_path)
        for url in ("s3://bucket/cache", "memory://x", Path("s3://bucket/cache")):
            for use in (
                open_cache,
                lambda url: ShardPool(shards, cache_dir=url),
                lambda url: ShardPool(shards).with_cache(url),
                lambda url: curate(shards, {"target_size": 2}, embedder="pixels:4", cache_dir=url),
                lambda url: CuratedDataModule(shards, cache_dir=url),
            ):
                with pytest.raises(CacheError, match=r"^cache_dir: .*(s3|memory):/"):
                    use(url)
        assert main(["index", *shards, "--cache-dir", "s3://bucket/cache"]) == 2
        assert main(["inspect", "s3://bucket/cache"]) == 2
        assert os.listdir(tmp_path) == before

    def test_a_url_for_a_file_that_is_read(self, write_pool, tmp_path):
        with pytest.raises(ConfigError, match=r"^selection: 's3://b/ids\.npy'"):
            CuratedDataModule(write_pool([6]), selection="s3://b/ids.npy").setup("fit")
        with pytest.raises(ConfigError, match=r"^folder: 's3://b/images'"):
            import_folder("s3://b/images", tmp_path / "out")

    def test_home_is_home_everywhere(self, write_pool, tmp_path, monkeypatch):
        shards = write_pool([6])
        home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
        home.mkdir(), elsewhere.mkdir()
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.chdir(elsewhere)
        assert write("~/out")[0] == home / "out" / "shard-000000.tar"
        assert len(ShardPool("~/out/*.tar")) == 5
        assert len(ShardPool(Path("~/out/shard-000000.tar"))) == 2
        export(ShardPool(shards, cache_dir="~/cache"), [0], "~/exported")
        (home / "images").mkdir()
        (home / "images" / "a.jpg").write_bytes(b"x")
        import_folder("~/images", "~/imported")
        curation = curate(shards, {"target_size": 2}, embedder="pixels:4", cache_dir="~/cache")
        write_report(curation, ShardPool(shards), "~/report.html")
        np.save(home / "ids.npy", np.array([1, 2]))
        (home / "c.yaml").write_text("target_size: 2\n")
        options = ["--embedder", "pixels:4", "--config=~/c.yaml", "--cache-dir=~/cache"]
        assert main(["-q", "curate", *shards, *options, "--ids=~/chosen.npy"]) == 0
        data = CuratedDataModule(
            shards, selection="~/ids.npy", loader={"num_workers": 0}, batch_size=2, image_size=8
        )
        data.setup("fit")
        assert data.train_dataloader() is not None
        assert {"out", "cache", "exported", "imported", "report.html", "chosen.npy"} <= set(os.listdir(home))
        assert not os.listdir(elsewhere)


class TestExports:
    def test_what_an_earlier_export_wrote_beside_is_kept(self, tmp_path):
        pool = ShardPool(write(tmp_path / "pool", 6))
        export(pool, [0, 1], tmp_path / "out" / "train-%d.tar")
        before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        with pytest.raises(PoolError, match=r"manifest\.json"):
            export(pool, [2], tmp_path / "out" / "val-%d.tar")
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before

    @pytest.mark.long
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_killed_at_any_file_it_starts_over(self, tmp_path, overwrite):
        """Killed before and after each rename and removal, in turn."""
        pool = ShardPool(write(tmp_path / "pool", 6))
        export(pool, [0, 1, 2, 3], tmp_path / "whole", max_samples=2)
        expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
        out, step = tmp_path / "out", 0
        while True:
            if overwrite and step == 0:
                export(pool, [5, 4, 3, 2, 1], out, max_samples=1)
            process = multiprocessing.get_context("fork").Process(
                target=killed_export, args=(pool, out, step, overwrite)
            )
            process.start()
            process.join()
            step += 1
            if process.exitcode == 0:
                break
            if (
                not overwrite
                and not (out / ".shard-#.tar.unfinished").exists()
                and (out / "ids.npy").exists()
            ):
                break  # killed after its end
            assert process.exitcode == -signal.SIGKILL
        assert step > 10
        assert {path.name: path.read_bytes() for path in out.iterdir()} == expected


def killed_export(pool, out, step, overwrite):
    """Export, and die at the `step`th file event."""
    events = itertools.count()

    def event():
        if next(events) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def deadly(call):
        def wrapped(*arguments, **options):
            event()
            result = call(*arguments, **options)
            event()
            return result

        return wrapped

    for name in ("replace", "rename", "unlink", "fsync"):
        setattr(os, name, deadly(getattr(os, name)))
    export(pool, [0, 1, 2, 3], out, max_samples=2, overwrite=overwrite)


class TestFullDisks:
    @pytest.mark.long
    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_a_failing_disk_is_one_error(self, tmp_path, monkeypatch, code, call, write_pool):
        pool = ShardPool(write_pool([6]))
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "a.jpg").write_bytes(b"x")
        curation = curate(pool, {"target_size": 2}, embedder="pixels:4", cache_dir=tmp_path / "cache")

        def fail(*arguments):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, call, fail)
        for number, use in enumerate(
            (
                write,
                lambda place: export(pool, [0], place),
                lambda place: import_folder(tmp_path / "images", place),
                lambda place: write_report(curation, pool, place / "report.html"),
            )
        ):
            place = tmp_path / f"out-{number}"
            with pytest.raises(CacheError, match=f"out-{number}") as caught:
                use(place)
            assert os.strerror(code) in str(caught.value)
            assert not [name for name in os.listdir(place) if name.startswith((".tmp-", "s", "r"))]

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux")
    def test_a_full_disk_while_a_shard_is_written(self, tmp_path, monkeypatch):
        """Every write fails as on a full disk; the next run starts over."""
        opened = open

        def full(path, mode="r", *arguments, **options):
            is_shard = "x" in mode and "shard" in str(path)
            if is_shard:
                opened(path, mode).close()
            return opened("/dev/full", "wb") if is_shard else opened(path, mode, *arguments, **options)

        monkeypatch.setattr("builtins.open", full)
        writer = ShardWriter(tmp_path)
        with pytest.raises(CacheError, match=rf"shard-000000\.tar: .*{os.strerror(errno.ENOSPC)}"):
            writer.write({"__key__": "a", "bin": bytes(1 << 20)})
        monkeypatch.undo()
        assert os.listdir(tmp_path) == [".shard-#.tar.unfinished"]
        write(tmp_path, 1)
        assert os.listdir(tmp_path) == ["shard-000000.tar"]
