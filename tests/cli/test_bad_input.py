"""Embeddings, columns and conditions that do not fit a real pool: one line for each, and nothing written."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curated_data import ShardPool
from curated_data.cli import main

SHARD = Path(__file__).parents[2] / "recipes/data/fashion-lt50/fashion-lt50-train-00.tar"


def vectors(rows: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Rows and scores of the pool, as they should be (`rows`, `scores`) and not."""
    folder = tmp_path_factory.mktemp("files")
    keys = ShardPool(SHARD).keys(np.arange(1100))
    rng = np.random.default_rng(0)
    rows, scores = rng.normal(size=(1100, 8)).astype(np.float32), rng.random(1100)
    others = [f"other{i}" for i in range(1100)]
    twice = [*keys[:-1], keys[3]]
    (folder / "mixed").mkdir()
    arrays = {
        "rows": rows, "short": rows[:-1], "nan": np.full_like(rows, np.nan), "flat": rows[0],
        "whole": rows.astype(int), "mixed/0": rows[:500], "mixed/1": rows[500:, :4],
    }  # fmt: skip
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "cut.npy").write_bytes((folder / "rows.npy").read_bytes()[:500])
    tables = {
        "keyed": {"key": keys, "embedding": vectors(rows)},
        "others": {"key": others, "embedding": vectors(rows)},
        "twice": {"key": twice, "embedding": vectors(rows)},
        "unnamed": {"photo": keys, "embedding": vectors(rows)},
        "two": {"key": keys, "a": vectors(rows), "b": vectors(rows)},
        "scores": {"key": keys, "similarity": scores},
        "others' scores": {"key": others, "similarity": scores},
        "short scores": {"similarity": scores[:-1]},
        "scores twice": {"key": twice, "similarity": scores},
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    (folder / "text.parquet").write_text("no parquet")
    return folder


EMBEDDINGS = {
    "short.npy": ["short.npy", "1099 rows", "1100 samples", "in the pool's order"],
    "mixed": ["mixed/1.npy", "length 4", "mixed/0.npy 8", "one network"],
    "nan.npy": ["none of the pool's 1100", "nan.npy", "not finite"],
    "flat.npy": ["flat.npy", "(8,)", "a matrix (n, d)"],
    "whole.npy": ["whole.npy", "int64", "floating-point"],
    "cut.npy": ["cut.npy", "500 bytes", "numpy.save"],
    "others.parquet": ["others.parquet", "'other0'", "'train-", "the embeddings of this pool"],
    "twice.parquet": ["twice.parquet", "'train-", "more than once", "one row for each key"],
    "unnamed.parquet": ["unnamed.parquet", "'photo'", "?key=COLUMN"],
    "keyed.parquet?key=uid": ["keyed.parquet", "'uid'", "'key'"],
    "keyed.parquet?column=embed": ["keyed.parquet", "'embed'", "did you mean 'embedding'"],
    "keyed.parquet?colum=a": ["?colum=a", "key, column"],
    "scores.parquet": ["scores.parquet", "'similarity'", "give the file with the embeddings"],
    "two.parquet": ["two.parquet", "'a', 'b'", "?column=NAME"],
    "text.parquet": ["text.parquet", "cannot be read as parquet", "give another file"],
    "nowhere.npy": ["nowhere.npy", "no such file", "a .npy or parquet file"],
}
OF_POOLS = ("short.npy", "others.parquet", "twice.parquet", "unnamed.parquet", "keyed.parquet?key=uid")
CONDITIONS = {
    "similarity > 2": ["similarity > 2 alone drops 1100", "none of the 1100", "drop fewer"],
    "similarity > 0.5 AND similarity < 0.1": ["similarity > 0.5 alone", "similarity < 0.1 alone"],
    "similarty > 0.2": ["'similarty'", "did you mean 'similarity'?"],
    "similarity": ["double", "as similarity > 0"],
    "similarity > 'x'": ["similarity > 'x'", "Could not convert string 'x'", "correct it"],
    "similarity > 1e400": ["1e400", "cannot be evaluated"],
    "similarity >": ["similarity >", "not a condition in SQL", "'similarity > 0.28"],
    "json.x > 3": ["'json.x'", "no .json member"],
    "random() > similarity": ["'random'", "not a function of values alone"],
    "similarity > (SELECT count(*) FROM read_csv('secret.csv'))": ["subquery", "columns of one sample"],
    "similarity IN (SELECT a FROM 'secret.csv')": ["subquery", "columns of one sample"],
    "read_text('secret.csv') > similarity": ["'read_text'", "not a function of values alone"],
    "similarity > 0; COPY (SELECT 1) TO 'written.csv'": ["not a condition in SQL"],
    "similarity > 0) FROM samples; COPY samples TO 'written.csv'; SELECT (1": ["not a condition"],
    "similarity), (similarity": ["more than a condition"],
    "ATTACH 'written.db'": ["names no column"],
    "getenv('HOME') > similarity": ["'getenv'"],
}
COLUMNS = {
    "others' scores.parquet": ["others' scores.parquet", "'other0'", "'train-", "the table of this pool"],
    "short scores.parquet": ["short scores.parquet", "1099 rows", "1100 samples", "add their keys"],
    "scores twice.parquet": ["scores twice.parquet", "'train-", "more than once"],
    "text.parquet": ["text.parquet", "cannot be read as parquet"],
    "nowhere.parquet": ["nowhere.parquet", "no such file"],
}


def said(capsys, *arguments: str) -> str:
    """What a curation that fails says: its last line, and it is the error."""
    assert main(["curate", *arguments, "--cache-dir", "cache", "--target-size", "50"]) == 2
    printed, lines = capsys.readouterr()
    assert printed == ""
    assert "Traceback" not in lines
    (error,) = [line for line in lines.splitlines() if line.startswith("curated-data curate: ")]
    assert lines.endswith(error + "\n")
    return error


def check(error: str, named: list[str]) -> None:
    assert not [text for text in named if text not in error], error


@pytest.fixture(autouse=True)
def within(files, tmp_path, monkeypatch):
    """A folder in which there is nothing but a file that conditions try to read."""
    monkeypatch.chdir(tmp_path)
    Path("secret.csv").write_text("a\n1\n")
    yield
    assert {*os.listdir()} <= {"secret.csv", "cache"}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_of_a_pool(name, files, capsys):
    check(said(capsys, str(SHARD), "--embedder", f"precomputed:{files / name}"), EMBEDDINGS[name])


@pytest.mark.parametrize("name", [name for name in EMBEDDINGS if name not in OF_POOLS])
def test_embeddings_alone(name, files, capsys):
    check(said(capsys, "--embeddings", str(files / name)), EMBEDDINGS[name])


@pytest.mark.parametrize("where", CONDITIONS)
def test_conditions(where, files, capsys):
    rows, scores = f"precomputed:{files / 'rows.npy'}", str(files / "scores.parquet")
    error = said(capsys, str(SHARD), "--embedder", rows, "--columns", scores, "--where", where)
    check(error, CONDITIONS[where])


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("shards", [True, False])
def test_columns(name, shards, files, capsys):
    pool = [str(SHARD), "--embedder", f"precomputed:{files / 'rows.npy'}"]
    given = pool if shards else ["--embeddings", str(files / "keyed.parquet")]
    error = said(capsys, *given, "--columns", str(files / name), "--where", "similarity > 0.5")
    check(error, COLUMNS[name])


def test_rows_without_columns(files, capsys):
    error = said(capsys, "--embeddings", str(files / "rows.npy"), "--where", "similarity > 0.5")
    check(error, ["'similarity'", "--columns PATH"])


def test_a_shard_is_no_file_of_embeddings(capsys):
    check(said(capsys, "--embeddings", str(SHARD)), [SHARD.name, "holds no embeddings", ".npy or parquet"])


def test_columns_are_named_after_the_path(files, tmp_path, capsys):
    where = ["--cache-dir", "cache", "--target-size", "50", "--ids", "cache/ids.npy"]
    given = f"{files / 'two.parquet'}?column=b"
    assert main(["-q", "curate", "--embeddings", given, *where]) == 0
    assert len(np.load("cache/ids.npy")) == 50


def test_rows_without_keys_take_scores_with_keys_in_order(files, caplog):
    where = ["--cache-dir", "cache", "--target-size", "50", "--where", "similarity > 0.5"]
    given = [str(files / "rows.npy"), "--columns", str(files / "scores.parquet"), "--ids", "cache/ids.npy"]
    assert main(["-q", "curate", "--embeddings", *given, *where]) == 0
    scores = pq.read_table(files / "scores.parquet")["similarity"].to_numpy()
    assert (scores[np.load("cache/ids.npy")] > 0.5).all()
    assert "its rows are taken in order" in caplog.text


@pytest.mark.long
def test_a_process_of_its_own_says_one_line(files):
    command = [
        sys.executable,
        "-m",
        "curated_data.cli",
        "-q",
        "curate",
        "--embeddings",
        "--target-size",
        "50",
    ]
    command += [str(files / "rows.npy"), "--where", "similarity > 0.5", "--cache-dir", "cache"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("curated-data curate: column 'similarity': ")
