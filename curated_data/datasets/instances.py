"""Revisited Oxford and Paris: landmarks to be found again (arXiv 1803.11285)."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from curated_data.datasets.images import Images, existing, need
from curated_data.errors import PoolError


def revisited(root: Path, part: str) -> Images:
    """The queries or the gallery of `roxford5k` or `rparis6k`: `gnd_<name>.pkl` (or .json) and `jpg/`.

    Queries are cut to the box of their landmark, as the protocol has it. Of the pickle plain containers,
    numbers, strings and numpy arrays are read; it can run no code.

    Args:
        root: holds the ground truth and `jpg`.
        part: "queries" or "gallery".
    """
    if part not in ("queries", "gallery"):
        raise PoolError(f"part {part!r}: expected 'queries' or 'gallery'")
    what = f"gnd_{root.name}.pkl (or .json), and the images below jpg/"
    found = sorted(need(root, what).glob("gnd_*.pkl")) + sorted(root.glob("gnd_*.json"))
    if not found:
        raise PoolError(f"{root}: put {what} there")
    content = _read(found[0])
    try:
        names = content["qimlist" if part == "queries" else "imlist"]
        truth, boxes = None, None
        if part == "queries":
            truth = [
                {kind: [int(i) for i in entry.get(kind, ())] for kind in ("easy", "hard", "junk")}
                for entry in content["gnd"]
            ]
            boxes = np.array([entry["bbx"] for entry in content["gnd"]], np.float64).reshape(len(names), 4)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PoolError(
            f"{found[0]}: not the revisited ground truth ({type(error).__name__}: {error})"
        ) from error
    files = existing((root / "jpg" / f"{name}.jpg" for name in names), what)
    return Images(root, files, boxes=boxes, ground_truth=truth)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_bytes())
        else:
            content = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise PoolError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise PoolError(f"{path}: expected a mapping with gnd, imlist and qimlist")
    return content


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, numbers, strings and arrays, and refuses every other name."""

    allowed = ("_reconstruct", "ndarray", "dtype", "scalar")
    modules = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")

    def find_class(self, module: str, name: str) -> Any:
        if module in self.modules and name in self.allowed:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):  # bytes, as older protocols write them
            return super().find_class(module, name)
        if (module, name) in (("builtins", "bytes"), ("__builtin__", "bytes")):  # no bytes: empty arrays
            return bytes
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not plain data")
