"""Commands and trainings killed at a file event or by the clock, once or twice: the next run ends with the
same result, bit for bit.
"""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from curated_data import CuratedDataModule, RecurationCallback
from lightning_modules import SimCLR
from tests.chaos.cage import Cage, Ending, snapshot
from tests.chaos.tally import Tally
from tests.chaos.world import World, is_beside, tree_of
from tests.support.recuration_kills import Recorder, last_checkpoint

_LIMIT = 90.0


@dataclass
class Scene:
    """A command, and the folder that it starts from.

    Attributes:
        once: a second run after a whole one is refused, as of an export.
        result: what must be the same in the end.
    """

    name: str
    start: Path | None
    command: Callable[[], Any]
    once: bool = False
    result: Callable[[Path], Any] = lambda folder: snapshot(folder, is_beside)
    n_events: int = 0
    seconds: float = 0.0
    expected: Any = None


def attack(world: World, tally: Tally, rng: random.Random, until: float, cases: int | None = None) -> None:
    """Kill until a time (of `time.monotonic`), or so many times."""
    cage, scenes = world.cage, _scenes(world)
    for scene in scenes:
        _measure(cage, scene)
    number = 0
    while time.monotonic() < until and number != cases:
        scene = scenes[number % len(scenes)]
        # A training takes longer than the others.
        if scene.name == "training" and number // len(scenes) % 3 and cases is None:
            scene = rng.choice(scenes[:-1])
        outcome, what, said = _kill(cage, scene, rng)
        tally.add(f"kills: {scene.name}", outcome, what, said)
        number += 1


def _scenes(world: World) -> list[Scene]:
    case, cache = world.cage.case, str(world.cage.case / "cache")
    pages = {name: str(case / f"{name}.html") for name in ("report", "duplicates", "search")}
    curated = world.start("curated", world.curation("curate"))
    exporting = world.curation("export", "--out", str(case / "out"), "--max-samples", "3")
    exported = world.start("exported", world.curation("curate"), exporting)
    tree = str(case / "cache" / "tree" / tree_of(curated))
    shards = str(case / "shards")
    again = ("--out", str(case / "out"), "--max-samples", "4", "--overwrite", "--order", "pool")
    classes = str(world.home / "classes")
    image = str(world.home / "classes" / "class0" / "000.png")
    shard = str(world.home / "grown" / "more-000000.tar")
    seeds = ("--set", f"retrieval={{seeds: {{more: {shard}}}, n: 2}}", "quotas={temperature: 0.5}")
    return [
        Scene("index", None, world.command("index", world.pool, "--cache-dir", cache)),
        Scene("embed", None, world.curation("embed")),
        Scene("curate", None, world.curation("curate", "--ids", str(case / "ids.npy"))),
        Scene("extend", curated, world.curation("extend", "--tree", tree, grown=True)),
        Scene("export", curated, exporting, once=True),
        Scene("export over an earlier one", exported, world.curation("export", *again)),
        Scene("import", None, world.command("import", classes, shards, "--max-samples", "5"), once=True),
        Scene("report", curated, world.curation("report", "--out", pages["report"])),
        Scene("duplicates", curated, world.curation("duplicates", "--examples", pages["duplicates"])),
        Scene("inspect", curated, world.command("inspect", cache, "--verify")),
        Scene("inspect a sample", curated, world.command("inspect", cache, "--sample", "3")),
        Scene("curate with seeds", None, world.curation("curate", *seeds)),
        Scene("tune", curated, world.curation("tune", grown=True)),
        Scene("search", curated, world.curation("search", "--image", image, "--out", pages["search"])),
        Scene("table", curated, world.curation("table", "--out", str(case / "table.parquet"))),
        Scene("training", None, lambda: train(world), result=trained),
    ]


def _measure(cage: Cage, scene: Scene) -> None:
    found = []
    for _ in range(2):
        ending = cage_run(cage, scene, fresh=True)
        assert ending.how == "done", (scene.name, ending)
        assert ending.value == 0, (scene.name, ending)
        found.append(scene.result(cage.case))
        scene.n_events, scene.seconds = ending.n_events, ending.seconds
    assert found[0] == found[1], f"{scene.name}: two whole runs differ: {_differing(*found)}"
    scene.expected = found[0]


def cage_run(cage: Cage, scene: Scene, *, fresh: bool = False, **options: Any) -> Ending:
    if fresh:
        cage.fresh(scene.start)
    return cage.run(scene.command, limit=_LIMIT, **options)


def _kill(cage: Cage, scene: Scene, rng: random.Random) -> tuple[str, str, str]:
    """Outcome, what was done, and what was said of one case."""
    done, endings = [], []
    for number in range(rng.choice((1, 1, 2))):
        if scene.n_events and rng.random() < 0.8:
            options: dict[str, Any] = {"kill_at": rng.randint(1, scene.n_events)}
        else:
            options = {"kill_after": rng.uniform(0, scene.seconds)}
        endings.append(cage_run(cage, scene, fresh=not number, **options))
        done.append(f"{options} {endings[-1].how}")
    last = cage_run(cage, scene)
    found = scene.result(cage.case)
    endings.append(last)
    what = "; ".join(done)
    said = f"{last.error}\n{last.trace}\n{last.said[-1500:]}"
    if any(ending.escapes for ending in endings) or cage.is_touched():
        return "escaped", f"{what}: {[ending.escapes for ending in endings]}", said
    if any(ending.how == "hung" for ending in endings):
        return "hung", what, said
    if last.how != "done":
        return "unclear", what, said
    if found != scene.expected:
        lost = isinstance(found, dict) and set(scene.expected) - set(found)
        if last.value != 0:
            return "lost" if lost else "unclear", f"{what}: status {last.value}", said
        return "different without a word", f"{what}: {_differing(scene.expected, found)}", said
    if last.value != 0 and not scene.once:
        return "lost", f"{what}: status {last.value}", said
    again = cage_run(cage, scene)  # what was left must not be in the way of the run after that, either
    if again.how != "done" or (again.value != 0 and not scene.once) or scene.result(cage.case) != found:
        return "lost", f"{what}: the run after next ends with {again.how} {again.value}", again.said[-1500:]
    return "equal", what, ""


def _differing(one: Any, other: Any) -> object:
    if isinstance(one, dict) and isinstance(other, dict):
        return [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)][:6]
    return (one, other)


def train(world: World) -> int:
    """A training with a re-curation after every epoch, from its newest checkpoint if there is one."""
    torch.set_num_threads(1)
    folder = world.cage.case
    lightning.seed_everything(0, verbose=False)
    data = CuratedDataModule(
        world.pool,
        {"target_size": 12, "levels": LEVELS_OF_TRAINING, "embedding": {"num_workers": 0, "batch_size": 8}},
        embedder="pixels:2",
        batch_size=6,
        loader={"num_workers": 0},
        cache_dir=folder / "cache",
    )
    module = SimCLR(
        "resnet10", image_size=6, small_images=True, backbone_options={"width": 2}, optimizer="sgd",
        warmup_epochs=0,
    )  # fmt: skip
    saving = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=1, save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        callbacks=[RecurationCallback(1), saving, Recorder(folder / "run")], enable_model_summary=False,
        default_root_dir=folder,
    )  # fmt: skip
    there = any((folder / "checkpoints").glob("*.ckpt"))
    trainer.fit(module, data, ckpt_path=last_checkpoint(folder / "checkpoints") if there else None)
    return 0


LEVELS_OF_TRAINING = [{"n_clusters": 6}, {"n_clusters": 2}]


def trained(folder: Path) -> Any:
    """What each step was trained on, at last, and the selection."""
    steps = {}
    lines = (folder / "run-0.jsonl").read_text().splitlines() if (folder / "run-0.jsonl").exists() else []
    for line in lines:
        step, *rest = json.loads(line)
        steps[f"step {step}"] = rest
    steps |= snapshot(folder, skip=lambda name: name != "run-0.npy")
    return steps
