"""A user's program for a strict type checker: `uv run mypy` and `test_types.py` check it, nothing runs it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from curated_data import (
    ClusterTree,
    CuratedDataModule,
    Curation,
    CurationConfig,
    CurationLogger,
    DecodingOptions,
    Level,
    LoaderOptions,
    RecurationCallback,
    ShardPool,
    ShardWriter,
    curate,
    flat_sample,
    hierarchical_kmeans,
    hierarchical_sample,
    kmeans,
)
from lightning_modules import MAE, SP2OT, DINOv2, SimCLR, TSimCNE
from lightning_modules.evaluation.knn import knn
from lightning_modules.evaluation.linear import linear
from lightning_modules.evaluation.online import OnlineKNN
from lightning_modules.evaluation.retrieval import retrieval
from lightning_modules.transport import p2ot

Ids = npt.NDArray[np.int64]
Rows = npt.NDArray[np.float32]


class OwnEmbedder:
    """What `curate` needs of an embedder, and no more."""

    dimension = 3
    fingerprint = "means of channels, 1"

    def preprocess(self, image: Tensor) -> Tensor:
        return image.float().mean((1, 2))

    def __call__(self, batch: Tensor) -> Tensor:
        return batch


class OwnModule(lightning.LightningModule):
    """A module that re-curation can embed with."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def embed(self, images: Tensor) -> Tensor:
        features: Tensor = self.net(images.mean((2, 3)))
        return features

    def eval_transform(self) -> nn.Module:
        return nn.Identity()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.embed(batch["image"]).square().sum()


class OwnData(CuratedDataModule):
    """A data module that changes something."""

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if self.selection is not None:
            self.set_selection(self.selection[::2])


def cluster(x: Rows | Tensor, *, levels: Sequence[Level] | str = "auto") -> tuple[Ids, Ids]:
    flat = kmeans(x, 10, metric="cosine", seed=1)
    print(flat.centroids.shape, float(flat.inertia), flat.n_iter + 1, np.bincount(flat.assignment))
    tree: ClusterTree = hierarchical_kmeans(x, levels, resample="closest", device=torch.device("cpu"))
    tree.save(Path("tree"))
    same = ClusterTree.load("tree")
    print(same.n_levels + 1, same.sizes(1).sum(), same.members(1, 0), same.centroids[1], same.parent[1])
    return hierarchical_sample(tree, 100, strategy="closest"), flat_sample(tree, 100, level=1, seed=1)


def select(shards: list[Path], cache: Path) -> Curation:
    with ShardWriter(cache / "pool-%06d.tar", max_samples=100) as writer:
        writer.write({"__key__": "a", "jpg": b"", "cls": 1, "json": {"licence": None}})
    pool = ShardPool([*shards, *writer.shards], cache_dir=cache)
    print(len(pool), pool.keys([0, 1]), pool.labels(np.arange(2)), pool.read([0])[0]["jpg"])
    config = CurationConfig(target_size=100, levels=[Level(10), Level(n_clusters=2, n_resamples=3)])
    by_mapping = curate(shards, {"target_size": 10}, embedder=lambda x: x.mean((2, 3)), cache_dir=str(cache))
    by_path = curate(shards[0], "curation.yaml", embedder="pixels:16", cache_dir=cache)
    by_network = curate(pool, config, embedder=nn.Flatten(), cache_dir=cache, device="cpu")
    print(len(by_mapping.ids), by_path.report["selected"], by_network.config.seed + 1)
    return curate(pool, config, embedder=OwnEmbedder(), cache_dir=cache, decoders={"bin": len})


def train(shards: str | Sequence[str | Path], ids: Ids) -> int:
    modules: list[lightning.LightningModule] = [
        SimCLR("resnet18", image_size=32, augmentation={"grey": 0.0}),
        DINOv2(backbone_options={"depth": 2}, global_scale=(0.4, 1.0)),
        MAE(mask_ratio=0.5, betas=(0.9, 0.95)),
        TSimCNE(epochs=(10, 1, 5)),
        SP2OT(10, method="p2ot"),
        OwnModule(),
    ]
    simclr = SimCLR()
    views: list[Tensor] = simclr.views()(torch.zeros(3, 8, 8, dtype=torch.uint8))
    image: Tensor = simclr.eval_transform()(torch.zeros(3, 8, 8, dtype=torch.uint8))
    features: Tensor = simclr.embed(image[None])
    print(len(views), features.shape, simclr.embedding_dimension + 1, simclr.backbone.dimension + 1)

    data = CuratedDataModule(
        shards,
        CurationConfig(target_size=1000),
        embedder=OwnEmbedder(),
        views=simclr.views(),
        eval_transform=simclr.eval_transform(),
        batch_size=64,
        cache_dir=Path("cache"),
        val_pool="validation.tar",
        shuffle="block",
        last_batch="pad",
        decoding=DecodingOptions(on_error="skip"),
    )
    print(OwnData(ShardPool("pool.tar"), {"target_size": 10}, embedder="pixels:8", cache_dir="cache"))
    alone = LoaderOptions(num_workers=0)
    print(CuratedDataModule("pool.tar", selection=ids, labels="labels.npy", loader=alone))
    callbacks: list[lightning.Callback] = [
        RecurationCallback(every_n_epochs=5, share=0.5, embedder=lambda module: module),
        RecurationCallback(monitor="loss", mode="min", on_failure="keep"),
        CurationLogger(labels=ids, class_names=["cat", "dog"]),
        OnlineKNN(data.val_dataloader, data.val_dataloader, k=[10, 20]),
    ]
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", callbacks=callbacks)
    for module in modules:
        trainer.fit(module, datamodule=data)
    for batch in data.train_dataloader():
        print(batch["sample_id"])
    tree = None if data.curation is None else data.curation.tree
    return 0 if tree is None else tree.n_levels


def evaluate(curation: Curation, labels: Ids) -> float:
    x = curation.embeddings
    neighbours = knn(x, labels, x[:10], labels[:10], k=(1, 5))
    heads = linear({"cls": x[:100]}, labels[:100], {"cls": x[:10]}, labels[:10])
    found = retrieval(x[:10], x[:], query_labels=labels[:10], gallery_labels=labels)
    plan: Tensor = p2ot(torch.rand(8, 4), 0.5, epsilon=0.1)
    print(heads.heads[0]["accuracy"], found.average_precision, plan.sum())
    return neighbours.accuracy[5]
