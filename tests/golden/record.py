"""Figures that a change of structure must not alter, over three small pools: images, texts and arrays.

    python -m tests.golden.record --write    # after a change that is meant to alter results
    python -m tests.golden.record --exact    # on one machine, before and after a change of structure

Ids, trees and the order of batches must be equal bit for bit. The losses of ten steps and the figures of
evaluations are rounded differently by other processors, so the test in CI allows for that; `--exact` does
not.
"""

import argparse
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image

from curated_data import Component, CuratedDataModule, CurationConfig, Level, Mixture, ShardPool, curate
from curated_data.config import EmbeddingConfig, NearDuplicateConfig
from curated_data.pipeline.extend import extend
from curated_data.pipeline.recurate import recurate
from curated_data.streaming.order import EpochOrder
from lightning_modules import MAE, SP2OT, DINOv2, SimCLR, TSimCNE
from lightning_modules.evaluation.clustering import clustering
from lightning_modules.evaluation.fairness import fairness
from lightning_modules.evaluation.health import health
from lightning_modules.evaluation.knn import knn
from lightning_modules.evaluation.logistic import fit_logistic
from lightning_modules.evaluation.ranking import ranking
from lightning_modules.evaluation.retrieval import retrieval
from tests.support.ranks import on_ranks
from tests.support.trainers import quiet_trainer

GOLDEN = Path(__file__).with_name("golden.json")
N_CLASSES = 6
SIZES = (40, 1, 55)  # samples per shard
STEPS = 10


def figures(folder: Path) -> dict[str, Any]:
    """All figures, computed in a folder for pools and caches."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for kind in POOLS:
        where = folder / kind
        where.mkdir()
        write_pool(where, kind)
        curated = curations(where, kind, where / "cache")
        on_ranks(2, _record_rank, where, kind)
        for rank in range(2):
            assert json.loads((where / f"rank-{rank}.json").read_text()) == curated, (
                "ranks and one process differ"
            )
        found[kind] = curated
    found["order"] = orders()
    found["mixture"] = mixtures(folder / "images")
    found["losses"] = {name: losses(folder / "images", name) for name in MODULES}
    found["evaluations"] = evaluations()
    return found


def curations(folder: Path, kind: str, cache: Path) -> dict[str, str]:
    """A digest of the ids and the tree of a curation, of one that is extended, and of a re-curation."""
    shards = sorted(map(str, folder.glob("pool-*.tar")))
    embedder = EMBEDDERS[kind]
    config = CurationConfig(
        target_size=30,
        levels=[Level(n_clusters=16, n_resamples=3, sample_size=3), Level(n_clusters=4)],
        near_duplicates=NearDuplicateConfig(enabled=True, threshold=0.999),
        embedding=EmbeddingConfig(num_workers=0, dtype="float32"),
    )
    first = curate(shards[:2], config, embedder=embedder, cache_dir=cache)
    grown = extend(shards, config, tree=first.folders["tree"], embedder=embedder, cache_dir=cache)
    whole = curate(shards, config, embedder=embedder, cache_dir=cache)
    again = recurate(
        ShardPool(shards, cache_dir=cache), config, base=whole, share=0.7, embedder=embedder, cache_dir=cache
    )
    named = {"first": first, "extended": grown, "whole": whole, "recurated": again}
    return {f"{name}/ids": digest(curation.ids) for name, curation in named.items()} | {
        f"{name}/tree": digest(*curation.tree.parent.values()) for name, curation in named.items()
    }


def orders() -> dict[str, str]:
    """A digest of two epochs of global batches for every way to order them."""
    ids = np.arange(3, 500, 7)
    starts = np.array([0, 100, 100, 350, 500])
    ways: dict[str, dict[str, Any]] = {
        "full": {},
        "none": {"shuffle": "none"},
        "block": {"shuffle": "block", "shard_starts": starts, "shards_per_window": 2},
        "strata": {"strata": ids % 5},
        "pad": {"last_batch": "pad"},
        "short": {"last_batch": "short"},
    }
    found = {}
    for name, settings in ways.items():
        order = EpochOrder(ids, seed=3, batch_size=16, **settings)
        epochs = [order.batches(epoch, 0, order.n_batches)[1] for epoch in (0, 5)]
        found[name] = digest(*epochs, order.spares(1, np.arange(20), 3))
    return found


def mixtures(folder: Path) -> dict[str, str]:
    """A digest of three epochs of ids and components, of weights that stay and that change."""
    shards = sorted(map(str, folder.glob("pool-*.tar")))
    components = [
        Component("some", shards, selection=np.arange(0, 41, 3), shuffle="block"),
        Component("all", shards, batches="own"),
        Component("few", shards[0], shuffle="none"),
    ]
    weights: dict[str, dict[int, list[float]]] = {
        "stay": {0: [0.5, 0.2, 0.3]},
        "change": {0: [0.5, 0.2, 0.3], 9: [0.1, 0.6, 0.3]},
    }
    found = {}
    for name, shares in weights.items():
        data = CuratedDataModule(
            mixture=Mixture(components, weights=shares, epoch_size=90),
            image_size=8, batch_size=8, seed=3, loader={"num_workers": 0},
        )  # fmt: skip
        data.setup("fit")
        order = data.train_dataloader().batch_sampler.order
        epochs = [order.batches(epoch, 0, order.n_batches)[1] for epoch in range(3)]
        sources = [order.components(epoch, 0, order.n_batches) for epoch in range(3)]
        found[name] = digest(*epochs, *sources, order.spares(1, np.arange(20), 3))
    return found


def losses(folder: Path, name: str) -> list[float]:
    """The losses of ten steps of a pretraining module on the pool of images."""
    import lightning.pytorch as pl

    torch.manual_seed(0)
    module = MODULES[name]()
    seen: list[float] = []

    class Recorder(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            seen.append(float(outputs["loss"]))

    data = CuratedDataModule(
        sorted(map(str, folder.glob("pool-*.tar"))),
        views=module.views(),
        batch_size=16,
        loader={"num_workers": 0},
        cache_dir=folder / "stream",
    )
    quiet_trainer(max_steps=STEPS, max_epochs=-1, callbacks=[Recorder()]).fit(module, data)
    return seen


def evaluations() -> dict[str, float]:
    """Figures of the evaluations on fixed features."""
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(N_CLASSES, 12))
    y, y_test = rng.integers(0, N_CLASSES, 120), rng.integers(0, N_CLASSES, 60)
    x = (centres[y] + rng.normal(size=(120, 12))).astype(np.float32)
    x_test = (centres[y_test] + rng.normal(size=(60, 12))).astype(np.float32)
    near = knn(x, y, x_test, y_test, k=(5, 20))
    groups = ["a" if label < 3 else "b" for label in y_test]
    head = fit_logistic(torch.from_numpy(x), torch.from_numpy(y), N_CLASSES, inverse_penalty=1.0)
    ranked = ranking({"a": [0.5, 0.6], "b": [0.7, 0.72], "c": [0.4, 0.41]}, {"a": 0.3, "b": 0.5, "c": 0.2})
    spectrum = health(x)
    return {
        "knn": near.best,
        "logistic": float(head.weight.norm()),
        "clustering": clustering(y_test, np.minimum(y_test, 3)).accuracy,
        "fairness": fairness(near.correct[5], groups).gap,
        "retrieval": retrieval(x_test, x, query_labels=y_test, gallery_labels=y).scores["5"]["map"],
        "ranking": ranked.spearman,
        "effective_rank": spectrum.effective_rank,
    }


def write_pool(folder: Path, kind: str) -> None:
    """Shards of labelled samples whose classes have very different sizes."""
    rng = np.random.default_rng(11)
    sample = POOLS[kind]
    for number, size in enumerate(SIZES):
        with webdataset.TarWriter(str(folder / f"pool-{number}.tar"), mtime=0) as writer:
            for place in range(size):
                label = min(int(rng.exponential(1.2)), N_CLASSES - 1)
                content = sample(label, rng)
                writer.write({"__key__": f"{number}/{place:03d}", "cls": str(label).encode(), **content})


def digest(*arrays: np.ndarray) -> str:
    """A name for the content of arrays."""
    state = hashlib.sha256()
    for array in arrays:
        state.update(f"{array.dtype.str}{array.shape}".encode())
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()[:16]


def _image(label: int, rng: np.random.Generator) -> dict[str, bytes]:
    image = np.clip(rng.normal(40 * label + 20, 25, (24, 24, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return {"png": buffer.getvalue()}


def _text(label: int, rng: np.random.Generator) -> dict[str, bytes]:
    words = rng.choice(list("abcdefghij")[label : label + 5], 12)
    return {"txt": " ".join(words).encode()}


def _array(label: int, rng: np.random.Generator) -> dict[str, bytes]:
    buffer = io.BytesIO()
    np.save(buffer, rng.normal(label, 1, (4, 6, 6)).astype(np.float32))
    return {"npy": buffer.getvalue()}


class Sums:
    """An embedder whose rows are sums of integers over cells: exact in float32, so equal on any processor."""

    def __init__(self, kind: str, dimension: int, preprocess: Callable[[Any], torch.Tensor]) -> None:
        self.fingerprint, self.dimension, self.preprocess = f"golden {kind}", dimension, preprocess

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.sum(dim=-1)


def _cells(image: torch.Tensor) -> torch.Tensor:
    return image.reshape(3, 4, 6, 4, 6).permute(0, 1, 3, 2, 4).reshape(48, 36).float()


def _letters(text: str) -> torch.Tensor:
    return torch.tensor([[float(text.count(letter))] for letter in "abcdefghij"])


def _bands(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.round(64 * array)).reshape(16, 9)


POOLS: dict[str, Callable[[int, np.random.Generator], dict[str, bytes]]] = {
    "images": _image,
    "texts": _text,
    "arrays": _array,
}
EMBEDDERS = {
    "images": Sums("images", 48, _cells),
    "texts": Sums("texts", 10, _letters),
    "arrays": Sums("arrays", 16, _bands),
}
_VIT: dict[str, Any] = {
    "backbone": "timm:vit_tiny_patch16_224",
    "image_size": 16,
    "backbone_options": {"patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2},
}
MODULES: dict[str, Callable[[], Any]] = {
    "simclr": lambda: SimCLR(**_VIT, batch_norm=False, warmup_epochs=1),
    "mae": lambda: MAE(**_VIT, decoder_dimension=16, decoder_depth=1, decoder_heads=2, warmup_epochs=1),
    "dinov2": lambda: DINOv2(
        **_VIT, local_image_size=8, n_local_views=2, head_hidden=16, head_bottleneck=8, n_prototypes=12
    ),
    "sp2ot": lambda: SP2OT(N_CLASSES, **_VIT, buffer_size=48, n_neighbors=3, n_heads=2),
    "tsimcne": lambda: TSimCNE(**_VIT, small_images=False, epochs=(2, 1, 1), warmup_epochs=1),
}


def _record_rank(rank: int, folder: Path, kind: str) -> None:
    found = curations(folder, kind, folder / "cache-of-two")
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="replace the recorded figures")
    parser.add_argument("--exact", type=Path, help="compare with this file; write it if it is missing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = figures(Path(folder))
    goal = GOLDEN if options.write else options.exact
    if goal is None:
        print(json.dumps(found, indent=1, sort_keys=True))
    elif options.write or not goal.exists():
        goal.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    else:
        known = json.loads(goal.read_text())
        if known != found:
            for name in known:
                if known[name] != found.get(name):
                    print(name, known[name], found.get(name), sep="\n  ")
            return 1
        print("equal")
    return 0


if __name__ == "__main__":
    sys.exit(main())
