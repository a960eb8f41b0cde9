"""The files and values that a user or a checkpoint gives: kinds for `files`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import save_file

from curated_data import CuratedDataModule, ShardPool
from curated_data.cli.common import load_array
from curated_data.cli.results import _class_names
from curated_data.config import load_config, read_yaml
from curated_data.embedding import resolve_embedder
from curated_data.embedding.existing import EmbeddedPool
from curated_data.networks import load_weights
from curated_data.pipeline.labels import read_label_file
from curated_data.report.page import check_arrays, class_names_beside
from curated_data.selection.names import read_classes, read_wordnet
from curated_data.streaming.strata import strata
from curated_data.training.mixture_file import open_mixture
from lightning_modules import SimCLR
from tests.chaos.kinds import Kind, digest
from tests.chaos.world import World


def input_kinds(world: World) -> list[Kind]:
    case, start = world.cage.case, world.home / "starts" / "inputs"
    start.mkdir(parents=True)
    torch.manual_seed(0)
    network = _Network()
    torch.save(network.state_dict(), start / "zip.pth")
    torch.save(network.state_dict(), start / "legacy.pt", _use_new_zipfile_serialization=False)
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
    few = {"key": [f"k{place:03d}" for place in range(24)], "label": ["a", "b", "c", "b"] * 6}
    pq.write_table(pa.table(few), start / "few.parquet")
    rows = zip(*few.values(), strict=True)
    (start / "few.csv").write_text("key,label\n" + "".join(f"{key},{label}\n" for key, label in rows))
    part = {"pool": world.pool, "weight": 1}
    parts = [{"name": "all", **part}, {"name": "few", **part, "selection": [1, 5]}]
    (start / "mixture.yaml").write_text(
        yaml.safe_dump({"data": {"mixture": {"components": parts, "epoch_size": 24}, "batch_size": 4}})
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
        return {key: digest(tensor) for key, tensor in network.state_dict().items()}

    def module() -> Any:
        torch.set_num_threads(1)
        found = resolve_embedder(f"checkpoint:{case / 'simclr.ckpt'}")
        return found.fingerprint

    def settings() -> Any:
        return repr(load_config(read_yaml(case / "config.yaml")))

    def chosen(**options: str) -> Any:
        data = CuratedDataModule(
            world.pool, batch_size=4, loader={"num_workers": 0}, image_size=6,
            **{name: case / file for name, file in options.items()},
        )  # fmt: skip
        data.setup("fit")
        return [[batch["sample_id"].tolist(), batch["label"].tolist()] for batch in data.train_dataloader()]

    def beside() -> Any:
        shutil.copy2(world.home / "pool-000000.tar", case / "pool.tar")
        return class_names_beside(ShardPool(case / "pool.tar"))

    def placed() -> Any:
        array = load_array(str(case / "coordinates.npy"), "coordinates")
        check_arrays(24, coordinates=array, labels=None)
        return digest(array)

    def classes(file: str) -> Any:
        found = read_label_file(case / file, ShardPool(world.pool))
        return [found.numbers.tolist(), found.names, found.n_unknown]

    def mixed() -> Any:
        data = open_mixture([case / "mixture.yaml"])
        return [repr(data.mixture), data.batch_size]

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
    fields += ("n_clusters", "n_resamples", "threshold", "CurationConfig")
    kinds = {
        "weights": (("zip.pth", "legacy.pt", "flat.safetensors"), weights, ()),
        "checkpoints as embedders": (("simclr.ckpt",), lambda _: module(), ()),
        "settings in YAML": (("config.yaml",), lambda _: settings(), fields),
        "ids": (("ids.npy",), lambda _: chosen(selection="ids.npy"), ("selection", "ids")),
        "labels": (("labels.npy",), lambda _: chosen(labels="labels.npy"), ("labels",)),
        "coordinates": (("coordinates.npy",), lambda _: placed(), ("coordinates",)),
        "names of classes": (("classes.json",), lambda _: _class_names(str(case / "classes.json")), ()),
        "names beside shards": (("classes.json",), lambda _: beside(), ()),
        "classes of few": (("few.csv", "few.parquet"), classes, ("--labels",)),
        "mixtures in YAML": (("mixture.yaml",), lambda _: mixed(), ("mixture", "component", *fields)),
        "classes of captions": (("entries.json",), lambda _: repr(read_classes(case / "entries.json")), ()),
        "WordNet": (("data.noun",), lambda _: repr(read_wordnet(case / "data.noun")), ()),
    }
    found = []
    for label, (files, read, names) in kinds.items():
        for file in files:
            reads = {"read": lambda file=file, read=read: read(file)}
            find = lambda folder, file=file: [folder / file]  # noqa: E731
            found.append(Kind(label, start, find, reads, lambda *_: "taken as it is", names))
    return found


def row_kinds(world: World) -> list[Kind]:
    """Rows that a user gives in parts, their copy in a cache, and the clusters that a stream keeps."""
    case, start = world.cage.case, world.home / "starts" / "rows"
    (start / "parts").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, dtype in enumerate((np.float32, np.float64, np.float32)):
        np.save(start / "parts" / f"part-{number}.npy", rng.normal(size=(8, 5)).astype(dtype))
    ids, clusters = np.arange(2, 14), np.arange(12) % 3
    place = {"tree": "0123456789abcdef0123"}
    strata(ids, 1, find=lambda *_: clusters, cache_dir=start / "cache", keep=True, **place)

    def rows() -> Any:
        torch.set_num_threads(1)
        store = EmbeddedPool(case / "parts").store(case / "cache")
        return [store.shape, digest(store.as_array(), store.valid), store.n_failures]

    def kept() -> Any:
        return strata(ids, 1, find=None, cache_dir=case / "cache", keep=False, **place).tolist()

    world.cage.fresh(start)
    assert world.cage.run(rows).how == "done"
    known = start.with_name("rows, known")
    shutil.copytree(case, known)

    def files(*patterns: str) -> Callable[[Path], list[Path]]:
        return lambda folder: sorted(
            path for pattern in patterns for path in folder.glob(pattern)
            if path.is_file() and ".locks" not in path.parts
        )  # fmt: skip

    def as_given(*_: Any) -> str:
        return "taken as it is"  # rows of a user have no checksum

    parts, copy, streams = files("parts/*"), files("cache/embeddings/**/*"), files("cache/streaming/*")
    return [
        Kind("rows in parts", start, parts, {"rows": rows}, as_given, ("embeddings", "parts")),
        Kind("rows in parts, known", known, parts, {"rows": rows}, as_given, ("embeddings", "parts")),
        Kind("the copy of rows", known, copy, {"rows": rows}),
        Kind("kept clusters of a stream", start, streams, {"strata": kept}),
    ]


class _Network(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))


def _checkpoint() -> dict[str, Any]:
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
