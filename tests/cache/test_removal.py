"""What is removed, renamed or cut: only what the package owns, whatever a file or a checkpoint names."""

import ast
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import curated_data
from curated_data import ClusterTree
from curated_data.cache.artifacts import open_cache
from curated_data.cache.checksums import load_npy
from curated_data.cache.layout import REMOVABLE
from curated_data.cache.remedies import Remedy
from curated_data.cache.removal import artifact_folder, remove, set_aside
from curated_data.clustering.checkpoint import Checkpoint, Running
from curated_data.errors import CacheError
from curated_data.training.recurating import drop_unheld
from tests.support.guard import NAME, NAMES, Guard, is_artifact


@given(NAMES.filter(lambda name: not is_artifact(name)))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_only_a_stage_and_a_fingerprint_become_a_path(tmp_path, name):
    with pytest.raises(CacheError) as caught:
        artifact_folder(tmp_path, name)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    assert not drop_unheld(tmp_path, name)


def test_an_artifact_is_found_where_its_name_says(tmp_path):
    for stage in REMOVABLE:
        assert artifact_folder(tmp_path, f"{stage}/{NAME}") == tmp_path.resolve() / stage / NAME
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache" / "tree").mkdir(parents=True)
    (tmp_path / "cache" / "tree" / NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match=f"tree/{NAME}: .*link"):
        artifact_folder(tmp_path / "cache", f"tree/{NAME}")
    (tmp_path / "cache" / "selection").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match=f"selection/{NAME}: .*{tmp_path}/cache"):
        artifact_folder(tmp_path / "cache", f"selection/{NAME}")


def test_what_lies_outside_is_not_removed(tmp_path, monkeypatch):
    own, other = tmp_path / "own", tmp_path / "other"
    own.mkdir()
    (other / "deep").mkdir(parents=True)
    (own / "link").symlink_to(other)
    (own / "loop").symlink_to(own / "loop")
    guard = Guard(own, monkeypatch)
    refused = [
        own, own / ".", own / "..", own / "x" / "..", other, own / ".." / "other", own / "link" / "deep", "/",
        "", ".", "..", f"{own}/\0", own / "loop" / "x", own / ("a" * 300) / "b", Path("/"), "relative",
    ]  # fmt: skip
    for path in refused:
        for function in (remove, set_aside):
            with pytest.raises((CacheError, OSError)) as caught:  # a name that is too long is the system's
                function(path, below=own)
            assert isinstance(caught.value, CacheError) or "aaa" in str(path)
    for path in (other, "/etc", "/tmp", Path.home()):
        with pytest.raises(CacheError):
            remove(path, below="/")
    assert guard.outside == []
    remove(own / "link", below=own)  # the link itself
    remove(own / "missing", below=own)
    remove(own / "missing" / "deep", below=own)
    assert (other / "deep").is_dir()
    assert [path.name for path in own.iterdir()] == ["loop"]


def test_a_killed_removal_leaves_nothing_under_the_name(tmp_path, monkeypatch):
    folder = tmp_path / "tree" / NAME
    (folder / "tree").mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(folder, below=tmp_path)
    assert not folder.exists()
    monkeypatch.undo()
    root = open_cache(tmp_path)
    os.utime(root / ".swept", (0, 0))
    open_cache(tmp_path)
    assert list((tmp_path / "tree").iterdir()) == []  # at the next sweep, without waiting for a week


def test_a_named_artifact_goes_and_nothing_else(place, monkeypatch):
    _, cache, _, _ = place
    guard = Guard(cache, monkeypatch)
    (tree,) = (cache / "tree").glob("[!.]*")
    others = {path for path in cache.rglob("*") if tree not in (path, *path.parents)}
    assert drop_unheld(cache, f"tree/{tree.name}")
    assert drop_unheld(cache, f"tree/{tree.name}")  # it is gone
    assert {path for path in cache.rglob("*") if ".locks" not in path.parts} == {
        path for path in others if ".locks" not in path.parts
    }
    assert guard.outside == []


def test_checkpoints_and_trees_remove_no_more_than_their_own(tmp_path, monkeypatch):
    own, victim = tmp_path / "own", tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("years of work")
    own.mkdir()
    guard = Guard(own, monkeypatch)
    saved = Checkpoint(own / "checkpoint", "run")
    saved.save("work.running-000001", {"x": np.arange(3)})
    for name in (
        "work.running-abc",
        "work.running-",
        "work.running-0000001x",
        "work.running-" + chr(0x660) * 6,
    ):
        shutil.copytree(own / "checkpoint" / "work.running-000001", own / "checkpoint" / name)
    (own / "checkpoint" / "link").symlink_to(victim)
    (own / "checkpoint" / ".tmp-link").symlink_to(victim)
    running = Running(saved, "work.running", 0.0)
    np.testing.assert_array_equal(running.load()["x"], np.arange(3))
    Checkpoint(own / "checkpoint", "run")
    for name in ("link", "..", "../../victim", str(victim)):
        saved.drop(name)
    assert guard.outside == []
    tree = ClusterTree({1: np.zeros((1, 2), np.float32)}, {1: np.zeros(3, np.int64)})
    tree.save(own / "tree")
    tree.save(own / "tree")
    (own / "tree" / "notes.txt").write_text("of the user")
    with pytest.raises(CacheError, match=r"notes\.txt"):
        tree.save(own / "tree")
    (own / "link").symlink_to(victim)
    with pytest.raises(CacheError, match="/own/link: "):
        tree.save(own / "link")
    assert (own / "tree" / "notes.txt").exists()
    assert guard.outside == []
    monkeypatch.undo()
    assert (victim / "precious").read_text() == "years of work"


@pytest.mark.parametrize("where", ["plain", "linked cache", "linked artifact", "no cache", "beside a marker"])
def test_remedies_name_nothing_but_artifacts(where, tmp_path):
    cache = tmp_path / "home" / "cache"
    folder = cache / "tree" / NAME / "tree"
    folder.mkdir(parents=True)
    if where != "no cache":
        (cache / "cache.json").write_text("{}")
    if where == "linked cache":
        (tmp_path / "link").symlink_to(cache)
        folder = tmp_path / "link" / "tree" / NAME / "tree"
    if where == "linked artifact":
        shutil.move(cache / "tree" / NAME, tmp_path / "moved")
        (cache / "tree" / NAME).symlink_to(tmp_path / "moved")
    if where == "beside a marker":
        folder = cache / "documents" / "letters"
        folder.mkdir(parents=True)
        (folder / "letter").touch()
    text = str(Remedy(folder / "parent_1.npy"))
    if where in ("no cache", "beside a marker"):
        assert "remove" not in text
    else:
        assert text.startswith(f"remove {folder.parent} ")


@given(
    st.lists(st.sampled_from(["/", "..", ".", "home", "cache.json", "manifest.json", "\0", "~"]), max_size=6)
)
def test_remedies_of_any_path_name_no_folder_outside_a_cache(parts):
    assert "remove" not in str(Remedy(Path("/", *parts) / "parent_1.npy"))
    with pytest.raises(CacheError) as caught:
        load_npy(Path("/", *parts), Remedy(Path("/", *parts)))
    assert "remove /" not in str(caught.value)


# What may call what, besides `removal` itself. A replacement is not a removal: it publishes what was written.
ALLOWED = {
    "cache/publishing.py": {"replace"},
    "clustering/tree.py": {"replace"},
    "embedding/precomputed.py": {"truncate"},  # a file of its own without a name
    "cache/locks.py": {"ftruncate"},
    "pool/out.py": {"replace"},
    "pool/shard_cache.py": {"truncate"},
}
DESTRUCTIVE = {
    *("remove", "unlink", "rmdir", "rename", "renames", "replace", "removedirs", "rmtree", "truncate"),
    *("ftruncate", "move"),
}


def test_no_module_removes_by_itself():
    root = Path(curated_data.__file__).parent
    strangers = []
    for path in sorted(root.rglob("*.py")):
        name = str(path.relative_to(root))
        allowed = ALLOWED.get(name, set()) | (DESTRUCTIVE if name == "cache/removal.py" else set())
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                if isinstance(node, ast.ImportFrom) and node.module in ("os", "shutil"):
                    strangers += [
                        f"{name}: from {node.module}" for item in node.names if item.name in DESTRUCTIVE
                    ]
                continue
            called, owner = node.func.attr, node.func.value
            if called not in DESTRUCTIVE or called in allowed:
                continue
            of_module = isinstance(owner, ast.Name) and owner.id in ("os", "shutil")
            # `text.replace(a, b)`, `dataclasses.replace` and `list.remove(x)` are not about files.
            of_path = called in ("unlink", "rmdir", "rmtree", "truncate") or (
                called in ("rename", "replace") and len(node.args) == 1 and not node.keywords
            )
            if of_module or (of_path and not (isinstance(owner, ast.Attribute) and owner.attr == "_stream")):
                strangers.append(f"{name}:{node.lineno}: {ast.unparse(node)[:60]}")
    assert strangers == []
