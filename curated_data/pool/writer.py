"""Writing pools: shards with reproducible bytes, each published when it is complete."""

import contextlib
import hashlib
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self, cast

from curated_data.cache.artifacts import fingerprint
from curated_data.cache.paths import local_path, spelled
from curated_data.cache.removal import TEMPORARY
from curated_data.errors import PoolError
from curated_data.pool.claim import Claim, Progress, check_free, names_in
from curated_data.pool.decode import IMAGE_EXTENSIONS, as_extensions
from curated_data.pool.encode import encode_member
from curated_data.pool.folders import ImageFolders, read_image
from curated_data.pool.grouping import split_name
from curated_data.pool.out import LocalFolder, RemoteFolder, open_out, writing
from curated_data.progress import progress

log = logging.getLogger(__name__)

BESIDE = (
    "README.md", "classes.json", "clusters.npy", "croissant.json", "curation.parquet", "curation.png",
    "ids.npy", "manifest.json",
)  # fmt: skip
"""What a run may write beside its shards."""

_UNFINISHED = ".unfinished"
_NUMBER = re.compile(r"%0?(\d*)d")


class ShardWriter:
    """Writes samples to numbered tar shards, which webdataset reads back unchanged.

    Equal samples give equal bytes: headers contain no times or owners. A shard gets its name when it is
    complete. A killed run leaves a marker beside its shards, and the next writer of the same pattern removes
    what that run wrote and starts over, unless `resume` says that it would write the same. Two writers of a
    pattern at once are an error.

    Args:
        pattern: a file name with one number (`out/train-%06d.tar`), or a folder, for `shard-%06d.tar` in it;
            on this machine, or the URL of a store that fsspec can write, such as `s3://bucket/folder`.
        max_samples: per shard.
        max_bytes: a shard is closed before it exceeds this size, unless a single sample does.
        overwrite: replace shards of the same pattern from a finished run.
        storage_options: for fsspec, to write to a store.
        digest: also take the SHA-256 of each shard.
        resume: a fingerprint of the samples and their order: shards that a killed run published under the
            same are kept, and `place` says where they end; not with `overwrite` or `digest`.

    Attributes:
        shards: those written, as paths, or as URLs in a store.
        digests: the SHA-256 of each published shard by its name, if asked for.
        n_samples: how many were written.
        place: how far the source of the samples was read, as the caller counts, who sets it after each.

    Raises:
        PoolError: shards of that pattern exist, another writer is at work on them, or webdataset would not
            read a sample back unchanged.
        CacheError: they cannot be written.

    Examples:
        >>> from curated_data import ShardPool, ShardWriter
        >>> with ShardWriter("written-%06d.tar") as writer:
        ...     writer.write({"__key__": "cats/0001", "txt": "a cat", "cls": 3, "json": {"source": "web"}})
        >>> ShardPool("written-000000.tar").read([0], ["txt"])[0]["txt"]
        b'a cat'
    """

    def __init__(
        self,
        pattern: str | Path,
        *,
        max_samples: int = 10_000,
        max_bytes: int = 1 << 30,
        overwrite: bool = False,
        storage_options: Mapping[str, Any] | None = None,
        digest: bool = False,
        resume: str | None = None,
    ) -> None:
        self.out, self.name = check_out(
            pattern,
            max_samples=max_samples,
            max_bytes=max_bytes,
            overwrite=overwrite,
            storage_options=storage_options,
        )
        self.max_samples, self.max_bytes, self.overwrite = max_samples, max_bytes, overwrite
        self.shards: list[Any] = []
        self.digests: dict[str, str] = {}
        self._digest = digest
        self.n_samples = self.place = 0
        self._shard: contextlib.ExitStack | None = None
        self._file: IO[bytes] | None = None
        self._samples = self._bytes = 0
        self._last_key: str | None = None
        self._claim = Claim(self.out, _marker(self.name), overwrite=overwrite)
        try:
            self._begin(overwrite, resume if not (overwrite or digest) else None)
        except BaseException:
            self._claim.release(is_done=False)
            raise

    def _begin(self, overwrite: bool, resume: str | None) -> None:
        """Remove what a killed run of this pattern left, but for shards of the same run, and finished shards
        if that was asked.
        """
        existing = _check_ours(self.out, self.name, self._claim.listed, overwrite)
        markers = [name for name in self.out.names() if name.endswith(_UNFINISHED)] if existing else []
        for marker in markers:  # another pattern may have such names, too
            if marker != _marker(self.name) and names_in(self.out.read(marker)) & set(existing):
                check_free(self.out, marker, overwrite=overwrite)
        self._claim.add(existing)  # so that a kill within the next lines leaves none that nobody owns
        kept = self._kept(existing, resume)
        self._claim.note(Progress(self._run, len(kept), self.n_samples, self.place))
        beside = [name for name in BESIDE if name in self._claim.listed]
        unfinished = re.compile(rf"\.tmp-\w{{12}}-({'|'.join(map(re.escape, beside))})")
        for name in existing + [name for name in self.out.names() if unfinished.fullmatch(name)] + beside:
            if name not in kept:
                self.out.remove(name)

    def _kept(self, existing: list[str], resume: str | None) -> list[str]:
        """The shards that a killed run has published, if it was the same."""
        self._run, before = "-", self._claim.progress
        if resume is None:
            return []
        self._run = fingerprint(resume=resume, max_samples=self.max_samples, max_bytes=self.max_bytes)
        if before is None or before.run != self._run or before.shards > len(existing):
            return []
        kept = [self.name % number for number in range(before.shards)]
        if not set(kept) <= set(existing):
            return []
        self.shards = list(map(self.out.place, kept))
        self.n_samples, self.place = before.samples, before.place
        if kept:
            log.info("%s: goes on after %d shards of a run that was stopped", self.out, len(kept))
        return kept

    def write(self, sample: Mapping[str, Any]) -> None:
        """Append a sample.

        Args:
            sample: `__key__`, and members by extension: bytes are written as they are, str as UTF-8, int as
                digits, dicts and lists as JSON, numpy arrays as `.npy`, PIL images as PNG. Other fields that
                start with `__` are ignored.
        """
        if self._claim.is_released:
            raise PoolError(f"{self.out}: this writer is closed or has failed; open another")
        key = sample.get("__key__")
        if not isinstance(key, str):
            raise PoolError(f"a sample needs a '__key__' of type str, not {key!r}")
        members = [
            (extension, encode_member(content, f"sample {key!r}, member {extension!r}", extension))
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
            self.publish()
        file = self._open() if self._file is None else self._file
        try:
            with writing(self.shards[-1]):
                for header, (_, content) in zip(headers, members):
                    file.write(header)
                    file.write(content)
                    file.write(bytes(_padded(len(content)) - len(content)))
        except BaseException:  # the shard is cut within a sample
            self._give_up()
            raise
        self._samples += 1
        self._bytes += length
        self.n_samples += 1
        self._last_key = key

    def write_beside(self, name: str, content: bytes) -> None:
        """Write a file beside the shards, which belongs to this run as they do."""
        with self.create_beside(name) as file:
            file.write(content)

    @contextlib.contextmanager
    def create_beside(self, name: str) -> Iterator[IO[bytes]]:
        """The same for a file that is written in the block."""
        assert name in BESIDE, "what a killed run leaves is looked for by these names"
        self._claim.add([name])
        with self.out.create(name) as file, writing(self.out.place(name)):
            yield file

    def remove_beside(self, name: str) -> None:
        """Remove such a file of an earlier run, after `check_out` has let it pass."""
        self._claim.add([name])
        self.out.remove(name)

    def publish(self) -> None:
        """Publish the shard that was begun; the run continues."""
        if self._file is None or self._shard is None:
            return
        end = 2 * tarfile.BLOCKSIZE  # two empty blocks, then up to a full record
        try:
            with writing(self.shards[-1]):
                self._file.write(bytes(end + -(self._bytes + end) % tarfile.RECORDSIZE))
            self._shard.close()
        except BaseException:
            self._give_up()
            raise
        if isinstance(self._file, Digested):
            self.digests[self.name % (len(self.shards) - 1)] = self._file.sha256.hexdigest()
        self._file = self._shard = None
        self._samples = self._bytes = 0
        self._last_key = None
        if self._run != "-":
            self._claim.note(Progress(self._run, len(self.shards), self.n_samples, self.place))

    def close(self) -> None:
        """Publish the last shard and mark the run as finished. Without samples there are no shards."""
        self.publish()
        self._claim.release(is_done=True)  # unless it was released after an error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self.close()
        else:
            self._give_up()

    def _give_up(self) -> None:
        """Keep complete shards and the marker, drop the current shard."""
        self._file, shard, self._shard = None, self._shard, None
        if shard is not None:
            with contextlib.suppress(_Dropped):
                shard.__exit__(_Dropped, _Dropped(), None)
        self._claim.release(is_done=False)

    def _open(self) -> IO[bytes]:
        name = self.name % len(self.shards)
        self._claim.add([name])
        self._shard = contextlib.ExitStack()
        file = self._shard.enter_context(self.out.create(name))
        self._file = cast(IO[bytes], Digested(file)) if self._digest else file
        self.shards.append(self.out.place(name))
        return self._file


class Digested:
    """A file that is written, with the SHA-256 of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sha256 = file, hashlib.sha256()

    def write(self, content: Any) -> int:
        """Write bytes."""
        self.sha256.update(content)
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Dropped(Exception):
    """Thrown into the shard that is being written, to drop it."""


def check_out(
    pattern: str | Path,
    *,
    max_samples: int = 10_000,
    max_bytes: int = 1 << 30,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    beside: Mapping[str, bytes | None] | None = None,
) -> tuple[LocalFolder | RemoteFolder, str]:
    """Check where shards are to go, without writing anything; the arguments are those of `ShardWriter`.

    Args:
        beside: files that will be written beside the shards, with their content if it is known. One that is
            there already, with other content, counts as the shards do.

    Returns:
        The folder, and the pattern of the shards' names.

    Raises:
        PoolError: the pattern or a limit cannot be used, there are shards of that pattern, or another writer
            is at work on them.
        CacheError: nothing can be written there.
    """
    pattern = spelled(pattern)
    if not pattern:
        raise PoolError("the place for the shards is empty; give a folder, '.' for this one")
    folder, slash, name = pattern.rpartition("/")
    if not _NUMBER.search(pattern):
        if pattern.endswith(".tar"):
            raise PoolError(f"{pattern!r}: a pattern of shards needs a number, as 'shard-%06d.tar'")
        folder, name = pattern, "shard-%06d.tar"
    if len(_NUMBER.findall(name)) != 1 or _NUMBER.search(folder) or name.count("%") != 1:
        raise PoolError(
            f"{pattern!r}: a pattern of shards has one number, in the file's name, as 'shard-%06d.tar'"
        )
    if max_samples < 1 or max_bytes < 1:
        raise PoolError(f"a shard must hold a sample: max_samples={max_samples}, max_bytes={max_bytes}")
    out = open_out(folder or ("/" if slash else "."), storage_options)
    if isinstance(out, LocalFolder):
        out.check()
    listed = check_free(out, _marker(name), overwrite=overwrite)
    _check_ours(out, name, listed, overwrite)
    for file, content in () if overwrite else (beside or {}).items():
        found = None if file in listed else out.read(file)
        if found is not None and found != content:
            raise PoolError(
                f"{out.place(file)}: exists already, with other shards; give another folder, remove it, or "
                "pass overwrite=True (--overwrite)"
            )
    return out, name


def _marker(name: str) -> str:
    return f".{_NUMBER.sub('#', name)}{_UNFINISHED}"


def existing_shards(folder: LocalFolder | RemoteFolder, name: str) -> list[str]:
    """The names of the shards of a pattern, as from `check_out`, and of temporary files of a killed run."""
    before, _, after = _NUMBER.split(name)
    number = re.compile(r"(\.tmp-\w{12}-)?" + re.escape(before) + r" *\d+" + re.escape(after))
    return [found for found in folder.names() if number.fullmatch(found)]


def _check_ours(
    folder: LocalFolder | RemoteFolder, name: str, listed: set[str], overwrite: bool
) -> list[str]:
    """The shards that are there already, if they may be removed: a dead run wrote them, or it was asked."""
    existing = existing_shards(folder, name)
    others = [found for found in existing if found not in listed and not found.startswith(TEMPORARY)]
    if others and not overwrite:
        raise PoolError(
            f"{folder.place(others[0])}: {len(others)} shard(s) of {name!r} are there already; give another "
            "name or folder, remove them, or pass overwrite=True (--overwrite)"
        )
    return existing


def import_folder(
    folder: str | Path,
    out: str | Path,
    *,
    max_samples: int = 10_000,
    max_bytes: int = 1 << 30,
    image_extensions: str | Sequence[str] = IMAGE_EXTENSIONS,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Turn a folder of images into shards, with labels if there is one sub-folder per class.

    An image's key is its path below `folder` without the extension. Dots in the name are written as `%2E`,
    and if two images differ only in their extension it stays in the key, so that webdataset reads the same
    keys back. `.cls` is the number of the class among the sorted class names, and `.json` has `class_name`;
    the class names are listed in `classes.json` beside the shards.

    Args:
        folder: `folder/<class>/**/<image>`, or images directly in it.
        out: a folder for the shards, or a pattern, as for `ShardWriter`.
        max_samples, max_bytes: per shard.
        image_extensions: which files are images (`.jfif` becomes `.jpg`). All others are left out and
            counted by extension, and so are hidden files, what macOS adds to archives (`__MACOSX`, `._*`),
            and what is not a regular file.
        overwrite: replace the shards of an earlier run.
        storage_options: for fsspec, to write to a store.

    Returns:
        The shards, as paths, or as URLs in a store.

    Raises:
        PoolError: no such folder, no images in it, images both in class folders and beside them, a folder or
            an image that cannot be read, or a `classes.json` of other classes beside the shards.
        CacheError: the shards cannot be written.
    """
    folder = local_path(folder, "folder")
    image_extensions = as_extensions(image_extensions, "image_extensions")
    if not folder.is_dir():
        raise PoolError(f"{str(folder)!r}: is not a folder to import from")
    first = ImageFolders(folder, image_extensions)
    names, beside = first.top()
    classes = [name for name in names if sum(map(len, first.below(folder / name)))]
    if beside and classes:
        raise PoolError(
            f"{beside[0].path}: lies beside the class folders ({classes[0]!r}, ...), so it has no "
            "class; move it into one, or import a folder without class folders"
        )
    if first.left_out:  # reported first, so that one can stop
        counts = ", ".join(f"{count:,} {what}" for what, count in sorted(first.left_out.items()))
        log.warning("%s: left out %d files: %s", folder, first.left_out.total(), counts)
    if not beside and not classes:
        raise PoolError(f"{str(folder)!r}: has no image ({', '.join(image_extensions[:5])}, ...) to import")
    listed = (json.dumps(classes, ensure_ascii=False, indent=0) + "\n").encode("utf-8", "surrogateescape")
    options: dict[str, Any] = {
        "max_samples": max_samples,
        "max_bytes": max_bytes,
        "overwrite": overwrite,
        "storage_options": storage_options,
    }
    check_out(out, **options, beside={"classes.json": listed} if classes else None)
    with ShardWriter(out, **options) as writer:
        again = ImageFolders(folder, image_extensions)
        with progress("import", None, "images") as advance:
            for label, name in enumerate(classes) if classes else [(None, "")]:
                for images in again.below(folder / name):
                    for path, stem, extension in images:
                        above = os.path.relpath(path.parent, folder)
                        sample: dict[str, Any] = {
                            "__key__": os.path.join(above, stem).removeprefix("./"),
                            extension: read_image(path),
                        }
                        if label is not None:
                            sample |= {"cls": label, "json": {"class_name": name}}
                        writer.write(sample)
                        advance()
        if classes:
            writer.write_beside("classes.json", listed)
    log.info(
        "imported %d images of %d classes to %d shards", writer.n_samples, len(classes), len(writer.shards)
    )
    return writer.shards


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
