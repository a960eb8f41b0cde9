"""Folders that files are written to, each file whole or not at all: local ones, and those of any store that
fsspec can write.
"""

import contextlib
import errno
import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import fsspec

from curated_data.cache.checksums import open_regular
from curated_data.cache.paths import is_url, spelled
from curated_data.cache.publishing import flush_entry
from curated_data.cache.removal import TEMPORARY, remove
from curated_data.errors import CacheError, CuratedDataError, PoolError, printable
from curated_data.pool.urls import unreachable

_ATTEMPTS = 3
_WHOLE = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "tos", "hf", "memory")
"""Stores in which an upload appears under its name when it is complete; in others it is renamed then."""

_READ_ONLY = ("http", "https", "data", "github", "gist", "git", "pipe")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FAILING = (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV)


class LocalFolder:
    """A folder on this machine. It is made when the first file is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def place(self, name: str) -> Path:
        """The path of a file."""
        return self.path / name

    def names(self) -> list[str]:
        """The names in it, sorted; none if it does not exist."""
        with writing(self.path), contextlib.suppress(FileNotFoundError):
            return sorted(os.listdir(self.path))
        return []

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if it is not there, or is not a file."""
        with contextlib.suppress(OSError), open_regular(self.path / name) as file:
            return file.read(64 << 20)
        return None

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """A new file to write, which is flushed to disk and gets its name when the block ends."""
        path = self.path / name
        temporary = self.path / f"{TEMPORARY}{uuid.uuid4().hex[:12]}-{name}"
        with writing(path):
            self.path.mkdir(parents=True, exist_ok=True)
        with _scratch(temporary, path) as file:
            yield file
            with writing(path):
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
                flush_entry(self.path)

    def remove(self, name: str) -> None:
        """Remove a file, or a link."""
        path = self.path / name
        if path.is_dir() and not path.is_symlink():
            raise PoolError(f"{path}: is a folder, expected a file; move it away")
        with writing(path):
            remove(path, below=self.path)

    def check(self) -> None:
        """Check, without creating anything, that files can be written.

        Raises:
            CacheError: they cannot.
        """
        above = [self.path, *self.path.absolute().parents]
        nearest = next(place for place in above if os.path.lexists(place))
        if not nearest.is_dir():
            raise CacheError(f"{nearest}: is not a folder, so nothing can be written in it; choose another")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise CacheError(f"{nearest}: cannot be written (permission denied); give another place")


class RemoteFolder:
    """A folder of a store. A file is collected on local disk, and uploaded when it is complete."""

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = url.rstrip("/")
        protocol = url.partition("://")[0]
        if "::" in url or protocol in _READ_ONLY or url.startswith("pipe:"):
            raise CacheError(
                f"{url!r}: nothing can be written there; give a local folder, or the URL of one in a store "
                "such as S3"
            )
        self._is_whole = protocol in _WHOLE
        try:
            self._store, self._path = fsspec.core.url_to_fs(self.url, **dict(storage_options or {}))
        except (ImportError, ValueError, TypeError) as error:
            raise unreachable(url, error) from error

    def __str__(self) -> str:
        return self.url

    def place(self, name: str) -> str:
        """The URL of a file."""
        return f"{self.url}/{name}"

    def names(self) -> list[str]:
        """The names in it, sorted; none if it does not exist."""
        with self._reaching(self.url), contextlib.suppress(FileNotFoundError):
            self._store.invalidate_cache()
            found = self._store.ls(self._path, detail=False)
            return sorted(name.rstrip("/").rpartition("/")[2] for name in found)
        return []

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if it is not there."""
        with self._reaching(self.place(name)), contextlib.suppress(FileNotFoundError):
            self._store.invalidate_cache()
            content: bytes = self._store.cat_file(f"{self._path}/{name}")
            return content
        return None

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """A new file to write, which is in the store, under its name, when the block has ended."""
        temporary = Path(tempfile.gettempdir(), f"curated-data-{uuid.uuid4().hex}")
        with _scratch(temporary, temporary) as file:
            yield file
            with writing(temporary):
                file.flush()
            self._upload(str(temporary), file.tell(), name)

    def remove(self, name: str) -> None:
        """Remove a file."""
        with self._reaching(self.place(name)), contextlib.suppress(FileNotFoundError):
            self._store.rm_file(f"{self._path}/{name}")

    def check(self) -> None:
        """Check that files can be written, by writing an empty one and removing it.

        Raises:
            CacheError: they cannot.
        """
        probe = f"{TEMPORARY}{uuid.uuid4().hex[:12]}-probe"
        with self.create(probe) as file:
            file.write(b"\n")
        self.remove(probe)

    def _upload(self, local: str, size: int, name: str) -> None:
        target = f"{self._path}/{name}"
        first = target if self._is_whole else f"{self._path}/{TEMPORARY}{uuid.uuid4().hex[:12]}-{name}"
        for attempt in range(_ATTEMPTS):
            with self._reaching(self.place(name)):
                try:
                    if not self._is_whole:
                        self._store.makedirs(self._path, exist_ok=True)
                    self._store.put_file(local, first)
                    self._store.invalidate_cache()
                    stored = self._store.info(first).get("size")
                    if stored != size:
                        raise OSError(f"the store has {stored} of its {size} bytes")
                    if first != target:
                        self._store.mv(first, target)
                    return
                except (PermissionError, FileNotFoundError, NotImplementedError):
                    raise
                except Exception:  # each store has its own passing errors
                    if attempt + 1 == _ATTEMPTS:
                        raise
            time.sleep(0.5 * 2**attempt)

    @contextlib.contextmanager
    def _reaching(self, url: str) -> Iterator[None]:
        try:
            yield
        except CuratedDataError:
            raise
        except Exception as error:  # each store has its own
            raise CacheError(
                f"{url}: cannot be written ({printable(error)}); check the bucket or host, its rights, and "
                "storage_options"
            ) from error


def open_out(
    folder: str | Path, storage_options: Mapping[str, Any] | None = None
) -> LocalFolder | RemoteFolder:
    """The folder that a path or URL names; nothing is written yet.

    Raises:
        PoolError, CacheError: its protocol is unknown, needs a package that is not installed, or cannot be
            written.
    """
    text = spelled(folder)
    return RemoteFolder(text, storage_options) if is_url(text) else LocalFolder(Path(text))


def open_file(
    place: str | Path, storage_options: Mapping[str, Any] | None = None
) -> tuple[LocalFolder | RemoteFolder, str]:
    """The folder of a file to write, and its name; nothing is written yet.

    Raises:
        PoolError, CacheError: as for `open_out`; or there is a folder of that name.
    """
    text = spelled(place)
    folder, _, name = text.rpartition("/")
    if not name:
        raise CacheError(f"{text!r}: is a folder; give the name of a file")
    out = open_out(folder or ("/" if text.startswith("/") else "."), storage_options)
    if isinstance(out, LocalFolder) and out.place(name).is_dir():
        raise CacheError(f"{text}: is a folder; give the name of a file in it")
    return out, name


def write_file(
    place: str | Path, content: bytes, storage_options: Mapping[str, Any] | None = None
) -> Path | str:
    """Write a file, to this machine or a store, whole or not at all; returns its path or URL.

    Raises:
        PoolError, CacheError: it cannot be written.
    """
    out, name = open_file(place, storage_options)
    with out.create(name) as file, writing(out.place(name)):
        file.write(content)
    return out.place(name)


@contextlib.contextmanager
def writing(place: Path | str) -> Iterator[None]:
    """Turn the system's errors about a file that is being written into one that names it."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            hint = "free some space or quota, or give another place"
            raise CacheError(f"{place}: no space left ({error}); {hint}, and run it again") from error
        if error.errno in _FAILING:
            raise CacheError(
                f"{place}: its disk or network folder fails ({error}); check it, or give another place"
            ) from error
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise CacheError(f"{place}: too many open files ({error}); raise `ulimit -n`") from error
        raise CacheError(f"{place}: cannot be written ({error}); give another place") from error


@contextlib.contextmanager
def _scratch(temporary: Path, path: Path) -> Iterator[IO[bytes]]:
    """A new file, which is gone when the block ends unless it has been renamed."""
    with writing(path):
        file = open(temporary, "xb")  # noqa: SIM115 (its closing may fail, too)
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # of what is dropped
            file.close()
        if os.path.lexists(temporary):
            remove(temporary, below=temporary.parent)
