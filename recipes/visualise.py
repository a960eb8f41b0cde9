r"""Map a pool in 2-D (t-SimCNE on embeddings): a figure, the coordinates as CSV, and the report page.

    uv run recipes/visualise.py 'recipes/data/fashion-lt50/fashion-lt50-train-{00..03}.tar' --target-size 800
    uv run recipes/visualise.py 'pool-{000..999}.tar' --embedder timm:vit_small_patch14_dinov2.lvd142m \
        --target-size 100000 --cache-dir cache --out runs/map

The map is trained on the embeddings; with `--module tsimcne.ckpt` it is that of a trained t-SimCNE module.
Where the pool has labels, `quality.json` tells what the map keeps of the classes.

Time: about a minute for 5,000 images on 2 CPU cores, once they are embedded. Any number of samples is mapped,
but at most 20,000 are used to train the map.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from curated_data import ShardPool, curate
from curated_data.cache.artifacts import open_cache
from curated_data.cache.paths import local_path
from curated_data.embedding import embed_pool, resolve_embedder
from curated_data.embedding.embedders import ModuleEmbedder
from curated_data.errors import ConfigError, EmbedderError
from curated_data.programs import described_parser, labels_of, report_errors
from curated_data.report.examples import thumbnails
from curated_data.report.page import class_names_beside, write_report
from lightning_modules import TSimCNE
from lightning_modules.evaluation.map_quality import map_quality
from lightning_modules.maps import draw_map, embed_2d, save_coordinates


def main(arguments: list[str] | None = None) -> int:
    """Curate (or read it from the cache), map, plot; returns the exit status."""
    parser = described_parser(__doc__)
    parser.add_argument("pool", nargs="+", help="shards: 'pool-{000..099}.tar', globs, paths or URLs")
    parser.add_argument(
        "--embedder", default="efficientnet_lite0:64", help="network that embeds (default: %(default)s)"
    )
    parser.add_argument("--target-size", type=int, required=True, help="samples to select")
    parser.add_argument("--epochs", type=int, default=40, help="of the map's training (default: %(default)s)")
    parser.add_argument("--module", help="checkpoint of a t-SimCNE module, whose map is drawn instead")
    parser.add_argument(
        "--cache-dir", default="runs/cache", help="for the results of all stages (default: %(default)s)"
    )
    parser.add_argument("--out", default="runs/map", help="folder for the results (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    options = parser.parse_args(arguments)
    return report_errors("visualise", lambda: visualise(options))


def visualise(options: argparse.Namespace) -> None:
    """Write the map as a figure and a table, and a report with it."""
    if options.epochs < 1:
        raise ConfigError(f"--epochs {options.epochs}: the map needs one pass or more")
    out = local_path(options.out, "--out")
    out.mkdir(parents=True, exist_ok=True)
    pool = ShardPool(options.pool, cache_dir=options.cache_dir)
    settings = {"target_size": options.target_size, "seed": options.seed}
    curation = curate(pool, settings, embedder=options.embedder, cache_dir=options.cache_dir)
    ids = np.flatnonzero(curation.embeddings.valid)
    coordinates = np.full((len(pool), 2), np.nan, np.float32)
    if options.module:
        store = embed_pool(pool, module_map(options.module), open_cache(options.cache_dir), dtype="float32")
        ids = ids[store.valid[ids]]
        coordinates[ids] = store.rows(ids)
    else:
        coordinates[ids] = embed_2d(curation.embeddings.rows(ids), epochs=options.epochs, seed=options.seed)
    labels = labels_of(pool)
    has_labels = bool((labels >= 0).any())
    shown = labels if has_labels else curation.tree.assignment(curation.tree.n_levels)

    figure = draw_map(
        coordinates[ids],
        labels=shown[ids],
        names=class_names_beside(pool) if has_labels else None,
        selected=np.isin(ids, curation.ids),
        thumbnail=lambda row: thumbnails(pool, ids[[row]], 32)[0],
        title=f"{len(ids):,} images by {'class' if has_labels else 'cluster'}; the selected are drawn larger",
    )
    figure.savefig(out / "map.png", dpi=150)
    save_coordinates(out / "map.csv", coordinates[ids], ids=ids, labels=shown[ids])
    if has_labels:
        judge(coordinates[ids], labels[ids], out / "quality.json", options.seed)
    write_report(curation, pool, out / "report.html", coordinates=coordinates)
    print(f"{out / 'map.png'}\n{out / 'map.csv'}\n{out / 'report.html'}")


def module_map(path: str) -> ModuleEmbedder:
    """The coordinates of a t-SimCNE checkpoint as an embedder of two dimensions."""
    embedder = resolve_embedder(f"checkpoint:{path}")
    assert isinstance(embedder, ModuleEmbedder)
    module = getattr(embedder.network, "module", None)
    if not isinstance(module, TSimCNE):
        raise EmbedderError(f"{path}: holds a {type(module).__name__}, and only TSimCNE has a map of its own")
    return ModuleEmbedder(_Map(module), embedder.preprocess, dimension=2, name=f"map of {path}")


class _Map(nn.Module):
    _entries = ("coordinates",)  # of what it wraps, for the fingerprint

    def __init__(self, module: TSimCNE) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        return self.module.coordinates(images)


def judge(coordinates: np.ndarray, labels: np.ndarray, path: Path, seed: int) -> None:
    """Write and print what the map keeps of the classes that have points enough."""
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    kept = np.isin(labels, classes[counts >= 5])
    if (counts >= 5).sum() < 2 or kept.sum() < 20:
        print("too few labelled points to judge the map by")
        return
    quality = map_quality(coordinates[kept], labels[kept], seed=seed)
    quality.to_json(path)
    print(quality.table())


if __name__ == "__main__":
    sys.exit(main())
