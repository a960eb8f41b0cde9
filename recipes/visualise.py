r"""Map a pool in 2-D (t-SimCNE on embeddings): a figure, the coordinates as CSV, and the report page.

    uv run recipes/visualise.py 'recipes/data/fashion-lt50/fashion-lt50-train-{00..03}.tar' --target-size 800
    uv run recipes/visualise.py 'pool-{000..999}.tar' --embedder timm:vit_small_patch14_dinov2.lvd142m \
        --target-size 100000 --cache-dir cache --out runs/map

Time: about a minute for 5,000 images on 2 CPU cores, once they are embedded. Any number of samples is mapped,
but at most 20,000 are used to train the map.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from curated_data import ShardPool, curate
from curated_data.errors import ConfigError
from curated_data.report.examples import thumbnails
from curated_data.report.page import class_names_beside, write_report
from lightning_modules.maps import draw_map, embed_2d, save_coordinates
from recipes.curate import report_errors


def main() -> int:
    """Curate (or read it from the cache), map, plot; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("pool", nargs="+", help="shards: 'pool-{000..099}.tar', globs, paths or URLs")
    parser.add_argument(
        "--embedder", default="efficientnet_lite0:64", help="network that embeds (default: %(default)s)"
    )
    parser.add_argument("--target-size", type=int, required=True, help="samples to select")
    parser.add_argument("--epochs", type=int, default=40, help="of the map's training (default: %(default)s)")
    parser.add_argument(
        "--cache-dir", default="runs/cache", help="for the results of all stages (default: %(default)s)"
    )
    parser.add_argument("--out", default="runs/map", help="folder for the results (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    options = parser.parse_args()
    return report_errors("visualise", lambda: visualise(options))


def visualise(options: argparse.Namespace) -> None:
    """Write the map as a figure and a table, and a report with it."""
    if options.epochs < 1:
        raise ConfigError(f"--epochs {options.epochs}: the map needs one pass or more")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    pool = ShardPool(options.pool, cache_dir=options.cache_dir)
    settings = {"target_size": options.target_size, "seed": options.seed}
    curation = curate(pool, settings, embedder=options.embedder, cache_dir=options.cache_dir)
    ids = np.flatnonzero(curation.embeddings.valid)
    coordinates = np.full((len(pool), 2), np.nan, np.float32)
    coordinates[ids] = embed_2d(curation.embeddings.rows(ids), epochs=options.epochs, seed=options.seed)
    labels = pool.labels(np.arange(len(pool)))
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
    write_report(curation, pool, out / "report.html", coordinates=coordinates)
    print(f"{out / 'map.png'}\n{out / 'map.csv'}\n{out / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
