"""What checkpoints of trainings hold as plain values, damaged or made up: kinds for `files`."""

import copy
import json
import random
import shutil
from typing import Any

import torch

from curated_data import Component, CuratedDataModule, Mixture, RecurationCallback
from tests.chaos.damage import hostile, mutate
from tests.chaos.kills import train, trained
from tests.chaos.kinds import Kind
from tests.chaos.world import World


def state_kinds(world: World) -> list[Kind]:
    """The plain values that checkpoints of a training hold, of a data module and of re-curations."""
    case, start = world.cage.case, world.home / "starts" / "states"
    start.mkdir(parents=True)
    callback = json.loads(json.dumps(RecurationCallback(1).state_dict()))
    callback["artifacts"] = ["tree/0123456789abcdef0123"]

    def data(which: str) -> CuratedDataModule:
        settings = {"batch_size": 4, "loader": {"num_workers": 0}, "image_size": 6}
        if which == "stream":
            return CuratedDataModule(world.pool, **settings)
        parts = [Component("all", world.pool, 2), Component("few", world.pool, 1, selection=[3, 5, 8, 13])]
        return CuratedDataModule(mixture=Mixture(parts, epoch_size=24), **settings)

    def state(which: str) -> Any:
        module = data(which)
        list(module.train_dataloader())
        return module.state_dict() | {"epoch": 1, "batch": 2, "n_trained": 8}

    states = {"callback": callback}
    for which in ("stream", "mixture"):
        world.cage.fresh(None)
        ending = world.cage.run(lambda which=which: state(which))
        assert ending.how == "done", ending
        states[which] = ending.value

    def changed(which: str, rng: random.Random) -> str:
        content, what = _changed(states[which], rng)
        torch.save(content, case / which)
        return what

    def read(which: str) -> Any:
        content = torch.load(case / which, weights_only=True)
        if which == "callback":
            callback = RecurationCallback(1)
            callback.load_state_dict(content)
            return repr(callback.state_dict())
        module = data(which)
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


def training_kinds(world: World) -> list[Kind]:
    """A checkpoint of a training that re-curates, with another state of its stream or of its callback."""
    case, start = world.cage.case, world.home / "starts" / "training"
    world.cage.fresh(None)
    assert world.cage.run(lambda: train(world)).how == "done"
    shutil.copytree(case, start)
    saved = sorted((start / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    chosen = saved[len(saved) // 2].name
    for path in saved:
        if path.name != chosen:
            path.unlink()
    for path in start.glob("run-0.*"):
        path.unlink()

    def resumed() -> Any:
        train(world)
        return {key: repr(value) for key, value in trained(case).items()}

    def changed(rng: random.Random) -> str:
        path = case / "checkpoints" / chosen
        content = torch.load(path, weights_only=True)
        callbacks = content["callbacks"]
        (name,) = [key for key in callbacks if key.startswith("RecurationCallback")]
        holder, key = rng.choice(((callbacks, name), (callbacks, name), (content, "CuratedDataModule")))
        holder[key], what = _changed(holder[key], rng)
        torch.save(content, path)
        return f"{key}: {what}"

    find = lambda folder: [folder / "checkpoints" / chosen]  # noqa: E731
    return [
        Kind(
            "a checkpoint that re-curates", start, find, {"resume": resumed}, lambda *_: "taken as it is",
            ("checkpoint", "state", "RecurationCallback"), change=changed,
        )
    ]  # fmt: skip


def _changed(content: Any, rng: random.Random) -> tuple[Any, str]:
    """A copy of plain values with a hostile one in it, and what that is."""
    content = copy.deepcopy(content)
    what, how = mutate(content, rng), rng.random()
    if how < 0.1:
        return hostile(rng), "another state"
    if how < 0.2:
        content["selection"], what = torch.tensor([[1.5], [2.0]]), "a tensor"
    return content, what
