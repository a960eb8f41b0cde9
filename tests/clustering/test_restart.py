"""A killed run continues and ends with the same tree; torn or foreign checkpoints are refused."""

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
LONG = [Level(1100)]  # neighbourhoods, then exact iterations
OFTEN = {"checkpoint_seconds": 0}

# Imports once, then forks the processes of each attempt and kills them after a while, until one is done.
KILLER = """
import json, os, random, signal, sys, time
import numpy as np
import torch.distributed as dist
from curated_data.clustering import Level, hierarchical_kmeans
folder, levels, settings, world = sys.argv[1], *map(json.loads, sys.argv[2:5])
x = np.load(folder + "/x.npy")

def work(name, number, rank):
    if world > 1:
        meeting = f"file://{folder}/{name}-meeting-{number}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    checkpoint = f"{folder}/{name}"
    tree = hierarchical_kmeans(x, [Level(**level) for level in levels], checkpoint=checkpoint, **settings)
    if rank == 0:
        tree.save(f"{folder}/{name}-tree")
    os._exit(0)

def attempt(name, number=0, limit=1e9):
    children = []
    for rank in range(world):
        children.append(os.fork())
        if children[-1] == 0:
            work(name, number, rank)
    deadline, running = time.monotonic() + limit, set(children)
    while running and time.monotonic() < deadline:
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                assert status == 0
                running.discard(child)
        time.sleep(0.001)
    for child in running:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return not running

began = time.monotonic()
assert attempt("whole")
whole = time.monotonic() - began
rng, kills, within = random.Random(0), 0, 0
while not attempt("killed", kills, rng.uniform(0, whole * (0.1 + 0.05 * kills))):
    kills += 1
    there = os.listdir(f"{folder}/killed") if os.path.isdir(f"{folder}/killed") else []
    within += any(".running-" in name for name in there)
print(kills, within)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("levels", "settings", "world"),
    [
        (LEVELS, {}, 1),
        (LEVELS, OFTEN, 1),
        (LEVELS, OFTEN, 2),
        (SPLITS, OFTEN, 1),
        (SPLITS, OFTEN, 2),
        (LONG, {"n_init": 2, "tol": 0} | OFTEN, 1),
        (LONG, {"n_init": 2, "tol": 0} | OFTEN, 2),
    ],
    ids=["steps", "resampling", "resampling-2", "splits", "splits-2", "long", "long-2"],
)
def test_killed_at_random_moments_ends_with_the_same_tree(tmp_path, levels, settings, world):
    np.save(tmp_path / "x.npy", clouds(2500 * world, 8, 60, seed=0))
    arguments = [
        json.dumps([vars(level) for level in levels]),
        json.dumps({"seed": 5} | settings),
        str(world),
    ]
    run = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), *arguments],
        capture_output=True, text=True, timeout=300, env={"OMP_NUM_THREADS": "1", "PATH": ""}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    kills, within = map(int, run.stdout.split())
    assert kills >= 3
    assert bool(within) == ("checkpoint_seconds" in settings)  # else it is too short to be kept at all
    whole, killed = (ClusterTree.load(tmp_path / f"{name}-tree") for name in ("whole", "killed"))
    for level in whole.centroids:
        np.testing.assert_array_equal(killed.parent[level], whole.parent[level])
        np.testing.assert_array_equal(killed.centroids[level], whole.centroids[level])
    np.testing.assert_array_equal(killed.distance, whole.distance)


@pytest.mark.parametrize("k", [60, 1100])
def test_a_long_kmeans_goes_on_from_its_last_iteration(tmp_path, monkeypatch, k):
    from curated_data.clustering import lloyd, seeding

    x = clouds(4000, 8, 60, seed=0)
    levels, settings = [Level(k)], {"seed": 1, "tol": 0, "checkpoint_seconds": 0}
    plain = hierarchical_kmeans(x, levels, **settings)
    seedings, updates, stop_at = [], [], [3, 6]
    seed, update = seeding.seed_rows, lloyd.Lloyd._update

    def counted_update(self):
        updates.append(1)
        if len(updates) in stop_at:
            raise KeyboardInterrupt
        return update(self)

    def counted_seeding(*args, **kwargs):
        seedings.append(1)
        return seed(*args, **kwargs)

    monkeypatch.setattr(sys.modules["curated_data.clustering.kmeans"], "seed_rows", counted_seeding)
    monkeypatch.setattr(lloyd.Lloyd, "_update", counted_update)
    # Every write, however long it takes: each iteration is kept.
    monkeypatch.setattr(sys.modules["curated_data.clustering.checkpoint"], "_WRITING_SHARE", np.inf)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            hierarchical_kmeans(x, levels, checkpoint=tmp_path / "c", **settings)
    again = hierarchical_kmeans(x, levels, checkpoint=tmp_path / "c", **settings)
    interrupted, updates[:], stop_at[:] = len(updates), [], []
    hierarchical_kmeans(x, levels, **settings)
    assert len(seedings) == 2  # once in the three attempts, once just now
    assert interrupted == len(updates) + 2
    np.testing.assert_array_equal(again.parent[1], plain.parent[1])
    np.testing.assert_array_equal(again.centroids[1], plain.centroids[1])
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["level-1", "manifest.json"]


def test_a_torn_state_within_a_kmeans_is_refused(tmp_path, monkeypatch):
    from curated_data.clustering import lloyd

    x, settings = clouds(400, 4, 10, seed=0), {"seed": 1, "tol": 0, "checkpoint_seconds": 0}
    update = lloyd.Lloyd._update
    monkeypatch.setattr(lloyd.Lloyd, "_update", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        hierarchical_kmeans(x, [Level(20)], checkpoint=tmp_path / "c", **settings)
    monkeypatch.setattr(lloyd.Lloyd, "_update", update)
    (seeds,) = (tmp_path / "c").glob("level-1.step-0.running-*/seeds.npy")
    whole = seeds.read_bytes()
    for torn in (whole[:-8], whole[:-8] + bytes(8)):
        seeds.write_bytes(torn)
        with pytest.raises(CacheError, match=str(seeds.parent)):
            hierarchical_kmeans(x, [Level(20)], checkpoint=tmp_path / "c", **settings)
    seeds.write_bytes(whole)
    hierarchical_kmeans(x, [Level(20)], checkpoint=tmp_path / "c", **settings)


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
        with pytest.raises(CacheError, match=f"{tmp_path}/c: .*another run"):
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
    with pytest.raises(CacheError, match=f"^{flipped}: "):
        hierarchical_kmeans(x, levels, seed=1, checkpoint=tmp_path / "c")

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("keep")
    with pytest.raises(CacheError, match=r"mine: .*'thesis\.tex'"):
        hierarchical_kmeans(x, levels, checkpoint=tmp_path / "mine")
    with pytest.raises(CacheError, match=r"mine/thesis\.tex: "):
        hierarchical_kmeans(x, levels, checkpoint=tmp_path / "mine" / "thesis.tex")
