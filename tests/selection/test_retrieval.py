"""Retrieval from seed sets, against brute force and plain loops, for any input and on labelled data."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from curated_data import ClusterTree, Level, hierarchical_kmeans, retrieve
from curated_data.errors import ConfigError
from curated_data.selection import retrieval
from curated_data.selection.retrieval import Retrieved, retrieve_clusters, target_weights


def brute_force(x, sets, n, least=-2.0, allowed=None):
    """{id: (-cosine, set, row, rank)} of the best reason for each id, one pair after the other."""
    reasons: dict[int, tuple] = {}
    allowed = np.ones(len(x), bool) if allowed is None else allowed
    usable = [i for i in np.flatnonzero(allowed) if np.isfinite(x[i]).all() and x[i].any()]
    for number, rows in enumerate(sets):
        for row, seed in enumerate(rows.astype(np.float64)):
            near = []
            for i in usable:
                other = x[i].astype(np.float64)
                cosine = np.dot(other, seed) / np.sqrt(np.dot(other, other) * np.dot(seed, seed))
                near.append((-round(float(cosine), 12), int(i)))
            near = [pair for pair in sorted(near) if -pair[0] >= least][:n]
            for rank, (negative, i) in enumerate(near):
                reason = (negative, number, row, rank)
                reasons[i] = min(reasons.get(i, reason), reason)
    return reasons


def reasons_of(found: Retrieved) -> dict[int, tuple]:
    assert (np.diff(found.ids) > 0).all()
    assert found.ids.dtype == np.int64
    assert (found.cluster == -1).all()
    columns = (-found.cosine, found.seed_set, found.seed, found.rank)
    return {int(i): tuple(reason) for i, *reason in zip(found.ids, *columns, strict=True)}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_it_is_what_brute_force_finds_for_any_blocks(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 9999)))
    size, d = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 5))
    # Small integers give many equal rows, equal directions and ties; odd rows have no direction at all.
    x = rng.integers(-2, 3, (size, d)).astype(
        data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
    )
    for value in (np.nan, np.inf, 0):
        x[rng.random(size) < 0.05] = value
    sets = {f"set {i}": rng.integers(1, 3, (rng.integers(1, 5), d)).astype(np.float32) for i in range(2)}
    n, least = data.draw(st.integers(1, 60)), data.draw(st.sampled_from([None, -0.5, 0.5, 1.0]))
    valid, exclude = rng.random(size) < 0.8, rng.integers(0, size, 3)
    allowed = valid & ~np.isin(np.arange(size), exclude)
    block = data.draw(st.integers(1, 60))
    found = retrieve(x, sets, n, least=least, valid=valid, exclude=exclude, block=block)
    assert reasons_of(found) == brute_force(x, sets.values(), n, -2 if least is None else least, allowed)
    assert found.names == ("set 0", "set 1")


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_blocks_tiles_and_copies_change_no_bit(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(1000, 33)).astype(np.float32)
    x[rng.choice(1000, 400)] = x[7]  # many copies, near to one seed
    x[rng.choice(1000, 100)] *= 3
    seeds = {"a": np.concatenate([x[7:8], rng.normal(size=(20, 33)).astype(np.float32)])}
    once = retrieve(x, seeds, 5, block=1000)
    expected = brute_force(x, seeds.values(), 5)
    assert {i: reason[1:] for i, reason in reasons_of(once).items()} == {
        i: reason[1:] for i, reason in expected.items()
    }
    np.testing.assert_allclose(once.cosine, [-expected[i][0] for i in once.ids.tolist()], atol=2e-12)
    for block, tile in ((1, 1), (7, 20), (128, 500), (999, 1 << 22)):
        monkeypatch.setattr(retrieval, "_TILE", tile)
        again = retrieve(x, seeds, 5, block=block)
        for name in ("ids", "seed_set", "seed", "cosine", "rank"):
            np.testing.assert_array_equal(getattr(once, name), getattr(again, name))


def test_rows_that_float32_cannot_tell_apart_are_in_exact_order() -> None:
    rng = np.random.default_rng(0)
    x = 1 + 5e-4 * rng.normal(size=(2000, 8))  # all cosines are 1 up to 1e-6
    seeds = 1 + 5e-4 * rng.normal(size=(3, 8))
    expected = brute_force(x, [seeds], 4)
    for block in (2000, 300):
        found = reasons_of(retrieve(x, {"a": seeds}, 4, block=block))
        assert {i: reason[1:] for i, reason in found.items()} == {
            i: reason[1:] for i, reason in expected.items()
        }


def test_it_agrees_with_scikit_learn_for_any_kind_of_matrix(tmp_path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 24)).astype(np.float16)
    seeds = rng.normal(size=(40, 24)).astype(np.float32)
    neighbours = NearestNeighbors(n_neighbors=6, metric="cosine").fit(x.astype(np.float64))
    expected = np.unique(neighbours.kneighbors(seeds.astype(np.float64))[1])
    np.save(tmp_path / "x.npy", x)
    for matrix in (x, torch.from_numpy(x), np.load(tmp_path / "x.npy", mmap_mode="r"), x.astype(np.float64)):
        found = retrieve(matrix, {"a": torch.from_numpy(seeds[:10]), "b": seeds[10:]}, 6, block=700)
        np.testing.assert_array_equal(found.ids, expected)


def test_it_reads_blocks_and_nothing_that_is_excluded() -> None:
    class Watched:
        shape, dtype = (100, 3), np.dtype(np.float32)

        def __len__(self) -> int:
            return 100

        def __getitem__(self, which: slice) -> np.ndarray:
            read.append((which.start, which.stop))
            return np.ones((which.stop - which.start, 3), np.float32)

    read: list[tuple[int, int]] = []
    valid = np.arange(100) >= 25
    found = retrieve(Watched(), {"a": np.ones((1, 3), np.float32)}, 3, valid=valid, block=20)
    assert read == [(20, 40), (40, 60), (60, 80), (80, 100)]
    assert found.ids.tolist() == [25, 26, 27]  # ties: the smaller ids


def test_rows_without_a_direction_are_counted_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    x = np.ones((10, 3), np.float32)
    x[2], x[4] = 0, np.nan
    valid = np.arange(10) != 4  # known to be none, so not news
    with caplog.at_level("WARNING"):
        found = retrieve(x, SEEDS, 10, valid=valid, block=4)
    assert found.ids.tolist() == [0, 1, 3, 5, 6, 7, 8, 9]
    assert "1 of 10 rows" in caplog.text


def test_scales_beyond_float32_keep_their_direction() -> None:
    x = np.array([[1e300, 0], [0, 1e-300], [1e300, 1e300]])
    found = retrieve(x, {"a": np.array([[0, 1e-200]])}, 1)
    assert found.ids.tolist() == [1]
    assert found.cosine.tolist() == [1.0]


@pytest.mark.parametrize("classes", [(3, 8), (0, 6), (1, 9), (2, 7), (4, 5)])
def test_seeds_of_some_classes_retrieve_these(classes: tuple[int, int]) -> None:
    """A sample is right if it has the class of its seed set; a tenth of the pool has it."""
    x, labels = load_digits(return_X_y=True)
    tree = hierarchical_kmeans(x, [Level(60)], metric="cosine", seed=0)
    precision = []
    for draw in range(4):
        rng = np.random.default_rng(draw)
        mine = {str(c): rng.choice(np.flatnonzero(labels == c), 10, replace=False) for c in classes}
        exclude = np.concatenate(list(mine.values()))
        seeds = {name: x[ids] for name, ids in mine.items()}
        near = retrieve(x, seeds, 4, exclude=exclude)
        by_cluster = retrieve_clusters(
            tree, seeds, per_cluster=10, least_seeds=2, metric="cosine", exclude=exclude
        )
        for found in (near, by_cluster):
            assert len(found.ids) >= 20
            assert not np.isin(found.ids, exclude).any()
        precision.append(
            [np.mean(labels[f.ids] == np.array(classes)[f.seed_set]) for f in (near, by_cluster)]
        )
    assert (np.mean(precision, axis=0) >= 0.9).all(), precision


def random_tree(rng: np.random.Generator, n: int = 120, d: int = 3) -> tuple[ClusterTree, np.ndarray]:
    """Two levels over n samples; the last cluster of each is empty, and some samples are excluded."""
    centroids = {1: rng.normal(size=(9, d)), 2: rng.normal(size=(4, d))}
    above = np.append(rng.integers(0, 3, 8), -1)
    return ClusterTree(centroids, {1: rng.integers(-1, 8, n), 2: above}), above


def plain_counts(tree: ClusterTree, rows: np.ndarray, level: int, metric: str) -> dict[int, int]:
    counts = dict.fromkeys(range(tree.n_clusters[level]), 0)
    for row in rows.astype(np.float64):
        point = row / np.linalg.norm(row) if metric == "cosine" else row
        apart = [np.linalg.norm(point - c) if s else np.inf for c, s in zip(tree.centroids[1], tree.sizes(1))]
        cluster = int(np.argmin(apart))
        counts[cluster if level == 1 else int(tree.parent[2][cluster])] += 1
    return counts


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 9999),
    level=st.sampled_from([1, 2]),
    metric=st.sampled_from(["l2", "cosine"]),
    per_cluster=st.integers(1, 30),
    least_seeds=st.integers(1, 6),
    limit=st.sampled_from([None, 0, 5, {"a": 7}]),
)
def test_clusters_give_what_a_plain_loop_says(seed, level, metric, per_cluster, least_seeds, limit) -> None:
    rng = np.random.default_rng(seed)
    tree, _ = random_tree(rng)
    seeds = {name: rng.normal(size=(rng.integers(1, 30), 3)) for name in "ab"}
    valid, exclude = rng.random(120) < 0.9, rng.integers(0, 120, 5)
    allowed = valid & ~np.isin(np.arange(120), exclude)
    arguments = {"level": level, "metric": metric, "limit": limit, "valid": valid, "exclude": exclude}
    arguments |= {"per_cluster": per_cluster, "least_seeds": least_seeds}
    found = retrieve_clusters(tree, seeds, seed=3, **arguments)
    left_in = {
        c: min(per_cluster, int(allowed[tree.members(level, c)].sum())) for c in range(tree.n_clusters[level])
    }
    expected = {}
    for number, name in enumerate(seeds):
        counts = plain_counts(tree, seeds[name], level, metric)
        left = limit.get(name, 1000) if isinstance(limit, dict) else 1000 if limit is None else limit
        for cluster in sorted(counts, key=lambda c: (-counts[c], c)):
            if counts[cluster] >= least_seeds:
                expected[number, cluster] = min(left_in[cluster], left)
                left_in[cluster] -= expected[number, cluster]
                left -= expected[number, cluster]
    given_by = {
        pair: int(((found.seed_set == pair[0]) & (found.cluster == pair[1])).sum()) for pair in expected
    }
    assert given_by == expected
    assert len(found.ids) == sum(expected.values())
    assert (np.diff(found.ids) > 0).all()
    assert allowed[found.ids].all()
    np.testing.assert_array_equal(tree.assignment(level, found.ids), found.cluster)
    for cluster in np.unique(found.cluster):  # ranks are those of one draw, over all sets
        assert sorted(found.rank[found.cluster == cluster]) == list(range((found.cluster == cluster).sum()))
    assert (found.seed == -1).all()
    assert np.isnan(found.cosine).all()


def test_the_draw_is_random_by_its_seed_and_larger_ones_contain_smaller() -> None:
    tree, _ = random_tree(np.random.default_rng(0), 2000)
    seeds = {"a": np.random.default_rng(1).normal(size=(50, 3))}
    few, again, other, more = (
        retrieve_clusters(tree, seeds, metric="l2", per_cluster=c, seed=s).ids
        for c, s in ((9, 0), (9, 0), (9, 1), (30, 0))
    )
    np.testing.assert_array_equal(few, again)
    assert len(np.setdiff1d(few, other)) > len(few) / 2
    assert np.isin(few, more).all()


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 9999), level=st.sampled_from([1, 2]), metric=st.sampled_from(["l2", "cosine"]))
def test_target_weights_are_the_sum_of_the_formula(seed, level, metric) -> None:
    rng = np.random.default_rng(seed)
    tree, _ = random_tree(rng)
    seeds = {name: rng.normal(size=(rng.integers(1, 30), 3)) for name in "abc"}
    weights = {"c": 0.5, "a": 2.0, "b": 0.0}
    found = target_weights(tree, seeds, weights, level=level, metric=metric)
    expected = np.zeros(tree.n_clusters[level])
    for name, rows in seeds.items():
        for cluster, count in plain_counts(tree, rows, level, metric).items():
            expected[cluster] += weights[name] * count / len(rows)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found.sum() == pytest.approx(2.5)
    assert target_weights(tree, seeds, level=level, metric=metric).sum() == pytest.approx(1)


def test_samples_as_seeds_fall_into_their_own_clusters() -> None:
    x = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
    for metric in ("l2", "cosine"):
        tree = hierarchical_kmeans(x, [Level(30), Level(5)], metric=metric, seed=0)
        for level in (1, 2):
            weights = target_weights(tree, {"all": x}, level=level, metric=metric)
            np.testing.assert_allclose(weights, tree.sizes(level) / 500, atol=0.005)  # but for rounding


X, SEEDS = np.ones((10, 3), np.float32), {"a": np.ones((2, 3), np.float32)}
BAD_SEEDS = [
    ({}, "seeds"),
    (np.ones((2, 3)), "seeds"),
    ({"a": np.ones((0, 3))}, r"seeds\['a'\]"),
    ({"a": np.ones(3)}, r"seeds\['a'\]"),
    ({"a": [[1.0, 2, 3]]}, r"seeds\['a'\]"),
    ({"a": np.ones((2, 4))}, r"seeds\['a'\].* 4 "),
    ({"a": np.array([["x", "y", "z"]])}, r"seeds\['a'\]"),
    ({**SEEDS, "b": np.array([[1, 1, 1], [1, np.nan, 1]])}, r"seeds\['b'\]: row 1 "),
]
BAD = [
    *(({"seeds": seeds}, match) for seeds, match in BAD_SEEDS),
    ({"seeds": {"a": np.zeros((1, 3))}}, r"seeds\['a'\]: row 0 "),
    ({"embeddings": np.ones(3)}, "embeddings"),
    ({"embeddings": np.ones((0, 3))}, "embeddings"),
    ({"n": 0}, "n: .* 0"),
    ({"n": True}, "n: "),
    ({"n": 1.5}, "n: "),
    ({"block": 0}, "block: "),
    ({"least": 1.5}, "least: "),
    ({"least": np.nan}, "least: "),
    ({"valid": np.ones(9, bool)}, "valid: "),
    ({"valid": np.ones(10)}, "valid: "),
    ({"exclude": [10]}, "exclude: id 10 "),
    ({"exclude": [-1]}, "exclude: id -1 "),
    ({"exclude": [0.5]}, "exclude: "),
]


@pytest.mark.parametrize(("arguments", "match"), BAD)
def test_bad_input_to_retrieve_gets_one_clear_error(arguments, match) -> None:
    with pytest.raises(ConfigError, match=f"^{match}"):
        retrieve(**{"embeddings": X, "seeds": SEEDS, **arguments})


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        *(({"seeds": seeds}, match) for seeds, match in BAD_SEEDS),
        ({"level": 3}, "level: .* 3"),
        ({"level": 0}, "level: "),
        ({"level": True}, "level: "),
        ({"level": 1.0}, "level: "),
        ({"level": [1]}, "level: "),
        ({"metric": "dot"}, "metric: .*'dot'"),
        ({"metric": "cosine", "seeds": {"a": np.zeros((1, 3))}}, r"seeds\['a'\]: row 0 "),
        ({"per_cluster": 0}, "per_cluster: "),
        ({"least_seeds": 0}, "least_seeds: "),
        ({"limit": -1}, "limit .*-1"),
        ({"limit": {"b": 1}}, "limit: .*'b'"),
        ({"seed": -1}, "seed: "),
        ({"valid": np.ones(9, bool)}, "valid: "),
        ({"exclude": [120]}, "exclude: id 120 "),
    ],
)
def test_bad_input_to_clusters_gets_one_clear_error(arguments, match) -> None:
    tree, _ = random_tree(np.random.default_rng(0))
    with pytest.raises(ConfigError, match=f"^{match}"):
        retrieve_clusters(**{"tree": tree, "seeds": SEEDS, "metric": "l2", "per_cluster": 3, **arguments})


@pytest.mark.parametrize("weights", [{}, {"b": 1}, {"a": 1, "b": 1}, {"a": -1}, {"a": np.nan}, {"a": "1"}])
def test_bad_weights_get_one_clear_error(weights) -> None:
    tree, _ = random_tree(np.random.default_rng(0))
    with pytest.raises(ConfigError, match=r"^weights: "):
        target_weights(tree, SEEDS, weights, metric="l2")
