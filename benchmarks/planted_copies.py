"""Which threshold finds copies of real images, and what it takes for copies that are none.

    python -m benchmarks.planted_copies FOLDER [FOLDER …] [--embedder efficientnet_lite0:128] [--images 800]

Each folder holds images of one kind: `.png` or `.jpg`, all different to the pixel. Of each image seven copies
are planted, as a crawl finds an image again. At each threshold, near-duplicates are taken out of a pool of
originals and copies, and of the originals alone:

- recall: of the copies of one sort, the share at the threshold or nearer to their own original.
- precision: of the samples taken out of the whole pool, the share that is a copy of an image of the one that
  stayed for it: of the same original. Originals that differ in a few pixels only count as different.
- lost: the share of originals of which nothing stayed, neither the original nor one of its copies.
- lost alone: the share of originals taken out where no copies were planted; it is what a pool without any
  copies loses.
"""

import argparse
import io
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

from benchmarks.machine import print_machine
from curated_data.embedding import embed_pool, resolve_embedder
from curated_data.pool import ShardPool, ShardWriter
from curated_data.selection.near_duplicates import near_duplicates

THRESHOLDS = (0.9, 0.93, 0.95, 0.97, 0.98, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="of images of one kind each")
    parser.add_argument("--embedder", default="efficientnet_lite0:128")
    parser.add_argument("--images", type=int, default=800, help="of each folder (default: %(default)s)")
    parsed = parser.parse_args()
    print_machine()
    for folder in parsed.folders:
        images = [read(path) for path in chosen(folder, parsed.images)]
        sorts = ["original", *copies(images[0])]
        rows = embedded([copies(image) for image in images], images, parsed.embedder)
        show(folder.name, parsed.embedder, sorts, rows)


def chosen(folder: Path, n: int) -> list[Path]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    order = np.random.default_rng(0).permutation(len(paths))
    large = (paths[i] for i in order if min(Image.open(paths[i]).size) >= 12)  # for a caption and a border
    return list(islice(large, n))


def read(path: Path) -> Image.Image:
    """An image in RGB; where it is transparent, on grey."""
    image = Image.open(path).convert("RGBA")
    ground = Image.new("RGBA", image.size, (128, 128, 128, 255))
    ground.alpha_composite(image)
    return ground.convert("RGB")


def copies(image: Image.Image) -> dict[str, bytes]:
    """Files of an image as a crawl finds it again."""
    width, height = image.size
    border = max(round(0.05 * width), 1), max(round(0.05 * height), 1)
    inner = (*border, width - border[0], height - border[1])
    captioned = image.copy()
    draw = ImageDraw.Draw(captioned)
    draw.rectangle((0, height - max(height // 6, 5), width, height), fill=(0, 0, 0))
    draw.text(
        (2, height - max(height // 6, 5)), "a caption", fill=(255, 255, 255), font_size=max(height // 8, 4)
    )
    return {
        "jpeg 75": file(image, "JPEG", quality=75),
        "jpeg 40": file(image, "JPEG", quality=40),
        "half size": file(image.resize((max(width // 2, 4), max(height // 2, 4)), Image.Resampling.BICUBIC)),
        "crop 5 %": file(image.crop(inner)),
        "mirrored": file(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        "caption": file(captioned),
        "colour": file(ImageEnhance.Color(ImageEnhance.Brightness(image).enhance(1.1)).enhance(1.2)),
    }


def file(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def embedded(made: list[dict[str, bytes]], images: list[Image.Image], embedder: str) -> np.ndarray:
    """(sorts, images, d): of the originals, then of each sort of copies."""
    sorts = list(made[0])
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(f"{folder}/pool-%06d.tar") as writer:
            for number, image in enumerate(images):
                writer.write({"__key__": f"original{number:06d}", "png": file(image)})
            for sort_number, sort in enumerate(sorts):
                for number, files in enumerate(made):
                    member = "jpg" if sort.startswith("jpeg") else "png"
                    writer.write({"__key__": f"copy{sort_number}-{number:06d}", member: files[sort]})
        pool = ShardPool(f"{folder}/pool-*.tar", cache_dir=f"{folder}/cache")
        store = embed_pool(pool, resolve_embedder(embedder), Path(folder) / "cache", num_workers=0)
        return store.as_array().reshape(1 + len(sorts), len(images), -1)


def show(kind: str, embedder: str, sorts: list[str], rows: np.ndarray) -> None:
    n = rows.shape[1]
    unit = rows / np.maximum(np.linalg.norm(rows, axis=2, keepdims=True), 1e-12)
    to_original = np.einsum("snd,nd->sn", unit, unit[0])
    print(f"\n{kind}, {n} images, {embedder}")
    print("| threshold | " + " | ".join(sorts[1:]) + " | all | precision | lost | lost alone |")
    print("|---" * (len(sorts) + 4) + "|")
    for threshold in THRESHOLDS:
        found = near_duplicates(rows.reshape(-1, rows.shape[2]), threshold=threshold)
        alone = near_duplicates(rows[0], threshold=threshold)
        out = np.flatnonzero(found.near >= 0)
        figures = [
            *(to_original[1:] >= threshold).mean(axis=1),
            (to_original[1:] >= threshold).mean(),
            (out % n == found.near[out] % n).mean(),
            1 - found.keep.reshape(-1, n).any(axis=0).mean(),
            1 - alone.keep.mean(),
        ]
        print(f"| {threshold} | " + " | ".join(f"{100 * figure:.1f}" for figure in figures) + " |")


if __name__ == "__main__":
    main()
