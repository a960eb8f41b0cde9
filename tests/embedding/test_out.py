"""Embeddings that are written out: read back by pyarrow and numpy, and by ourselves."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from curated_data import EmbeddedPool, ShardPool, curate
from curated_data.cli import main
from curated_data.embedding import out
from curated_data.embedding.extract import embed_pool
from curated_data.embedding.resolve import resolve_embedder


@pytest.mark.parametrize("form", out.FORMATS)
def test_written_embeddings_are_those_of_the_store(form, write_pool, tmp_path, monkeypatch):
    monkeypatch.setattr(out, "_PART", 20)
    monkeypatch.setattr(out, "_BLOCK", 7)
    shards = write_pool([30, 25], bad={(0, 3): b"no image"})
    place = tmp_path / "out"
    options = ["--cache-dir", str(tmp_path / "cache"), "--embedder", "pixels:4"]
    assert main(["-q", "embed", *shards, *options, "--out", str(place), "--format", form]) == 0
    pool = ShardPool(shards)
    store = embed_pool(pool, resolve_embedder("pixels:4"), tmp_path / "cache", num_workers=0)
    good = np.delete(np.arange(55), 3)
    if form == "parquet":
        tables = [pq.read_table(path) for path in sorted(place.iterdir())]
        keys = [key for table in tables for key in table["key"].to_pylist()]
        rows = np.concatenate([np.array(table["embedding"].to_pylist()) for table in tables])
    else:
        arrays, tables = sorted((place / "img_emb").iterdir()), sorted((place / "metadata").iterdir())
        rows = np.concatenate([np.load(path) for path in arrays])
        keys = [key for path in tables for key in pq.read_table(path)["key"].to_pylist()]
    assert keys == pool.keys(good)
    np.testing.assert_array_equal(rows, store.rows(good))
    assert EmbeddedPool(place).keys([0, 53]) == [keys[0], keys[53]]
    config = {"target_size": 10, "levels": [{"n_clusters": 4}]}
    again = curate(shards, config, embedder=f"precomputed:{place}", cache_dir=tmp_path / "other")
    np.testing.assert_array_equal(again.embeddings.as_array(), store.as_array())
    assert [f["id"] for f in again.embeddings.failures] == [3]


def test_what_is_there_is_not_replaced(write_pool, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    arguments = ["-q", "embed", *write_pool([5]), "--embedder", "pixels:4", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--cache-dir", str(tmp_path / "cache")]) == 2
    assert "out: exists already" in capsys.readouterr().err
    assert not (tmp_path / "cache" / "embeddings").exists()
