"""Finding the images in a folder, with a count of everything that is left out."""

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from curated_data.errors import PoolError

_JPEG = ("jfif", "jif", "jpe")
_NEEDS_DECODER = ("avif", "heic", "heif")
_RESOURCES = "__MACOSX"


class ImageFile(NamedTuple):
    """An image: its path, the last part of its key, and the extension of its member."""

    path: Path
    stem: str
    extension: str


class ImageFolders:
    """The images below a folder, in the order of their names.

    Links to files are followed. A folder is visited once, by its own path if that lies below the root, so a
    cycle of links ends and no image is found twice. What is not a regular file is never opened.

    Args:
        root: where all searches begin.
        extensions: of images.

    Attributes:
        left_out: how many files were left out, by extension or reason.
    """

    def __init__(self, root: Path, extensions: Sequence[str]) -> None:
        self.root = root
        self.left_out: Counter[str] = Counter()
        self._real_root = root.resolve()
        self._seen: set[tuple[int, int]] = set()
        self._members = {extension: extension for extension in extensions}
        if {"jpg", "jpeg"} & set(extensions):
            self._members |= dict.fromkeys(_JPEG, "jpg")
        for extension in _NEEDS_DECODER:
            if not _has_decoder(extension):
                self._members.pop(extension, None)
            elif extension not in extensions and "image" in extensions:
                self._members[extension] = "image"

    def top(self) -> tuple[list[str], list[ImageFile]]:
        """The root's own sub-folders and images."""
        return self._listed(self.root)

    def below(self, folder: Path) -> Iterator[list[ImageFile]]:
        """The images of a folder, then those of each folder below it."""
        stack = [folder]
        while stack:
            place = stack.pop()
            if not self._enters(place):
                continue
            folders, images = self._listed(place)
            stack.extend(place / name for name in reversed(folders))
            yield images

    def _enters(self, folder: Path) -> bool:
        try:
            status = os.stat(folder)
            inside = folder.is_symlink() and self._is_found_below(folder.resolve())
        except OSError as error:
            raise unreadable(folder, error) from error
        identity = status.st_dev, status.st_ino
        if inside or identity in self._seen:
            self.left_out["links to folders that are visited anyway"] += 1
            return False
        self._seen.add(identity)
        return True

    def _is_found_below(self, real: Path) -> bool:
        if real == self._real_root:
            return True
        parts = real.relative_to(self._real_root).parts if self._real_root in real.parents else (".",)
        return not any(part.startswith(".") or part == _RESOURCES for part in parts)

    def _listed(self, folder: Path) -> tuple[list[str], list[ImageFile]]:
        """The names of the sub-folders, and the images; all else is counted."""
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise unreadable(error.filename or folder, error) from error
        folders, names = [], []
        for entry in found:
            kind = self._kind(entry)
            if kind == "folder":
                folders.append(entry.name)
            elif kind == "image":
                names.append(entry.name)
        stems = Counter(name.rpartition(".")[0] for name in names)
        images = []
        for name in names:
            stem, _, extension = name.rpartition(".")
            if stems[stem] > 1:
                stem = name
            if "." in stem or "%2E" in stem or "%25" in stem:  # so that no two stems become equal
                stem = stem.replace("%", "%25").replace(".", "%2E")
            images.append(ImageFile(folder / name, stem, self._members[extension.lower()]))
        return folders, images

    def _kind(self, entry: "os.DirEntry[str]") -> str:
        """ "folder", "image", or "" for what is left out, which is counted."""
        name = entry.name
        extension = name.rpartition(".")[2].lower() if "." in name else ""
        try:
            mode = os.stat(entry.path).st_mode if entry.is_symlink() else entry.stat().st_mode
        except OSError as error:
            if extension in self._members and not name.startswith("."):
                raise unreadable(entry.path, error) from error
            mode = 0
        if name == _RESOURCES and stat.S_ISDIR(mode):
            self.left_out[f"in {_RESOURCES}"] += sum(len(files) for _, _, files in os.walk(entry.path))
        elif name.startswith("._"):
            self.left_out["AppleDouble (._*)"] += 1
        elif name.startswith("."):
            self.left_out["hidden (.*)"] += 1
        elif stat.S_ISDIR(mode):
            return "folder"
        elif not stat.S_ISREG(mode):
            self.left_out["no regular file" if mode else "links to nothing"] += 1
        elif extension in self._members:
            return "image"
        elif extension in _NEEDS_DECODER:
            self.left_out[f".{extension} (unsupported: Pillow has no decoder for it)"] += 1
        else:
            self.left_out[f".{extension}" if extension else "without an extension"] += 1
        return ""


def read_image(path: Path) -> bytes:
    """The bytes of a regular file; a pipe or a device is never waited for."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise PoolError(f"{path}: is not a regular file any more; move it away")
            return file.read()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path | str, error: OSError) -> PoolError:
    """The error for a file or folder that cannot be read."""
    return PoolError(f"{path}: cannot be read ({error.strerror}); make it readable, or move it away")


def _has_decoder(extension: str) -> bool:
    Image.init()
    return Image.registered_extensions().get(f".{extension}") in Image.OPEN
