"""Kinds of files, and what reads them."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.chaos.cage import Ending


@dataclass
class Kind:
    """Files of one kind, and what reads them.

    Attributes:
        start: the folder that they lie in.
        find: the files, in the folder of the case.
        reads: by name, functions that read them and return plain values.
        judge: the outcome where a value is not the one expected; None if it is bad.
        names: what an error may name instead of the file.
        change: what is done instead of damage to a file; returns it in words.
    """

    name: str
    start: Path
    find: Callable[[Path], list[Path]]
    reads: dict[str, Callable[[], Any]]
    judge: Callable[[str, Any, Any, Ending], str | None] = lambda *_: None
    names: tuple[str, ...] = ()
    forges: bool = False
    change: Callable[[random.Random], str] | None = None


def digest(*arrays: Any) -> str:
    found = hashlib.sha256()
    for array in arrays:
        array = np.asarray(array)
        found.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]
