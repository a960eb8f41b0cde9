"""Retrieval from seed sets through the whole of a curation."""

import numpy as np
import pytest

from curated_data import ShardPool, ShardWriter, curate, curate_embeddings
from curated_data.errors import ConfigError, PoolError
from curated_data.pipeline.reopen import reopen
from curated_data.report.explain import explain
from curated_data.selection.metrics import read_labels
from curated_data.selection.retrieval import retrieve, target_weights
from curated_data.selection.retrieved import load_retrieved
from tests.support.long_tailed import long_tailed_rows


@pytest.fixture(scope="module")
def rows():
    return long_tailed_rows()


@pytest.fixture
def seeds(rows, tmp_path):
    rng = np.random.default_rng(1)
    found = {}
    for name, some in (("a", rows[10:14]), ("b", rows[700:705])):
        np.save(tmp_path / f"{name}.npy", some + 0.1 * rng.normal(size=some.shape).astype(np.float32))
        found[name] = str(tmp_path / f"{name}.npy")
    return found


def run(rows, tmp_path, seeds, target_size=200, *, more=None, **how):
    config = {"target_size": target_size, "retrieval": {"seeds": seeds, **how}, **(more or {})}
    return curate_embeddings(rows, config, cache_dir=tmp_path / "cache")


def test_the_nearest_are_selected_with_their_reasons(rows, tmp_path, seeds):
    arrays = {name: np.load(path) for name, path in seeds.items()}
    out = [int(retrieve(rows, arrays, 1).ids[0])]
    curation = run(rows, tmp_path, seeds, n=5, more={"exclude": out, "nested_sizes": [60]})
    expected = retrieve(rows, arrays, 5, exclude=np.array(out))
    found = load_retrieved(curation.folders["retrieval"], len(rows))
    assert np.array_equal(found.ids, expected.ids)
    assert set(found.ids) <= set(curation.nested[60]) <= set(curation.ids)
    assert len(curation.ids) == 200
    assert not np.isin(out, curation.ids).any()
    told = curation.report["retrieval"]
    assert sum(of_set["selected"] for of_set in told.values()) == len(found.ids)
    assert {name: of_set["seeds"] for name, of_set in told.items()} == {"a": 4, "b": 5}

    again = reopen(tmp_path / "cache", curation.folders["selection"].name)
    table = again.table(selected=True).to_pydict()
    of_set = dict(zip(table["id"], table["seed_set"]))
    for place, sample in enumerate(found.ids.tolist()):
        name = found.names[found.seed_set[place]]
        assert of_set[sample] == name
        line = next(line for line in explain(again, sample) if "retrieved" in line)
        assert repr(name) in line
        assert f"to seed {found.seed[place]}, at a cosine of {found.cosine[place]:.4f}" in line
    assert sum(name is not None for name in of_set.values()) == len(found.ids)

    second = run(rows, tmp_path, seeds, n=5, more={"exclude": out, "nested_sizes": [60]})
    assert all(second.report["cached"].values())
    more = run(rows, tmp_path, seeds, n=6, more={"exclude": out, "nested_sizes": [60]})
    assert more.report["cached"] == {"tree": True, "retrieval": False, "selection": False}


def test_nothing_else_is_selected_where_nothing_shall_fill_the_rest(rows, tmp_path, seeds):
    alone = run(rows, tmp_path, seeds, n=5, fill=False, limit={"b": 3})
    found = load_retrieved(alone.folders["retrieval"], len(rows))
    assert np.array_equal(alone.ids, found.ids)
    assert (found.seed_set == 1).sum() == 3
    few = run(rows, tmp_path, seeds, 6, n=5, fill=False, limit={"b": 3})
    order = np.lexsort((found.ids, -found.cosine, found.rank))
    assert np.array_equal(few.ids, np.sort(found.ids[order[:6]]))


def test_clusters_that_seeds_fall_into_give_what_they_may(rows, tmp_path, seeds):
    how = {"method": "clusters", "least_seeds": 2, "per_cluster": 9, "fill": False, "limit": 12}
    curation = run(rows, tmp_path, seeds, more={"levels": [{"n_clusters": 12}]}, **how)
    found = load_retrieved(curation.folders["retrieval"], len(rows))
    tree = curation.tree
    assert len(found.ids)
    assert np.array_equal(tree.parent[1][found.ids], found.cluster)
    assert np.bincount(found.cluster).max() <= 9
    assert np.bincount(found.seed_set).max() <= 12
    fallen = [np.bincount(tree.assign(np.load(path)), minlength=12) for path in seeds.values()]
    assert all(fallen[number][cluster] >= 2 for number, cluster in zip(found.seed_set, found.cluster))
    assert "gave." in next(line for line in explain(curation, int(found.ids[0])) if "retrieved" in line)


def test_quotas_follow_the_share_of_the_seeds(rows, tmp_path, seeds):
    more = {"sampling": "flat", "levels": [{"n_clusters": 12}]}
    curation = run(rows, tmp_path, seeds, 40, method="weights", weights={"a": 3, "b": 1}, more=more)
    arrays = {name: np.load(path) for name, path in seeds.items()}
    weights = target_weights(curation.tree, arrays, {"a": 3, "b": 1}, metric=curation.tree.metric)
    given = np.bincount(curation.tree.parent[1][curation.ids], minlength=12)
    assert not given[weights == 0].any()
    np.testing.assert_allclose(given, 40 * weights / 4, atol=1)


def test_seeds_of_classes_of_images_retrieve_these(fashion_train, fashion_test, tmp_path):
    """Trousers and bags: by pixels alone, at least 85 of 100 that are retrieved are of the seeds' class."""
    held_out = ShardPool(fashion_test)
    labels = read_labels(held_out)
    paths, classes = {}, {"trousers": 1, "bags": 8}
    for name, label in classes.items():
        some = np.flatnonzero(labels == label)[:40]
        with ShardWriter(tmp_path / f"{name}-%03d.tar") as writer:
            for sample in held_out.read(some):
                members = {key: value for key, value in sample.items() if key in ("png", "cls")}
                writer.write({"__key__": sample["__key__"], **members})
        paths[name] = str(tmp_path / f"{name}-000.tar")
    pool = ShardPool(fashion_train)
    config = {
        "target_size": 400,
        "retrieval": {"seeds": paths, "n": 3, "fill": False},
        "near_duplicates": {"enabled": True, "threshold": 0.995},
        "embedding": {"num_workers": 0},
    }
    curation = curate(pool, config, embedder="pixels:14", cache_dir=tmp_path / "cache")
    found = load_retrieved(curation.folders["retrieval"], len(curation.embeddings))
    truth = read_labels(pool)
    removed = ~np.load(curation.folders["near_duplicates"] / "keep.npy")
    assert not removed[found.ids].any()
    for number, label in enumerate(classes.values()):
        got = truth[found.ids[found.seed_set == number]]
        assert len(got) > 30
        assert (got == label).mean() >= 0.85
        assert (got == label).mean() > 3 * (truth == label).mean()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("none.npy", ConfigError, "retrieval.seeds.a: .*none.npy"),
        ("seeds.tar", ConfigError, "retrieval.seeds.a: .*embeddings"),
    ],
)
def test_bad_seeds_of_rows_are_named(rows, tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        run(rows, tmp_path, {"a": given})


def test_bad_seeds_of_shards_are_named(write_pool, tmp_path):
    config = {"target_size": 5, "embedding": {"num_workers": 0}}
    shards = write_pool([30])
    np.save(tmp_path / "short.npy", np.ones((2, 3), np.float32))
    for given, error, message in (
        (str(tmp_path / "no-*.tar"), PoolError, "retrieval.seeds.mine: .*no-"),
        (str(tmp_path / "short.npy"), ConfigError, r"retrieval.seeds.mine: .*short.npy .*\(2, 3\)"),
    ):
        with pytest.raises(error, match=message):
            curate(
                shards,
                config | {"retrieval": {"seeds": {"good": shards, "mine": given}}},
                embedder="pixels:4",
                cache_dir=tmp_path / "cache",
            )
        assert not list((tmp_path / "cache").glob("embeddings/*/*")), "nothing was embedded before"
