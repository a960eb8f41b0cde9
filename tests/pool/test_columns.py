"""Columns of pools, against what was written, Pillow and scikit-image's definitions by hand."""

import io
import json
import os
import re
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image, ImageStat

from curated_data import ShardPool
from curated_data.errors import ConfigError, PoolError
from curated_data.pool import columns


def picture(rng, shape=(20, 30), kind="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def scored(tmp_path) -> list[str]:
    """Two shards with images, texts and JSON, and parquet beside them, as img2dataset writes."""
    rng = np.random.default_rng(0)
    paths = []
    for shard in range(2):
        path = tmp_path / f"{shard:05d}.tar"
        keys = []
        with webdataset.TarWriter(str(path), mtime=0) as writer:
            for place in range(6):
                key = f"{shard:05d}{place:04d}"
                keys.append(key)
                content = {"nsfw": place % 2 == 0, "deep": {"score": place / 10}, "tags": ["a"]}
                if place == 3:
                    content = {"nsfw": None}
                image = picture(rng, (20 + place, 30)) if place != 5 else b"no image"
                writer.write({"__key__": key, "png": image, "txt": "ä" * place, "json": json.dumps(content)})
        order = rng.permutation(5)  # one lacks a row
        table = {"key": [keys[i] for i in order], "similarity": [float(i) for i in order]}
        pq.write_table(pa.table(table), path.with_suffix(".parquet"))
        paths.append(str(path))
    return paths


@pytest.mark.parametrize("cached", [True, False])
def test_columns_of_every_kind(scored, cached, tmp_path, monkeypatch):
    pool = ShardPool(scored, cache_dir=tmp_path / "cache" if cached else None)
    names = ["id", "key", "shard", "json.nsfw", "json.deep.score", "text_length", "similarity", "height"]
    found = pool.columns(names).to_pydict()
    assert found["id"] == list(range(12))
    assert found["key"] == pool.keys(np.arange(12))
    assert found["shard"] == [0] * 6 + [1] * 6
    assert found["json.nsfw"] == [True, False, True, None, True, False] * 2
    assert found["json.deep.score"] == [0.0, 0.1, 0.2, None, 0.4, 0.5] * 2
    assert found["text_length"] == [0, 1, 2, 3, 4, 5] * 2
    assert found["similarity"] == [0.0, 1.0, 2.0, 3.0, 4.0, None] * 2
    assert found["height"] == [20, 21, 22, 23, 24, None] * 2
    if cached:  # then nothing is read again
        monkeypatch.setattr(columns, "_computed", lambda *_: pytest.fail("read again"))
        assert pool.columns(names).to_pydict() == found


def test_new_columns_join_those_in_the_cache(scored, tmp_path):
    pool = ShardPool(scored, cache_dir=tmp_path / "cache")
    first = pool.columns(["width"])
    both = pool.columns(["brightness", "width"])
    assert both.column("width") == first.column("width")
    assert len(list((tmp_path / "cache" / "columns").glob("*.parquet"))) == 2
    for path in (tmp_path / "cache" / "columns").glob("*.parquet"):
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(PoolError, match=r"\.parquet"):
        pool.columns(["width"])


def test_kept_columns_of_another_shard_are_not_taken(scored, tmp_path):
    pool = ShardPool(scored, cache_dir=tmp_path / "cache")
    columns.read_columns(pool, ["width"])
    one, other = sorted((tmp_path / "cache" / "columns").glob("*.parquet"))
    one.write_bytes(other.read_bytes())
    with pytest.raises(PoolError, match=one.name):
        columns.read_columns(pool, ["width"])


def test_measures_of_images(tmp_path):
    rng = np.random.default_rng(1)
    flat = Image.new("RGB", (64, 32), (10, 200, 30))
    mixed = [np.full((32, 32, 3), 90, np.uint8), rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)]
    half = Image.fromarray(np.concatenate(mixed, 1))
    noise = Image.open(io.BytesIO(picture(rng, (40, 50))))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    path = tmp_path / "pool.tar"
    sizes = []
    with webdataset.TarWriter(str(path), mtime=0) as writer:
        for number, image in enumerate((flat, half, noise, noise)):
            buffer = io.BytesIO()
            image.save(buffer, "PNG", **({"exif": exif} if number == 3 else {}))
            sizes.append(len(buffer.getvalue()))
            writer.write({"__key__": f"{number}", "png": buffer.getvalue()})
    found = ShardPool(path).columns(list(columns.MEASURES)).to_pydict()
    assert found["width"] == [64, 64, 50, 40]
    assert found["height"] == [32, 32, 40, 50]
    assert found["aspect"] == [2, 2, 1.25, 1.25]
    assert found["bytes"] == sizes
    for place, image in enumerate((flat, half, noise)):
        grey = ImageStat.Stat(image.convert("L")).mean[0]
        assert found["brightness"][place] * 255 == pytest.approx(grey, abs=0.6)
        assert found["entropy"][place] == pytest.approx(image.convert("L").entropy(), abs=0.05)
    assert found["flat"][0] == 1
    assert found["flat"][1] == pytest.approx(0.5, abs=0.05)
    assert found["flat"][2] < 0.05
    assert found["sharpness"][0] == 0 < found["sharpness"][1] < found["sharpness"][2]


def test_given_tables_are_joined_by_key_or_taken_in_order(scored, tmp_path):
    keys = ShardPool(scored).keys(np.arange(12))
    (tmp_path / "tables").mkdir()
    for number, part in enumerate(np.array_split(np.arange(12)[::-1], 3)):
        table = pa.table({"uid": part, "key": [keys[i] for i in part], "score": part * 2.0})
        pq.write_table(table, tmp_path / "tables" / f"{number}.parquet")
    by_key = ShardPool(scored, columns=tmp_path / "tables").columns(["score"])
    assert by_key["score"].to_pylist() == [2.0 * i for i in range(12)]
    pq.write_table(pa.table({"score": np.arange(12)}), tmp_path / "ordered.parquet")
    in_order = ShardPool(scored, columns=[tmp_path / "ordered.parquet"]).columns(["score"])
    assert in_order["score"].to_pylist() == list(range(12))


def test_what_is_wrong_is_one_error(scored, tmp_path):
    keys = ShardPool(scored).keys(np.arange(12))
    tables = {
        "twice": {"key": [*keys, keys[4]], "score": range(13)},
        "others": {"key": ["x", "y"], "score": [1, 2]},
        "short": {"score": range(11)},
        "numbers": {"key": keys[:6], "score": range(6)},
        "texts": {"key": keys[6:], "score": "abcdef"},
    }
    for name, table in tables.items():
        pq.write_table(pa.table({k: list(v) for k, v in table.items()}), tmp_path / f"{name}.table")
    (tmp_path / "text.table").write_text("none")
    types = [tmp_path / "numbers.table", tmp_path / "texts.table"]
    pool = ShardPool(scored)
    for make, kind, named in (
        (lambda: pool.columns(["similarty"]), ConfigError, "'similarity'"),
        (lambda: pool.columns(["json.nsfv"]), ConfigError, "'json.nsfw'"),
        (lambda: pool.columns(["widht"]), ConfigError, "'width'"),
        (lambda: ShardPool(scored, columns=tmp_path / "twice.table").columns(["score"]), PoolError, keys[4]),
        (lambda: ShardPool(scored, columns=tmp_path / "others.table").columns(["score"]), PoolError, "'x'"),
        (lambda: ShardPool(scored, columns=tmp_path / "short.table").columns(["score"]), ConfigError, "11 "),
        (lambda: ShardPool(scored, columns=types).columns(["score"]), ConfigError, "numbers.table: "),
        (lambda: ShardPool(scored, columns=tmp_path / "text.table"), PoolError, "text.table"),
        (lambda: ShardPool(scored, columns=tmp_path / "no.parquet"), PoolError, "no.parquet"),
    ):
        with pytest.raises(kind, match=re.escape(named)):
            make()


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Six shards of images and what measured them: the processes that decoded an image, in a folder."""
    monkeypatch.setattr(columns, "_WORTH_OF_PIXELS", 1)
    monkeypatch.setattr(columns, "_WORTH_PROCESSES", 1)
    processes = tmp_path / "processes"
    processes.mkdir()
    measure = columns.measure_image

    def measured(data, **how):
        (processes / str(os.getpid())).touch()
        return measure(data, **how)

    monkeypatch.setattr(columns, "measure_image", measured)
    rng, paths = np.random.default_rng(0), []
    for shard in range(6):
        paths.append(str(tmp_path / f"{shard}.tar"))
        with webdataset.TarWriter(paths[-1]) as writer:
            for place in range(shard):  # the first is empty
                writer.write({"__key__": f"{shard}-{place}", "png": picture(rng), "json": b'{"a": 1}'})
    return paths, processes


@pytest.mark.parametrize("cached", [True, False])
def test_processes_measure_what_one_does(measured, cached, tmp_path):
    paths, processes = measured
    names = ["sharpness", "json.a", "width"]
    alone = ShardPool(paths, num_workers=1).columns(names)
    assert [path.name for path in processes.iterdir()] == [str(os.getpid())]
    (processes / str(os.getpid())).unlink()
    pool = ShardPool(paths, cache_dir=tmp_path / "cache" if cached else None, num_workers=2)
    assert pool.columns(names).equals(alone)
    of_workers = {path.name for path in processes.iterdir()}
    assert of_workers
    assert str(os.getpid()) not in of_workers
    if cached:
        for path in processes.iterdir():
            path.unlink()
        assert pool.columns(names).equals(alone)
        assert not list(processes.iterdir())


def test_a_killed_process_is_said_to_be_one(measured, tmp_path, monkeypatch):
    paths, _ = measured
    parent = os.getpid()

    def die(data, **how):
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(columns, "measure_image", die)
    with pytest.raises(PoolError, match=r"^columns: .*killed"):
        ShardPool(paths, cache_dir=tmp_path / "cache", num_workers=2).columns(["sharpness"])


def test_a_wrong_column_is_one_error_from_processes_too(measured, tmp_path):
    paths, _ = measured
    with pytest.raises(ConfigError, match=r"'json\.b'.*'json\.a'"):
        ShardPool(paths, cache_dir=tmp_path / "cache", num_workers=2).columns(["json.b"])
