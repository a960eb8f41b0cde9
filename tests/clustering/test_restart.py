"""A killed run goes on and ends with the same tree; torn or foreign checkpoints are refused."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from curated_data.clustering import ClusterTree, Level, hierarchical_kmeans
from curated_data.errors import CacheError
from tests.oracles.clustering import clouds

LEVELS = [Level(150, n_resamples=6, sample_size=5), Level(30, n_resamples=6, sample_size=3), Level(6)]
SPLITS = [Level(30, n_splits=6), Level(20, n_resamples=3, sample_size=3)]

# Imports once, then forks a process for each attempt and kills it after a while, until one comes through.
KILLER = """
import json, os, random, signal, sys, time
import numpy as np
from curated_data.clustering import Level, hierarchical_kmeans
folder, levels, seed = sys.argv[1], [Level(**level) for level in json.loads(sys.argv[2])], int(sys.argv[3])
x = np.load(folder + "/x.npy")

def attempt(name, limit=None):
    child = os.fork()
    if child == 0:
        tree = hierarchical_kmeans(x, levels, seed=5, checkpoint=f"{folder}/{name}")
        tree.save(f"{folder}/{name}-tree")
        os._exit(0)
    deadline = time.monotonic() + (limit or 1e9)
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False

began = time.monotonic()
assert attempt("whole")
whole = time.monotonic() - began
rng, kills = random.Random(seed), 0
while not attempt("killed", rng.uniform(0, whole * (0.3 + 0.05 * kills))):
    kills += 1
print(kills)
"""


@pytest.mark.parametrize("levels", [LEVELS, SPLITS], ids=["resampling", "splits"])
def test_killed_at_random_moments_ends_with_the_same_tree(tmp_path, levels):
    np.save(tmp_path / "x.npy", clouds(2500, 8, 60, seed=0))
    settings = json.dumps([vars(level) for level in levels])
    run = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), settings, "0"],
        capture_output=True, text=True, timeout=300, env={"OMP_NUM_THREADS": "1", "PATH": ""}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 3
    whole, killed = (ClusterTree.load(tmp_path / f"{name}-tree") for name in ("whole", "killed"))
    for level in whole.centroids:
        np.testing.assert_array_equal(killed.parent[level], whole.parent[level])
        np.testing.assert_array_equal(killed.centroids[level], whole.centroids[level])
    np.testing.assert_array_equal(killed.distance, whole.distance)


def test_what_is_finished_is_not_done_again(tmp_path, monkeypatch):
    import curated_data.clustering.hierarchy as hierarchy

    x = clouds(1000, 4, 30, seed=0)
    plain = hierarchical_kmeans(x, LEVELS[1:], seed=1)
    fits, original = [], hierarchy.fit_rows

    def stop_at_the_fifth(*args, **kwargs):
        fits.append(args[1])
        if len(fits) == 5:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(hierarchy, "fit_rows", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        hierarchical_kmeans(x, LEVELS[1:], seed=1, checkpoint=tmp_path / "c")
    assert hierarchical_kmeans(x, LEVELS[1:], seed=1, checkpoint=tmp_path / "c").sizes(2).sum() == 1000
    assert len(fits) == 5 + 4  # 7 k-means of level 1 and 1 of level 2, of which 4 were finished before
    again = hierarchical_kmeans(x, LEVELS[1:], seed=1, checkpoint=tmp_path / "c")
    assert len(fits) == 9
    np.testing.assert_array_equal(again.parent[1], plain.parent[1])
    np.testing.assert_array_equal(again.centroids[2], plain.centroids[2])
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["level-1", "level-2", "manifest.json"]
    assert not list((tmp_path / "c").rglob("*.p*kl*"))


def test_torn_and_foreign_checkpoints_are_refused(tmp_path):
    x = clouds(400, 4, 10, seed=0)
    levels = [Level(20, 1, 4)]
    hierarchical_kmeans(x, levels, seed=1, checkpoint=tmp_path / "c")
    for change in (
        {"seed": 2},
        {"levels": [Level(21, 1, 4)]},
        {"x": x + 1},
        {"metric": "cosine"},
        {"x": x[:-1]},
    ):
        with pytest.raises(CacheError, match="another run"):
            hierarchical_kmeans(
                **{"x": x, "levels": levels, "seed": 1, "checkpoint": tmp_path / "c"} | change
            )

    for name in ("assignment.npy", "centroids.npy", "manifest.json"):
        torn = tmp_path / f"torn-{name}"
        shutil.copytree(tmp_path / "c", torn)
        file = torn / "level-1" / name
        file.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(CacheError, match=str(torn)):
            hierarchical_kmeans(x, levels, seed=1, checkpoint=torn)
    flipped = tmp_path / "c" / "level-1" / "assignment.npy"
    flipped.write_bytes(flipped.read_bytes()[:-8] + b"\x01" + bytes(7))
    with pytest.raises(CacheError, match=r"assignment.npy: damaged"):
        hierarchical_kmeans(x, levels, seed=1, checkpoint=tmp_path / "c")

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("keep")
    with pytest.raises(CacheError, match="no checkpoint"):
        hierarchical_kmeans(x, levels, checkpoint=tmp_path / "mine")
    with pytest.raises(CacheError, match="is a file"):
        hierarchical_kmeans(x, levels, checkpoint=tmp_path / "mine" / "thesis.tex")
