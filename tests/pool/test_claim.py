"""One writer at a time: the living are left alone, the dead started over, nothing of others is removed."""

import multiprocessing
import os
import signal
import socket
import time

import fsspec
import pytest

from curated_data.errors import CacheError, PoolError
from curated_data.pool import ShardPool, ShardWriter
from curated_data.pool import claim as claims
from tests.support.small_shards import names_in, samples, write


def stopped_writer(place, begun, end, count=5):
    with ShardWriter(place, max_samples=2) as writer:
        for sample in samples(count):
            writer.write(sample)
        begun.set()
        end.wait(60)
        if end.is_set() and count == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def run_writer(place, count=5):
    processes = multiprocessing.get_context("fork")
    begun, end = processes.Event(), processes.Event()
    process = processes.Process(target=stopped_writer, args=(place, begun, end, count))
    process.start()
    assert begun.wait(60)
    return process, end


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_living_writer_is_left_alone(tmp_path, overwrite):
    process, end = run_writer(tmp_path, count=4)
    try:
        before = {path.name: path.read_bytes() for path in tmp_path.glob("s*.tar")}
        assert before
        for place in (tmp_path, tmp_path / "shard-%03d.tar", f"file://{tmp_path}"):
            with pytest.raises(PoolError, match=rf"process {process.pid}\b"):
                write(place, overwrite=overwrite)
        assert {path.name: path.read_bytes() for path in tmp_path.glob("s*.tar")} == before
        assert write(tmp_path / "other-%d.tar")  # another pattern is another's business
    finally:
        end.set()
        process.join()
    assert process.exitcode == 0
    assert len(ShardPool(f"{tmp_path}/shard-*.tar")) == 4


def test_after_a_dead_writer_its_files_go_and_no_others(tmp_path):
    process, end = run_writer(tmp_path)
    end.set()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "shard-000001.tar").exists()
    (tmp_path / "shard-000009.tar").write_bytes(b"of somebody else")
    with pytest.raises(PoolError, match=r"shard-000009\.tar"):
        write(tmp_path, 1)
    assert (tmp_path / "shard-000009.tar").read_bytes() == b"of somebody else"
    assert (tmp_path / "shard-000001.tar").exists()
    (tmp_path / "shard-000009.tar").unlink()
    write(tmp_path, 1)
    assert os.listdir(tmp_path) == ["shard-000000.tar"]


def test_a_child_that_outlives_a_killed_writer_is_waited_for(tmp_path):
    """A command that a writer was starting shares its lock until it runs."""
    marker_locked = multiprocessing.get_context("fork").Event()

    def killed():
        writer = ShardWriter(tmp_path)
        if os.fork() == 0:
            marker_locked.set()
            time.sleep(2)
            os._exit(0)
        marker_locked.wait(60)
        writer.write(samples(1)[0])
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    write(tmp_path, 1)
    assert os.listdir(tmp_path) == ["shard-000000.tar"]


def test_two_writers_in_one_process(tmp_path, bucket):
    for place in (tmp_path, bucket):
        with ShardWriter(place) as first:
            first.write(samples(1)[0])
            for overwrite in (False, True):
                with pytest.raises(PoolError, match=rf"process {os.getpid()}\b"):
                    ShardWriter(place, overwrite=overwrite)
        assert len(ShardPool(first.shards)) == 1


def test_a_living_writer_of_an_overlapping_pattern(tmp_path):
    with ShardWriter(tmp_path / "x-1%d.tar") as first:
        first.write(samples(1)[0])
        first.publish()
        with pytest.raises(PoolError, match=rf"process {os.getpid()}\b"):
            ShardWriter(tmp_path / "x-%d.tar", overwrite=True)
        assert (tmp_path / "x-10.tar").exists()
    assert len(ShardPool(first.shards)) == 1
    write(tmp_path / "x-%d.tar", 1, overwrite=True)
    assert os.listdir(tmp_path) == ["x-0.tar"]


def test_a_writer_that_was_dropped_is_dead(tmp_path):
    writer = ShardWriter(tmp_path, max_samples=1)
    for sample in samples(2):
        writer.write(sample)
    del writer
    write(tmp_path, 1)
    assert os.listdir(tmp_path) == ["shard-000000.tar"]


@pytest.mark.parametrize("line", ["../victim", "/etc/passwd", "", "shard-000000.tar/../../victim", "\0"])
def test_names_in_a_marker_are_not_trusted(tmp_path, line):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "victim").write_text("mine")
    (out / "notes.txt").write_text("mine")
    (out / ".shard-#.tar.unfinished").write_text(f"host 1 {'0' * 32}\nnotes.txt\n{line}\n")
    write(out, 1)
    assert (tmp_path / "victim").read_text() == "mine"
    assert sorted(os.listdir(out)) == ["notes.txt", "shard-000000.tar"]


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_planted_marker_is_not_followed(tmp_path, kind):
    victim, marker = tmp_path / "victim", tmp_path / "out" / ".shard-#.tar.unfinished"
    victim.write_text("mine")
    marker.parent.mkdir()
    marker.symlink_to(victim) if kind == "link" else os.mkfifo(marker)
    with pytest.raises(CacheError, match="unfinished"):
        write(tmp_path / "out", 1)
    assert victim.read_text() == "mine"


def test_a_writer_of_another_host(bucket):
    memory = fsspec.filesystem("memory")
    write(bucket, 1)
    memory.pipe(f"{bucket}/.shard-#.tar.unfinished", f"elsewhere 7 {'0' * 32}\nshard-000000.tar\n".encode())
    with pytest.raises(PoolError, match="elsewhere process 7"):
        write(bucket, 1)
    assert names_in(bucket) == [".shard-#.tar.unfinished", "shard-000000.tar"]
    write(bucket, 3, overwrite=True)
    assert names_in(bucket) == ["shard-000000.tar", "shard-000001.tar"]


def test_a_dead_writer_in_a_store(bucket):
    """Of this host and a process that has ended: it is started over unasked."""
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    header = f"{socket.gethostname()} {process.pid} {'0' * 32}"
    write(bucket, 4)
    fsspec.filesystem("memory").pipe(
        f"{bucket}/.shard-#.tar.unfinished", f"{header}\nshard-000000.tar\nshard-000001.tar\n".encode()
    )
    write(bucket, 1)
    assert names_in(bucket) == ["shard-000000.tar"]


def test_who_was_taken_over_stops(bucket, monkeypatch):
    writer = ShardWriter(bucket, max_samples=1)
    writer.write(samples(1)[0])
    monkeypatch.setattr(claims.socket, "gethostname", lambda: "elsewhere")
    with ShardWriter(bucket, overwrite=True, max_samples=1) as other:
        other.write(samples(1)[0])
    with pytest.raises(PoolError, match=bucket):
        writer.write(samples(2)[1])
    assert names_in(bucket) == ["shard-000000.tar"]


def test_a_folder_of_that_name_is_not_removed(tmp_path):
    (tmp_path / "shard-000000.tar").mkdir()
    (tmp_path / "shard-000000.tar" / "x").touch()
    with pytest.raises(PoolError, match=r"shard-000000\.tar"):
        write(tmp_path, overwrite=True)
    assert (tmp_path / "shard-000000.tar" / "x").exists()
