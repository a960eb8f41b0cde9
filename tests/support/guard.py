"""Hostile names of artifacts, and a guard that notes whatever is destroyed outside of a folder."""

import builtins
import gc
import io
import os
import pathlib
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import strategies as st

from curated_data.cache.layout import REMOVABLE

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
