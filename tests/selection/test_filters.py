"""Conditions in SQL against pandas-like masks of numpy, attacks, and filters in a whole curation."""

import os
import re

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curated_data import EmbeddedPool, ShardPool, curate, curate_embeddings
from curated_data.cli import main
from curated_data.errors import ConfigError, PoolError
from curated_data.pipeline.extend import extend
from curated_data.pipeline.plan import plan
from curated_data.selection.filters import Where
from curated_data.selection.included import with_included
from curated_data.selection.sampling import hierarchical_sample

CONFIG = {"target_size": 30, "levels": [{"n_clusters": 8}]}

ATTACKS = [
    "exists(SELECT 1 FROM read_csv('/etc/passwd'))",
    "a IN (SELECT 1)",
    "a > (SELECT count(*) FROM duckdb_settings())",
    "true) FROM samples; COPY (SELECT 1) TO '/tmp/written.csv'; SELECT (a",
    "a); DROP TABLE samples; SELECT (a",
    "a) FROM samples UNION ALL SELECT (a",
    "a), (a",
    "a) FROM samples WHERE (a",
    "a) FROM read_parquet('x.parquet') --",
    "a) FROM samples ORDER BY (a",
    "a) AS b, (a",
    "read_text('/etc/passwd') = 'x' AND a",
    "getenv('HOME') = 'x' AND a",
    "current_setting('threads') = a",
    "random() < a",
    "sleep_ms(1000000) AND a",
    "nextval('x') > a",
    "sum(a) > 1",
    "row_number() OVER () > a",
    "columns('a') > 1",
    "* > 1",
    "a > ?",
    "a > $1",
    "COPY samples TO 'x'",
    "ATTACH 'x.db'",
    "INSTALL httpfs",
    "PRAGMA database_list",
    "SET threads = 1",
    "a >",
    "",
    ";",
    "1 = 1",
    "a > 1e400",
    "(" * 500 + "a" + ")" * 500 + ")",
]


@pytest.mark.parametrize("text", ATTACKS)
def test_what_is_more_than_a_condition_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="where"):
        Where(text)
    assert os.listdir(tmp_path) == []


def test_a_working_directory_that_is_gone_is_an_error(tmp_path, monkeypatch):
    """DuckDB aborts the process there."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigError, match="working directory"):
        Where("score > 1")


def test_the_database_itself_is_locked(tmp_path):
    from curated_data.selection.filters import _connected

    (tmp_path / "a.csv").write_text("a\n1\n")
    with _connected() as connection:
        for statement in (
            f"SELECT * FROM read_csv('{tmp_path}/a.csv')",
            f"SELECT * FROM '{tmp_path}/a.csv'",
            f"COPY (SELECT 1) TO '{tmp_path}/b.csv'",
            f"ATTACH '{tmp_path}/c.db'",
            "INSTALL httpfs",
            "LOAD httpfs",
            "SET enable_external_access = true",
            "SET lock_configuration = false",
        ):
            with pytest.raises(duckdb.Error):
                connection.execute(statement).fetchall()
    assert os.listdir(tmp_path) == ["a.csv"]


PARTS = {
    "a > 2": lambda a, b, c: None if a is None else a > 2,
    "NOT json.flag": lambda a, b, c: None if b is None else not b,
    "c IN ('x', 'y')": lambda a, b, c: None if c is None else c in ("x", "y"),
    "a IS NOT NULL": lambda a, b, c: a is not None,
    "(a < 1 OR c = 'z')": lambda a, b, c: (
        True if (a is not None and a < 1) or c == "z" else None if a is None or c is None else False
    ),
}
rows = st.tuples(
    st.one_of(st.none(), st.integers(0, 5)),
    st.one_of(st.none(), st.booleans()),
    st.one_of(st.none(), st.sampled_from("xyz")),
)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(rows, min_size=1, max_size=30),
    parts=st.lists(st.sampled_from(list(PARTS)), min_size=1, unique=True),
)
def test_counts_are_those_of_three_valued_logic(values, parts):
    a, flag, c = zip(*values, strict=True)
    table = pa.table(
        {"a": pa.array(a, pa.int64()), "json.flag": pa.array(flag, pa.bool_()), "c": pa.array(c, pa.string())}
    )
    where = Where(" AND ".join(parts))
    found = where.apply(table.select(where.columns))
    truth = [[PARTS[part](*row) for part in parts] for row in values]
    assert found.keep.tolist() == [all(t is True for t in row) for row in truth]
    assert found.nulls == sum(False not in row and None in row for row in truth)
    for condition, of_part in zip(found.conditions, zip(*truth, strict=True), strict=True):
        assert condition.drops == sum(t is not True for t in of_part)
        assert condition.nulls == sum(t is None for t in of_part)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a", "'a'"),
        ("a > 'x'", "a > 'x'"),
        ("a.b > 1", "a.b"),
        ("a AND a.b > 1", "a.b"),
    ],
)
def test_a_condition_that_does_not_fit_its_columns(text, named):
    where = Where(text)
    table = pa.table({"a": [1, 2], "a.b": [1, 2]}) if "a.b" in where.columns else pa.table({"a": [1, 2]})
    if text == "a.b > 1":
        assert where.apply(table).keep.tolist() == [False, True]
        return
    with pytest.raises(ConfigError, match=re.escape(named)):
        where.apply(table)


@pytest.fixture
def scored(write_pool) -> list[str]:
    """60 + 40 samples with a score beside them; one in ten has none."""
    shards = write_pool([60, 40])
    for path in shards:
        keys = ShardPool(path).keys(np.arange(len(ShardPool(path))))
        scores = [None if i % 10 == 0 else (i * 7 % 40) / 40 for i in range(len(keys))]
        pq.write_table(pa.table({"key": keys, "score": scores}), path.replace(".tar", ".parquet"))
    return shards


def scores(shards) -> np.ndarray:
    return np.array(
        [np.nan if s is None else s for s in ShardPool(shards).columns(["score"])["score"].to_pylist()]
    )


@pytest.mark.parametrize("duplicates", [False, True])
def test_a_curation_selects_from_what_a_filter_keeps(scored, duplicates, tmp_path):
    config = CONFIG | {"where": "score >= 0.25 AND width = 8"}
    config["near_duplicates"] = {"enabled": duplicates}
    found = curate(scored, config, embedder="pixels:4", cache_dir=tmp_path / "cache")
    kept = scores(scored) >= 0.25
    assert len(found.ids) == 30
    assert kept[found.ids].all()
    assert (found.tree.parent[1] >= 0).tolist() == kept.tolist()
    report = found.report["filters"]
    assert report["dropped"] == int((~kept).sum())
    assert report["nulls"] == 10
    assert [c["drops"] for c in report["conditions"]] == [int((~kept).sum()), 0]
    assert report["examples"][0] == [0, "000/0000"]
    assert found.report["near_duplicates"] == 0
    again = curate(scored, config, embedder="pixels:4", cache_dir=tmp_path / "cache")
    assert all(again.report["cached"].values())
    other = curate(scored, CONFIG, embedder="pixels:4", cache_dir=tmp_path / "cache")
    assert (other.tree.parent[1] >= 0).all()
    assert plan(scored, config, embedder="pixels:4", cache_dir=tmp_path / "cache").filters == report


def test_samples_are_excluded_and_included_by_id_key_and_file(scored, tmp_path):
    keys = ShardPool(scored).keys(np.arange(100))
    np.save(tmp_path / "test.npy", np.arange(20, 30))
    (tmp_path / "keys.txt").write_text("\n".join(keys[30:40]) + "\n")
    out = [3, keys[4], str(tmp_path / "test.npy"), str(tmp_path / "keys.txt")]
    config = CONFIG | {"exclude": out, "include": [0, keys[99]], "where": "score > 0.5", "target_size": 20}
    found = curate(scored, config, embedder="pixels:4", cache_dir=tmp_path / "cache")
    assert not {3, 4, *range(20, 40)} & set(found.ids.tolist())
    assert {0, 99} <= set(found.ids.tolist())  # though 0 has no score
    assert len(found.ids) == len(set(found.ids.tolist())) == 20
    assert found.report["filters"]["excluded"] > 0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), n_included=st.integers(0, 20), target=st.integers(20, 60))
def test_included_samples_count_in_the_quotas_of_their_clusters(seed, n_included, target):
    from curated_data import ClusterTree

    rng = np.random.default_rng(seed)
    parent = {1: rng.integers(0, 12, 200), 2: np.arange(12) % 3}
    tree = ClusterTree({1: rng.normal(size=(12, 2)), 2: rng.normal(size=(3, 2))}, parent)
    ids = hierarchical_sample(tree, target, seed=seed)
    included = np.sort(rng.choice(200, n_included, replace=False))
    found = with_included(tree, ids, included, target, seed=seed)
    assert len(found) == len(ids)
    assert len(np.unique(found)) == len(found)
    assert np.isin(included, found).all()
    for level, k in ((1, 12), (2, 3)):
        before = np.bincount(tree.assignment(level)[ids], minlength=k)
        after = np.bincount(tree.assignment(level)[found], minlength=k)
        forced = np.bincount(tree.assignment(level)[included], minlength=k)
        fits = forced <= before
        if fits.all():
            np.testing.assert_array_equal(after, before)
        assert (after >= forced).all()


def test_a_pool_that_has_grown_is_filtered(scored, tmp_path):
    config = CONFIG | {"where": "score >= 0.25"}
    cache = tmp_path / "cache"
    first = curate(scored[:1], config, embedder="pixels:4", cache_dir=cache)
    grown = extend(scored, config, tree=first.folders["tree"], embedder="pixels:4", cache_dir=cache)
    assert (grown.tree.parent[1] >= 0).tolist() == (scores(scored) >= 0.25).tolist()
    tighter = config | {"where": "score >= 0.5"}
    grown = extend(scored, tighter, tree=first.folders["tree"], embedder="pixels:4", cache_dir=cache)
    assert (grown.tree.parent[1] >= 0).tolist() == (scores(scored) >= 0.5).tolist()
    looser = config | {"where": "score >= 0"}
    grown = extend(scored, looser, tree=first.folders["tree"], embedder="pixels:4", cache_dir=cache)
    assert (grown.tree.parent[1] >= 0).tolist() == (scores(scored) >= 0).tolist()


def test_rows_are_filtered_by_the_columns_beside_them(tmp_path):
    rng = np.random.default_rng(0)
    rows, score = rng.normal(size=(200, 4)).astype(np.float32), rng.random(200)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), 4)
    pq.write_table(pa.table({"embedding": lists, "score": score}), tmp_path / "rows.parquet")
    config = {"target_size": 50, "where": "score > 0.5 AND id < 150"}
    found = curate_embeddings(tmp_path / "rows.parquet", config, cache_dir=tmp_path / "cache")
    kept = (score > 0.5) & (np.arange(200) < 150)
    assert kept[found.ids].all()
    with pytest.raises(ConfigError, match="'score'"):
        EmbeddedPool(tmp_path / "rows.parquet").columns(["scor"])


def test_from_the_shell(scored, tmp_path, capsys):
    place = ["--cache-dir", str(tmp_path / "cache"), "--embedder", "pixels:4", "--target-size", "20"]
    assert main(["-q", "curate", *scored, *place, "--where", "score > 0.5"]) == 0
    printed = capsys.readouterr().out
    assert "by score > 0.5 alone" in printed
    assert "NULL" in printed
    assert main(["-q", "curate", *scored, *place, "--where", "scor > 0.5"]) == 2
    assert "'score'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "kind", "named"),
    [
        ({"where": "scroe > 1"}, ConfigError, "'score'"),
        ({"where": "score > 7"}, PoolError, "score > 7"),
        ({"where": "json.x > 7"}, ConfigError, ".json"),
        ({"exclude": [100]}, ConfigError, "id 100"),
        ({"exclude": ["nobody"]}, ConfigError, "'nobody'"),
        ({"exclude": [1.5]}, ConfigError, "1.5"),
        ({"exclude": ["no.npy"]}, ConfigError, "no.npy"),
        ({"include": ["no.txt"]}, ConfigError, "no.txt"),
        ({"exclude": "a"}, ConfigError, "exclude: "),
        ({"exclude": [3], "include": [3]}, ConfigError, "sample 3"),
        ({"include": list(range(50))}, ConfigError, "include: 50 "),
        ({"exclude": list(range(100))}, PoolError, "100 samples"),
    ],
)
def test_what_is_wrong_is_one_error_before_anything_is_embedded(config, kind, named, scored, tmp_path):
    with pytest.raises(kind, match=re.escape(named)):
        curate(scored, CONFIG | config, embedder="pixels:4", cache_dir=tmp_path / "cache")
