"""Labels and captions from columns: in the pool, in batches, reports and tables."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from curated_data import CuratedDataModule, EmbeddedPool, ShardPool, curate, curate_embeddings
from curated_data.cli import main
from curated_data.errors import ConfigError, PoolError
from curated_data.pool.captions import read_captions
from curated_data.report.page import write_report
from curated_data.selection.metrics import class_balance, read_labels
from tests.conftest import png

N = 24
NAMES = ["cat", "ant", "dog"]


@pytest.fixture
def shard(tmp_path) -> str:
    """A shard with classes and texts in JSON and in parquet beside it, and others in its own members."""
    rng = np.random.default_rng(0)
    path = tmp_path / "00000.tar"
    with webdataset.TarWriter(str(path), mtime=0) as writer:
        for i in range(N):
            image = png(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            of = {"class": NAMES[i % 3], "number": i % 3 + 5} if i else {}
            writer.write({"__key__": f"{i:03d}", "png": image, "json": of, "cls": b"77", "txt": "old"})
    order = rng.permutation(N)
    table = {
        "key": [f"{i:03d}" for i in order],
        "title": [f"title {i}" if i != 3 else None for i in order],
        "score": [i + 0.5 for i in order],
        "digits": [str(i % 4) for i in order],
    }
    pq.write_table(pa.table(table), path.with_suffix(".parquet"))
    return str(path)


def test_columns_replace_members(shard, tmp_path):
    pool = ShardPool(shard, cache_dir=tmp_path / "cache", labels="json.class", captions="title")
    ids = np.array([4, 0, 1, 2])
    assert pool.labels(ids).tolist() == [0, -1, 0, 2]  # ant, none, ant, dog: in the order of their letters
    assert read_captions(pool, np.array([7, 3, 7])) == ["title 7", None, "title 7"]
    assert read_captions(ShardPool(shard), np.array([3])) == ["old"]
    assert ShardPool(shard, labels="json.number").labels(ids).tolist() == [6, -1, 6, 7]
    assert ShardPool(shard, labels="digits").labels(ids).tolist() == [0, 0, 1, 2]
    np.testing.assert_array_equal(read_labels(pool), pool.labels(np.arange(N)))
    assert pool.columns(["label"])["label"].to_pylist() == [None, *pool.labels(np.arange(1, N)).tolist()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_have_them(shard, num_workers, tmp_path):
    pool = ShardPool(shard, cache_dir=tmp_path / "cache", labels="json.class", captions="title")
    data = CuratedDataModule(
        pool,
        val_pool=pool,
        batch_size=8,
        loader={"num_workers": num_workers},
        image_size=8,
        cache_dir=tmp_path / "cache",
    )
    data.setup("fit")
    seen = []
    for batch in [*data.train_dataloader(), *data.val_dataloader()]:
        for number, label, caption in zip(
            batch["sample_id"].tolist(), batch["label"].tolist(), batch["caption"]
        ):
            assert label == (-1 if number == 0 else sorted(NAMES).index(NAMES[number % 3]))
            assert caption == ("" if number == 3 else f"title {number}")
            seen.append(number)
    assert sorted(seen) == sorted([*range(N), *range(N)])
    assert data.class_names == ("ant", "cat", "dog")


def test_reports_and_tables_have_them(shard, tmp_path):
    pool = ShardPool(shard, cache_dir=tmp_path / "cache", labels="json.class", captions="title")
    config = {"target_size": 8, "levels": [{"n_clusters": 4}]}
    curation = curate(pool, config, embedder="pixels:4", cache_dir=tmp_path / "cache")
    plain = curate(shard, config, embedder="pixels:4", cache_dir=tmp_path / "cache")
    assert all(plain.report["cached"].values())  # what samples are called is no part of what they are
    table = curation.table(pool).to_pydict()
    assert table["class"][1:4] == ["ant", "dog", "cat"]
    assert table["caption"][2:5] == ["title 2", None, "title 4"]
    assert class_balance(read_labels(pool), curation.ids).before.sum() == N - 1
    page = write_report(curation, pool, tmp_path / "report.html").read_text()
    assert "title " in page
    assert "dog" in page


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"labels": "json.clas"}, "'json.class'"),
        ({"labels": "score"}, "'score'"),
        ({"captions": "score"}, "'score'"),
        ({"captions": "titel"}, "'title'"),
    ],
)
def test_a_column_that_does_not_fit_is_named(shard, given, named):
    pool = ShardPool(shard, **given)
    with pytest.raises(ConfigError, match=named):
        pool.labels(np.arange(N)) if "labels" in given else read_captions(pool, np.arange(N))


def test_from_the_shell(shard, tmp_path, capsys):
    options = [
        "--label-column",
        "json.class",
        "--caption-column",
        "title",
        "--cache-dir",
        str(tmp_path / "c"),
    ]
    options += ["--embedder", "pixels:4", "--target-size", "8", "--out", str(tmp_path / "report.html")]
    assert main(["-q", "report", shard, *options]) == 0
    assert "dog" in (tmp_path / "report.html").read_text()


@pytest.fixture
def rows(tmp_path):
    matrix = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    np.save(tmp_path / "rows.npy", matrix)
    return tmp_path / "rows.npy"


def test_rows_are_filtered_by_given_columns(rows, tmp_path):
    score = np.random.default_rng(1).random(60)
    for part, some in enumerate(np.split(np.arange(60), [20])):
        pq.write_table(
            pa.table({"key": [f"k{i}" for i in some], "score": score[some]}), tmp_path / f"{part}.parquet"
        )
    tables = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    config = {"target_size": 10, "levels": [{"n_clusters": 3}], "where": "score > 0.5 AND id > 4"}
    found = curate_embeddings(rows, config, columns=tables)
    kept = (score > 0.5) & (np.arange(60) > 4)
    assert ((found.tree.parent[1] >= 0) == kept).all()
    with pytest.raises(ConfigError, match="'score'"):
        curate_embeddings(rows, config | {"where": "scroe > 1"}, columns=tables)
    with pytest.raises(ConfigError, match="60"):
        curate_embeddings(rows, config, columns=tables[:1])
    with pytest.raises(ConfigError, match="columns"):
        curate_embeddings(EmbeddedPool(rows), config, columns=tables)
    with pytest.raises(PoolError, match=r"missing\.parquet"):
        EmbeddedPool(rows, columns=tmp_path / "missing.parquet")


def test_columns_of_rows_with_keys_are_joined(tmp_path):
    rng = np.random.default_rng(0)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=40)), 4)
    keys = [f"k{i}" for i in range(10)]
    pq.write_table(pa.table({"key": keys, "embedding": lists}), tmp_path / "rows.parquet")
    order = rng.permutation(12)
    table = pa.table({"key": [f"k{i}" for i in order], "score": order.astype(float)})
    pq.write_table(table, tmp_path / "more.parquet")
    pool = EmbeddedPool(tmp_path / "rows.parquet", columns=tmp_path / "more.parquet")
    assert pool.columns(["score", "id"]).to_pydict() == {
        "score": [float(i) for i in range(10)],
        "id": list(range(10)),
    }
