r"""Everything on one machine, in minutes: curate a long-tailed pool, pretrain on the selection, compare.

Long-tailed Fashion-MNIST, which is included, so that no network is needed:
    uv run recipes/quickstart.py
Long-tailed CIFAR-10, downloaded by torchvision:
    uv run recipes/quickstart.py --data cifar10
A folder of shards *train*.tar and *test*.tar with .cls labels:
    uv run recipes/quickstart.py --data FOLDER
Any shards of images:
    uv run recipes/quickstart.py --pool 'my-{000..099}.tar' --target-size 100000 \
        --embedder timm:vit_small_patch14_dinov2.lvd142m --image-size 224

Prints one table: the balance of the pool, of a random selection and of the curated one, and the k-NN accuracy
of SimCLR pretrained on either, over all classes and over the rarest three. The k-NN bank is the whole
labelled pool for both models, so that only their features differ. A pool without labels is curated and
plotted, but not compared. Also writes two figures and the report page. A second run finds everything in the
cache.
"""

import argparse
import json
import logging
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from curated_data import CuratedDataModule, CurationConfig, LoaderOptions, ShardPool, ShardWriter, curate
from curated_data.cache.artifacts import fingerprint, open_cache
from curated_data.cache.paths import local_path
from curated_data.cache.publishing import atomic_path
from curated_data.embedding import embed_pool, resolve_embedder
from curated_data.errors import ConfigError, CuratedDataError, PoolError
from curated_data.programs import described_parser
from curated_data.progress import log_to_terminal
from curated_data.report import figures
from curated_data.report.examples import ClusterRow, cluster_rows
from curated_data.report.page import write_report
from curated_data.selection.metrics import class_balance
from curated_data.stages.curation import Curation
from lightning_modules import SimCLR
from lightning_modules.evaluation import knn
from lightning_modules.evaluation.longtail import mean_known

log = logging.getLogger("quickstart")

FASHION = Path(__file__).parent / "data" / "fashion-lt50"
FASHION_CLASSES = json.loads((FASHION / "classes.json").read_text())
CIFAR_CLASSES = ["aeroplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "lorry"]
BATCH_SIZE = 64
RAREST = 3
NEIGHBOURS = 5


@dataclass(frozen=True)
class Data:
    """Where the images are, and suitable settings."""

    pool: list[str]
    test: list[str]
    target_size: int
    image_size: int
    class_names: list[str] | None = None
    is_grey: bool = False


def main() -> int:
    """Run the quickstart; returns the exit status."""
    options = parse_options()
    log_to_terminal()
    quieten_lightning()
    try:
        run(options)
    except CuratedDataError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    return 0


def quieten_lightning() -> None:
    """Silence its lines per epoch, and its advice about loggers and validation, which are off on purpose."""
    noisy = "lightning", "lightning.pytorch", "lightning.fabric"
    for name in (*noisy, "curated_data.streaming", "curated_data.training.datamodule"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def run(options: argparse.Namespace) -> None:
    """Curate, pretrain twice, evaluate, draw."""
    started = time.monotonic()
    out = local_path(options.out, "--out")
    cache = open_cache(out / "cache")
    data = choose_data(options)
    for name, least in (("epochs", 1), ("workers", 0), ("target_size", 1), ("image_size", 1)):
        if (value := getattr(options, name)) is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    if data.test:  # built here once, not first after minutes of curation
        try:
            SimCLR(**simclr_settings(data, options.backbone))
        except ValueError as error:
            raise ConfigError(str(error)) from error
    pool = ShardPool(data.pool, cache_dir=cache)
    config = CurationConfig(target_size=data.target_size, metric=options.metric, seed=options.seed)
    curation = curate(pool, config, embedder=options.embedder, cache_dir=cache)
    labels = pool.labels(np.arange(len(pool)))

    valid = np.flatnonzero(curation.embeddings.valid)
    rng = np.random.default_rng(options.seed)
    chosen = {
        "random": np.sort(rng.choice(valid, len(np.unique(curation.ids)), replace=False)),
        "curated": curation.ids,
    }
    all_cached = all(curation.report["cached"].values())
    rows = {"pool": balance(labels, valid), **{name: balance(labels, ids) for name, ids in chosen.items()}}
    caption = ""
    if data.test and (labels >= 0).any():
        for name, ids in chosen.items():
            module, was_cached = pretrained(name, ids, pool, data, options, cache)
            all_cached &= was_cached
            rows[name] |= accuracies(module, pool, labels, data, cache)
        embedder = accuracies(options.embedder, pool, labels, data, cache)
        caption = (
            f"k-NN of the embedder itself ({options.embedder}, trained elsewhere): {embedder['all']:.1%} "
            f"over all, {embedder['rarest']:.1%} over the rarest {RAREST}. One training each: differences "
            "within the interval are noise."
        )
    print_table(rows, caption)
    for path in draw(out, pool, curation, labels, chosen, data):
        print(f"figure: {path}")
    print(f"report: {write_report(curation, pool, out / 'report.html', class_names=data.class_names)}")
    print(f"cache:  {cache}")
    seconds = time.monotonic() - started
    print(f"everything was found in the cache, {seconds:.0f} s" if all_cached else f"{seconds:.0f} s in all")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = described_parser(__doc__)
    parser.add_argument("--data", default="fashion", help="fashion, cifar10, or a folder of shards")
    parser.add_argument("--pool", nargs="+", help="shards of your own, instead of --data")
    parser.add_argument("--test", nargs="+", default=[], help="labelled shards to evaluate on, with --pool")
    parser.add_argument(
        "--embedder", default="efficientnet_lite0:64", help="network that embeds (default: %(default)s)"
    )
    parser.add_argument("--target-size", type=int, help="samples to select (default: a fifth of the pool)")
    parser.add_argument("--metric", choices=("l2", "cosine"), help="of the clustering (default: cosine)")
    parser.add_argument("--image-size", type=int, help="side of the views SimCLR trains on, in pixels")
    parser.add_argument("--backbone", default="resnet10", help="that SimCLR trains (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="of each training (default: 30, small: 2)")
    parser.add_argument("--workers", type=int, default=1, help="loader processes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument(
        "--out", default="runs/quickstart", help="folder of figures and cache (default: %(default)s)"
    )
    parser.add_argument("--small", action="store_true", help="a quarter of the pool, 2 epochs")
    options = parser.parse_args()
    if options.epochs is None:
        options.epochs = 2 if options.small else 30
    return options


def choose_data(options: argparse.Namespace) -> Data:
    """The pool that the command line names, with settings that suit it."""
    if options.pool:
        n_samples = len(
            ShardPool(options.pool, cache_dir=open_cache(local_path(options.out, "--out") / "cache"))
        )
        return Data(
            options.pool, options.test, options.target_size or n_samples // 5, options.image_size or 224
        )
    if options.data == "fashion":
        train = sorted(map(str, FASHION.glob("*-train-*.tar")))[: 1 if options.small else None]
        test, classes, size = [str(FASHION / "fashion-test-00.tar")], FASHION_CLASSES, 28
    else:
        classes, size = CIFAR_CLASSES if options.data == "cifar10" else None, 32
        folder = (
            long_tailed_cifar(local_path(options.out, "--out"))
            if options.data == "cifar10"
            else local_path(options.data, "--data")
        )
        train, test = (sorted(map(str, folder.glob(f"*{part}*.tar"))) for part in ("train", "test"))
        if not train:
            raise CuratedDataError(
                f"--data {options.data}: no *train*.tar in {folder}; give a folder of shards"
            )
    is_grey = options.data == "fashion"
    n_samples = len(ShardPool(train, cache_dir=open_cache(local_path(options.out, "--out") / "cache")))
    target_size = options.target_size or n_samples // 5
    return Data(train, test, target_size, options.image_size or size, classes, is_grey)


def long_tailed_cifar(out: Path, ratio: float = 100.0) -> Path:
    """CIFAR-10 with class c cut to 5000 * ratio^(-c / 9) images, as shards; its whole test set beside
    them.
    """
    from torchvision.datasets import CIFAR10

    folder = out / "cifar10-lt100"
    if folder.exists():
        return folder
    with atomic_path(folder) as temporary:
        for part in ("train", "test"):
            data = CIFAR10(out / "download", train=part == "train", download=True)
            targets = np.array(data.targets)
            kept = [
                np.flatnonzero(targets == c)[: round(5000 * ratio ** (-c / 9)) if part == "train" else None]
                for c in range(10)
            ]
            order = np.random.default_rng(0).permutation(np.concatenate(kept))
            with ShardWriter(temporary / f"{part}-%03d.tar", max_samples=2000) as writer:
                for number in order:
                    writer.write(
                        {"__key__": f"{number:05d}", "png": data[number][0], "cls": int(targets[number])}
                    )
    return folder


def pretrained(
    name: str, ids: np.ndarray, pool: ShardPool, data: Data, options: argparse.Namespace, cache: Path
) -> tuple[SimCLR, bool]:
    """SimCLR trained on a selection, or loaded from an earlier run."""
    settings = simclr_settings(data, options.backbone)
    key = fingerprint(
        ids=ids, pool=pool.state, settings=settings, epochs=options.epochs, seed=options.seed, version=1
    )
    path = cache / "pretrained" / f"{key}.ckpt"
    lightning.seed_everything(options.seed, verbose=False)
    module = SimCLR(**settings)
    if path.exists():
        module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        return module, True
    log.info("pretraining SimCLR on the %s selection: %d images, %d epochs", name, len(ids), options.epochs)
    stream = CuratedDataModule(
        pool,
        selection=ids,
        batch_size=min(BATCH_SIZE, len(ids)),
        seed=options.seed,
        loader=LoaderOptions(num_workers=options.workers),
    )
    quiet_trainer(max_epochs=options.epochs).fit(module, stream)
    with atomic_path(path) as temporary:
        torch.save({"state_dict": module.state_dict()}, temporary)
    return module, False


def simclr_settings(data: Data, backbone: str) -> dict[str, Any]:
    """Settings for SimCLR in small batches: SGD, a low temperature, crops that keep most of the image."""
    small = data.image_size <= 64
    grey = {"jitter": [0.4, 0.4, 0.0, 0.0], "grey": 0.0, "scale": [0.3, 1.0]}
    return {
        "backbone": backbone,
        "backbone_options": {"width": 16} if small else None,
        "image_size": data.image_size,
        "small_images": small,
        "temperature": 0.2,
        "optimizer": "sgd",
        "learning_rate": 0.2,
        "weight_decay": 5e-4,
        "warmup_epochs": 2,
        "augmentation": grey if data.is_grey else None,
    }


def quiet_trainer(**settings: Any) -> lightning.Trainer:
    """A Trainer that writes nothing."""
    return lightning.Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        log_every_n_steps=1,
        **settings,
    )


def accuracies(
    embedder: str | SimCLR, pool: ShardPool, labels: np.ndarray, data: Data, cache: Path
) -> dict[str, float]:
    """k-NN accuracy on the held-out images: over all classes, and the mean over the pool's rarest classes."""
    resolved = resolve_embedder(embedder)
    test = ShardPool(data.test, cache_dir=cache)
    features = {
        name: embed_pool(part, resolved, cache, num_workers=1)
        for name, part in (("pool", pool), ("test", test))
    }
    bank = np.flatnonzero(features["pool"].valid & (labels >= 0))
    test_labels = test.labels(np.arange(len(test)))
    asked = np.flatnonzero(features["test"].valid & (test_labels >= 0))
    if not len(asked):
        raise PoolError(f"{test.urls[0]}: no image of the test set can be read and has a label (.cls)")
    result = knn(
        features["pool"].as_array()[bank],
        labels[bank],
        features["test"].as_array()[asked],
        test_labels[asked],
        k=min(NEIGHBOURS, len(bank)),
    )
    counts = np.bincount(labels[bank])
    rarest = np.argsort(np.where(counts > 0, counts, len(labels)))[:RAREST]
    k = next(iter(result.per_class))
    return {
        "all": result.class_accuracy[k],
        "rarest": mean_known(np.array([result.per_class[k].get(c, np.nan) for c in rarest.tolist()])),
        "n_test": len(asked),
    }


def balance(labels: np.ndarray, ids: np.ndarray) -> dict[str, float]:
    """Size, class entropy and head-to-tail ratio of a selection; only the size without labels."""
    found = class_balance(labels, ids)
    if found is None:
        return {"size": len(ids)}
    return {"size": len(ids), "entropy": found.entropy_after, "ratio": found.ratio_after}


def print_table(rows: dict[str, dict[str, float]], caption: str) -> None:
    """Print one row per selection, without empty columns."""
    columns = {
        "size": ("images", "{:,.0f}"),
        "entropy": ("class entropy, nats", "{:.3f}"),
        "ratio": ("head / tail", "{:,.1f}"),
        "all": ("k-NN, all classes", "{:.1%}"),
        "rarest": (f"k-NN, rarest {RAREST}", "{:.1%}"),
    }
    table = Table(title="What the selection holds, and what SimCLR learns from it", caption=caption or None)
    table.add_column("")
    shown = {key: column for key, column in columns.items() if any(key in row for row in rows.values())}
    for heading, _ in shown.values():
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        cells = [layout.format(row[key]) if key in row else "" for key, (_, layout) in shown.items()]
        if "all" in row:
            error = 1.96 * (row["all"] * (1 - row["all"]) / row["n_test"]) ** 0.5
            cells[list(shown).index("all")] += f" ± {error:.1%}"
        table.add_row(name, *cells)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def draw(
    out: Path,
    pool: ShardPool,
    curation: Curation,
    labels: np.ndarray,
    chosen: dict[str, np.ndarray],
    data: Data,
) -> list[Path]:
    """Plot class counts before and after, and examples of what clusters kept and dropped."""
    drawn = []
    if (labels >= 0).any():
        n_classes = int(labels.max()) + 1
        counts = {"pool": labels} | {name: labels[ids] for name, ids in chosen.items()}
        counts = {
            name: np.bincount(values[values >= 0], minlength=n_classes) for name, values in counts.items()
        }
        names = data.class_names if data.class_names and len(data.class_names) == n_classes else None
        figure = figures.class_balance(counts, class_names=names, title="Class counts, before and after")
        drawn.append((out / "class_balance.png", figure))
    rows: list[ClusterRow] = []
    for choose in ("largest", "most cut", "smallest"):
        seen = [row.cluster for row in rows]
        rows += cluster_rows(curation.tree, curation.ids, choose=choose, n_clusters=4, exclude=seen)
    drawn.append(
        (out / "clusters.png", figures.contact_sheet(pool, rows, title="Clusters: kept and dropped"))
    )
    for path, figure in drawn:
        figure.savefig(path, dpi=150)
    return [path for path, _ in drawn]


if __name__ == "__main__":
    sys.exit(main())
