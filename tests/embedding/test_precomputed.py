"""EmbeddingFiles that exist for a pool of shards: every source, by key and by order, and bad input."""

import re
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curated_data import CuratedDataModule, EmbeddedPool, LoaderOptions, ShardPool, curate, curate_embeddings
from curated_data.cache.artifacts import open_cache
from curated_data.cli import main
from curated_data.embedding import Precomputed
from curated_data.embedding.files import EmbeddingFiles
from curated_data.errors import ConfigError, EmbedderError, PoolError
from curated_data.pipeline.extend import extend
from tests.support.ranks import on_two_ranks

CONFIG = {"target_size": 20, "levels": [{"n_clusters": 8}]}
SIZES = [30, 25, 20]


def lists(rows: np.ndarray, fixed: bool = False) -> pa.Array:
    values = pa.array(rows.ravel())
    if fixed:
        return pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
    return pa.ListArray.from_arrays(np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1], values)


def write_table(path, keys, rows, *, name="key", column="embedding", fixed=False, group=7, **more):
    table = pa.table({name: keys, column: lists(rows, fixed)} | more)
    pq.write_table(table, path, row_group_size=group)
    return path


@pytest.fixture
def pool(write_pool, tmp_path) -> ShardPool:
    return ShardPool(write_pool(SIZES), cache_dir=tmp_path / "index")


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(sum(SIZES), 6)).astype(np.float32)


def all_keys(pool) -> list[str]:
    return pool.keys(np.arange(len(pool)))


def sources(pool, rows, folder) -> dict[str, str]:
    keys, rng = all_keys(pool), np.random.default_rng(1)
    mixed = rng.permutation(len(rows))
    shuffled = [keys[i] for i in mixed]
    np.save(folder / "rows.npy", rows)
    (folder / "arrays").mkdir()
    for number, some in enumerate(np.array_split(rows, 11)):
        np.save(folder / "arrays" / f"part_{number}.npy", some)
    write_table(folder / "ordered.parquet", keys, rows)
    write_table(folder / "fixed.parquet", shuffled, rows[mixed], fixed=True)
    write_table(folder / "named.parquet", shuffled, rows[mixed], name="uid", column="emb")
    write_table(folder / "half.parquet", shuffled, rows[mixed].astype(np.float16), fixed=True)
    (folder / "parts").mkdir()
    for number, some in enumerate(np.array_split(mixed, 12)):
        write_table(folder / "parts" / f"part_{number}.parquet", [keys[i] for i in some], rows[some])
    for name in ("img_emb", "metadata"):
        (folder / "clip" / name).mkdir(parents=True)
    for number, some in enumerate(np.array_split(mixed, 11)):
        np.save(folder / "clip" / "img_emb" / f"img_emb_{number}.npy", rows[some])
        table = pa.table({"image_path": [keys[i] for i in some], "caption": ["a"] * len(some)})
        pq.write_table(table, folder / "clip" / "metadata" / f"metadata_{number}.parquet")
    return {
        "array": f"precomputed:{folder}/rows.npy",
        "arrays": f"precomputed:{folder}/arrays",
        "ordered": f"precomputed:{folder}/ordered.parquet",
        "fixed": f"precomputed:{folder}/fixed.parquet",
        "named": f"precomputed:{folder}/named.parquet?key=uid&column=emb",
        "parts": f"precomputed:{folder}/parts",
        "clip": f"precomputed:{folder}/clip?missing=refuse",
        "half": f"precomputed:{folder}/half.parquet",
    }


def test_every_source_gives_each_sample_its_row(pool, rows, tmp_path):
    found = {}
    for name, embedder in sources(pool, rows, tmp_path).items():
        curation = curate(pool, CONFIG, embedder=embedder, cache_dir=tmp_path / name / "cache")
        expected = rows.astype(np.float16).astype(np.float32) if name == "half" else rows
        np.testing.assert_array_equal(curation.embeddings.as_array(), expected, name)
        assert curation.embeddings.n_failures == 0
        found[name] = curation.ids
    for name in found.keys() - {"half"}:
        np.testing.assert_array_equal(found[name], found["array"], name)


@settings(max_examples=40, deadline=None)
@given(
    there=st.sets(st.integers(0, 29), min_size=1),
    extra=st.integers(0, 5),
    group=st.integers(1, 12),
    mapped=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_are_joined_as_by_a_dictionary(there, extra, group, mapped, seed, tmp_path_factory, tar_of_30):
    folder = tmp_path_factory.mktemp("join")
    pool = ShardPool(tar_of_30)
    keys = all_keys(pool)
    rng = np.random.default_rng(seed)
    kept = [keys[i] for i in there] + [f"other{i}" for i in range(extra)]
    kept = [kept[i] for i in rng.permutation(len(kept))]
    rows = rng.normal(size=(len(kept), 3)).astype(np.float32)
    if mapped:
        for name in ("img_emb", "metadata"):
            (folder / name).mkdir()
        np.save(folder / "img_emb" / "img_emb_0.npy", rows)
        pq.write_table(pa.table({"key": kept}), folder / "metadata" / "metadata_0.parquet")
        source = folder
    else:
        source = write_table(folder / "rows.parquet", kept, rows, group=group)
    store = Precomputed(source).store(pool, open_cache(folder / "cache"))
    expected = dict(zip(kept, rows, strict=True))
    for number, key in enumerate(keys):
        assert store.valid[number] == (key in expected)
        wanted = expected.get(key, np.zeros(3, np.float32))
        np.testing.assert_array_equal(store.rows(np.array([number]))[0], wanted)
    assert {f["key"] for f in store.iterate_failures()} == set(keys) - set(kept)


@pytest.fixture(scope="session")
def tar_of_30(tmp_path_factory) -> str:
    import webdataset

    path = tmp_path_factory.mktemp("pool") / "pool.tar"
    with webdataset.TarWriter(str(path), mtime=0) as writer:
        for place in range(30):
            writer.write({"__key__": f"a/{place:02d}", "txt": b"x"})
    return str(path)


def test_what_is_missing_is_counted_or_refused_and_what_is_left_over_counted(pool, rows, tmp_path, caplog):
    keys = all_keys(pool)
    path = write_table(tmp_path / "some.parquet", [*keys[5:], "x", "y"], np.concatenate([rows[5:], rows[:2]]))
    with caplog.at_level("INFO"):
        curation = curate(pool, CONFIG, embedder=f"precomputed:{path}", cache_dir=tmp_path / "cache")
    assert curation.report["failed"] == 5
    assert not set(range(5)) & set(curation.ids.tolist())
    assert any("5 samples without one, 2 rows left over" in text for text in caplog.messages)
    embedder = Precomputed(path, missing="refuse")
    with pytest.raises(ConfigError) as caught:
        curate(pool, CONFIG, embedder=embedder, cache_dir=tmp_path / "cache")
    assert keys[0] in str(caught.value)
    assert "5 of 75" in str(caught.value)


def test_a_pool_that_has_grown_keeps_its_clusters(write_pool, rows, tmp_path):
    shards = write_pool(SIZES)
    keys = all_keys(ShardPool(shards))
    first = write_table(tmp_path / "first.parquet", keys[:55], rows[:55])
    both = write_table(tmp_path / "both.parquet", keys[::-1], rows[::-1].copy())
    cache = tmp_path / "cache"
    before = curate(shards[:2], CONFIG, embedder=f"precomputed:{first}", cache_dir=cache)
    tree = before.folders["tree"]
    after = extend(shards, CONFIG, tree=tree, embedder=f"precomputed:{both}", cache_dir=cache)
    np.testing.assert_array_equal(after.tree.parent[1][:55], before.tree.parent[1])
    assert after.report["drift"]["n_new"] == 20


def test_a_pool_of_rows_from_parquet_and_clip_retrieval(pool, rows, tmp_path):
    named = sources(pool, rows, tmp_path)
    for name in ("half", "array", "arrays", "named"):  # of other precision, without keys, of other names
        del named[name]
    for name, text in named.items():
        source = Precomputed.parse(text)
        assert source is not None
        mine = EmbeddedPool(source.path)
        curation = curate_embeddings(mine, CONFIG, cache_dir=tmp_path / name / "cache")
        place = {key: row for row, key in enumerate(mine.keys(np.arange(len(mine))))}
        order = [place[key] for key in all_keys(pool)]
        np.testing.assert_array_equal(curation.embeddings.as_array()[order], rows, name)


def test_numbers_in_names_count_by_value(tmp_path):
    for number in (10, 9, 1):
        np.save(tmp_path / f"img_emb_{number}.npy", np.full((1, 2), number, np.float16))
    assert EmbeddedPool(tmp_path).embeddings.take(np.arange(3))[:, 0].tolist() == [1, 9, 10]


def test_missing_vectors_are_rows_that_failed(tmp_path):
    column = pa.array([[1.0, 2.0], None, [3.0, None]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"embedding": column}), tmp_path / "rows.parquet")
    store = EmbeddedPool(tmp_path / "rows.parquet").store(tmp_path / "cache")
    assert store.valid.tolist() == [True, False, False]


def test_a_large_file_is_opened_without_being_read(tmp_path):
    path = tmp_path / "large.npy"
    shape = (10_000_000, 768)
    with open(path, "wb") as file:  # sparse: 15 GB that take no space
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + shape[0] * shape[1] * 2)
    tracemalloc.start()
    try:
        pool = EmbeddedPool(path)
        assert (len(pool), pool.dimension, pool.dtype) == (*shape, "float16")
        assert isinstance(pool.embeddings.parts[0].rows, np.memmap)
        assert pool.embeddings.take(np.array([9_999_999, 5])).shape == (2, 768)
        assert len(next(pool.embeddings.blocks(1000))[1]) == 1000
        assert tracemalloc.get_traced_memory()[1] < 8 << 20  # the block, and little more
    finally:
        tracemalloc.stop()


def bad(pool, rows, folder) -> dict:
    keys = all_keys(pool)
    np.save(folder / "short.npy", rows[:-1])
    write_table(folder / "twice.parquet", [*keys[:-1], keys[3]], rows)
    write_table(folder / "others.parquet", [f"z{i}" for i in range(len(keys))], rows)
    write_table(folder / "unnamed.parquet", keys, rows, name="photo_id")
    pq.write_table(pa.table({"key": keys, "score": rows[:, 0]}), folder / "scores.parquet")
    pq.write_table(pa.table({"key": keys, "a": lists(rows), "b": lists(rows)}), folder / "two.parquet")
    pq.write_table(pa.table({"key": [*keys[:-1], None], "e": lists(rows)}), folder / "null.parquet")
    ragged = pa.array([[1.0, 2.0], [1.0]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"key": keys[:2], "embedding": ragged}), folder / "ragged.parquet")
    (folder / "text.parquet").write_text("no parquet")
    (folder / "half" / "img_emb").mkdir(parents=True)
    (folder / "half" / "metadata").mkdir()
    np.save(folder / "half" / "img_emb" / "img_emb_0.npy", rows)
    (folder / "both").mkdir()
    np.save(folder / "both" / "a.npy", rows)
    write_table(folder / "both" / "b.parquet", keys, rows)
    return {
        "short.npy": (ConfigError, "short.npy: has 74"),
        "twice.parquet": (PoolError, keys[3]),
        "others.parquet": (PoolError, "z0"),
        "unnamed.parquet": (ConfigError, "photo_id"),
        "ordered.parquet?key=keys": (PoolError, "ordered.parquet: "),
        "unnamed.parquet?key=photoid": (ConfigError, "photo_id"),
        "scores.parquet": (ConfigError, "'key', 'score'"),
        "two.parquet": (ConfigError, "'a', 'b'"),
        "two.parquet?column=c": (ConfigError, "'c'"),
        "two.parquet?column=key": (ConfigError, "'key'"),
        "null.parquet": (PoolError, "row 74"),
        "ragged.parquet": (ConfigError, "row 1 of"),
        "text.parquet": (PoolError, "text.parquet"),
        "nowhere.parquet": (PoolError, "nowhere.parquet"),
        "half": (PoolError, "img_emb_0.npy"),
        "both": (PoolError, "a.npy, b.parquet"),
        "": (EmbedderError, "precomputed:"),
        "short.npy?missing=ignore": (ConfigError, "ignore"),
        "short.npy?keys=a": (EmbedderError, "keys=a"),
    }


def test_bad_files_are_one_error(pool, rows, tmp_path):
    for name, (kind, named) in bad(pool, rows, tmp_path).items():
        place = f"{tmp_path}/{name}" if name else ""
        with pytest.raises(kind, match=re.escape(named)):
            curate(pool, CONFIG, embedder=f"precomputed:{place}", cache_dir=tmp_path / "cache")


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_parquet_file_is_one_error_or_a_matrix(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    path = write_table(folder / "rows.parquet", list("abcdefghij"), np.ones((10, 4), np.float32), group=4)
    content = bytearray(path.read_bytes())
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")  # of the footer
    for _ in range(data.draw(st.integers(1, 2))):
        content[data.draw(st.integers(start, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    error = ""
    try:
        files = EmbeddingFiles(path)
        read = sum(len(rows) for _, rows in files.blocks(3))
        keys = files.keys()
    except (PoolError, ConfigError) as raised:
        error = str(raised)
    if error:
        assert "rows.parquet" in error
    else:
        assert read == len(files)
        assert keys is None or len(keys) == read


def test_rows_that_are_all_bad_or_of_another_length(pool, rows, tmp_path):
    path = write_table(tmp_path / "nan.parquet", all_keys(pool), np.full_like(rows, np.nan))
    with pytest.raises(PoolError, match=r"75 samples.*pool-000"):
        curate(pool, CONFIG, embedder=f"precomputed:{path}", cache_dir=tmp_path / "cache")
    np.save(tmp_path / "a.npy", rows)
    np.save(tmp_path / "b.npy", rows[:, :4])
    with pytest.raises(ConfigError, match="length 4"):
        EmbeddingFiles([tmp_path / "a.npy", tmp_path / "b.npy"])


def test_a_pool_with_a_key_twice_is_refused(write_pool, rows, tmp_path):
    import shutil

    (shard,) = write_pool([30])
    shutil.copy(shard, tmp_path / "copy.tar")
    pool = ShardPool([shard, tmp_path / "copy.tar"])
    path = write_table(tmp_path / "a.parquet", pool.keys(np.arange(30)), rows[:30])
    with pytest.raises(PoolError, match=re.escape(pool.index().duplicate_example)):
        Precomputed(path).places(pool)


def test_commands_take_rows_where_they_take_an_embedder(pool, rows, tmp_path, capsys):
    write_table(tmp_path / "rows.parquet", all_keys(pool), rows)
    np.save(tmp_path / "query.npy", rows[7])
    given = [*pool.urls, "--embedder", f"precomputed:{tmp_path}/rows.parquet"]
    given += ["--cache-dir", str(tmp_path / "cache")]
    assert main(["embed", *given, "--out", str(tmp_path / "out")]) == 0
    written = pq.read_table(tmp_path / "out").column("embedding").to_pylist()
    np.testing.assert_array_equal(np.array(written, np.float32), rows)
    assert main(["duplicates", *given, "--examples", str(tmp_path / "page.html")]) == 0
    found = ["--vectors", str(tmp_path / "query.npy"), "-n", "1", "--ids", str(tmp_path / "ids.npy")]
    assert main(["search", *given, *found]) == 0
    assert np.load(tmp_path / "ids.npy").tolist() == [7]
    assert main(["search", *given, "--image", "query.png"]) == 2
    assert "give --vectors" in capsys.readouterr().err


def _by_key(pool, rows, folder) -> str:
    """The rows by key in another order, in a file; five samples have none."""
    keys, order = all_keys(pool), np.random.default_rng(2).permutation(len(rows))[5:]
    write_table(folder / "rows.parquet", [keys[i] for i in order], rows[order])
    return f"precomputed:{folder / 'rows.parquet'}"


def _on_rank(rank, pool, embedder, folder):
    config = CONFIG | {"where": "id >= 10"}
    curation = curate(pool, config, embedder=embedder, cache_dir=folder / "cache")
    data = CuratedDataModule(
        pool, CONFIG, embedder=embedder, batch_size=5, image_size=8, cache_dir=folder / "cache",
        loader=LoaderOptions(num_workers=0),
    )  # fmt: skip
    data.setup("fit")
    streamed = np.concatenate([batch["sample_id"].numpy() for batch in data.train_dataloader()])
    report = {name: curation.report[name] for name in ("failed", "selected", "filters")}
    return curation.ids, curation.tree.parent[1], report, streamed


@pytest.mark.long
def test_two_ranks_curate_and_train_as_one_process_does(pool, rows, tmp_path):
    embedder = _by_key(pool, rows, tmp_path)
    found = on_two_ranks(_on_rank, pool, embedder, tmp_path / "two")
    ids, parent, report, streamed = _on_rank(0, pool, embedder, tmp_path / "one")
    for of_rank in found:
        np.testing.assert_array_equal(of_rank[0], ids)
        np.testing.assert_array_equal(of_rank[1], parent)
        assert of_rank[2] == report
    assert len(streamed) == CONFIG["target_size"]
    np.testing.assert_array_equal(np.sort(np.concatenate([found[0][3], found[1][3]])), np.sort(streamed))


def test_a_data_module_selects_by_rows_that_exist(pool, rows, tmp_path):
    embedder = _by_key(pool, rows, tmp_path)
    expected = curate(pool, CONFIG, embedder=embedder, cache_dir=tmp_path / "cache")
    assert expected.report["failed"] == 5
    data = CuratedDataModule(
        pool, CONFIG, embedder=embedder, batch_size=5, image_size=8, cache_dir=tmp_path / "cache",
        loader=LoaderOptions(num_workers=0),
    )  # fmt: skip
    data.setup("fit")
    assert all(data.curation.report["cached"].values())
    streamed = [number for batch in data.train_dataloader() for number in batch["sample_id"].tolist()]
    np.testing.assert_array_equal(np.sort(streamed), expected.ids)


def test_a_data_module_names_rows_of_another_pool(pool, rows, tmp_path):
    write_table(tmp_path / "other.parquet", [f"nobody {i}" for i in range(len(rows))], rows)
    data = CuratedDataModule(
        pool, CONFIG, embedder=f"precomputed:{tmp_path / 'other.parquet'}", batch_size=5,
        cache_dir=tmp_path / "cache",
    )  # fmt: skip
    with pytest.raises(PoolError, match=r"other\.parquet: "):
        data.setup("fit")
