"""Classes of samples from files."""

import csv
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curated_data import EmbeddedPool, ShardPool, ShardWriter
from curated_data.errors import ConfigError, CuratedDataError, PoolError
from curated_data.pipeline.labels import read_label_file

N = 10
ROWS = EmbeddedPool(np.zeros((N, 4)))


@pytest.fixture
def pool(tmp_path):
    with ShardWriter(tmp_path / "pool-%06d.tar") as writer:
        for number in range(N):
            writer.write({"__key__": f"0{number}", "txt": "a"})
    return ShardPool(str(tmp_path / "pool-*.tar"), cache_dir=tmp_path / "cache")


@settings(deadline=None)
@given(
    st.dictionaries(st.integers(0, N - 1), st.none() | st.text("ab,\"\t\n'é", min_size=1), min_size=1).filter(
        lambda found: any(text and text.strip() for text in found.values())
    ),
    st.sampled_from(["csv", "tsv"]),
)
def test_every_table_says_what_was_written(tmp_path_factory, named, kind):
    folder = tmp_path_factory.mktemp("labels")
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="," if kind == "csv" else "\t")
    writer.writerows([["id", "more", "label"], *([i, "x", name or ""] for i, name in named.items())])
    (folder / f"y.{kind}").write_text(text.getvalue(), newline="")
    table = pa.table({"id": pa.array(named, pa.int32()), "label": pa.array(named.values(), pa.string())})
    pq.write_table(table, folder / "y.parquet")
    wanted = {i: name.strip() for i, name in named.items() if name and name.strip()}
    for file in (f"y.{kind}", "y.parquet"):
        found = read_label_file(folder / file, ROWS)
        assert found.names == tuple(sorted(set(wanted.values())))
        assert {i: found.names[c] for i, c in enumerate(found.numbers) if c >= 0} == wanted


def test_keys_go_before_ids_and_unknown_ones_are_counted(pool, tmp_path, caplog):
    (tmp_path / "y.csv").write_text("id,key,label\n5,07,3\n6,7,4\n7,01,-1\n8,09,\n")
    found = read_label_file(tmp_path / "y.csv", pool)
    assert found.names is None
    assert found.n_unknown == 1
    assert "'7'" in caplog.text
    assert {i: c for i, c in enumerate(found.numbers.tolist()) if c >= 0} == {7: 3}


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        ("key,label\n1,a\n1,b\n", PoolError, "'1'"),
        ("id,label\n1,a\n01,b\n", PoolError, "sample 1"),
        ("id,label\n10,a\n", ConfigError, "id 10"),
        ("id,label\nx,a\n", ConfigError, "'id'"),
        ("id,label\n1,a,b\n", ConfigError, "Expected 2"),
        ("id,labels_\n1,a\n", ConfigError, "'labels_'"),
        ("name,label\n1,a\n", ConfigError, "key or id"),
        ("id,label,label\n1,a,a\n", ConfigError, "two columns"),
        ("key,label\nelsewhere,a\n", ConfigError, "elsewhere"),
        ("id,label\n", ConfigError, "no row"),
        ("", ConfigError, "key or id"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, content, error, said):
    (tmp_path / "y.csv").write_text(content)
    with pytest.raises(error, match=said) as raised:
        read_label_file(tmp_path / "y.csv", ROWS)
    assert "y.csv" in str(raised.value)


@settings(deadline=None)
@given(st.binary(max_size=60), st.sampled_from(["csv", "txt", "parquet", "npy"]))
def test_any_bytes_are_labels_or_one_error(tmp_path_factory, content, kind):
    file = tmp_path_factory.mktemp("labels") / f"y.{kind}"
    file.write_bytes(b"id,label\n" + content if kind == "csv" else content)
    try:
        found = read_label_file(file, ROWS)
    except CuratedDataError:
        return
    assert found.numbers.shape == (N,)
    assert found.numbers.min() >= -1


def test_keys_of_a_pool_that_has_one_twice(tmp_path):
    for name in ("a", "b"):
        with ShardWriter(tmp_path / f"{name}-%06d.tar") as writer:
            writer.write({"__key__": "same", "txt": "a"})
    (tmp_path / "y.csv").write_text("key,label\nsame,1\n")
    twice = ShardPool(
        [str(tmp_path / "a-000000.tar"), str(tmp_path / "b-000000.tar")], cache_dir=tmp_path / "cache"
    )
    with pytest.raises(PoolError, match="'same'"):
        read_label_file(tmp_path / "y.csv", twice)
