"""The table of a curation, as DuckDB, polars and pyarrow read it, against the curation itself."""

import csv
import io

import duckdb
import numpy as np
import polars
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curated_data import ShardPool, ShardWriter, curate, curate_embeddings
from curated_data.cli import main
from curated_data.errors import ConfigError
from curated_data.report.explain import explain
from curated_data.report.table import REASONS, CurationTable
from curated_data.selection.removed import Removed
from tests.support.images import noise

SETTINGS = {"target_size": 30, "levels": [{"n_clusters": 12}, {"n_clusters": 4}], "sampling": "hierarchical"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """120 images with captions and labels; number 5 is broken, 100 to 109 are copies of number 9."""
    folder, images = tmp_path_factory.mktemp("pool"), noise(120)
    images[5] = b"?"
    images[100:110] = [images[9]] * 10
    with ShardWriter(folder / "pool-%06d.tar", max_samples=50) as writer:
        for i, image in enumerate(images):
            sample = {"__key__": f"k/é{i:03d}", "png": image, "cls": i % 3}
            writer.write(sample if i == 7 else sample | {"txt": f"caption {i}, “quoted”\n"})
    (folder / "classes.json").write_text('["ant", "bee", "cat"]')
    pool = ShardPool(str(folder / "pool-*.tar"))
    settings = SETTINGS | {"near_duplicates": {"enabled": True}}
    curation = curate(pool, settings, embedder="pixels:8", cache_dir=folder / "cache")
    return pool, curation


@pytest.fixture(scope="module")
def file(made, tmp_path_factory):
    pool, curation = made
    xy = np.random.default_rng(1).normal(size=(120, 2))
    xy[3] = np.nan
    table = CurationTable(curation, pool, images=16, coordinates=xy)
    return table.write(tmp_path_factory.mktemp("table") / "curation.parquet"), xy


def test_duckdb_counts_what_the_curation_reports(made, file):
    _, curation = made
    query = f"select reason, count(*)::int, sum(times)::int from '{file[0]}' group by reason"
    found = {reason: (n, times) for reason, n, times in duckdb.sql(query).fetchall()}
    report = curation.report
    assert set(found) <= set(REASONS)
    assert found["selected"] == (30, report["selected"])
    assert found["failed"] == (report["failed"], 0) == (1, 0)
    assert found["near-duplicate"] == (report["near_duplicates"], 0) == (10, 0)
    assert found["not drawn"] == (79, 0)


def test_polars_reads_what_the_tree_and_the_pool_hold(made, file):
    pool, curation = made
    frame = polars.read_parquet(file[0])
    assert frame["id"].to_list() == list(range(120))
    assert frame["key"].to_list() == pool.keys(range(120))
    assert frame["shard"].to_list() == [pool.urls[s] for s in pool.shard_of(range(120))]
    assert frame["label"].to_list() == pool.labels(range(120)).tolist()
    assert frame["class"][:3].to_list() == ["ant", "bee", "cat"]
    assert frame["caption"][8] == "caption 8, “quoted”"
    assert frame["caption"].null_count() == 1
    for level in (1, 2):
        cluster = frame[f"cluster_{level}"].fill_null(-1).to_numpy()
        assert (cluster == curation.tree.assignment(level)).all()
    np.testing.assert_array_equal(frame["distance"].fill_null(np.nan).to_numpy(), curation.tree.distance)
    assert np.flatnonzero(frame["selected"].to_numpy()).tolist() == curation.ids.tolist()
    assert frame["x"].null_count() == 1
    np.testing.assert_allclose(frame["y"].fill_null(np.nan).to_numpy(), file[1][:, 1], rtol=1e-6)


def test_a_reason_is_that_of_the_explanation(made, file):
    _, curation = made
    removed = Removed.load(curation.folders["near_duplicates"])
    for row in polars.read_parquet(file[0]).drop("image").iter_rows(named=True):
        text = " ".join(explain(curation, row["id"]))
        if row["reason"] == "near-duplicate":
            assert f"near-duplicate of sample {row['duplicate_of']}," in text
            assert row["cosine"] == removed.cosine[row["id"]]
        elif row["reason"] == "failed":
            assert row["failure"] in text
        else:
            assert ("was selected" in text) == (row["reason"] == "selected")
            assert row["duplicate_of"] is None
            assert row["cosine"] is None


def test_thumbnails_are_images(file):
    for row in pq.read_table(file[0], columns=["id", "image"]).to_pylist()[:3]:
        assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (16, 16)


def test_blocks_are_those_of_the_whole(made, monkeypatch):
    pool, curation = made
    whole = curation.table(pool)
    monkeypatch.setattr("curated_data.report.table._BLOCK", 7)
    assert CurationTable(curation, pool).read().equals(whole)
    selected = curation.table(pool, selected=True)
    assert selected.equals(whole.filter(whole["selected"]).combine_chunks())
    assert selected.num_rows == len(np.unique(curation.ids))


def test_without_a_pool_its_columns_are_left_out(made):
    _, curation = made
    names = curation.table().schema.names
    assert {"id", "cluster_1", "reason", "failure"} <= set(names)
    assert not {"key", "shard", "caption", "label"} & set(names)


def test_repeats_and_zero_rows(tmp_path):
    rows = np.random.default_rng(0).normal(size=(100, 4))
    rows[:5] = 0
    rows[5] = np.nan
    settings = SETTINGS | {"metric": "cosine", "max_repeats": 3, "target_size": 150}
    curation = curate_embeddings(rows, settings, cache_dir=tmp_path)
    table = curation.table()
    assert table["reason"].to_pylist()[:6] == ["excluded"] * 5 + ["failed"]
    assert pc.sum(table["times"]).as_py() == 150
    assert pc.max(table["times"]).as_py() > 1


@pytest.mark.parametrize(
    ("options", "named"),
    [({"images": 0}, "^images: "), ({"coordinates": np.zeros((3, 2))}, "^coordinates: ")],
)
def test_bad_options(made, options, named):
    pool, curation = made
    with pytest.raises(ConfigError, match=named):
        CurationTable(curation, pool, **options)


def test_bad_inputs(made, write_pool, tmp_path):
    pool, curation = made
    with pytest.raises(ConfigError, match=r"^pool: "):
        CurationTable(curation, ShardPool(write_pool([4])))
    with pytest.raises(ConfigError, match=r"^images: "):
        CurationTable(curation, images=8)
    with pytest.raises(ConfigError, match=r"t\.csv: "):
        CurationTable(curation, pool).write(tmp_path / "t.csv")
    assert not list(tmp_path.glob("t.csv*"))


@pytest.mark.long
def test_command(made, tmp_path, capsys):
    pool, _ = made
    out, keys = tmp_path / "t.parquet", tmp_path / "keys.csv"
    command = ["table", *pool.urls, "--cache-dir", str(tmp_path / "cache"), "--embedder", "pixels:8"]
    levels = "levels=[{n_clusters: 12}, {n_clusters: 4}]"
    more = ["--target-size", "30", "--set", levels, "sampling=hierarchical"]
    assert main([*command, *more, "--selected", "--out", str(out), "--keys", str(keys)]) == 0
    table = pq.read_table(out)
    with open(keys, newline="", encoding="utf-8") as text:
        rows = list(csv.DictReader(text))
    assert [int(row["id"]) for row in rows] == table["id"].to_pylist()
    assert [row["key"] for row in rows] == table["key"].to_pylist()
    assert len(rows) == 30
    assert main([*command, *more]) == 2
    assert "--out" in capsys.readouterr().err


def test_columns_of_the_pool_and_filtered_samples(write_pool, tmp_path):
    pool = ShardPool(write_pool([30, 20]))
    settings = {"target_size": 10, "exclude": [0, 7]}
    curation = curate(pool, settings, embedder="pixels:4", cache_dir=tmp_path / "cache")
    table = CurationTable(curation, pool, columns=["width"]).read()
    assert table["width"].to_pylist() == [8] * 50
    assert np.flatnonzero(pc.equal(table["reason"], "filtered").to_numpy()).tolist() == [0, 7]
    with pytest.raises(ConfigError, match=r"^columns: "):
        CurationTable(curation, pool, columns=["key"]).read()
