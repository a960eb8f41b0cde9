"""The files that the package writes, and the shards that it reads: kinds for `files`."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from curated_data import ShardPool, curate
from curated_data.cache.artifacts import open_cache
from curated_data.embedding import embed_pool, resolve_embedder
from curated_data.pipeline.export import export
from curated_data.pipeline.extend import extend
from curated_data.pipeline.inspect import inspect_cache, verify_cache
from curated_data.pipeline.reopen import reopen
from tests.chaos.cage import Ending, snapshot
from tests.chaos.kinds import Kind, digest
from tests.chaos.world import CONFIG, EMBEDDER, World, is_beside, only


def cache_kinds(world: World) -> list[Kind]:
    case = world.cage.case
    cache, out = case / "cache", case / "out"
    start = world.start(
        "whole", world.curation("curate"), world.curation("export", "--out", str(out), "--max-samples", "4")
    )
    tree = cache / "tree" / only(start, "cache/tree/[!.]*").name

    selection = only(start, "cache/selection/[!.]*").name

    def curated() -> Any:
        torch.set_num_threads(1)
        return _of(curate(world.pool, CONFIG, embedder=EMBEDDER, cache_dir=cache, device="cpu"))

    def reopened() -> Any:
        return _of(reopen(cache, selection))

    def extended() -> Any:
        torch.set_num_threads(1)
        options = {"embedder": EMBEDDER, "cache_dir": cache, "device": "cpu"}
        return _of(extend(world.grown, CONFIG, tree=tree, **options))

    def exported() -> Any:
        torch.set_num_threads(1)
        pool = ShardPool(world.pool, cache_dir=cache)
        found = curate(pool, CONFIG, embedder=EMBEDDER, cache_dir=cache, device="cpu")
        export(pool, found.ids, case / "new", tree=found.tree, max_samples=4)
        return snapshot(case / "new")

    def read() -> Any:
        pool = ShardPool(world.pool, cache_dir=cache)
        return [_sample(sample) for sample in pool.read(range(len(pool)))]

    def inspected() -> Any:
        return [[found.stage, found.name, found.complete] for found in inspect_cache(cache)]

    def verified() -> Any:
        return verify_cache(cache)

    def over() -> Any:
        torch.set_num_threads(1)
        pool = ShardPool(world.pool, cache_dir=cache)
        found = curate(pool, CONFIG, embedder=EMBEDDER, cache_dir=cache, device="cpu")
        export(pool, found.ids, out, tree=found.tree, max_samples=3, overwrite=True)
        skip = lambda name: name.endswith(".aside") or is_beside(name)  # noqa: E731
        return snapshot(out, skip)

    whole = {
        "curate": curated,
        "reopen": reopened,
        "extend": extended,
        "export": exported,
        "verify": verified,
        "inspect": inspected,
        "read": read,
    }

    def stage_files(stage: str) -> Callable[[Path], list[Path]]:
        def find(folder: Path) -> list[Path]:
            found = (folder / "cache" / stage).rglob("*")
            return sorted(path for path in found if path.is_file() and ".locks" not in path.parts)

        return find

    def beside(folder: Path) -> list[Path]:
        found = [folder / "cache" / "cache.json", folder / "cache" / ".swept"]
        return found + sorted(path for path in (folder / "cache" / ".shards").rglob("*") if path.is_file())

    def judge(name: str, value: Any, expected: Any, ending: Ending) -> str | None:
        if name == "inspect":  # which only lists, and calls incomplete what has no manifest
            return "counted"
        return None

    kinds = [
        Kind(stage, start, stage_files(stage), whole, judge, forges=True)
        for stage in ("index", "pool", "embeddings", "near_duplicates", "tree", "selection")
    ]
    kinds.append(Kind("notes of the cache", start, beside, whole, judge))
    kinds.append(
        Kind(
            "an export's manifest and arrays", start,
            lambda folder: sorted(path for path in (folder / "out").iterdir() if path.suffix != ".tar"),
            {"export over it": over}, _judge_export, names=("out",),
        )
    )  # fmt: skip
    half = _half_clustered(world)
    if half is not None:
        kinds.append(
            Kind(
                "checkpoints of a clustering", half,
                lambda folder: sorted(
                    path for path in (folder / "cache" / "checkpoints").rglob("*")
                    if path.is_file() and ".locks" not in path.parts
                ),
                {"curate": curated},
            )
        )  # fmt: skip
    return kinds


def _judge_export(name: str, value: Any, expected: Any, ending: Ending) -> str | None:
    """Files that may be somebody else's stay beside an export, each of them named in the log."""
    stays = value.keys() - expected.keys()
    kept = {name: content for name, content in value.items() if name not in stays}
    is_named = all(name.partition("/")[0] in ending.said for name in stays)
    return "counted" if kept == expected and is_named else None


def shard_kinds(world: World) -> list[Kind]:
    case = world.cage.case
    places = {"shards": "pool-{000000..000002}.tar"}
    kinds = []
    for name, pattern in places.items():

        def pool_of(pattern: str = pattern) -> str:
            return str(case / "pool" / pattern)

        def embed(pool_of: Callable[[], str] = pool_of) -> Any:
            torch.set_num_threads(1)
            pool = ShardPool(pool_of(), cache_dir=open_cache(case / "cache"))
            store = embed_pool(pool, resolve_embedder(EMBEDDER), case / "cache", device="cpu", num_workers=0)
            members = [_sample(sample) for sample in pool.read(range(len(pool)))]
            rows, valid = store.as_array(), store.valid
            failed = [failure["key"] for failure in store.iterate_failures()]
            return {
                "samples": {
                    one[0]: [one[1:], digest(row), bool(is_valid)]
                    for one, row, is_valid in zip(members, rows, valid, strict=True)
                },
                "failed": failed,
                "looks whole": all(map(_looks_whole, (case / "pool").glob("pool-*.tar"))),
            }

        start = world.home / "starts" / name.replace(" ", "-")
        for known in (False, True):
            place = start.with_name(f"{start.name}-{known}")
            (place / "pool").mkdir(parents=True)
            for shard in world.home.glob("pool-*.tar"):
                shutil.copy2(shard, place / "pool" / shard.name)
            if known:  # with an index and embeddings of the time before the damage
                world.cage.fresh(place)
                assert world.cage.run(embed).how == "done"
                shutil.rmtree(place)
                shutil.copytree(case, place)
            label = f"{name}, known" if known else name
            find = lambda folder: sorted((folder / "pool").iterdir())  # noqa: E731
            names = ("pool-", "packed.tar")
            kinds.append(Kind(label, place, find, {"embed": embed}, _judge_shards, names))
    return kinds


def _of(curation: Any) -> dict[str, Any]:
    tree = curation.tree
    report = {key: value for key, value in curation.report.items() if key not in ("cached", "seconds")}
    return {
        "ids": curation.ids.tolist(),
        "tree": digest(*tree.centroids.values(), *tree.parent.values()),
        "rows": digest(curation.embeddings.as_array()),
        "valid": digest(curation.embeddings.valid),
        "report": json.loads(json.dumps(report)),
    }


def _half_clustered(world: World) -> Path | None:
    """A curation that was killed while it clustered, after its last piece."""
    command, best = world.curation("curate"), None
    world.cage.fresh(None)
    n_events = world.cage.run(command).n_events
    place = world.home / "starts" / "half"
    for number in range(n_events, 1, -7):
        world.cage.fresh(None)
        world.cage.run(command, kill_at=number)
        pieces = list((world.cage.case / "cache" / "checkpoints").rglob("*.npy"))
        trees = list((world.cage.case / "cache" / "tree").glob("[!.]*"))
        if len(pieces) > 2 and not trees:
            shutil.copytree(world.cage.case, place, symlinks=True)
            best = place
            break
    return best


def _sample(sample: dict[str, Any]) -> list[Any]:
    return [
        sample["__key__"],
        *(hashlib.sha256(sample[name]).hexdigest()[:8] for name in sorted(sample) if name[0] != "_"),
    ]


def _looks_whole(path: Path) -> bool:
    """Whether an archive ends as one that tar has written: in less zeros than a record and a marker."""
    content = path.read_bytes()
    return len(content) % 10240 == 0 and 1024 <= len(content) - len(content.rstrip(b"\0")) < 10240 + 1024


def _judge_shards(name: str, value: Any, expected: Any, ending: Ending) -> str | None:
    """Samples whose bytes are as before have their rows; all others failed by name, or cannot be told."""
    outcome = "counted"
    for key, (members, row, _) in expected["samples"].items():
        if key not in value["samples"]:
            continue
        now, other, _ = value["samples"][key]
        if now == members and other != row:
            return None
        if now != members and key not in value["failed"]:
            outcome = "taken as it is"  # another image or label, which nothing can tell
    if "have the key of an earlier one" in ending.said:  # a shard in another's place
        return outcome
    gone = set(expected["samples"]) - set(value["samples"])
    if gone and value["looks whole"]:  # zeroed so that nothing tells it from an archive of fewer samples
        return "taken as it is"
    if gone and not ("pool-" in ending.said or "packed" in ending.said):
        return None
    return outcome
