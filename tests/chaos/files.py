"""Damaged files of every kind: the same result as without the damage, one clear error that names the file, or
failures that are counted and named.
"""

import hashlib
import json
import logging
import random
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curated_data import CuratedDataModule, RecurationCallback, ShardPool, curate
from curated_data.cache import open_cache
from curated_data.cli import _array, _class_names
from curated_data.config import load_config, read_yaml
from curated_data.embedding import embed_pool, resolve_embedder
from curated_data.embedding.weights import load_weights
from curated_data.errors import CuratedDataError
from curated_data.export import export
from curated_data.extend import extend
from curated_data.inspect import inspect_cache, verify_cache
from curated_data.report.page import check_arrays, class_names_beside
from curated_data.selection.names import read_classes, read_wordnet
from curated_data.stored import open_curation
from tests.chaos.cage import Ending, snapshot
from tests.chaos.damage import damage, forge, hostile, mutate, remove_stages
from tests.chaos.tally import GOOD, Tally
from tests.chaos.world import CONFIG, EMBEDDER, World, is_beside, only

_LIMIT = 40.0
_LATER = {
    "index": ("pool",),
    "embeddings": ("near_duplicates", "tree", "selection"),
    "near_duplicates": ("tree", "selection"),
    "tree": ("selection",),
}


@dataclass
class Kind:
    """Files of one kind, and what reads them.

    Attributes:
        start: the folder that they lie in.
        find: the files, in the folder of the case.
        reads: by name, functions that read them and return plain values.
        judge: the outcome where a value is not the one expected; None if it is bad.
        names: what an error may name instead of the file.
        change: what is done instead of damage to a file; returns it in words.
    """

    name: str
    start: Path
    find: Callable[[Path], list[Path]]
    reads: dict[str, Callable[[], Any]]
    judge: Callable[[str, Any, Any, Ending], str | None] = lambda *_: None
    names: tuple[str, ...] = ()
    forges: bool = False
    change: Callable[[random.Random], str] | None = None


def attack(world: World, tally: Tally, rng: random.Random, until: float, cases: int | None = None) -> None:
    """Damage files until a time (of `time.monotonic`), or so many."""
    kinds = [*_cache_kinds(world), *_shard_kinds(world), *_input_kinds(world), *_state_kinds(world)]
    expected: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        expected[kind.name] = {}
        for name, read in kind.reads.items():
            world.cage.fresh(kind.start)
            ending = world.cage.run(read, limit=_LIMIT)
            assert ending.how == "done", (kind.name, name, ending)
            expected[kind.name][name] = ending.value
    number, notes = 0, world.cage.inside / "tmp" / "batch.jsonl"
    while time.monotonic() < until and number != cases:
        count = _BATCH if cases is None else min(_BATCH, cases - number)
        seed, pools = rng.getrandbits(32), world.pools()
        notes.unlink(missing_ok=True)

        def batch(number: int = number, count: int = count, seed: int = seed) -> None:
            generator = random.Random(seed)
            for place in range(number, number + count):
                kind = kinds[place % len(kinds)]
                name = generator.choice(list(kind.reads))
                _attack(world, generator, kind, name, expected[kind.name][name], notes)
                if time.monotonic() > until:
                    return

        ending = world.cage.start(batch).wait(_LIMIT, watched=notes)
        lines = notes.read_text().splitlines() if notes.exists() else []
        open_case: list[str] = []
        for line in lines:
            found = json.loads(line)
            if len(found) == 2:
                open_case = found
                continue
            open_case = []
            tally.add(*found)
            number += 1
        if open_case:  # the process ended within a case
            bad = "hung" if ending.how == "hung" else "unclear"
            tally.add(open_case[0], bad, open_case[1], f"{ending.how} {ending.error} {ending.said[-1500:]}")
            number += 1
        else:
            assert ending.how == "done", ending
        if world.cage.is_touched() or world.pools() != pools:
            tally.add("files: what lies beside", "escaped", f"{lines[-_BATCH:]}")


_BATCH = 40


def _attack(world: World, rng: random.Random, kind: Kind, name: str, expected: Any, notes: Path) -> None:
    """One case, in an attacked process; its outcome is noted."""
    case = world.cage.fresh(kind.start)
    files = kind.find(case)
    path = rng.choice(files)
    same = [
        other for other in files if other.suffix == path.suffix and other != path and other.stat().st_size
    ]
    forged = (
        kind.forges and rng.random() < 0.25 and path.suffix in (".json", ".npy") and bool(path.stat().st_size)
    )
    if kind.forges and rng.random() < 0.5 and name not in ("verify", "reopen"):
        later = _LATER.get(path.relative_to(case / "cache").parts[0], ())
        remove_stages(case / "cache", [stage for stage in later if name != "extend" or stage != "tree"])
    named = {path.name, path.parent.name, *kind.names} - {"case", "cache", ""}
    if path.name == "cache.json":
        named.add("written in cache format")
    label = f"files: {kind.name}" + (", forged" if forged else "")
    before = path.read_bytes()
    if kind.change is not None:
        what = kind.change(rng)
    else:
        what = forge(path, rng) if forged else damage(path, rng, same, world.cage.canary / "precious")
    what = f"{path.relative_to(case)}: {what}, then {name}"
    with open(notes, "a") as file:
        file.write(json.dumps([label, what]) + "\n")
        file.flush()
        said = _Said()
        n_escapes = world.cage.n_escapes()
        with said:
            try:
                ending = Ending("done", json.loads(json.dumps(kind.reads[name]())))
            except BaseException as error:
                message = f"{type(error).__name__}: {error}"
                ours = isinstance(error, CuratedDataError)
                ending = Ending("error", error=message, trace=traceback.format_exc(), is_ours=ours)
        ending.said = "\n".join(said.lines)
        outcome = _outcome(ending, expected, named, kind, name, forged)
        is_same = path.is_file() and path.read_bytes() == before
        if name == "verify" and kind.forges and not forged and not is_same and ending.value == []:
            outcome = "different without a word"  # of which `inspect --verify` says that it is whole
        if world.cage.n_escapes() != n_escapes:
            outcome = "escaped"
        text = (
            f"{ending.error[:600]}\n{ending.trace[-2500:]}\nvalue {str(ending.value)[:400]}\n"
            f"for    {str(expected)[:400]}\n{ending.said[-600:]}"
        )
        file.write(json.dumps([label, outcome, what, "" if outcome in GOOD else text]) + "\n")


class _Said(logging.Handler):
    """What the package logs within a block."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> None:
        logging.getLogger("curated_data").addHandler(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("curated_data").removeHandler(self)


def _outcome(ending: Ending, expected: Any, named: set[str], kind: Kind, name: str, forged: bool) -> str:
    if ending.how == "error":
        is_clear = ending.is_ours and "\n" not in ending.error.strip() and len(ending.error) < 1500
        return "one clear error" if is_clear and any(one in ending.error for one in named) else "unclear"
    if ending.value == expected:
        return "equal"
    if name == "verify":
        return "one clear error" if any(one in str(ending.value) for one in named) else "unclear"
    judged = kind.judge(name, ending.value, expected, ending)
    if judged is not None:
        return judged
    return "taken as it is" if forged else "different without a word"


# --- what reads ---------------------------------------------------------------------------------------------


def _digest(*arrays: Any) -> str:
    found = hashlib.sha256()
    for array in arrays:
        array = np.asarray(array)
        found.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def _of(curation: Any) -> dict[str, Any]:
    tree = curation.tree
    report = {key: value for key, value in curation.report.items() if key not in ("cached", "seconds")}
    return {
        "ids": curation.ids.tolist(),
        "tree": _digest(*tree.centroids.values(), *tree.parent.values()),
        "rows": _digest(curation.embeddings.as_array()),
        "valid": _digest(curation.embeddings.valid),
        "report": json.loads(json.dumps(report)),
    }


def _cache_kinds(world: World) -> list[Kind]:
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
        return _of(open_curation(cache, selection))

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
            {"export over it": over}, names=("out",),
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


def _shard_kinds(world: World) -> list[Kind]:
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
                    one[0]: [one[1:], _digest(row), bool(is_valid)]
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


def _input_kinds(world: World) -> list[Kind]:
    case, start = world.cage.case, world.home / "starts" / "inputs"
    start.mkdir(parents=True)
    torch.manual_seed(0)
    network = _Network()
    torch.save(network.state_dict(), start / "zip.pth")
    torch.save(network.state_dict(), start / "legacy.pt", _use_new_zipfile_serialization=False)
    from safetensors.torch import save_file

    save_file(network.state_dict(), start / "flat.safetensors")
    (start / "classes.json").write_text(json.dumps(["zero", "one", "two"]))
    (start / "entries.json").write_text(
        json.dumps([{"id": f"n{k}", "names": [f"name{k}"], "definition": "d"} for k in range(4)])
    )
    (start / "data.noun").write_text(
        '  1 the licence\n00001740 03 n 01 entity 0 001 ~ 00001930 n 0000 | that which exists; "x"\n'
        "00001930 03 n 02 thing 0 matter 1 001 @ 00001740 n 0000 | a thing\n"
    )
    (start / "config.yaml").write_text(
        "target_size: 9\nstrategy: closest\nlevels:\n  - {n_clusters: 6, n_resamples: 2, sample_size: 3}\n"
        "  - {n_clusters: 2}\nembedding: {num_workers: 0, dtype: float32}\n"
        "near_duplicates:\n  threshold: 0.9\n"
    )
    np.save(start / "ids.npy", np.arange(2, 14))
    np.save(start / "labels.npy", np.arange(24) % 3)
    np.save(start / "coordinates.npy", np.random.default_rng(0).normal(size=(24, 2)))
    torch.save(_checkpoint(), start / "simclr.ckpt")
    world.cage.fresh(None)

    def weights(file: str) -> Any:
        torch.manual_seed(1)
        network = _Network()
        load_weights(network, str(case / file), "network")
        return {key: _digest(tensor) for key, tensor in network.state_dict().items()}

    def module() -> Any:
        torch.set_num_threads(1)
        found = resolve_embedder(f"checkpoint:{case / 'simclr.ckpt'}")
        return found.fingerprint

    def settings() -> Any:
        return repr(load_config(read_yaml(case / "config.yaml")))

    def chosen(**options: str) -> Any:
        data = CuratedDataModule(
            world.pool, batch_size=4, num_workers=0, image_size=6,
            **{name: case / file for name, file in options.items()},
        )  # fmt: skip
        data.setup("fit")
        return [[batch["sample_id"].tolist(), batch["label"].tolist()] for batch in data.train_dataloader()]

    def beside() -> Any:
        shutil.copy2(world.home / "pool-000000.tar", case / "pool.tar")
        return class_names_beside(ShardPool(case / "pool.tar"))

    def placed() -> Any:
        array = _array(str(case / "coordinates.npy"), "coordinates")
        check_arrays(24, coordinates=array, labels=None)
        return _digest(array)

    fields = (
        "--",
        "levels",
        "target_size",
        "strategy",
        "embedding",
        "near_duplicates",
        "config",
        "sample_size",
    )
    fields += ("n_clusters", "n_resamples", "threshold")
    kinds = {
        "weights": (("zip.pth", "legacy.pt", "flat.safetensors"), None, ()),
        "checkpoints as embedders": (("simclr.ckpt",), module, ()),
        "settings in YAML": (("config.yaml",), settings, fields),
        "ids": (("ids.npy",), lambda: chosen(selection="ids.npy"), ("selection", "ids")),
        "labels": (("labels.npy",), lambda: chosen(labels="labels.npy"), ("labels",)),
        "coordinates": (("coordinates.npy",), placed, ("coordinates",)),
        "names of classes": (("classes.json",), lambda: _class_names(str(case / "classes.json")), ()),
        "names beside shards": (("classes.json",), beside, ()),
        "classes of captions": (("entries.json",), lambda: repr(read_classes(case / "entries.json")), ()),
        "WordNet": (("data.noun",), lambda: repr(read_wordnet(case / "data.noun")), ()),
    }
    found = []
    for label, (files, read, names) in kinds.items():
        for file in files:
            reads = {"read": read or (lambda file=file: weights(file))}
            find = lambda folder, file=file: [folder / file]  # noqa: E731
            found.append(Kind(label, start, find, reads, lambda *_: "taken as it is", names))
    return found


class _Network(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))


def _checkpoint() -> dict[str, Any]:
    from lightning_modules import SimCLR

    settings = {
        "backbone": "resnet10",
        "image_size": 6,
        "small_images": True,
        "backbone_options": {"width": 2},
    }
    module = SimCLR(**settings)
    return {
        "state_dict": module.state_dict(),
        "hyper_parameters": settings,
        "module_class": f"{SimCLR.__module__}.{SimCLR.__qualname__}",
    }


def _state_kinds(world: World) -> list[Kind]:
    """The plain values that checkpoints of a training hold, of a data module and of re-curations."""
    case, start = world.cage.case, world.home / "starts" / "states"
    start.mkdir(parents=True)
    callback = json.loads(json.dumps(RecurationCallback(1).state_dict()))
    callback["artifacts"] = ["tree/0123456789abcdef0123"]

    def data() -> CuratedDataModule:
        return CuratedDataModule(world.pool, batch_size=4, num_workers=0, image_size=6)

    def state() -> Any:
        module = data()
        list(module.train_dataloader())
        return module.state_dict() | {"selection": None, "epoch": 1, "batch": 2, "n_trained": 8}

    world.cage.fresh(None)
    ending = world.cage.run(state)
    assert ending.how == "done", ending
    states = {"stream": ending.value, "callback": callback}

    def changed(which: str, rng: random.Random) -> str:
        content = json.loads(json.dumps(states[which]))
        what, how = mutate(content, rng), rng.random()
        if how < 0.1:
            content, what = hostile(rng), "another state"
        elif how < 0.2:
            content["selection"], what = torch.tensor([[1.5], [2.0]]), "a tensor"
        torch.save(content, case / which)
        return what

    def read(which: str) -> Any:
        content = torch.load(case / which, weights_only=True)
        if which == "callback":
            callback = RecurationCallback(1)
            callback.load_state_dict(content)
            return repr(callback.state_dict())
        module = data()
        module.load_state_dict(content)
        loader = module.train_dataloader()
        return [batch["sample_id"].tolist() for batch in loader]

    kinds = []
    for which, content in states.items():
        place = start / which
        place.mkdir()
        torch.save(content, place / which)
        kinds.append(
            Kind(
                f"state of a training, {which}", place, lambda folder, which=which: [folder / which],
                {"load": lambda which=which: read(which)}, lambda *_: "taken as it is",
                ("checkpoint", "state"), change=lambda rng, which=which: changed(which, rng),
            )
        )  # fmt: skip
    return kinds
