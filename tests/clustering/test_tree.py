import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curated_data.cache.artifacts import read_json, with_checksum
from curated_data.cache.publishing import atomic_write_json
from curated_data.clustering.tree import ClusterTree, take_groups
from curated_data.errors import CacheError


def random_tree(rng, n=300, counts=(40, 9, 3), excluded=True):
    parent, below = {}, n
    for level, k in enumerate(counts, 1):
        parent[level] = rng.integers(-1 if excluded else 0, k, below)
        below = k
    return ClusterTree({i: rng.normal(size=(k, 5)) for i, k in enumerate(counts, 1)}, parent, np.arange(n))


@given(st.integers(0, 2**32 - 1), st.integers(0, 60), st.booleans())
def test_members_sizes_and_assignment_agree_at_every_level(seed, n, excluded):
    tree = random_tree(np.random.default_rng(seed), n, (12, 5, 2), excluded)
    for level in range(1, tree.n_levels + 1):
        # By definition: follow each sample's parents upwards.
        expected = []
        for sample in range(n):
            node = sample
            for above in range(1, level + 1):
                node = tree.parent[above][node] if node >= 0 else -1
            expected.append(node)
        assert tree.assignment(level).tolist() == expected
        some = np.arange(n)[::-3]
        assert tree.assignment(level, some).tolist() == [expected[sample] for sample in some]
        for cluster in range(tree.n_clusters[level]):
            members = tree.members(level, cluster)
            assert members.dtype == np.int64
            assert members.tolist() == [s for s in range(n) if expected[s] == cluster]
            assert tree.sizes(level)[cluster] == len(members)


def test_children_are_compressed_rows_of_the_level_below():
    tree = random_tree(np.random.default_rng(0))
    children = tree.children(2)
    assert children.start[0] == 0
    assert children.start[-1] == (tree.parent[2] >= 0).sum()
    for c in range(9):
        assert take_groups(children, np.array([c])).tolist() == np.flatnonzero(tree.parent[2] == c).tolist()
    several = take_groups(children, np.array([4, 1, 4]))
    assert several.tolist() == [n for c in (4, 1, 4) for n in np.flatnonzero(tree.parent[2] == c)]
    assert take_groups(children, np.array([], np.int64)).tolist() == []


def test_keeps_contract_types():
    tree = ClusterTree({1: np.zeros((2, 3), np.float16)}, {1: np.array([0, 1, -1], np.int32)})
    assert tree.centroids[1].dtype == np.float32
    assert tree.parent[1].dtype == np.int64
    assert tree.sizes(1).dtype == np.int64
    assert tree.n_levels == 1
    assert tree.distance is None


@pytest.mark.parametrize(
    ("centroids", "parent", "message"),
    [
        ({}, {}, r"\[\] and \[\]"),
        ({2: np.zeros((2, 3))}, {2: np.zeros(4, int)}, r"\[2\] and \[2\]"),
        ({1: np.zeros((2, 3))}, {1: np.zeros(4, int), 2: np.zeros(2, int)}, r"\[1\] and \[1, 2\]"),
        ({1: np.zeros(3)}, {1: np.zeros(4, int)}, r"centroids\[1\]"),
        ({1: np.full((2, 3), np.nan)}, {1: np.zeros(4, int)}, r"centroids\[1\] has non-finite"),
        ({1: np.zeros((2, 3))}, {1: np.array([0, 2])}, r"parent\[1\] .*0\.\.2"),
        ({1: np.zeros((2, 3))}, {1: np.array([0, -2])}, r"parent\[1\] .*-2\.\.0"),
        ({1: np.zeros((2, 3))}, {1: np.array([0.0, 1.0])}, r"parent\[1\] .*float64"),
        (
            {1: np.zeros((2, 3)), 2: np.zeros((1, 3))},
            {1: np.zeros(4, int), 2: np.zeros(3, int)},
            r"parent\[2\] .* 2 .* 3$",
        ),
        ({1: np.zeros((2, 3)), 2: np.zeros((1, 4))}, {1: np.zeros(4, int), 2: np.zeros(2, int)}, "dimension"),
    ],
)
def test_refuses_arrays_that_do_not_fit(centroids, parent, message):
    with pytest.raises(ValueError, match=message):
        ClusterTree(centroids, parent)


def test_refuses_distance_levels_and_clusters_out_of_range():
    tree = random_tree(np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"distance .*\(3,\)"):
        ClusterTree(tree.centroids, tree.parent, np.zeros(3))
    with pytest.raises(ValueError, match=r"1\.\.3.* 4"):
        tree.sizes(4)
    with pytest.raises(ValueError, match=r"level 2 .*0\.\.8.* 9"):
        tree.members(2, 9)


@pytest.mark.parametrize("memory_map", [False, True])
def test_save_and_load(tmp_path, memory_map):
    tree = random_tree(np.random.default_rng(1))
    tree.save(tmp_path / "tree")
    assert {p.suffix for p in (tmp_path / "tree").iterdir()} == {".npy", ".json"}  # nothing pickled
    back = ClusterTree.load(tmp_path / "tree", memory_map=memory_map)
    for level in tree.centroids:
        np.testing.assert_array_equal(back.centroids[level], tree.centroids[level])
        np.testing.assert_array_equal(back.parent[level], tree.parent[level])
    np.testing.assert_array_equal(back.distance, tree.distance)


def test_save_replaces_a_tree_and_nothing_else(tmp_path):
    first, second = random_tree(np.random.default_rng(1)), random_tree(np.random.default_rng(2))
    first.save(tmp_path / "tree")
    second.save(tmp_path / "tree")
    np.testing.assert_array_equal(ClusterTree.load(tmp_path / "tree").parent[1], second.parent[1])
    assert [p.name for p in tmp_path.iterdir()] == ["tree"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(CacheError, match=r"mine: .*'notes\.txt'"):
        first.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    first.save(tmp_path / "empty")
    assert ClusterTree.load(tmp_path / "empty").n_levels == 3


def test_load_refuses_what_is_damaged_or_foreign(tmp_path):
    with pytest.raises(CacheError, match="nowhere"):
        ClusterTree.load(tmp_path / "nowhere")
    tree = random_tree(np.random.default_rng(1))
    tree.save(tmp_path / "torn")
    data = (tmp_path / "torn" / "parent_1.npy").read_bytes()
    (tmp_path / "torn" / "parent_1.npy").write_bytes(data[: len(data) // 2])
    with pytest.raises(CacheError, match=r"torn/parent_1\.npy: .*remove .*torn"):
        ClusterTree.load(tmp_path / "torn")
    tree.save(tmp_path / "pickled")
    np.save(tmp_path / "pickled" / "parent_1.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CacheError, match=r"pickled/parent_1\.npy: "):
        ClusterTree.load(tmp_path / "pickled")
    tree.save(tmp_path / "other")
    manifest = read_json(tmp_path / "other" / "manifest.json")
    atomic_write_json(tmp_path / "other" / "manifest.json", manifest | {"format": 999})
    with pytest.raises(CacheError, match=r"999"):
        ClusterTree.load(tmp_path / "other")
    atomic_write_json(tmp_path / "other" / "manifest.json", with_checksum(manifest) | {"n_samples": 7})
    with pytest.raises(CacheError, match=r"other/manifest.json: .*checksum"):
        ClusterTree.load(tmp_path / "other")
    atomic_write_json(tmp_path / "other" / "manifest.json", with_checksum(manifest | {"n_samples": 7}))
    with pytest.raises(CacheError, match=r"/other: .*arrays"):
        ClusterTree.load(tmp_path / "other")


def test_a_tree_on_disk_is_no_copy_and_stays_as_it_was_saved(tmp_path):
    random_tree(np.random.default_rng(1)).save(tmp_path / "tree")
    tree = ClusterTree.load(tmp_path / "tree", memory_map=True)
    for array in (*tree.centroids.values(), *tree.parent.values(), tree.distance):
        assert not array.flags.owndata
        array[:1] = 0  # as for a tree in memory
    tree = ClusterTree.load(tmp_path / "tree", memory_map=True)
    np.testing.assert_array_equal(tree.parent[1], random_tree(np.random.default_rng(1)).parent[1])
    parent = np.load(tmp_path / "tree" / "parent_1.npy")
    np.save(tmp_path / "tree" / "parent_1.npy", parent[::-1].copy())
    with pytest.raises(CacheError, match=r"parent_1\.npy: .*checksum"):
        ClusterTree.load(tmp_path / "tree", memory_map=True)
