"""A cache that a disk, a hand or another program has damaged: the right selection, or one error that says
what to remove, and after that the right selection.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from curated_data import ShardPool, curate
from curated_data.cache.artifacts import MANIFEST, read_json
from curated_data.cache.checksums import file_checksum
from curated_data.config import load_config
from curated_data.errors import CacheError
from curated_data.pipeline.export import export
from curated_data.pipeline.extend import extend
from curated_data.pipeline.inspect import verify_cache
from curated_data.pipeline.recurate import recurate
from tests.support.images import noise, write_samples

CONFIG = {
    "target_size": 12,
    "levels": [{"n_clusters": 8, "n_resamples": 2, "sample_size": 3}, {"n_clusters": 3}],
    "embedding": {"num_workers": 0, "dtype": "float32"},
    "near_duplicates": {"enabled": True, "threshold": 0.99},
}


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 9 // 10] ^= 4
    path.write_bytes(data)


def _fold(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _pickle(path: Path) -> None:
    if path.suffix == ".npy":
        np.save(path, np.array([print, {}], object), allow_pickle=True)
    else:
        path.write_bytes(b"\x80\x04N.")


def _reverse(path: Path) -> None:
    """Other numbers of the same kind, which nothing but a checksum tells from the right ones."""
    if path.suffix == ".npy":
        np.save(path, np.load(path)[::-1].copy())
    else:
        path.write_text("[]")


DAMAGES = {
    "truncated": _truncate,
    "empty": lambda path: path.write_bytes(b""),
    "flipped": _flip,
    "gone": Path.unlink,
    "a folder": _fold,
    "a pipe": _pipe,
    "pickled": _pickle,
    "reversed": _reverse,
}
# Each kind of file, and the stages to remove so that the next run reads it.
FILES = {
    "cache.json": (),
    "pool/*/manifest.json": (),
    "pool/*/shard_start.npy": (),
    "pool/*/key_bytes.npy": (),
    "index/*/arrays.npz": ("pool",),
    "index/*/manifest.json": ("pool",),
    "embeddings/*/*.npy": ("near_duplicates", "tree", "selection"),
    "embeddings/*/*.json": ("near_duplicates", "tree", "selection"),
    "embeddings/*/.pools/*.npz": (),
    "near_duplicates/*/manifest.json": (),
    "pool/*/member_offset.npy": (),
    "pool/*/member_extension.npy": (),
    "near_duplicates/*/keep.npy": ("tree", "selection"),
    "near_duplicates/*/near.npy": ("tree", "selection"),
    "tree/*/manifest.json": (),
    "tree/*/tree/manifest.json": (),
    "tree/*/tree/parent_1.npy": ("selection",),
    "tree/*/tree/centroids_2.npy": (),
    "tree/*/tree/distance.npy": (),
    "selection/*/manifest.json": (),
    "selection/*/ids.npy": (),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A pool with a bad sample, its cache, and the ids selected."""
    folder, images = tmp_path_factory.mktemp("whole"), noise(30)
    images[20] = b"?"
    shards = write_samples(folder / "pool-%06d.tar", ({"png": image} for image in images), max_samples=15)
    found = curate(shards, CONFIG, embedder="pixels:4", cache_dir=folder / "cache")
    return shards, folder / "cache", found.ids


@pytest.mark.long
@pytest.mark.parametrize(
    "names",
    [("flipped", "reversed", "a pipe"), pytest.param(tuple(DAMAGES), marks=pytest.mark.slow, id="all")],
)
@pytest.mark.parametrize("pattern", FILES)
def test_a_damaged_file_gives_the_same_selection_or_says_what_to_remove(whole, pattern, names, tmp_path):
    shards, original, expected = whole
    for name in names:
        cache = tmp_path / name
        shutil.copytree(original, cache)
        (path,) = sorted(cache.glob(pattern))[:1]
        for stage in FILES[pattern]:
            shutil.rmtree(cache / stage)
        DAMAGES[name](path)
        found = None
        for _ in range(3):  # an artifact that was removed may lead to the next thing that is damaged
            if found is None:
                found, error = _curate(shards, cache)
                _do_as_told(error, cache)
        np.testing.assert_array_equal(found, expected, err_msg=name)


def _curate(shards: list[str], cache: Path) -> tuple[np.ndarray | None, str]:
    try:
        return curate(shards, CONFIG, embedder="pixels:4", cache_dir=cache).ids, ""
    except CacheError as error:
        return None, str(error)


def _do_as_told(error: str, cache: Path) -> None:
    """Remove what an error says should be removed."""
    if not error:
        return
    if "remove the shard's .npy and .json" in error:
        first = Path(re.match(r"(\S+?\.(npy|json)):", error.replace(str(cache), "CACHE"))[1])
        for end in (".npy", ".json"):
            path = Path(str(first.with_suffix(end)).replace("CACHE", str(cache)))
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return
    if "remove that file" in error:
        path = cache / "cache.json"
    else:
        match = re.search(r"(?:remove|move) (CACHE/\S+)", error.replace(str(cache), "CACHE"))
        away = re.match(r"(CACHE/\S+): is not an artifact", error.replace(str(cache), "CACHE"))
        assert match or away, error
        path = Path((match or away)[1].replace("CACHE", str(cache)))
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_every_byte_of_a_cache_can_be_looked_at(whole, tmp_path):
    _, original, _ = whole
    shutil.copytree(original, tmp_path / "cache")
    assert verify_cache(tmp_path / "cache") == []
    for pattern in (
        "pool/*/key_bytes.npy",
        "embeddings/*/*.npy",
        "tree/*/tree/parent_1.npy",
        "index/*/*.npz",
    ):
        (path,) = sorted((tmp_path / "cache").glob(pattern))[:1]
        _flip(path)
        (problem,) = verify_cache(tmp_path / "cache")
        assert problem.startswith(f"{path}: damaged (its checksum differs); remove "), problem
        _flip(path)
    assert verify_cache(tmp_path / "cache") == []


def test_a_files_seal_is_its_size_and_crc(tmp_path):
    (tmp_path / "a").write_bytes(b"123456789")
    assert file_checksum(tmp_path / "a") == {"bytes": 9, "crc32": 0xCBF43926}  # the check value of CRC-32


def _grown(shards: list[str], cache: Path, held_out: list[str]) -> Callable[[], object]:
    base = curate(shards[:1], CONFIG, embedder="pixels:4", cache_dir=cache)
    return lambda: extend(shards, CONFIG, tree=base.folders["tree"], embedder="pixels:4", cache_dir=cache)


def _held_out(shards: list[str], cache: Path, held_out: list[str]) -> Callable[[], object]:
    settings = CONFIG["near_duplicates"] | {"held_out": held_out}
    config = CONFIG | {"near_duplicates": settings}
    return lambda: curate(shards[:1], config, embedder="pixels:4", cache_dir=cache)


def _anew(shards: list[str], cache: Path, held_out: list[str]) -> Callable[[], object]:
    pool = ShardPool(shards, cache_dir=cache)
    base = curate(pool, CONFIG, embedder="pixels:4", cache_dir=cache)
    config = load_config(CONFIG)
    return lambda: recurate(pool, config, base=base, share=0.5, embedder="pixels:2", cache_dir=cache)


BUILDERS = {"grown": _grown, "held out": _held_out, "anew": _anew}


@pytest.mark.parametrize("name", BUILDERS)
def test_nothing_is_built_from_damaged_rows(whole, name, tmp_path):
    """Whichever shard of whichever store it is that the build reads rows from."""
    shards, _, _ = whole
    cache = tmp_path / "cache"
    build = BUILDERS[name](shards, cache, shards[1:])
    build()
    caught = 0
    for path in sorted(cache.glob("embeddings/*/*.npy")):
        _forget_what_was_built(cache, keep_base=name == "grown")
        _flip(path)
        _, error = _built(build)
        assert not error or error.startswith(f"{path}: damaged")
        caught += bool(error)
        _flip(path)
    assert caught >= 1 + (name == "held out")
    _forget_what_was_built(cache, keep_base=name == "grown")
    assert _built(build) == (True, "")


def _forget_what_was_built(cache: Path, *, keep_base: bool) -> None:
    """Remove what is built from embeddings, but for the tree that is extended."""
    for stage in ("near_duplicates", "tree", "selection"):
        for folder in (cache / stage).glob("[!.]*"):
            if not (keep_base and stage == "tree" and "base" not in read_json(folder / MANIFEST)["inputs"]):
                shutil.rmtree(folder)


def _built(build: Callable[[], object]) -> tuple[bool, str]:
    try:
        build()
    except CacheError as error:
        return False, str(error)
    return True, ""


def test_a_damaged_index_gives_no_sample_at_all(whole, tmp_path):
    """Neither labels nor bytes of another one: any changed byte is seen before."""
    shards, original, _ = whole
    shutil.copytree(original, tmp_path / "cache")
    for path in sorted((tmp_path / "cache" / "pool").glob("*/*.npy")):
        content = path.read_bytes()
        for place in {8, len(content) // 2, len(content) - 1}:
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(CacheError, match=f"^{path}: "):
                export(ShardPool(shards, cache_dir=tmp_path / "cache"), [0, 29], tmp_path / "out")
        path.write_bytes(content)
    export(ShardPool(shards, cache_dir=tmp_path / "cache"), [0, 29], tmp_path / "out")
