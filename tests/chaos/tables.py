"""Archives that are compressed, rows and columns in parquet, and rows that change between two runs: kinds for
`files`.
"""

import bz2
import gzip
import lzma
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard

from curated_data import EmbeddedPool, ShardPool, curate_embeddings
from curated_data.cache.artifacts import open_cache
from curated_data.pool.columns import read_columns
from curated_data.pool.repack import import_archives
from tests.chaos.cage import Ending
from tests.chaos.kinds import Kind, digest
from tests.chaos.world import World

_COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: zstandard.ZstdCompressor(write_checksum=True).compress(content),
}


def archive_kinds(world: World) -> list[Kind]:
    """Shards that were compressed, which `import` repacks."""
    case, start = world.cage.case, world.home / "starts" / "compressed"
    start.mkdir(parents=True)
    (shard, *_) = sorted(world.home.glob("pool-*.tar"))
    for extension, compress in _COMPRESS.items():
        (start / f"old.tar.{extension}").write_bytes(compress(shard.read_bytes()))

    def repacked(file: str) -> Any:
        shards = import_archives(case / file, case / "new")
        pool = ShardPool([str(path) for path in shards])
        return [
            {name: value if isinstance(value, str) else value.hex() for name, value in sample.items()
             if name in ("__key__", "png", "cls")}
            for sample in pool.read(range(len(pool)))
        ]  # fmt: skip

    return [
        Kind(
            f"shards compressed as {extension}", start,
            lambda folder, file=f"old.tar.{extension}": [folder / file],
            {"import": lambda file=f"old.tar.{extension}": repacked(file)},
        )
        for extension in _COMPRESS
    ]  # fmt: skip


def changed_kinds(world: World) -> list[Kind]:
    """Rows in parts that grow, shrink, come, go or change between two runs with one cache."""
    case, start = world.cage.case, world.home / "starts" / "changing rows"
    (start / "parts").mkdir(parents=True)
    rng = np.random.default_rng(1)
    for number in range(3):
        np.save(start / "parts" / f"part-{number}.npy", rng.normal(size=(8, 5)).astype(np.float32))

    def rows(cache: str) -> Any:
        torch.set_num_threads(1)
        store = EmbeddedPool(case / "parts").store(case / cache)
        return [store.shape, digest(store.as_array(), store.valid), store.n_failures]

    world.cage.fresh(start)
    assert world.cage.run(lambda: rows("cache")).how == "done"
    shutil.rmtree(start)
    shutil.copytree(case, start)

    def change(generator: random.Random) -> str:
        return "; ".join(_change_rows(case / "parts", generator) for _ in range(generator.choice((1, 1, 2))))

    def judge(name: str, value: Any, expected: Any, ending: Ending) -> str | None:
        known, fresh = value
        return "taken as it is" if known == fresh else None  # the cache must not tell of earlier rows

    return [
        Kind(
            "rows that change between runs", start, _files("parts/*"),
            {"rows": lambda: [rows("cache"), rows("fresh")]}, judge, ("embeddings", "parts"), change=change,
        )
    ]  # fmt: skip


def table_kinds(world: World) -> list[Kind]:
    """Parquet with rows and columns, and the columns of a pool that a cache keeps."""
    case, start = world.cage.case, world.home / "starts" / "tables"
    (start / "parts").mkdir(parents=True)
    rng = np.random.default_rng(2)
    for number in range(2):
        matrix = rng.normal(size=(8, 5)).astype(np.float32)
        table = pa.table(
            {
                "embedding": pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), 5),
                "key": [f"k{number}{place}" for place in range(8)],
                "score": rng.random(8),
            }
        )
        pq.write_table(table, start / "parts" / f"part-{number}.parquet")
        for name in ("img_emb", "metadata"):  # as clip-retrieval writes them
            (start / "clip" / name).mkdir(parents=True, exist_ok=True)
        np.save(start / "clip" / "img_emb" / f"img_emb_{number}.npy", matrix)
        table = table.drop_columns("embedding").rename_columns({"key": "image_path"})
        pq.write_table(table, start / "clip" / "metadata" / f"metadata_{number}.parquet")

    def clip() -> Any:
        torch.set_num_threads(1)
        pool = EmbeddedPool(case / "clip")
        store = pool.store(case / "cache")
        return [digest(store.as_array(), store.valid), pool.keys(range(len(pool)))]

    def filtered() -> Any:
        torch.set_num_threads(1)
        config = {"target_size": 4, "levels": [{"n_clusters": 3}], "where": "score > 0.2"}
        found = curate_embeddings(case / "parts", config, cache_dir=case / "cache", device="cpu")
        return found.ids.tolist()

    def rows() -> Any:
        torch.set_num_threads(1)
        pool = EmbeddedPool(case / "parts")
        store = pool.store(case / "cache")
        keys = pool.keys(range(len(pool)))
        return [digest(store.as_array(), store.valid), keys, pool.columns(["score"]).to_pydict()]

    def columns() -> Any:
        pool = ShardPool(world.pool, cache_dir=open_cache(case / "cache"))
        return read_columns(pool, ["label", "width", "sharpness"]).to_pydict()

    world.cage.fresh(start)
    for read in (rows, columns, clip, filtered):
        ending = world.cage.run(read)
        assert ending.how == "done", ending
    known = start.with_name("tables, known")
    shutil.copytree(case, known)
    names = ("embeddings", "parts")

    def as_given(*_: Any) -> str:
        return "taken as it is"  # parquet of a user has no checksum

    return [
        Kind("rows in parquet", start, _files("parts/*"), {"rows": rows}, as_given, names),
        Kind("rows in parquet, known", known, _files("parts/*"), {"rows": rows}, as_given, names),
        Kind("rows of clip-retrieval", start, _files("clip/*/*"), {"rows": clip}, as_given, ("clip",)),
        Kind("rows that a condition chooses", known, _files("parts/*"), {"rows": filtered}, as_given, names),
        Kind("kept columns of a pool", known, _files("cache/columns/**/*"), {"columns": columns}),
    ]


def _files(pattern: str) -> Callable[[Path], list[Path]]:
    def find(folder: Path) -> list[Path]:
        found = (path for path in folder.glob(pattern) if path.is_file() and ".locks" not in path.parts)
        return sorted(found)

    return find


def _change_rows(parts: Path, rng: random.Random) -> str:
    """Change the parts as a user may between two runs; each is a whole array before and after."""
    path = rng.choice(sorted(parts.iterdir()))
    array, how = np.load(path), rng.choice(("grow", "truncate", "come", "go", "swap", "change", "touch"))
    if how == "grow":
        added = np.random.default_rng(rng.getrandbits(32)).normal(size=(rng.randint(1, 9), array.shape[1]))
        np.save(path, np.concatenate([array, added.astype(array.dtype)]))
    elif how == "truncate":
        np.save(path, array[: rng.randrange(len(array) + 1)])
    elif how == "come":
        np.save(parts / f"part-{rng.choice((0.5, 9, 10))}.npy", array[::-1])
    elif how == "go":
        path.unlink()
    elif how == "swap":
        other = rng.choice(sorted(parts.iterdir()))
        content = path.read_bytes()
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif how == "change":
        stat = path.stat()
        array[rng.randrange(len(array)) if len(array) else slice(0), 0] += 1
        np.save(path, array)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a copy that keeps times
    else:
        path.touch()
    return f"{path.name}: {how}"
