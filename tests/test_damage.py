"""A cache that a disk, a hand or another program has damaged: the right selection, or one error that says
what to remove, and after that the right selection.
"""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from curated_data import curate
from curated_data.errors import CacheError
from curated_data.inspect import verify_cache
from curated_data.seals import file_seal

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
    from tests.conftest import png

    folder = tmp_path_factory.mktemp("whole")
    rng = np.random.default_rng(0)
    from curated_data import ShardWriter

    with ShardWriter(folder / "pool-%06d.tar", max_samples=15) as writer:
        for place in range(30):
            image = png(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) if place != 20 else b"?"
            writer.write({"__key__": f"k{place:03d}", "png": image})
    shards = sorted(map(str, folder.glob("pool-*.tar")))
    found = curate(shards, CONFIG, embedder="pixels:4", cache_dir=folder / "cache")
    return shards, folder / "cache", found.ids


@pytest.mark.parametrize(
    "names", [("flipped", "reversed"), pytest.param(tuple(DAMAGES), marks=pytest.mark.slow, id="all")]
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
        away = re.match(r"(CACHE/\S+): is no artifact", error.replace(str(cache), "CACHE"))
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
    assert file_seal(tmp_path / "a") == {"bytes": 9, "crc32": 0xCBF43926}  # the check value of CRC-32
