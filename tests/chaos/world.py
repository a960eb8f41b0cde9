"""What is attacked: small pools, the caches of whole runs over them, and the commands that made them."""

import contextlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from curated_data import ShardWriter, cli
from tests.chaos.cage import Cage

LEVELS = [{"n_clusters": 6, "n_resamples": 2, "sample_size": 3}, {"n_clusters": 2}]
CONFIG: dict[str, Any] = {
    "target_size": 9,
    "levels": LEVELS,
    "embedding": {"num_workers": 0, "dtype": "float32", "batch_size": 8},
    "near_duplicates": {"enabled": True, "threshold": 0.999},
}
EMBEDDER = "pixels:2"
QUIET = ("-q",)


class World:
    """Pools and folders of class folders within a cage, which the attacks only read."""

    def __init__(self, cage: Cage, seed: int) -> None:
        self.cage, self.seed = cage, seed
        self.home = cage.inside / "world"
        self.home.mkdir()
        rng = np.random.default_rng(seed)
        images = [rng.integers(0, 256, (6, 6, 3), dtype=np.uint8) for _ in range(36)]
        for place in (7, 19, 31):  # near copies
            images[place] = images[place - 3].copy()
            images[place][0, 0] ^= 1
        with ShardWriter(self.home / "pool-%06d.tar", max_samples=8) as writer:
            for place, image in enumerate(images[:24]):
                writer.write({"__key__": f"k{place:03d}", "png": _png(image), "cls": place % 3})
        (self.home / "grown").mkdir()
        for shard in sorted(self.home.glob("pool-*.tar")):
            shutil.copy2(shard, self.home / "grown" / shard.name)
        with ShardWriter(self.home / "grown" / "more-%06d.tar", max_samples=8) as writer:
            for place, image in enumerate(images[24:], 24):
                writer.write({"__key__": f"k{place:03d}", "png": _png(image), "cls": place % 3})
        for place, image in enumerate(images[:12]):
            folder = self.home / "classes" / f"class{place % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{place:03d}.png").write_bytes(_png(image))
        (self.home / "config.yaml").write_text(json.dumps(CONFIG))  # JSON is YAML
        self.pool = str(self.home / "pool-*.tar")
        self.grown = [self.pool.replace("pool-*", "grown/pool-*"), str(self.home / "grown" / "more-*.tar")]

    def pools(self) -> list[tuple[str, int, int]]:
        """The state of every file that is only read."""
        found = [path for place in ("*.*", "grown/*", "classes/*/*") for path in self.home.glob(place)]
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found]

    def warm_up(self) -> None:
        """Import in this process what the commands import, so that its forks need not."""
        case = self.cage.fresh(None)
        with silent():
            for name, *options in (
                ("curate",),
                ("report", "--out", str(case / "page.html")),
                ("duplicates", "--examples", str(case / "page.html")),
                ("export", "--out", str(case / "out")),
                ("table", "--out", str(case / "table.parquet")),
            ):
                self.curation(name, *options)()
        logging.getLogger("curated_data").handlers.clear()  # which print to what is silent

    def command(self, *arguments: str) -> Callable[[], int]:
        """A command of the package's, to be run in an attacked process."""
        return lambda: run_command([*QUIET, *arguments])

    def curation(self, name: str, *arguments: str, grown: bool = False) -> Callable[[], int]:
        """A command that curates, with the settings of all."""
        pool = self.grown if grown else [self.pool]
        options = ["--cache-dir", str(self.cage.case / "cache"), "--embedder", EMBEDDER, "--device", "cpu"]
        if name not in ("embed", "duplicates", "search"):
            options += ["--config", str(self.home / "config.yaml")]
        return self.command(name, *pool, *options, *arguments)

    def start(self, name: str, *commands: Callable[[], int]) -> Path:
        """A folder in the state that commands leave a fresh one in."""
        self.cage.fresh(None)
        for command in commands:
            ending = self.cage.run(command)
            assert ending.value == 0, (name, ending)
        place = self.home / "starts" / name
        shutil.copytree(self.cage.case, place, symlinks=True)
        return place


def run_command(arguments: list[str]) -> int:
    """The exit status of a command, as a process of its own would have it."""
    torch.set_num_threads(1)
    try:
        return cli.main(arguments)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1


def only(folder: Path, pattern: str) -> Path:
    """The one path of a pattern."""
    (found,) = folder.glob(pattern)
    return found


def tree_of(start: Path) -> str:
    """The name of a start's tree, for `extend`."""
    return only(start, "cache/tree/[!.]*").name


def is_beside(relative: str) -> bool:
    """Whether a file is no result: locks, notes of the clock, and temporary names, which are swept later."""
    parts = relative.split(os.sep)
    return any(part.startswith(".tmp-") or part in (".locks", ".swept", ".holds") for part in parts)


@contextlib.contextmanager
def silent() -> Any:
    """Neither warnings nor output of a warm-up."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()
