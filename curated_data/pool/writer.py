"""Writing pools: shards with reproducible bytes, each published when it is complete."""

import io
import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from curated_data.cache import atomic_path
from curated_data.errors import PoolError
from curated_data.locks import check_writable
from curated_data.pool.decode import IMAGE_EXTENSIONS, as_extensions
from curated_data.pool.index import split_name
from curated_data.progress import progress

log = logging.getLogger(__name__)

_NUMBER = re.compile(r"%0?(\d*)d")


class ShardWriter:
    """Writes samples to numbered tar shards, which webdataset reads back unchanged.

    Equal samples give equal bytes: headers contain no times or owners. A shard gets its name when it is
    complete. A killed run leaves a marker beside its shards, and the next writer of the same pattern starts
    over.

    Args:
        pattern: a file name with one number (`out/train-%06d.tar`), or a folder, for `shard-%06d.tar` in it.
        max_samples: per shard.
        max_bytes: a shard is closed before it exceeds this size, unless a single sample does.
        overwrite: replace shards of the same pattern from a finished run.

    Raises:
        PoolError: shards of that pattern exist, or webdataset would not read a sample back unchanged.

    Example:
        >>> with ShardWriter("out/train-%06d.tar") as writer:  # doctest: +SKIP
        ...     writer.write({"__key__": "cats/0001", "jpg": data, "cls": 3, "json": {"source": "web"}})
    """

    def __init__(
        self,
        pattern: str | Path,
        *,
        max_samples: int = 10_000,
        max_bytes: int = 1 << 30,
        overwrite: bool = False,
    ) -> None:
        self.folder, self.name = check_out(
            pattern, max_samples=max_samples, max_bytes=max_bytes, overwrite=overwrite
        )
        self.max_samples, self.max_bytes = max_samples, max_bytes
        self.shards: list[Path] = []
        self.n_samples = 0
        self._marker = _marker(self.folder, self.name)
        self._shard: Any = None
        self._file: IO[bytes] | None = None
        self._samples = self._bytes = 0
        self._last_key: str | None = None
        existing = existing_shards(self.folder, self.name)
        with atomic_path(self._marker) as temporary:
            temporary.touch()
        for path in existing:
            path.unlink()

    def write(self, sample: Mapping[str, Any]) -> None:
        """Append a sample.

        Args:
            sample: `__key__`, and members by extension: bytes are written as they are, str as UTF-8, int as
                digits, dicts and lists as JSON, numpy arrays as `.npy`. Other fields that start with `__` are
                ignored.
        """
        key = sample.get("__key__")
        if not isinstance(key, str):
            raise PoolError(f"a sample needs a '__key__' of type str, not {key!r}")
        members = [
            (extension, encode_member(content, f"sample {key!r}, member {extension!r}"))
            for extension, content in sample.items()
            if not extension.startswith("__")
        ]
        if not members:
            raise PoolError(f"sample {key!r} has no member to write")
        if key == self._last_key and self._samples:
            raise PoolError(
                f"two samples in a row have the key {key!r}: they would be read as one; rename one"
            )
        headers = [_header(key, extension, len(content)) for extension, content in members]
        length = sum(len(header) + _padded(len(content)) for header, (_, content) in zip(headers, members))
        if self._samples and (self._samples >= self.max_samples or self._bytes + length > self.max_bytes):
            self._publish()
        file = self._open() if self._file is None else self._file
        for header, (_, content) in zip(headers, members):
            file.write(header)
            file.write(content)
            file.write(bytes(_padded(len(content)) - len(content)))
        self._samples += 1
        self._bytes += length
        self.n_samples += 1
        self._last_key = key

    def close(self) -> None:
        """Publish the last shard and mark the run as finished. Without samples there are no shards."""
        if self._file is not None:
            self._publish()
        self._marker.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:  # keep complete shards and the marker, drop the current shard
            self._file.close()
            self._file = None
            self._shard.__exit__(kind, error, trace)

    def _open(self) -> IO[bytes]:
        path = self.folder / (self.name % len(self.shards))
        self._shard = atomic_path(path)
        self._file = open(self._shard.__enter__(), "wb")  # noqa: SIM115 (open across calls)
        self.shards.append(path)
        return self._file

    def _publish(self) -> None:
        assert self._file is not None, "called where samples have been written"
        end = 2 * tarfile.BLOCKSIZE  # two empty blocks, then up to a full record
        self._file.write(bytes(end + -(self._bytes + end) % tarfile.RECORDSIZE))
        self._file.close()
        self._file = None
        self._shard.__exit__(None, None, None)
        self._samples = self._bytes = 0
        self._last_key = None


def check_out(
    pattern: str | Path, *, max_samples: int = 10_000, max_bytes: int = 1 << 30, overwrite: bool = False
) -> tuple[Path, str]:
    """Check where shards are to go, without writing anything; the arguments are those of `ShardWriter`.

    Returns:
        The folder, and the pattern of the shards' names.

    Raises:
        PoolError: the pattern or a limit cannot be used, or there are shards of that pattern.
        CacheError: nothing can be written there.
    """
    pattern = os.fspath(pattern)
    if not pattern:
        raise PoolError("the place for the shards is empty; give a folder, '.' for this one")
    if not _NUMBER.search(pattern):
        if pattern.endswith(".tar"):
            raise PoolError(f"{pattern!r}: a pattern of shards needs a number, as 'shard-%06d.tar'")
        pattern = os.path.join(pattern, "shard-%06d.tar")
    folder, name = Path(pattern).parent, os.path.basename(pattern)
    if len(_NUMBER.findall(name)) != 1 or _NUMBER.search(str(folder)) or name.count("%") != 1:
        raise PoolError(
            f"{pattern!r}: a pattern of shards has one number, in the file's name, as 'shard-%06d.tar'"
        )
    if max_samples < 1 or max_bytes < 1:
        raise PoolError(f"a shard must hold something: max_samples={max_samples}, max_bytes={max_bytes}")
    check_writable(folder, is_folder=True)
    existing = existing_shards(folder, name)
    if existing and not overwrite and not _marker(folder, name).exists():
        raise PoolError(
            f"{existing[0]}: {len(existing)} shard(s) of {name!r} are there already; give another name or "
            "folder, remove them, or pass overwrite=True (--overwrite)"
        )
    return folder, name


def _marker(folder: Path, name: str) -> Path:
    return folder / f".{name.replace('%', '')}.unfinished"


def existing_shards(folder: Path, name: str) -> list[Path]:
    """The shards of a pattern, as from `check_out`, and temporary files of a killed run."""
    if not folder.is_dir():
        return []
    before, _, after = _NUMBER.split(name)
    number = re.compile(r"(\.tmp-\w{12}-)?" + re.escape(before) + r"\d+" + re.escape(after))
    return sorted(path for path in folder.iterdir() if number.fullmatch(path.name))


def import_folder(
    folder: str | Path,
    out: str | Path,
    *,
    max_samples: int = 10_000,
    max_bytes: int = 1 << 30,
    image_extensions: str | Sequence[str] = IMAGE_EXTENSIONS,
    overwrite: bool = False,
) -> list[Path]:
    """Turn a folder of images into shards, with labels if there is one sub-folder per class.

    An image's key is its path below `folder` without the extension. Dots in the name are written as `%2E`,
    and if two images differ only in their extension it stays in the key, so that webdataset reads the same
    keys back. `.cls` is the number of the class among the sorted class names, and `.json` has `class_name`;
    the class names are listed in `classes.json` beside the shards.

    Args:
        folder: `folder/<class>/**/<image>`, or images directly in it.
        out: a folder for the shards, or a pattern as for `ShardWriter`.
        max_samples, max_bytes: per shard.
        image_extensions: which files are images; others are counted and skipped. Dot-files are ignored.
        overwrite: replace the shards of an earlier run.

    Returns:
        The shards.

    Raises:
        PoolError: no such folder, no images in it, images both in class folders and beside them, or a folder
            or an image that cannot be read.
    """
    folder = Path(folder)
    image_extensions = as_extensions(image_extensions, "image_extensions")
    if not folder.is_dir():
        raise PoolError(f"{str(folder)!r}: is no folder to import from")
    try:
        entries = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    except OSError as error:
        raise _unreadable(folder, error) from error
    classes = [name for name in entries if (folder / name).is_dir()]
    beside = [name for name in entries if (folder / name).is_file() and _extension(name) in image_extensions]
    if beside and classes:
        raise PoolError(
            f"{folder / beside[0]}: lies beside the class folders ({classes[0]!r}, ...), so it has no "
            "class; move it into one, or import a folder without class folders"
        )
    n_other = 0
    with ShardWriter(out, max_samples=max_samples, max_bytes=max_bytes, overwrite=overwrite) as writer:
        with progress("import", None, "images") as advance:
            for label, name in enumerate(classes) if classes else [(None, "")]:
                for files, others in _walk(folder / name, image_extensions):
                    n_other += others
                    for path, stem, extension in files:
                        sample: dict[str, Any] = {
                            "__key__": os.path.join(os.path.relpath(path.parent, folder), stem).removeprefix(
                                "./"
                            ),
                            extension: _read(path),
                        }
                        if label is not None:
                            sample |= {"cls": label, "json": {"class_name": name}}
                        writer.write(sample)
                        advance()
        if not writer.n_samples:
            raise PoolError(
                f"{str(folder)!r}: has no image ({', '.join(image_extensions[:5])}, ...) to import"
            )
        if classes:
            with atomic_path(writer.folder / "classes.json") as temporary:
                temporary.write_text(
                    json.dumps(classes, ensure_ascii=False, indent=0) + "\n", "utf-8", "surrogateescape"
                )
    log.info(
        "imported %d images of %d classes to %d shards", writer.n_samples, len(classes), len(writer.shards)
    )
    if n_other:
        log.warning("%s: left out %d files that are not images", folder, n_other)
    return writer.shards


def encode_member(content: Any, what: str = "member") -> bytes:
    """The bytes of a member with this content, see `ShardWriter.write`."""
    if isinstance(content, bytes | bytearray | memoryview):
        return bytes(content)
    if isinstance(content, str):
        return content.encode("utf-8", "surrogateescape")
    if isinstance(content, int | np.integer) and not isinstance(content, bool):
        return str(int(content)).encode("ascii")
    if isinstance(content, Mapping | list | tuple):
        return json.dumps(content, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogateescape")
    if isinstance(content, np.ndarray) and not content.dtype.hasobject:
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, content, allow_pickle=False)
        return buffer.getvalue()
    raise PoolError(
        f"{what}: cannot write a {type(content).__name__}; give bytes, str, int, dict, list or a numpy array"
    )


def _header(key: str, extension: str, size: int) -> bytes:
    """A member's tar header, after checking that its name will be read back as this key and extension."""
    name = f"{key}.{extension}"
    try:
        read_back = split_name(name.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError as error:
        raise PoolError(f"member name {name!r} cannot be written in UTF-8 ({error.reason})") from error
    if read_back != (key.encode("utf-8", "surrogateescape"), extension) or "\0" in name:
        raise PoolError(
            f"member name {name!r} would not be read back as key {key!r} and extension {extension!r}: a key "
            "has no dot in its last part and does not start with '__', an extension has no '/' and no "
            "capital, and is not reserved"
        )
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _padded(length: int) -> int:
    return -(-length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _walk(
    folder: Path, image_extensions: tuple[str, ...]
) -> Iterator[tuple[list[tuple[Path, str, str]], int]]:
    """For each folder, in sorted order: images as (path, last part of key, extension); number of others."""

    def refuse(error: OSError) -> None:  # by itself, os.walk leaves out what it cannot read
        raise _unreadable(error.filename, error) from error

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = sorted(
            name for name in names if not name.startswith(".") and _extension(name) in image_extensions
        )
        stems = Counter(name.rpartition(".")[0] for name in images)
        found = []
        for name in images:
            stem, _, extension = name.rpartition(".")
            if stems[stem] > 1:
                stem = name
            if "." in stem or "%2E" in stem or "%25" in stem:  # so that no two stems become equal
                stem = stem.replace("%", "%25").replace(".", "%2E")
            found.append((Path(place, name), stem, extension.lower()))
        yield found, sum(not name.startswith(".") for name in names) - len(images)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:  # which would be taken for one of the shard being written
        raise _unreadable(path, error) from error


def _unreadable(path: Path | str, error: OSError) -> PoolError:
    return PoolError(f"{path}: cannot be read ({error.strerror}); make it readable, or move it away")


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""
