"""A pool of tar shards as one long list of samples that can be read in any order."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from curated_data.cache.artifacts import absolute, fingerprint, open_cache
from curated_data.errors import ConfigError, PoolError, SampleError
from curated_data.parallel import all_reduce, check_same, is_distributed
from curated_data.pool.access import DOWNLOAD, RANGES, RemoteOptions, choose_access
from curated_data.pool.build import (
    Indexer,
    build_in_cache,
    build_in_memory,
    index_shard_file,
    pool_fingerprint,
)
from curated_data.pool.decode import IMAGE_EXTENSIONS, as_extensions
from curated_data.pool.image import ImageSettings
from curated_data.pool.imported import folder_of, imported_shards
from curated_data.pool.index import PoolIndex
from curated_data.pool.index_files import load_pool_index
from curated_data.pool.notes import report_notes
from curated_data.pool.reader import LocalReader, ReadCounters
from curated_data.pool.remote import RemoteReader
from curated_data.pool.shard import ShardFile
from curated_data.pool.storage import stat_on_ranks, stat_shards
from curated_data.pool.urls import absolute_url, expand_urls, is_remote

if TYPE_CHECKING:
    import pyarrow as pa

    from curated_data.pool.described import Described

log = logging.getLogger(__name__)

_BLOCK = 65_536  # samples whose labels are read at once


class ShardPool:
    """The samples of tar shards, numbered in shard order, then tar order.

    Samples are those of webdataset: neighbouring members whose names agree up to the first dot of the base
    name. The shards are indexed by their headers on first use. With a `cache_dir` the index is kept there, so
    that only new or changed shards are indexed again. A pickled pool is small: workers open the index
    themselves.

    Args:
        urls: a path or fsspec URL with braces (`pool-{000000..000099}.tar`) or a glob, or a list of these;
            or `folder:PATH`, a folder of images or of parquet, which is imported into the cache.
        cache_dir: for the index; None keeps it in memory.
        num_workers: processes (threads for remote shards) that index; None takes one per core.
        image_extensions: the extensions of images in order of preference, in any case, dot or not.
        storage_options: for fsspec to access remote shards, such as an endpoint.
        remote: how remote shards are read.
        background: the colour that transparent pixels of images are put on: a grey, or red, green and blue,
            0 to 255.
        exif_orientation: turn images as their EXIF data say, as viewers do; TIFFs always are.
        strict: raise an error about shards that were read with a warning: that are cut, end without the
            end-of-archive marker, hold samples whose parts lie apart, or links that lead nowhere.
        columns: parquet files, or folders of them, with more about the samples, see `columns`; None takes
            those beside the shards, as `00000.parquet` by `00000.tar`.
        labels: the column of the samples' classes, in place of `.cls` members: integers, or names, which are
            numbered from 0 in the order of their code points.
        captions: the column of the samples' texts, in place of `.txt` members. Labels and captions of a pool
            are held in memory.

    Raises:
        PoolError: an empty list, a pattern without a match, or a shard that is missing or given twice; on
            indexing, a shard that is not a tar, truncated, damaged or compressed, or a pool without samples.
        ConfigError: an extension that is empty, or a background that is not a colour.

    Examples:
        >>> from curated_data import ShardPool
        >>> pool = ShardPool("pool-{000..001}.tar", cache_dir="cache")
        >>> len(pool)
        40
        >>> pool.read([5, 0], ["png"])[0]["png"][1:4]
        b'PNG'
    """

    def __init__(
        self,
        urls: str | Path | Sequence[str | Path],
        *,
        cache_dir: str | Path | None = None,
        num_workers: int | None = None,
        image_extensions: str | Sequence[str] = IMAGE_EXTENSIONS,
        storage_options: Mapping[str, Any] | None = None,
        remote: RemoteOptions | None = None,
        background: int | Sequence[int] = 128,
        exif_orientation: bool = True,
        strict: bool = False,
        columns: str | Path | Sequence[str | Path] | None = None,
        labels: str | None = None,
        captions: str | None = None,
    ) -> None:
        self.storage_options = dict(storage_options or {})
        if (folder := folder_of(urls)) is not None:
            urls = imported_shards(folder, cache_dir)
        self.urls = expand_urls(urls, self.storage_options)
        self._places = [absolute_url(url) for url in self.urls]
        self.cache_dir = None if cache_dir is None else absolute(cache_dir)
        self.num_workers = num_workers
        self.image_extensions = as_extensions(image_extensions, "image_extensions")
        self.remote = remote or RemoteOptions()
        self.images = ImageSettings(_colour(background), bool(exif_orientation))
        self.strict = strict
        self._tables: list[Path] = []
        if columns is not None:
            from curated_data.pool.columns import checked_tables

            self._tables = checked_tables(columns)
        self.label_column, self.caption_column = labels, captions
        self._access: np.ndarray | None = None
        self._index: PoolIndex | None = None
        self._index_folder: Path | None = None
        self._layouts: list[str] | None = None
        self._without_cache: ShardPool | None = None

    def __len__(self) -> int:
        return len(self.index())

    def __repr__(self) -> str:
        size = f", {len(self._index)} samples" if self._index is not None else ""
        more = f" and {len(self.urls) - 1} more" if len(self.urls) > 1 else ""
        return f"{type(self).__name__}({self.urls[0]!r}{more}{size})"

    @cached_property
    def shards(self) -> list[ShardFile]:
        """Each shard, with its size and version at first use."""
        return stat_shards(self._places, self.storage_options, self.remote)

    def stat_on_all_ranks(self) -> None:
        """Stat the shards, each remote one on one rank only. All ranks call it.

        Every rank stats local shards, as folders may differ.

        Raises:
            ConfigError: ranks have other shards.
        """
        check_same(pool=fingerprint(places=self._places))
        if not (is_distributed() and self._is_remote):
            return
        if not all_reduce(np.array(["shards" in self.__dict__], np.int64), "min")[0]:
            self.shards = stat_on_ranks(self._places, self.storage_options, self.remote)

    @cached_property
    def state(self) -> str:
        """The name of the pool as it is now: of the place, size, and time or ETag of its shards in order.

        Another place gives another name, as does any change to a shard. Needs no index.
        """
        return fingerprint(stage="pool state", shards=[shard.fingerprint for shard in self.shards])

    @property
    def shard_fingerprints(self) -> list[str]:
        """The layout of each shard: the name of the keys, extensions, offsets and sizes of its members.

        The same wherever the shards lie. Found by indexing the pool, which reads headers alone, so two shards
        that differ only in their members' bytes have the same; embedding, which reads those, tells them apart
        (see `curated_data.embedding.contents`).
        """
        self.index()
        assert self._layouts is not None, "set with the index"
        return self._layouts

    @cached_property
    def fingerprint(self) -> str:
        """The name of the pool, from the layouts of its shards in order."""
        return pool_fingerprint(self.shard_fingerprints)

    def index(self) -> PoolIndex:
        """The pool's index, built on the first call or found in the cache."""
        if self._index is None:
            is_new = self._index_folder is None
            if self._index_folder is not None:
                # Checked by the process that opened the pool.
                self._index = load_pool_index(self._index_folder, checked=False)
            elif self.cache_dir is not None:
                self._index, self._index_folder, self._layouts = build_in_cache(
                    self.shards, self._indexer, self.num_workers, self.cache_dir
                )
                if self._without_cache is not None:
                    self._without_cache._take_index(self)
            else:
                self._index, self._layouts = build_in_memory(self.shards, self._indexer, self.num_workers)
            if is_new:
                self._report_notes()
            if len(self._index) == 0:
                self._index, shown = None, ", ".join(self.urls[:3])
                raise PoolError(
                    f"the pool is empty: no sample in {len(self.urls)} shard(s) ({shown}); a sample is a "
                    "file with an extension, as key.jpg"
                )
        return self._index

    def with_cache(self, cache_dir: str | Path | None) -> Self:
        """The same pool with its index in another cache, or in memory.

        A pool without a cache takes over the index that the other one finds or makes, so that shards are not
        looked up and indexed twice.
        """
        cache_dir = None if cache_dir is None else absolute(cache_dir)
        if cache_dir == self.cache_dir:
            return self
        pool = object.__new__(type(self))
        pool.__dict__.update(self.__getstate__())
        pool.cache_dir = cache_dir
        pool._index = pool._index_folder = None
        pool._without_cache = self if self.cache_dir is None else None
        return pool

    def shard_of(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The shard of each sample, (n,) int64 into `urls`."""
        return self.index().shard_of(self._checked(ids))

    def shard_ranges(self) -> np.ndarray:
        """(n_shards + 1,) int64: the first id of each shard, then the number of samples."""
        return self.index().shard_start

    def keys(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The samples' keys: the names of their members up to the first dot of the base name."""
        return self.index().keys(self._checked(ids))

    def sizes(self, ids: Sequence[int] | np.ndarray, extensions: Sequence[str] | None = None) -> np.ndarray:
        """The size of each sample in bytes, (n,) int64: of all its members, or of those with an extension."""
        ids = self._checked(ids)
        extensions = None if extensions is None else as_extensions(extensions, "extensions")
        members = self.index().members(ids, extensions)
        return np.bincount(members.owner, members.size, minlength=len(ids)).astype(np.int64)

    def read(
        self, ids: Sequence[int] | np.ndarray, extensions: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """Read samples, in the order of the ids; an id may be repeated.

        Args:
            ids: (n,) integers, 0 to `len(pool) - 1`.
            extensions: read only the members with these; a sample without any of them gets a list of the
                extensions that it has, under `__members__`.

        Returns:
            Dicts as in webdataset: `__key__`, `__url__`, and the bytes of each member under its extension.

        Raises:
            PoolError: an id outside the pool, extensions that no sample has, or a shard that is missing or
                has changed.
        """
        ids = self._checked(ids)
        extensions = None if extensions is None else as_extensions(extensions, "extensions")
        index = self.index()
        order = np.argsort(ids, kind="stable")
        unique, place = ids[order], None
        if (unique[1:] == unique[:-1]).any():
            unique, place = np.unique(ids, return_inverse=True)
        shard = index.shard_of(unique)
        members = index.members(unique, extensions)
        data = self._reader.read(shard[members.owner], members.offset, members.size)
        urls, names = self.urls, index.extensions
        samples: list[dict[str, Any]] = [
            {"__key__": key, "__url__": urls[number]}
            for key, number in zip(index.keys(unique), shard.tolist())
        ]
        for owner, extension, content in zip(members.owner.tolist(), members.extension.tolist(), data):
            samples[owner][names[extension]] = content
        if extensions is not None and len(data) < len(unique) * len(extensions):
            for row in np.flatnonzero(np.bincount(members.owner, minlength=len(unique)) == 0).tolist():
                start, stop = index.member_start[unique[row] : unique[row] + 2]
                samples[row]["__members__"] = [names[number] for number in index.member_extension[start:stop]]
        if place is not None:
            return [dict(samples[row]) for row in place.tolist()]  # no two entries share a dict
        asked: list[dict[str, Any]] = [{}] * len(ids)
        for row, sample in zip(order.tolist(), samples):
            asked[row] = sample
        return asked

    @cached_property
    def described(self) -> "Described | None":
        """The columns of labels and captions; None without any."""
        if self.label_column is None and self.caption_column is None:
            return None
        from curated_data.pool.described import Described

        return Described(self, self.label_column, self.caption_column)

    @property
    def has_labels(self) -> bool:
        """Whether some samples may have a class."""
        return self.label_column is not None or "cls" in self.index().extensions

    def labels(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The class of each sample, (n,) int64, from its `.cls` member, or the column of labels; -1 for
        samples without one.

        Raises:
            SampleError: a `.cls` that is not an integer in ASCII digits.
            ConfigError: an unknown column, or one that holds neither integers nor names.
        """
        ids = self._checked(ids)
        if self.described is not None and self.described.numbers is not None:
            return self.described.numbers[ids]
        labels = np.full(len(ids), -1, np.int64)
        if "cls" not in self.index().extensions:
            return labels
        for first in range(0, len(ids), _BLOCK):
            block, place = np.unique(ids[first : first + _BLOCK], return_inverse=True)
            members = self.index().members(block, ["cls"])
            shard = self.shard_of(block)
            data = self._reader.read(shard[members.owner], members.offset, members.size)
            found = np.full(len(block), -1, np.int64)
            for owner, content in zip(members.owner.tolist(), data):
                try:
                    found[owner] = int(content.decode("ascii"))
                except (ValueError, OverflowError):
                    url = self.urls[int(shard[owner])]
                    key = self.keys(block[owner : owner + 1])[0]
                    raise SampleError(
                        f"{url}: sample {key!r}: its .cls is not an integer: {content[:40]!r}"
                    ) from None
            labels[first : first + _BLOCK] = found[place]
        return labels

    def columns(self, names: Sequence[str]) -> "pa.Table":
        """What is known of each sample, as an Arrow table with n rows in the order of ids.

        Args:
            names: of columns: `id`, `key`, `shard`, `label`; fields of `.json` members, as `json.a.b`;
                measures of images (`width`, `height`, `aspect`, `bytes`, `sharpness`, `brightness`,
                `entropy`, `flat`) and of texts (`text_length`); and those of parquet files, joined by key.

        Raises:
            ConfigError: an unknown column; suggests the nearest name.
            PoolError: a parquet file cannot be read, or holds a key twice.
        """
        from curated_data.pool.columns import read_columns

        return read_columns(self, names, self._tables)

    def plan_access(self, ids: Sequence[int] | np.ndarray | None, *, epochs: int = 1) -> np.ndarray:
        """Decide for each remote shard whether to keep it whole in the cache, or to read samples by ranges.

        Decided by the rule of `curated_data.pool.access.choose_access`, unless `RemoteOptions.access` is set
        or the pool has no cache. It applies to all later reads, also by copies of this pool in workers. Local
        shards are read in place.

        Args:
            ids: the selection that will be read, without repeats; None for the whole pool.
            epochs: how often it will be read.

        Returns:
            (n_shards,) bool: which shards will be kept whole.
        """
        remote = np.array([is_remote(url) for url in self.urls])
        if not remote.any():
            return remote
        n_samples = np.diff(self.shard_ranges())
        n_selected = (
            n_samples
            if ids is None
            else np.diff(np.searchsorted(np.sort(self._checked(ids)), self.shard_ranges()))
        )
        if self.remote.access != "auto":
            chosen = remote & (self.remote.access == "shards")
        elif self.cache_dir is None:
            chosen = np.zeros(len(remote), bool)
        else:
            size = np.where(remote, [shard.size for shard in self.shards], 0)
            chosen = remote & choose_access(
                size,
                n_samples,
                np.where(remote, n_selected, 0),
                epochs=epochs,
                cache_bytes=self.remote.cache_bytes,
            )
        self._access = np.where(chosen, DOWNLOAD, RANGES)
        assert isinstance(self._reader, RemoteReader), "some shards are remote"
        self._reader.access[remote] = self._access[remote]
        log.info(
            "of %d remote shards with selected samples, %d are kept whole and the others read by ranges",
            int(((n_selected > 0) & remote).sum()),
            int(chosen.sum()),
        )
        return chosen

    @property
    def counters(self) -> ReadCounters:
        """Bytes needed and bytes read by this process."""
        return self._reader.counters

    def close(self) -> None:
        """Close all open shards; the pool stays usable."""
        self._reader.close()

    @cached_property
    def _reader(self) -> LocalReader | RemoteReader:
        if not self._is_remote:
            return LocalReader(self.shards)
        return RemoteReader(
            self.shards,
            storage_options=self.storage_options,
            options=self.remote,
            cache_folder=None if self.cache_dir is None else open_cache(self.cache_dir) / "shards",
            access=self._access,
        )

    @property
    def _is_remote(self) -> bool:
        return any(is_remote(url) for url in self.urls)

    @property
    def _indexer(self) -> Indexer:
        if not self._is_remote:
            return index_shard_file
        assert isinstance(self._reader, RemoteReader)
        return partial(index_shard_file, opener=self._reader.source)

    def _report_notes(self) -> None:
        assert self._index is not None
        try:
            report_notes(self._index.notes, strict=self.strict)
        except PoolError:
            self._index = self._index_folder = None
            raise

    def _take_index(self, other: "ShardPool") -> None:
        """Use the index of the same pool with a cache, unless this has its own, or shards have changed."""
        if self._index is None and self.__dict__.setdefault("shards", other.shards) == other.shards:
            self._index, self._index_folder = other._index, other._index_folder
            self._layouts = other._layouts

    def _checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(ids)
        if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
            raise PoolError(f"ids must be a list of integers, not {ids.dtype} of shape {ids.shape}")
        ids = ids.astype(np.int64, copy=False)
        n = len(self.index())
        if len(ids) and (ids.min() < 0 or ids.max() >= n):
            outside = ids[(ids < 0) | (ids >= n)]
            raise PoolError(f"id {outside[0]} is outside the pool: it has samples 0 to {n - 1}")
        return ids

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_index": None if self._index_folder is not None else self._index}
        state["_without_cache"] = None
        state.pop("_reader", None)
        state.pop("described", None)  # read from the cache instead
        return state


def _colour(given: int | Sequence[int]) -> tuple[int, int, int]:
    """A colour from a grey, or from red, green and blue."""
    values = list(given) if isinstance(given, Sequence) else [given] * 3
    if len(values) != 3 or not all(isinstance(v, int) and 0 <= v <= 255 for v in values):
        raise ConfigError(f"background: expected a grey or three values, each 0 to 255, found {given!r}")
    return values[0], values[1], values[2]
