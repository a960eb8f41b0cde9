"""k-means against its definition and against scikit-learn; and input that is hard or wrong."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from curated_data.clustering import kmeans
from curated_data.clustering import kmeans as kmeans_function
from curated_data.clustering.lloyd import _largest
from curated_data.clustering.nearest import Centroids
from tests.oracles.clustering import clouds, lloyd_step, squared_distances


def check(x, result, metric="l2"):
    """What any result must satisfy: nearest centroids, and inertia and distances that are theirs."""
    x = np.asarray(x, np.float64)
    if metric == "cosine":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert np.isfinite(result.centroids).all()
    gaps = squared_distances(x, result.centroids)
    own = gaps[np.arange(len(x)), result.assignment]
    scale = max(np.square(x - x.mean(0)).sum(1).max(), 1e-12)
    assert (own - gaps.min(1)).max() <= 1e-5 * scale
    assert result.inertia == pytest.approx(own.sum(), rel=1e-4, abs=1e-5 * scale)
    np.testing.assert_allclose(result.distance, np.sqrt(own), atol=2e-3 * np.sqrt(scale))
    assert result.n_empty == len(result.centroids) - len(np.unique(result.assignment))


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(1, 40))
def test_largest_are_the_first_of_a_stable_sort(values, count):
    values = np.array(values, np.float32)
    expected = np.argsort(-values, kind="stable")[:count]
    assert _largest(values, count).tolist() == expected.tolist()


@pytest.mark.parametrize("k", [1, 2, 7, 100, 1100])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_result_is_what_it_says(k, metric):
    x = clouds(4000, 12, 60, seed=k)
    result = kmeans(x, k, metric=metric, seed=3)
    check(x, result, metric)
    assert result.centroids.shape == (k, 12)
    assert result.centroids.dtype == np.float32
    assert result.assignment.dtype == np.int64
    assert result.n_empty == 0
    if metric == "cosine":
        np.testing.assert_allclose(np.linalg.norm(result.centroids, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("k", [20, 1100])
def test_runs_to_a_fixed_point_of_lloyd(k):
    """With no tolerance it ends where an iteration, done in float64, changes nothing."""
    x = clouds(6000, 8, 50, seed=1)
    result = kmeans(x, k, tol=0, n_iter=300, seed=0)
    assert result.n_iter < 300
    means = lloyd_step(x, result.assignment, k)
    np.testing.assert_allclose(result.centroids, means, atol=1e-5)
    again = squared_distances(x, means)
    assert (again.argmin(1) == result.assignment).mean() > 0.9995  # the rest are ties to float32


def test_leaves_scikit_learn_nothing_to_do():
    x = clouds(3000, 6, 30, seed=2).astype(np.float64)
    ours = kmeans(x, 25, tol=0, n_iter=300, seed=5)
    theirs = KMeans(25, init=ours.centroids.astype(np.float64), n_init=1, max_iter=10, tol=0).fit(x)
    assert theirs.inertia_ == pytest.approx(ours.inertia, rel=1e-6)
    assert (theirs.labels_ == ours.assignment).mean() > 0.999


@pytest.mark.long
@pytest.mark.parametrize("d", [2, 64])
def test_inertia_is_within_one_percent_of_scikit_learns_greedy_seeding(d):
    ratios = []
    for seed in range(3):
        x = clouds(6000, d, 300, seed=seed)
        theirs = KMeans(400, init="k-means++", n_init=1, max_iter=50, random_state=seed).fit(x)
        ratios.append(kmeans(x, 400, seed=seed).inertia / theirs.inertia_)
    assert np.mean(ratios) < 1.01


@pytest.mark.long
def test_many_clusters_lose_nothing_by_neighbourhoods_and_cells():
    """Where cells and neighbourhoods are at work, inertia is that of the plain algorithm."""
    x = clouds(20000, 16, 400, seed=0)
    theirs = KMeans(1500, init="k-means++", n_init=1, max_iter=50, random_state=0).fit(x)
    # Theirs differs by half a percent between their versions and seeds, and so does ours between seeds.
    assert kmeans(x, 1500, seed=0).inertia < 1.015 * theirs.inertia_


def test_seeds_reproduce_and_differ():
    x = clouds(3000, 5, 40, seed=0)
    state, torch_state = np.random.get_state()[1].copy(), torch.random.get_rng_state()  # noqa: NPY002
    first, second, other = (kmeans(x, 30, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.centroids, second.centroids)
    np.testing.assert_array_equal(first.assignment, second.assignment)
    assert not np.array_equal(first.assignment, other.assignment)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), torch_state)


def test_any_number_of_threads_gives_the_same():
    x = clouds(9000, 24, 200, seed=0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = kmeans(x, 1200, seed=1)
        torch.set_num_threads(3)
        three = kmeans(x, 1200, seed=1)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(one.assignment, three.assignment)
    np.testing.assert_array_equal(one.centroids, three.centroids)


def test_best_of_several_runs_is_kept():
    x = clouds(2000, 2, 40, seed=3)
    single = [kmeans(x, 40, seed=s).inertia for s in range(5)]
    assert kmeans(x, 40, n_init=12, seed=0).inertia <= min(single) * 1.02
    assert kmeans(x, 40, n_init=3, seed=0).inertia <= kmeans(x, 40, n_init=1, seed=0).inertia


@pytest.mark.long
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("kind", ["numpy", "fortran", "strided", "memmap", "tensor", "streamed"])
def test_every_kind_of_input_gives_the_same(dtype, kind, tmp_path):
    x = clouds(2500, 6, 20, seed=0, dtype=np.float16).astype(dtype)
    given, memory = x, None
    if kind == "fortran":
        given = np.asfortranarray(x)
    elif kind == "strided":
        given = np.repeat(x, 2, axis=0)[::2]
    elif kind == "memmap":
        given = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", dtype, x.shape)
        given[:] = x
    elif kind == "tensor":
        given = torch.from_numpy(x)
    elif kind == "streamed":
        memory = 100_000  # the rows take 60,000 bytes, and a third of it is one array's share
    expected = kmeans(clouds(2500, 6, 20, seed=0, dtype=np.float16).astype(np.float32), 30, seed=4)
    result = kmeans(given, 30, seed=4, max_memory=memory)
    np.testing.assert_array_equal(result.assignment, expected.assignment)
    np.testing.assert_array_equal(result.centroids, expected.centroids)


def test_bfloat16_tensor():
    x = torch.from_numpy(clouds(500, 4, 5, seed=0)).bfloat16()
    check(x.float().numpy(), kmeans(x, 6))


@pytest.mark.parametrize("nonfinite", [np.nan, np.inf, -np.inf])
def test_nonfinite_rows_are_excluded_and_named(nonfinite, caplog):
    x = clouds(500, 4, 5, seed=0)
    clean = kmeans(np.delete(x, [3, 77], axis=0), 6)
    x[3, 1] = x[77, 0] = nonfinite
    result = kmeans(x, 6)
    assert "3, 77" in caplog.text
    assert result.assignment[[3, 77]].tolist() == [-1, -1]
    assert np.isnan(result.distance[[3, 77]]).all()
    np.testing.assert_array_equal(np.delete(result.assignment, [3, 77]), clean.assignment)
    np.testing.assert_array_equal(result.centroids, clean.centroids)
    with pytest.raises(ValueError, match="3, 77"):
        kmeans(x, 6, nonfinite="raise")


def test_valid_mask_and_zero_rows_under_cosine():
    x = clouds(400, 4, 5, seed=0)
    x[9] = 0
    mask = np.ones(400, bool)
    mask[[0, 50]] = False
    result = kmeans(x, 6, valid=mask, metric="cosine")
    assert np.flatnonzero(result.assignment < 0).tolist() == [0, 9, 50]
    x[0] = np.nan  # not looked at: it is not valid anyway
    assert kmeans(x, 6, valid=mask, nonfinite="raise").assignment[0] == -1


def test_hard_inputs_end_in_a_right_result():
    rng = np.random.default_rng(0)
    constant = np.full((50, 3), 7.5, np.float32)
    result = kmeans(constant, 4)
    assert result.inertia == 0
    assert result.n_empty == 3
    np.testing.assert_array_equal(result.centroids[result.assignment], constant)

    repeated = np.repeat(rng.normal(size=(10, 3)), 20, axis=0)
    result = kmeans(repeated, 15)
    check(repeated, result)
    assert result.inertia < 1e-6
    assert result.n_empty == 5

    line = rng.normal(size=(300, 1))
    check(line, kmeans(line, 12))

    few = rng.normal(size=(30, 4)).astype(np.float32)
    result = kmeans(few, 30)
    assert sorted(result.assignment) == list(range(30))
    assert result.inertia < 1e-6

    far = clouds(1000, 4, 10, seed=0, dtype=np.float64) + 1000  # norms that dwarf the distances
    check(far - 1000, kmeans(far - 1000, 10))
    assert kmeans(far, 10).inertia == pytest.approx(kmeans(far - 1000, 10).inertia, rel=0.02)

    huge = np.concatenate([rng.normal(size=(5000, 3)) * 1e-3, rng.normal(size=(20, 3))])
    check(huge, kmeans(huge, 25))
    single = rng.normal(size=(1, 5))
    np.testing.assert_allclose(kmeans(single, 1).centroids, single, rtol=1e-6)


def test_emptied_clusters_are_filled_again():
    """Random seeds that are copies of each other leave clusters empty at once; none stays so."""
    x = np.repeat(clouds(2000, 2, 20, seed=0), 2, axis=0)
    for k in (600, 1500):
        result = kmeans(x, k, init="random", seed=0)
        assert result.n_repaired > 0
        assert result.n_empty == 0
        check(x, result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_clusters": 0}, "n_clusters"),
        ({"n_clusters": 2.5}, "n_clusters"),
        ({"n_clusters": 101}, "101 .*100"),
        ({"n_init": 0}, "n_init"),
        ({"n_iter": -1}, "n_iter"),
        ({"metric": "l1"}, "^metric: .*'l1'"),
        ({"init": "warm"}, "^init: .*'warm'"),
        ({"nonfinite": "ignore"}, "nonfinite .*'ignore'"),
        ({"max_memory": 0}, "max_memory"),
        ({"max_memory": "1GB"}, "max_memory .*'1GB'"),
        ({"tol": -1.0}, "tol .*-1.0"),
        ({"tol": float("nan")}, "tol .*nan"),
        ({"tol": "small"}, "tol .*'small'"),
        ({"seed": -1}, "^seed: .*-1"),
        ({"seed": 1.5}, "seed: "),
        ({"seeding_rows": 0}, "seeding_rows: "),
        ({"device": "nonsense"}, "device 'nonsense'"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
        ({"valid": np.zeros(100, bool)}, "no usable row"),
        ({"valid": np.ones(3, bool)}, r"valid .*\(100,\)"),
        ({"x": np.zeros(5)}, r"^x .*\(5,\)"),
        ({"x": np.zeros((0, 5))}, r"^x .*\(0, 5\)"),
        ({"x": [[1.0]]}, "^x .*list"),
        ({"x": np.zeros((5, 2), int)}, "floating-point"),
    ],
)
def test_wrong_arguments_get_one_clear_error(arguments, message):
    arguments = {"x": clouds(100, 4, 5, seed=0), "n_clusters": 5} | arguments
    with pytest.raises(ValueError, match=message):
        kmeans_function(**arguments)


def test_two_nearest_in_tiles_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    rows, centroids = (rng.normal(size=(n, 7)).astype(np.float32) for n in (1500, 2300))
    skip = rng.integers(-1, 2300, 1500)
    ready = Centroids(torch.from_numpy(centroids))
    index, best, second, own = ready.two_nearest(torch.from_numpy(rows), skip)
    gaps = squared_distances(rows, centroids)
    norms = np.square(rows).sum(1)
    kept = skip >= 0
    np.testing.assert_allclose(own[kept] + norms[kept], gaps[kept, skip[kept]], atol=1e-4)
    gaps[kept, skip[kept]] = np.inf
    np.testing.assert_array_equal(index, gaps.argmin(1))
    ordered = np.partition(gaps, 1, axis=1)
    np.testing.assert_allclose(best + norms, ordered[:, 0], atol=1e-4)
    np.testing.assert_allclose(second + norms, ordered[:, 1], atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_assigns_as_the_cpu_does():
    x = clouds(20000, 64, 300, seed=0)
    cpu, gpu = (kmeans(x, 1200, seed=0, device=device) for device in ("cpu", "cuda"))
    assert gpu.inertia == pytest.approx(cpu.inertia, rel=2e-3)
    gaps = squared_distances(x[:2000], gpu.centroids)
    own = gaps[np.arange(2000), gpu.assignment[:2000]]
    assert (own - gaps.min(1) <= 1e-5 * gaps.max()).mean() >= 0.9999


def test_a_trainings_precision_does_not_reach_the_assignment():
    """Lightning users set "medium", which may multiply in bfloat16: it must change nothing, and stay set."""
    x = clouds(3000, 16, 30, seed=0)
    expected = kmeans(x, 40, seed=1)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = kmeans(torch.from_numpy(x).requires_grad_(), 40, seed=1)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(result.assignment, expected.assignment)
