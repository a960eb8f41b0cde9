"""The cache: names that tell inputs apart, artifacts that are whole or absent, one builder at a time."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curated_data.cache.artifacts import (
    FORMAT_VERSION,
    build_once,
    fingerprint,
    locked,
    open_cache,
    read_array,
    read_json,
    read_manifest,
    write_manifest,
)
from curated_data.cache.publishing import atomic_path, atomic_save, atomic_write_json
from curated_data.errors import CacheError
from tests.support.programs import run_python

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


def as_key(value):
    """What makes two plain values the same input: their JSON-like structure with types told apart."""
    if isinstance(value, dict):
        return ("map", tuple(sorted((key, as_key(item)) for key, item in value.items())))
    if isinstance(value, list):
        return ("list", tuple(as_key(item) for item in value))
    return (type(value).__name__, repr(value))


@given(PLAIN, PLAIN)
def test_fingerprints_agree_exactly_where_inputs_do(a, b):
    assert (fingerprint(value=a) == fingerprint(value=b)) == (as_key(a) == as_key(b))


def test_fingerprint_of_arrays_sees_values_shape_and_type():
    base = np.arange(6)
    names = {
        fingerprint(x=array)
        for array in (base, base.reshape(2, 3), base.astype(np.int32), base[::-1], base + 1, np.array(3))
    }
    assert len(names) == 6
    assert fingerprint(x=base) == fingerprint(x=np.asfortranarray(base.copy()))


def test_fingerprint_does_not_depend_on_the_process(tmp_path):
    load = "from curated_data.cache.artifacts import fingerprint"
    code = f"{load}; print(fingerprint(a={{'x': 1, 'y': {{'z': [1.5, None]}}}}))"
    seeds = [run_python("-c", code, PYTHONHASHSEED=seed).stdout for seed in "12"]
    assert seeds[0] == seeds[1] == fingerprint(a={"y": {"z": [1.5, None]}, "x": 1}) + "\n"


def test_fingerprint_refuses_what_has_no_value():
    with pytest.raises(TypeError, match="object"):
        fingerprint(x=object())
    with pytest.raises(TypeError, match="object array"):
        fingerprint(x=np.array([object()]))


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    atomic_write_json(tmp_path / "a.json", {"x": 1})

    def fail_halfway():
        with atomic_path(tmp_path / "a.json") as temporary:
            temporary.write_text("{")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    assert read_json(tmp_path / "a.json") == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_came_first_is_kept(tmp_path):
    with atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "x").write_text("mine")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "x").write_text("first")
    assert (tmp_path / "folder" / "x").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def _write_forever(folder: str) -> None:
    for number in range(10**9):
        atomic_save(Path(folder) / "array.npy", np.full(20_000, number))


def test_killed_at_any_moment_the_file_is_whole(tmp_path):
    rng = np.random.default_rng(0)
    context = multiprocessing.get_context("fork")
    for _ in range(12):
        process = context.Process(target=_write_forever, args=(str(tmp_path),))
        process.start()
        while not (tmp_path / "array.npy").exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        array = np.load(tmp_path / "array.npy", allow_pickle=False)
        assert len(array) == 20_000
        assert (array == array[0]).all()


def _build_slowly(folder: str, log: str) -> None:
    def build(temporary: Path) -> None:
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(0.3)
        write_manifest(temporary, "test", {})

    build_once(folder, build)


def test_of_many_processes_one_builds(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_build_slowly, args=(str(tmp_path / "artifact"), str(tmp_path / "log")))
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "built\n"
    assert read_manifest(tmp_path / "artifact", "test")["format"] == FORMAT_VERSION


def test_a_dead_builder_blocks_nobody(tmp_path):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_build_slowly, args=(str(tmp_path / "artifact"), str(tmp_path / "log")))
    process.start()
    while not (tmp_path / "log").exists():
        time.sleep(0.001)
    with locked(tmp_path / "artifact", wait=False) as held:
        assert not held
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    _, found = build_once(tmp_path / "artifact", lambda temporary: write_manifest(temporary, "test", {}))
    assert not found
    assert (tmp_path / "artifact" / "manifest.json").exists()


def test_bad_caches_are_named(tmp_path):
    root = open_cache(tmp_path / "cache")
    assert open_cache(root) == root
    (root / "cache.json").write_text(json.dumps({"format": 999}))
    with pytest.raises(CacheError, match=r"999.*cache_dir"):
        open_cache(root)
    (root / "cache.json").write_text("{")
    with pytest.raises(CacheError, match=r"cache\.json: .*cache_dir"):
        open_cache(root)
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="/file/cache: "):
        open_cache(tmp_path / "file" / "cache")
    with pytest.raises(CacheError, match=r"^cache_dir: "):
        open_cache("")
    write_manifest(root, "tree", {})
    with pytest.raises(CacheError, match=r"'tree'.*'index'"):
        read_manifest(root, "index")


def test_reading_an_artifact_looks_at_its_own_files_alone(tmp_path, monkeypatch):
    """What to do about a damaged file takes a look at every folder above, for each of many shards."""
    root = open_cache(tmp_path)
    folder = root / "stage" / "name"
    folder.mkdir(parents=True)
    np.save(folder / "array.npy", np.arange(3))
    write_manifest(folder, "stage", {})
    looked = []
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **how: looked.append(path) or stat(path, **how))
    manifest = read_manifest(folder, "stage")
    assert read_array(folder, "array", manifest).tolist() == [0, 1, 2]
    assert set(looked) == {folder / "array.npy"}
    (folder / "array.npy").write_bytes(b"?")
    with pytest.raises(CacheError, match=f"{folder}/array.npy: .*remove {folder} "):
        read_array(folder, "array", manifest)


def test_only_old_temporaries_are_swept(tmp_path):
    root = open_cache(tmp_path)
    (root / "tree").mkdir()
    old, young = root / "tree" / ".tmp-old", root / "tree" / ".tmp-young"
    old.mkdir()
    young.mkdir()
    rows, lock = root / "embeddings" / "a" / ".tmp-rows", root / "tree" / ".locks" / "b.lock"
    for path in (rows, lock):
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (0, 0))
    os.utime(old, (0, 0))
    with locked(root / "tree" / "c"):
        held = root / "tree" / ".locks" / "c.lock"
        os.utime(held, (0, 0))
        open_cache(tmp_path)
        assert old.exists()  # it was looked for today
        os.utime(root / ".swept", (0, 0))
        open_cache(tmp_path)
        assert held.exists()
    assert not old.exists()
    assert not rows.exists()
    assert not lock.exists()
    assert young.exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path):
    with pytest.raises(CacheError, match="/proc/curated_data: "):
        open_cache("/proc/curated_data")
    # What a builder fails to find is its own matter, not the cache's.
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "artifact"):
        (tmp_path / "gone" / "pool.tar").read_bytes()


def test_an_artifact_that_appears_between_two_looks_is_one(tmp_path, monkeypatch):
    """Another run publishes it just after this one has found no manifest."""

    def publish(folder):
        folder.mkdir()
        write_manifest(folder, "selection", {})

    def lexists(path, first=os.path.lexists):
        if not first(path):
            Path(path).parent.mkdir(exist_ok=True)
            publish(Path(path))
        return first(path)

    monkeypatch.setattr("os.path.lexists", lexists)
    folder, found = build_once(tmp_path / "selection" / "name", lambda temporary: pytest.fail("built again"))
    assert found
    assert read_manifest(folder, "selection")["stage"] == "selection"
    monkeypatch.undo()
    (tmp_path / "selection" / "other").mkdir()
    with pytest.raises(CacheError, match="/selection/other: "):
        build_once(tmp_path / "selection" / "other", publish)
