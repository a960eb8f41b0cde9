"""Ways to damage a file, each by a seeded generator, in words."""

import json
import math
import os
import random
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from curated_data.cache.artifacts import with_checksum
from curated_data.cache.checksums import file_checksum

NAME = "0123456789abcdef0123"


def damage(path: Path, rng: random.Random, others: Sequence[Path], victim: Path) -> str:
    """Damage a file in a way that fits its kind; returns what was done.

    Args:
        others: files of the same kind.
        victim: a file outside, for links to lead to.
    """
    ways: list[Callable[..., str]] = [_cut, _flip, _flip, _zero, _zero, _swap, _not_a_file, _odd_content]
    if path.suffix == ".json" and path.stat().st_size:
        ways += [_json_text, _json_text]
    if path.suffix == ".npy":
        ways += [_header, _header]
    way = rng.choice(ways if path.stat().st_size else [_not_a_file, _odd_content])
    return way(path, rng, others, victim)


def forge(path: Path, rng: random.Random) -> str:
    """Hostile values in a JSON object or an array, with the checksums of their artifact made to fit."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        content.pop("seal", None)
        what = mutate(content, rng)
        path.write_text(json.dumps(with_checksum(content)))
    else:
        what = _other_array(path, rng)
    manifest = path.parent / "manifest.json"
    if path.name != "manifest.json" and manifest.is_file():
        content = json.loads(manifest.read_text())
        content.pop("seal", None)
        content["files"][path.name] = file_checksum(path)
        manifest.write_text(json.dumps(with_checksum(content)))
    details = path.with_suffix(".json")
    if path.suffix == ".npy" and details.is_file():
        content = json.loads(details.read_text())
        content.pop("seal", None)
        content["file"] = file_checksum(path)
        details.write_text(json.dumps(with_checksum(content)))
    return f"forged: {what}"


def hostile(rng: random.Random, depth: int = 0) -> Any:
    """A value that no file of ours holds, or not there."""
    simple: list[Any] = [
        *(None, True, False, -1, 0, 1, 1 << 31, 1 << 63, -(1 << 63), 10**300, 1e308, -0.5, math.nan),
        *(math.inf, "", "/", "..", "../../canary", "/etc/passwd", "~", "a" * 3000, "\0", "\ud800", "x\ny"),
        *(f"tree/{NAME}", f"../{NAME}", NAME, "float32", "manifest.json", "[]", [], {}, [[]], {"": {}}),
    ]
    if depth < 3 and rng.random() < 0.2:
        values = [hostile(rng, depth + 1) for _ in range(rng.randint(0, 3))]
        return values if rng.random() < 0.5 else {str(value)[:20]: value for value in values}
    return rng.choice(simple)


def mutate(content: Any, rng: random.Random) -> str:
    """Put a hostile value somewhere into nested dicts and lists."""
    places = list(_places(content))
    if not places:
        return "nothing to change"
    container, key = rng.choice(places)
    how = rng.random()
    if how < 0.15:
        del container[key]
        return f"{key!r} removed"
    container[key] = value = hostile(rng)
    return f"{key!r} = {repr(value)[:60]}"


def _places(content: Any) -> Any:
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(items):
        yield content, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _cut(path: Path, rng: random.Random, others: Sequence[Path], victim: Path) -> str:
    size = rng.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"cut to {size} bytes"


def _flip(path: Path, rng: random.Random, others: Sequence[Path], victim: Path) -> str:
    data, bits = bytearray(path.read_bytes()), rng.choice((1, 1, 1, 2, 8))
    places = [rng.randrange(8 * len(data)) for _ in range(bits)]
    for place in places:
        data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    return f"bits flipped at {[place // 8 for place in places]}"


def _zero(path: Path, rng: random.Random, others: Sequence[Path], victim: Path) -> str:
    data, page = bytearray(path.read_bytes()), rng.choice((16, 512, 4096))
    start = rng.randrange(len(data)) // page * page
    stop = min(start + page, len(data))
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)
    return f"bytes {start} to {stop} zeroed"


def _swap(path: Path, rng: random.Random, others: Sequence[Path], victim: Path) -> str:
    if not others:
        return _cut(path, rng, others, victim)
    other = rng.choice(others)
    path.write_bytes(other.read_bytes())
    return f"replaced by {other.parent.name}/{other.name}"


def _not_a_file(path: Path, rng: random.Random, others: Sequence[Path], victim: Path) -> str:
    how = rng.choice(
        ("gone", "folder", "full folder", "pipe", "loop", "link out", "link to itself", "broken")
    )
    aside = path.with_name(f"{path.name}.aside")
    if how == "link to itself":
        path.rename(aside)
        path.symlink_to(aside.name)
        return "a link to what it was"
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "full folder":
        path.mkdir()
        (path / "manifest.json").write_text("{}")
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "loop":
        path.symlink_to(path)
    elif how == "link out":
        path.symlink_to(victim)
    elif how == "broken":
        path.symlink_to(victim.parent / "nothing")
    return how


def _odd_content(path: Path, rng: random.Random, others: Sequence[Path], victim: Path) -> str:
    how = rng.choice(("empty", "noise", "pickle", "appended", "zeros", "text"))
    before = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "noise": rng.randbytes(rng.choice((1, 100, 5000))),
            "pickle": b"\x80\x04c__builtin__\nprint\n.",
            "appended": before + rng.randbytes(rng.choice((1, 512))),
            "zeros": bytes(len(before) or 512),
            "text": b"<html>503</html>\n",
        }[how]
    )
    return how


def _json_text(path: Path, rng: random.Random, others: Sequence[Path], victim: Path) -> str:
    deep = 100_000
    texts = {
        "deep list": "[" * deep,
        "deep object": '{"a":' * deep,
        "closed deep list": "[" * deep + "]" * deep,
        "huge number": '{"format": 1' + "0" * 5000 + "}",
        "NaN": '{"format": NaN, "stage": Infinity}',
        "null": "null",
        "list": "[1, 2]",
        "string": '"x"',
        "two": "{} {}",
        "double keys": '{"format": 1, "format": 2}',
        "surrogate": '{"format": "\\ud800"}',
        "UTF-16": '{"format": 1}'.encode("utf-16"),
    }
    if rng.random() < 0.4:
        try:
            content = json.loads(path.read_text())
        except ValueError:
            content = {"a": 1}
        what = mutate(content, rng)
        path.write_text(json.dumps(content))
        return what
    how = rng.choice(list(texts))
    text = texts[how]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return how


def _header(path: Path, rng: random.Random, others: Sequence[Path], victim: Path) -> str:
    """Another header before the same bytes."""
    data = path.read_bytes()
    body = data[10 + int.from_bytes(data[8:10], "little") :]
    dtype = rng.choice(("<f8", ">f4", "|O", "|S3", "<U9", "|V0", "<M8[s]", "<c16", "|b1", "<i8", "x", "<f4"))
    shape = rng.choice(
        ("(3,)", "(-1,)", "(1 << 60,)", "(9999999999999,)", "()", "(0,)", "(2, 0)", "'x'", "(1,) * 99")
    )
    text = (
        f"{{'descr': '{dtype}', 'fortran_order': {rng.choice(('False', 'True', '3'))}, 'shape': {shape}, }}"
    )
    if rng.random() < 0.1:
        text = "(" * 5000
    head = text.encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + body)
    return f"header {text[:90]}"


def _other_array(path: Path, rng: random.Random) -> str:
    array = np.load(path)
    how = rng.choice(("dtype", "shape", "values", "empty", "scalar", "reversed", "text", "header"))
    if how == "header":
        return _header(path, rng, (), path)
    if how == "values":
        array = array.copy()
        extreme = np.array([-1, 1 << 40, -(1 << 62), 0, 5])[rng.randrange(5)]
        with np.errstate(all="ignore"):
            array.reshape(-1)[rng.randrange(max(1, array.size)) :][:1] = (
                extreme.astype(array.dtype) if array.dtype.kind in "iufb" else b"../x"
            )
    new = {
        "dtype": lambda: (
            array.astype(rng.choice(("f8", "i2", ">i8", "u8", "c8")))
            if array.dtype.kind in "iufb"
            else array.astype("U30")
        ),
        "shape": lambda: array[None],
        "values": lambda: array,
        "empty": lambda: array[:0],
        "scalar": lambda: array.reshape(-1)[0] if array.size else array,
        "reversed": lambda: array[::-1],
        "text": lambda: np.array(["a", "b"]),
    }[how]()
    np.save(path, new)
    return f"array: {how} {zlib.crc32(path.read_bytes()):x}"


def remove_stages(cache: Path, stages: Sequence[str]) -> None:
    """Have the next run read what these stages were made of."""
    for stage in stages:
        shutil.rmtree(cache / stage, ignore_errors=True)
