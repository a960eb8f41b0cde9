"""What a layout gives: image files and what is known of each; and their way into shards."""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from curated_data.errors import PoolError
from curated_data.pool import ShardWriter
from curated_data.progress import progress

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


class Maps(Dataset[np.ndarray]):
    """Label or depth maps (H, W) of images, read when they are asked for."""

    def __init__(self, files: Sequence[Path], read: Callable[[Path], np.ndarray]) -> None:
        self.files, self.read = files, read

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.read(self.files[i])


@dataclass(frozen=True)
class Images:
    """One part of a dataset.

    Attributes:
        root: folder that the files are below.
        files: n image files, in an order that does not depend on the machine.
        labels: (n,) classes, or (n, m) several right ones, -1 for none; None where there are none.
        marks: (n, C) where images show several classes: 1 for each that is there, 0 not, -1 difficult.
        classes: names of the classes, where the layout has them.
        class_map: base classes that each class stands for, in a shifted set.
        boxes: (n, 4) left, top, right, bottom in pixels to cut out; None for whole images.
        border: pixels to cut off at each side.
        groups: by what they are of, a group's name for each image, "" for none.
        maps: of a dense task; n_classes of them; depth_range: valid depths in metres.
        ground_truth: for instance retrieval, each query's "easy", "hard" and "junk" places in the gallery.
    """

    root: Path
    files: Sequence[Path]
    labels: np.ndarray | None = None
    classes: list[str] | None = None
    class_map: list[list[int]] | None = None
    boxes: np.ndarray | None = None
    border: int = 0
    groups: dict[str, list[str]] = field(default_factory=dict)
    maps: Maps | None = None
    n_classes: int = 0
    marks: np.ndarray | None = None
    depth_range: tuple[float, float] | None = None
    ground_truth: list[dict[str, list[int]]] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def identity(self) -> dict[str, Any]:
        """What decides the shards' bytes: names and sizes of the files, and how they are cut."""
        names = [str(file.relative_to(self.root)) for file in self.files]
        sizes = np.array([file.stat().st_size for file in self.files], np.int64)
        labels = self.labels if self.labels is not None and self.labels.ndim == 1 else None
        return {"names": names, "sizes": sizes, "labels": labels, "boxes": self.boxes, "border": self.border}


def to_shards(images: Images, out: Path) -> None:
    """Write the images to shards `out/part-*.tar`, in order: as they are, or as PNG where they are cut.

    Raises:
        PoolError: a file that is to be cut cannot be read.
    """
    with ShardWriter(out / "part-%05d.tar") as writer, progress("import", len(images), "images") as advance:
        for i, file in enumerate(images.files):
            extension = file.suffix[1:].lower()
            if images.boxes is not None or images.border:
                extension = "png"
                content = _cut(file, images.boxes[i] if images.boxes is not None else None, images.border)
            else:
                content = file.read_bytes()
            sample: dict[str, Any] = {"__key__": f"{i:08d}", extension: content}
            if images.labels is not None and images.labels.ndim == 1 and images.labels[i] >= 0:
                sample["cls"] = int(images.labels[i])
            writer.write(sample)
            advance()


def train_or_test(part: str) -> str:
    """The part, if it is one of the two: of a misspelt one the other would be taken.

    Raises:
        PoolError: it is not.
    """
    if part not in ("train", "test"):
        raise PoolError(f"part {part!r}: expected 'train' or 'test'")
    return part


def need(path: Path, what: str) -> Path:
    """The path, if it is there.

    Raises:
        PoolError: it is not: `what` says what belongs there.
    """
    if not path.exists():
        raise PoolError(f"{path} is not there: put {what} there")
    return path


def image_files(folder: Path, what: str) -> list[Path]:
    """All images below a folder, sorted by their path.

    Raises:
        PoolError: no such folder, or no image below it.
    """
    need(folder, what)
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")
    )
    if not found:
        raise PoolError(f"{folder} holds no image: put {what} there")
    return found


def subfolders(folder: Path, what: str) -> list[Path]:
    """The class folders in a folder, sorted by name.

    Raises:
        PoolError: no such folder, or none in it.
    """
    need(folder, what)
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise PoolError(f"{folder} holds no folders: put {what} there")
    return found


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        PoolError: it is not there, or no text.
    """
    try:
        text = need(path, what).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PoolError(f"{path}: cannot be read ({error}): put {what} there") from error
    return [line for line in text.splitlines() if line.strip()]


def read_map(path: Path) -> np.ndarray:
    """A label or depth map (H, W) as its file holds it: palette images give indices.

    Raises:
        PoolError: unreadable, or with colour channels.
    """
    try:
        with Image.open(path) as image:
            values = np.array(image)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise PoolError(f"{path}: map cannot be read ({error})") from error
    if values.ndim != 2:
        raise PoolError(f"{path}: expected a map (H, W), got an image of shape {values.shape}")
    return values


def existing(files: Iterable[Path], what: str) -> list[Path]:
    """The files, if all are there.

    Raises:
        PoolError: some are not; names how many, and the first.
    """
    files = list(files)
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise PoolError(f"{missing[0]} is not there ({len(missing)} of {len(files)} files): put {what} there")
    return files


def _cut(file: Path, box: np.ndarray | None, border: int) -> bytes:
    try:
        with Image.open(file) as image:
            width, height = image.size
            left, top, right, bottom = (0, 0, width, height) if box is None else np.round(box).astype(int)
            area = (max(left, 0) + border, max(top, 0) + border,
                    min(right, width) - border, min(bottom, height) - border)  # fmt: skip
            if area[0] >= area[2] or area[1] >= area[3]:
                raise PoolError(f"{file}: nothing is left of {width} x {height} pixels cut to {area}")
            content = io.BytesIO()
            image.convert("RGB").crop(area).save(content, "PNG")
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise PoolError(f"{file}: cannot be read ({error})") from error
    return content.getvalue()
