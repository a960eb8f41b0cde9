"""Embeddings that exist already: every form of them, the whole of `curate` over them, and bad input."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import make_blobs

from curated_data import EmbeddedPool, curate, curate_embeddings
from curated_data.cli import main
from curated_data.embedding import existing
from curated_data.errors import CacheError, ConfigError, PoolError
from curated_data.pipeline.extend import extend
from curated_data.pipeline.reopen import reopen
from tests.support.ranks import on_ranks

CONFIG = {"target_size": 60, "levels": [{"n_clusters": 20}, {"n_clusters": 5}]}


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return make_blobs(600, 8, centers=12, random_state=0)[0].astype(np.float32)


def forms(rows, folder) -> dict:
    """The same rows in every form that is taken."""
    np.save(folder / "all.npy", rows)
    (folder / "parts").mkdir()
    for number, part in enumerate(np.array_split(rows, 3)):
        np.save(folder / "parts" / f"img_emb_{number}.npy", part)
    return {
        "array": rows,
        "a list": list(np.array_split(rows, 2)),
        "tensor": torch.from_numpy(rows),
        "a tensor that is trained": torch.from_numpy(rows).requires_grad_(),
        "double": rows.astype(np.float64),
        "big-endian": rows.astype(">f4"),
        "strided": np.repeat(rows, 2, axis=1)[:, ::2],
        "memory map": np.load(folder / "all.npy", mmap_mode="r"),
        "path": folder / "all.npy",
        "folder": str(folder / "parts"),
    }


def test_rows_in_every_form_give_one_selection(rows, tmp_path):
    found = {
        name: curate_embeddings(form, CONFIG, cache_dir=tmp_path / name)
        for name, form in forms(rows, tmp_path).items()
    }
    for name, curation in found.items():
        np.testing.assert_array_equal(curation.ids, found["array"].ids, name)
        np.testing.assert_array_equal(curation.embeddings.as_array(), rows, name)
    assert len(found["array"].ids) == 60


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any),
    block=st.integers(1, 30),
    dtype=st.sampled_from(["float16", "float32"]),
    bad=st.sets(st.integers(0, 159), max_size=5),
)
def test_the_store_holds_the_rows_in_order_and_counts_what_is_not_finite(
    sizes, block, dtype, bad, tmp_path_factory
):
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(size, 3)).astype(dtype) for size in sizes]
    rows = np.concatenate(parts)
    bad = sorted(row for row in bad if row < len(rows))
    starts = np.cumsum([0, *sizes])
    for row in bad:
        part = np.searchsorted(starts, row, side="right") - 1
        parts[part][row - starts[part]] = np.inf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(existing, "BLOCK", block)
        pool = EmbeddedPool(parts)
        store = pool.store(tmp_path_factory.mktemp("cache"))
    assert len(pool) == len(rows)
    assert np.flatnonzero(~store.valid).tolist() == bad
    good = np.setdiff1d(np.arange(len(rows)), bad)
    np.testing.assert_array_equal(store.rows(good), rows[good])
    assert [failure["id"] for failure in store.iterate_failures()] == bad


def test_a_second_run_is_a_look_up_and_a_reopened_one_the_same(rows, tmp_path):
    first = curate_embeddings(rows, CONFIG, cache_dir=tmp_path)
    second = curate_embeddings(rows.copy(), CONFIG, cache_dir=tmp_path)
    assert all(second.report["cached"].values())
    reopened = reopen(tmp_path, first.folders["selection"].name)
    np.testing.assert_array_equal(reopened.ids, first.ids)
    moved = rows.copy()
    moved[5, 2] += 1e-3
    assert not all(curate_embeddings(moved, CONFIG, cache_dir=tmp_path).report["cached"].values())


def test_near_duplicates_and_held_out_rows_are_left_out(rows, tmp_path):
    np.save(tmp_path / "test.npy", rows[10:20])
    pool = np.concatenate([rows, rows[100:110]])
    config = CONFIG | {
        "target_size": 600,
        "metric": "cosine",
        "near_duplicates": {"enabled": True, "threshold": 0.9999, "held_out": [str(tmp_path / "test.npy")]},
    }
    curation = curate_embeddings(pool, config, cache_dir=tmp_path / "cache")
    assert not set(range(10, 20)) & set(curation.ids.tolist())
    assert len(set(range(100, 110)) & set(curation.ids.tolist())) + len(
        set(range(600, 610)) & set(curation.ids.tolist())
    ) == len({tuple(row) for row in rows[100:110]})


def test_a_pool_that_has_grown_keeps_its_clusters(rows, tmp_path):
    first = curate_embeddings(rows[:400], CONFIG, cache_dir=tmp_path)
    grown = extend(
        EmbeddedPool([rows[:400], rows[400:]]),
        CONFIG,
        tree=first.folders["tree"],
        embedder=None,
        cache_dir=tmp_path,
    )
    np.testing.assert_array_equal(grown.tree.parent[1][:400], first.tree.parent[1])
    assert grown.report["drift"]["n_new"] == 200


def _on_rank(rank, rows, folder):
    curation = curate_embeddings([rows[:250], rows[250:]], CONFIG, cache_dir=folder / "cache")
    np.save(folder / f"ids-{rank}.npy", curation.ids)


def test_two_ranks_select_what_one_process_does(rows, tmp_path):
    on_ranks(2, _on_rank, rows, tmp_path)
    alone = curate_embeddings([rows[:250], rows[250:]], CONFIG, cache_dir=tmp_path / "alone")
    for rank in range(2):
        np.testing.assert_array_equal(np.load(tmp_path / f"ids-{rank}.npy"), alone.ids)


def test_from_the_shell(rows, tmp_path, capsys):
    np.save(tmp_path / "rows.npy", rows)
    place = ["--cache-dir", str(tmp_path / "cache"), "--target-size", "50"]
    arguments = ["-q", "curate", "--embeddings", str(tmp_path / "rows.npy"), *place]
    assert main([*arguments, "--ids", str(tmp_path / "ids.npy")]) == 0
    assert len(np.load(tmp_path / "ids.npy")) == 50
    assert "50 of 600" in capsys.readouterr().out


def test_without_a_cache_nothing_is_left_beside_the_process(rows):
    assert len(curate_embeddings(rows, CONFIG).ids) == 60


@pytest.mark.parametrize(
    ("make", "kind", "named"),
    [
        (lambda rows, folder: rows[0], ConfigError, "(8,)"),
        (lambda rows, folder: rows.astype(int), ConfigError, "int64"),
        (lambda rows, folder: [rows, rows[:, :4]], ConfigError, "length 4"),
        (lambda rows, folder: [], PoolError, "empty list"),
        (lambda rows, folder: rows[:0], PoolError, "no rows"),
        (lambda rows, folder: folder / "nowhere.npy", PoolError, "nowhere.npy"),
        (lambda rows, folder: folder, PoolError, "no .npy file"),
        (lambda rows, folder: "s3://bucket/rows.npy", ConfigError, "s3://bucket/rows.npy"),
        (lambda rows, folder: np.full_like(rows, np.nan), PoolError, "600"),
    ],
)
def test_bad_rows_are_one_error(make, kind, named, rows, tmp_path):
    with pytest.raises(kind, match=re.escape(named)):
        curate_embeddings(make(rows, tmp_path), CONFIG, cache_dir=tmp_path / "cache")


def test_a_damaged_file_is_one_error(rows, tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, rows)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PoolError, match=r"rows\.npy"):
        EmbeddedPool(path)
    path.write_bytes(b"no array")
    with pytest.raises((PoolError, CacheError)):
        EmbeddedPool(path)


def test_what_does_not_go_together(rows, tmp_path, write_pool):
    pool = EmbeddedPool(rows)
    largest = CONFIG | {"near_duplicates": {"enabled": True, "prefer": "largest"}}
    held_out = CONFIG | {"near_duplicates": {"enabled": True, "held_out": [str(tmp_path / "other.npy")]}}
    np.save(tmp_path / "other.npy", rows[:, :3])
    for config, embedder, named in (
        (CONFIG, "pixels:4", "embedder"),
        (largest, None, "prefer"),
        (held_out, None, "held_out"),
    ):
        with pytest.raises(ConfigError, match=re.escape(named)):
            curate(pool, config, embedder=embedder, cache_dir=tmp_path / "cache")
    with pytest.raises(ConfigError, match="embedder"):
        curate(write_pool([30]), CONFIG, embedder=None, cache_dir=tmp_path / "cache")


def test_a_report_without_images(rows, tmp_path):
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "labels.npy", np.arange(len(rows)) % 3)
    place = ["--cache-dir", str(tmp_path / "cache"), "--target-size", "50"]
    arguments = ["-q", "report", "--embeddings", str(tmp_path / "rows.npy"), *place]
    page = tmp_path / "page.html"
    assert main([*arguments, "--out", str(page), "--labels", str(tmp_path / "labels.npy")]) == 0
    text = page.read_text()
    assert '"samples":600' in text
    assert '"image":""' in text
    assert '"entropy"' in text
