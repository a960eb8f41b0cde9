"""What is removed, renamed or cut: only what the package owns, whatever a file or a checkpoint names."""

import ast
import builtins
import contextlib
import copy
import gc
import io
import json
import os
import pathlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import curated_data
from curated_data import ClusterTree, CuratedDataModule, RecurationCallback, ShardPool, curate
from curated_data.cache.artifacts import MANIFEST, open_cache, read_manifest, with_checksum
from curated_data.cache.checksums import load_npy
from curated_data.cache.layout import REMOVABLE
from curated_data.cache.remedies import Remedy
from curated_data.cache.removal import artifact_folder, remove, set_aside
from curated_data.clustering.checkpoint import Checkpoint, Running
from curated_data.embedding.store import EmbeddingStore
from curated_data.errors import CacheError, CuratedDataError
from curated_data.pipeline.inspect import inspect_cache, verify_cache
from curated_data.pipeline.reopen import reopen, selections
from curated_data.training.recurating import drop_unheld
from tests.support.images import noise, write_samples

NAME = "0123456789abcdef0123"
HOSTILE = [
    *("/", "..", ".", "", "../../x", "../victim", "/etc", "//", "tree/..", "tree/../..", f"tree/{NAME}/.."),
    *(f"tree/{NAME}/", f"/tree/{NAME}", f"tree//{NAME}", f"../{NAME}", f"tree/{NAME}\n", f"tree\\{NAME}"),
    *(f"tree/{NAME.upper()}", f"tree/{NAME}\0", "\0", "a" * 5000, "~", "*", "tree/*", f"index/{NAME}"),
    *(None, True, 1, -1, 1.5, float("nan"), b"tree", [], {}, ["/"], {"/": "/"}, ("..",), [NAME], 10**400),
    "tree/" + chr(0x660) * 20,  # digits, but none of ours
]
NAMES = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(max_size=30),
    st.lists(st.sampled_from(["..", "/", "tree", NAME, "~", "\0", "."]), max_size=6).map("/".join),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
)
DEVICES = (pathlib.Path("/dev"), pathlib.Path("/proc"))


def is_artifact(name: object, stages: str = "|".join(REMOVABLE)) -> bool:
    return isinstance(name, str) and re.fullmatch(f"({stages})/[0-9a-f]{{20}}", name) is not None


def is_removable(name: object) -> bool:
    return is_artifact(name, "embeddings|near_duplicates|tree")


class Guard:
    """Notes every destructive call outside of `root`, and does not make it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        gc.collect()  # holds of earlier tests remove their own locks as they are collected
        self.root, self.outside = Path(root).resolve(), []
        for name in ("remove", "unlink", "rmdir", "rename", "replace", "truncate", "removedirs", "renames"):
            monkeypatch.setattr(os, name, self._guarded(getattr(os, name)))
        for name in ("rmtree", "move"):
            monkeypatch.setattr(shutil, name, self._guarded(getattr(shutil, name)))
        monkeypatch.setattr(os, "ftruncate", self._guarded(os.ftruncate, is_handle=True))
        monkeypatch.setattr(os, "open", self._opened(os.open))
        monkeypatch.setattr(builtins, "open", self._opened_by_mode(open))
        monkeypatch.setattr(io, "open", builtins.open)

    def _is_inside(self, path: object, dir_fd: int | None = None) -> bool:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}").removesuffix(" (deleted)")
        if dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), os.fsdecode(path))
        path = Path(os.fsdecode(path)).absolute()
        real = path.parent.resolve() / path.name
        return self.root in real.parents or any(place in real.parents for place in DEVICES)

    def _guarded(self, original, *, is_handle=False):
        def call(path, *arguments, **named):
            to = arguments[:1] if original.__name__ in ("rename", "replace", "move", "renames") else ()
            for place in (path, *to):
                if not self._is_inside(place, named.get("dir_fd")):
                    self.outside.append((original.__name__, place))
                    raise AssertionError(f"{original.__name__}({place!r})")
            return original(path, *arguments, **named)

        return call

    def _opened(self, original):
        def call(path, flags, *arguments, **named):
            if flags & (os.O_TRUNC | os.O_CREAT) and not self._is_inside(path, named.get("dir_fd")):
                self.outside.append(("open", path))
                raise AssertionError(f"open({path!r})")
            return original(path, flags, *arguments, **named)

        return call

    def _opened_by_mode(self, original):
        def call(file, mode="r", *arguments, **named):
            if set(mode) & set("wax+") and not isinstance(file, int) and not self._is_inside(file):
                self.outside.append(("open", file))
                raise AssertionError(f"open({file!r})")
            return original(file, mode, *arguments, **named)

        return call


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A pool, and a cache with every kind of artifact."""
    folder = tmp_path_factory.mktemp("original")
    shards = write_samples(folder / "pool-%06d.tar", ({"png": image} for image in noise(20)), max_samples=10)
    config = {
        "target_size": 6,
        "levels": [{"n_clusters": 4}, {"n_clusters": 2}],
        "embedding": {"num_workers": 0},
        "near_duplicates": {"enabled": True, "threshold": 0.99},
    }
    curation = curate(shards, config, embedder="pixels:2", cache_dir=folder / "cache")
    return shards, folder / "cache", config, curation.folders["selection"].name


@pytest.fixture
def place(original, tmp_path):
    """A copy of the cache beside a folder that must not change."""
    shards, cache, config, selection = original
    shutil.copytree(cache, tmp_path / "home" / "cache")
    (tmp_path / "home" / "victim").mkdir()
    (tmp_path / "home" / "victim" / "precious").write_text("years of work")
    (tmp_path / "home" / "cache" / "victim").write_text("of the user, in the cache")
    return shards, tmp_path / "home" / "cache", config, selection


def no_harm(cache: Path):
    victims = (cache.parent / "victim" / "precious", cache / "victim")
    assert [path.read_text() for path in victims] == ["years of work", "of the user, in the cache"]


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
    with pytest.raises(CacheError, match="is a link"):
        artifact_folder(tmp_path / "cache", f"tree/{NAME}")
    (tmp_path / "cache" / "selection").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="lies outside"):
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


STATE = {
    "n_recurations": 1, "last_step": 4, "best": None, "epochs_without_gain": 0, "unfinished": None,
    "artifacts": [f"tree/{NAME}"], "selection": NAME,
}  # fmt: skip


def test_a_callback_takes_the_state_that_it_writes(tmp_path):
    callback = RecurationCallback(1)
    for state in (STATE, callback.state_dict(), STATE | {"best": 0.5, "unfinished": {"epoch": 1, "step": 2}}):
        loaded = RecurationCallback(1)
        loaded.load_state_dict(copy.deepcopy(state))
        assert loaded.state_dict() == state
    loaded = RecurationCallback(1)
    loaded.load_state_dict({name: value for name, value in STATE.items() if name != "selection"})
    assert loaded.state_dict()["selection"] is None


@given(st.sampled_from(sorted(STATE)), NAMES | NAMES.map(lambda name: [name]))
@settings(max_examples=300, deadline=None)
def test_a_callback_refuses_what_no_re_curation_writes(field, value):
    """Any value but those of the field's own kind, with one error that names the field."""
    is_count = type(value) is int and 0 <= value < 2**62
    is_right = {
        "best": value is None or type(value) in (int, float),
        "unfinished": value is None,
        "artifacts": isinstance(value, list) and all(is_removable(name) for name in value),
        "selection": value is None or re.fullmatch("[0-9a-f]{20}", str(value)) is not None,
    }.get(field, is_count)
    callback = RecurationCallback(1)
    if is_right:
        callback.load_state_dict(STATE | {field: value})
        return
    with pytest.raises(CacheError, match=field):
        callback.load_state_dict(STATE | {field: value})
    assert callback.state.artifacts == []
    with pytest.raises(CacheError, match="RecurationCallback"):
        RecurationCallback(1).load_state_dict({name: STATE[name] for name in STATE if name != "artifacts"})


@pytest.mark.parametrize("name", [*HOSTILE, f"selection/{NAME}"])
def test_no_state_has_anything_removed(place, name, monkeypatch):
    _, cache, _, _ = place
    before = snapshot(cache.parent)
    guard = Guard(cache, monkeypatch)
    for artifacts in (name, [name], [name] * 2, {name: 1} if isinstance(name, str) else name, [[name]]):
        if artifacts == []:
            continue
        with pytest.raises(CacheError):
            RecurationCallback(1).load_state_dict(STATE | {"artifacts": artifacts})
    assert guard.outside == []
    monkeypatch.undo()
    assert snapshot(cache.parent) == before


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


def rewrite(path: Path, change) -> None:
    content = json.loads(path.read_text())
    content.pop("seal", None)
    path.write_text(json.dumps(with_checksum(change(content))))


def everything(shards, cache, config, selection, name) -> None:
    """Everything that reads the cache; an error is one of ours."""
    reads = [
        lambda: curate(shards, config, embedder="pixels:2", cache_dir=cache),
        lambda: reopen(cache, selection),
        lambda: reopen(cache, name),
        lambda: selections(cache),
        lambda: inspect_cache(cache),
        lambda: verify_cache(cache),
        lambda: len(ShardPool(shards, cache_dir=cache)),
    ]
    for read in reads:
        with contextlib.suppress(CuratedDataError):
            read()


FIELDS = {
    "tree/*/manifest.json": [
        ("inputs", "embedder"),
        ("inputs", "near_duplicates"),
        ("inputs",),
        ("settings",),
    ],
    "tree/*/tree/manifest.json": [("n_levels",), ("distance",), ("files",)],
    "selection/*/manifest.json": [("inputs", "tree"), ("inputs",), ("report",), ("settings",), ("files",)],
    "near_duplicates/*/manifest.json": [("files",), ("inputs",)],
    "pool/*/manifest.json": [("files",), ("shards",), ("extensions",)],
    "index/*/manifest.json": [("files",), ("extensions",)],
    "embeddings/*/*.json": [("file",), ("failures",), ("samples",)],
    "cache.json": [("format",)],
}
PLACES = [(pattern, keys) for pattern, fields in FIELDS.items() for keys in fields]


@pytest.mark.long
@pytest.mark.parametrize(("pattern", "keys"), PLACES)
def test_no_name_in_a_file_leads_out_of_the_cache(place, pattern, keys, monkeypatch):
    shards, cache, config, selection = place
    (path, *_) = sorted(cache.glob(pattern))
    content = path.read_text()
    guard = Guard(cache, monkeypatch)
    for name in [
        "/",
        "..",
        "../../victim",
        str(cache.parent / "victim"),
        "",
        "\0",
        3,
        None,
        ["/"],
        {"..": 1},
    ]:
        is_of_files = keys == ("files",)

        def change(found, name=name, is_of_files=is_of_files):
            inner = found
            for key in keys[:-1]:
                inner = inner[key]
            inner[keys[-1]] = {str(name): {"bytes": 13, "crc32": 0}} if is_of_files else name
            return found

        rewrite(path, change)
        everything(shards, cache, config, selection, name)
        assert guard.outside == []
        no_harm(cache)
        if not path.exists():
            break
        path.write_text(content)


def test_a_manifest_whose_names_climb_is_damaged(tmp_path):
    for name in ("..", ".", "", "/etc/passwd", "../x", "a/b", "\0"):
        content = {"stage": "tree", "format": 1, "files": {name: {"bytes": 3, "crc32": 0}}}
        (tmp_path / MANIFEST).write_text(json.dumps(with_checksum(content)))
        with pytest.raises(CacheError, match=r"manifest\.json: damaged"):
            read_manifest(tmp_path, "tree")
    for seal in (None, 3, "x", {}, {"bytes": "3", "crc32": 0}, {"bytes": 3}, {"bytes": True, "crc32": 0}, []):
        content = {"stage": "tree", "format": 1, "files": {"a.npy": seal}}
        (tmp_path / MANIFEST).write_text(json.dumps(with_checksum(content)))
        with pytest.raises(CacheError, match=r"manifest\.json: damaged"):
            read_manifest(tmp_path, "tree")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_stream_takes_no_selection_by_a_path(place, name, monkeypatch):
    shards, cache, _, _ = place
    np.save(cache.parent / "victim" / "ids.npy", np.arange(3))
    data = CuratedDataModule(shards, cache_dir=cache, loader={"num_workers": 0})
    state = {"epoch": 0, "batch": 0, "n_trained": 0, "global_batch_size": None, "order": None,
             "selection": None, "next_selection": None}  # fmt: skip
    guard = Guard(cache, monkeypatch)
    for field in state:
        if (name is None and field not in ("epoch", "batch", "n_trained")) or state[field] == name:
            continue
        if (field, type(name)) in (
            ("global_batch_size", int),
            ("order", str),
            ("epoch", int),
            ("batch", int),
        ):
            continue
        if field == "n_trained" and type(name) is int and name >= 0:
            continue
        with pytest.raises(CacheError, match=field):
            data.load_state_dict(state | {field: name})
    assert guard.outside == []
    no_harm(cache)


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
    with pytest.raises(CacheError, match="is a link"):
        tree.save(own / "link")
    assert (own / "tree" / "notes.txt").exists()
    assert guard.outside == []
    monkeypatch.undo()
    assert (victim / "precious").read_text() == "years of work"


def test_a_store_of_odd_shards_is_damaged(place):
    _, cache, _, selection = place
    (tree,) = (cache / "tree").glob("[!.]*")
    for name in (b"../../victim", b"/etc/passwd", b"..", b"", b"\xff"):
        np.save(tree / "shards.npy", np.array([name, b"x"], "S20"))
        from curated_data.cache.checksums import file_checksum

        seal = file_checksum(tree / "shards.npy")
        rewrite(
            tree / MANIFEST, lambda found, seal=seal: found | {"files": found["files"] | {"shards.npy": seal}}
        )
        with pytest.raises(CacheError, match="damaged"):
            reopen(cache, selection)


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


def test_a_loaded_store_names_its_shards_files(place):
    _, cache, _, _ = place
    (folder,) = (cache / "embeddings").glob("[!.]*")
    shards = sorted(path.stem for path in folder.glob("*.json"))
    store = EmbeddingStore(folder, shards, 12, "float16")
    assert torch.isfinite(torch.from_numpy(store.as_array())).all()
    rewrite(folder / f"{shards[0]}.json", lambda found: found | {"failures": [{"place": 99}]})
    for table in (folder / ".pools").glob("*"):
        table.unlink()
    with pytest.raises(CacheError, match=rf"{shards[0]}\.json: damaged \(failures"):
        EmbeddingStore(folder, shards, 12, "float16")


@pytest.mark.long
@pytest.mark.parametrize("artifacts", ["absolute", "climbing", "letters", "selection", "link"])
def test_a_training_checkpoint_has_no_folder_removed(write_pool, tmp_path, artifacts):
    """Plain values in a checkpoint file, as `weights_only` loads them, in a whole run that re-curates."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from tests.support.recuration_runs import SIZES, fit

    shards, cache, victim = write_pool(SIZES), tmp_path / "cache", tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("years of work")
    saving = ModelCheckpoint(tmp_path / "k", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    callbacks = [RecurationCallback(1), saving]
    fit(shards, cache, None, epochs=2, callbacks=callbacks, enable_checkpointing=True)
    path = tmp_path / "k" / "step=6.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (key,) = (key for key in checkpoint["callbacks"] if "Recuration" in key)
    state = checkpoint["callbacks"][key]
    (tmp_path / "cache" / "tree" / NAME).symlink_to(victim)
    state["artifacts"] = {
        "absolute": [str(victim)],
        "climbing": ["../victim", "tree/../../victim"],
        "letters": str(victim),
        "selection": [f"selection/{state['selection']}"],
        "link": [f"tree/{NAME}"],
    }[artifacts]
    torch.save(checkpoint, path)
    before = {found for found in tmp_path.rglob("*") if ".locks" not in found.parts}
    resumed = {"epochs": 3, "callbacks": [RecurationCallback(1)], "ckpt_path": path}
    if artifacts == "link":  # of the right form, so it is looked at, and stays
        fit(shards, cache, None, **resumed)
    else:
        with pytest.raises(CacheError, match="artifacts"):
            fit(shards, cache, None, **resumed)
        assert before <= {found for found in tmp_path.rglob("*") if ".locks" not in found.parts}
    assert (victim / "precious").read_text() == "years of work"
    assert (cache / "selection" / state["selection"]).is_dir()
