"""Pools in the forms that people have them: parquet of the Hub, lists of archives, bare folders."""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from curated_data import ShardPool, curate
from curated_data.cli import main
from curated_data.errors import ConfigError, PoolError
from curated_data.pool.tables import import_tables


def encoded(rng, kind) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def tables(tmp_path) -> tuple[str, list[bytes]]:
    """A data set as the Hub stores it: two parquet files; one row lacks its image."""
    rng = np.random.default_rng(0)
    data = [encoded(rng, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF") for _ in range(3)]
    (tmp_path / "hub").mkdir()
    for number, part in enumerate((range(7), range(7, 12))):
        images = [{"bytes": None if i == 5 else data[i], "path": f"{i}.x"} for i in part]
        table = {"image": images, "label": [i % 3 for i in part], "caption": [f"no. {i}" for i in part],
                 "score": [i / 2 for i in part]}  # fmt: skip
        pq.write_table(pa.table(table), tmp_path / "hub" / f"train-{number:05d}-of-00002.parquet")
    return str(tmp_path / "hub"), data


def test_parquet_of_the_hub_becomes_shards(tables, tmp_path):
    folder, data = tables
    assert main(["-q", "import", folder, str(tmp_path / "out")]) == 0
    samples = list(webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False))
    rows = [i for i in range(12) if i != 5]
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in rows]
    for i, sample in zip(rows, samples, strict=True):
        kind = ("png", "jpg", "webp", "gif")[i // 3]
        assert sample[kind] == data[i]
        assert sample["cls"] == str(i % 3).encode()
        assert sample["txt"] == f"no. {i}".encode()
        assert json.loads(sample["json"]) == {"score": i / 2, "path": f"{i}.x"}


def test_tables_without_images_are_one_error(tmp_path):
    rows = {"plain": {"a": [1]}, "two": {"a": [b"x"], "b": [b"y"]}, "empty": {"image": [None, None]}}
    for name, columns in rows.items():
        kinds = {"empty": pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])}
        pq.write_table(pa.table(columns, kinds.get(name)), tmp_path / f"{name}.parquet")
    (tmp_path / "text.parquet").write_text("none")
    (tmp_path / "nothing").mkdir()
    for name, kind, named in (
        ("plain.parquet", ConfigError, "'a'"),
        ("two.parquet", ConfigError, "'a', 'b'"),
        ("empty.parquet", PoolError, "none of 2 rows"),
        ("text.parquet", PoolError, "text.parquet"),
        ("nothing", PoolError, "nothing"),
    ):
        with pytest.raises(kind) as caught:
            import_tables(tmp_path / name, tmp_path / "out")
        assert named in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        import_tables(tmp_path / "two.parquet", tmp_path / "out", image="c")
    assert "'c'" in str(caught.value)


def test_archives_that_a_file_lists(write_pool, tmp_path):
    shards = write_pool([4, 3])
    (tmp_path / "urls.txt").write_text("# two shards\n" + "\n".join(shards) + "\n")
    wids = {"wids_version": 1, "shardlist": [{"url": "pool-000.tar", "nsamples": 4}, {"url": "pool-001.tar"}]}
    (tmp_path / "index.json").write_text(json.dumps(wids))
    for name in ("urls.txt", "index.json"):
        assert main(["-q", "import", str(tmp_path / name), str(tmp_path / f"out-{name}")]) == 0
        found = ShardPool(str(tmp_path / f"out-{name}" / "*.tar"))
        assert found.keys(range(7)) == ShardPool(shards).keys(range(7))
    for name, content in (("bad.json", "{}"), ("empty.txt", "\n"), ("broken.json", "{")):
        (tmp_path / name).write_text(content)
        assert main(["-q", "import", str(tmp_path / name), str(tmp_path / "x")]) == 2


def test_a_folder_of_images_says_how_to_import_it_or_is_imported(tmp_path, caplog):
    rng = np.random.default_rng(0)
    for number in range(20):
        place = tmp_path / "images" / f"class {number % 2}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded(rng, "PNG"))
    folder = str(tmp_path / "images")
    with pytest.raises(PoolError) as caught:
        ShardPool(folder)
    assert "curated-data import" in str(caught.value)
    assert f"folder:{folder}" in str(caught.value)
    with pytest.raises(PoolError) as caught:
        ShardPool(f"folder:{folder}")
    assert "cache_dir" in str(caught.value)
    with pytest.raises(PoolError) as caught:
        ShardPool(f"folder:{folder}/none", cache_dir=tmp_path / "cache")
    assert "not a folder" in str(caught.value)
    config = {"target_size": 5, "levels": [{"n_clusters": 3}]}
    found = curate(f"folder:{folder}", config, embedder="pixels:4", cache_dir=tmp_path / "cache")
    assert found.report["samples"] == 20
    again = ShardPool(f"folder:{folder}", cache_dir=tmp_path / "cache")
    assert sorted(again.labels(range(20)).tolist()) == [0] * 10 + [1] * 10
    shutil.rmtree(tmp_path / "images" / "class 0")
    assert len(ShardPool([f"folder:{folder}"], cache_dir=tmp_path / "cache")) == 10
