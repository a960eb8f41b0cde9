"""Make the pools; see the package's docstring."""

from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.machine import print_machine
from benchmarks.pools import drawings, photos, signs, sounds, texts
from curated_data.programs import described_parser

MAKERS = {
    maker.__name__: maker
    for maker in (
        photos.cifar, photos.cifar_small, photos.fashion, photos.handwriting, photos.patches,
        drawings.emoji, drawings.icons, drawings.cliparts, drawings.sprites, drawings.terrain,
        signs.glyphs, signs.documents, sounds.notes, sounds.speech, texts.glosses, texts.packages,
    )
}  # fmt: skip
CUT = (photos.fashion, photos.handwriting, photos.patches, signs.documents, sounds.notes)
MAKERS |= {f"{maker.__name__}_{seed}": partial(maker, seed=seed) for seed in (1, 2) for maker in CUT}
"""With the tail over other classes: `fashion_1` and so on."""


def main() -> None:
    """One after the other; what is there already stays."""
    parser = described_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=MAKERS, default=list(MAKERS))
    options = parser.parse_args()
    print_machine()
    for name in options.only:
        target = options.out / name / "pool.npz"
        if target.exists():
            continue
        pool, test = MAKERS[name](options.out / "packages")
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name("unfinished.npz")
        np.savez(
            unfinished, items=pool.items, labels=pool.labels, test_items=test.items, test_labels=test.labels
        )
        unfinished.rename(target)
        counts = np.bincount(pool.labels)
        print(f"{name}: {len(pool.labels)} in {len(counts)} classes of {counts.min()} to {counts.max()}, "
              f"{len(test.labels)} to test", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
