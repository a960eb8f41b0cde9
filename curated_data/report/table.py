"""Everything known about the samples of a curation as one table: a row for each, in memory or as parquet."""

import csv
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from curated_data.errors import ConfigError, PoolError
from curated_data.pool import ShardPool
from curated_data.pool.captions import read_captions
from curated_data.pool.out import open_file, writing
from curated_data.progress import progress
from curated_data.report.examples import thumbnails
from curated_data.selection.metrics import read_labels
from curated_data.selection.removed import Removed
from curated_data.selection.retrieval import Retrieved
from curated_data.selection.retrieved import load_retrieved

if TYPE_CHECKING:
    from curated_data.embedding.existing import EmbeddedPool
    from curated_data.stages.curation import Curation

log = logging.getLogger(__name__)

_BLOCK = 1 << 16  # rows in memory at once, and in a row group
_IMAGES = 1 << 12  # the same, if rows have images

REASONS = (
    "selected",
    "not drawn",  # its cluster gave others
    "near-duplicate",
    "copy of held-out",
    "failed",
    "filtered",  # by a condition, or by name
    "excluded",  # an embedding of zero, which has no direction
)
"""Why a sample was or was not selected, in the column `reason`."""


class CurationTable:
    """The rows of a curation, which are made in blocks as they are asked for.

    | column | |
    |---|---|
    | `id` | of the sample, in ascending order |
    | `shard`, `key` | where it lies |
    | `label`, `class` | its `.cls` as an integer and, where there is a `classes.json`, the name of that |
    | `caption` | its text |
    | `cluster_1`, `cluster_2`, … | its cluster at each level; null if it took no part |
    | `distance` | to the centroid of its lowest cluster |
    | `selected`, `times` | whether it was selected, and how often |
    | `reason` | one of `REASONS` |
    | `duplicate_of`, `held_out`, `cosine` | the sample, or that of the held-out pool, that it is a copy of |
    | `seed_set`, `seed_rank` | the seed set that it was retrieved for, and its rank from 0 |
    | `seed`, `seed_cosine` | the nearest seed of that set; null if a cluster gave it |
    | `failure` | why it could not be embedded |
    | `x`, `y` | on a map |
    | `image` | a JPEG thumbnail, as `{bytes, path}` |

    Args:
        curation: from `curate`.
        pool: that was curated; None leaves out what only it knows: keys, labels, captions and images.
        selected: only the selected samples, each once.
        images: the side of thumbnails in pixels; None for none.
        coordinates: (n, 2) place of every sample on a map.
        columns: of the pool's own, see `ShardPool.columns`; they are kept in memory.

    Raises:
        ConfigError: a pool or coordinates of another length, images of no side, or images without a pool.
    """

    def __init__(
        self,
        curation: "Curation",
        pool: "ShardPool | EmbeddedPool | None" = None,
        *,
        selected: bool = False,
        images: int | None = None,
        coordinates: np.ndarray | None = None,
        columns: Sequence[str] = (),
    ) -> None:
        n = curation.tree.n_samples
        if pool is not None and len(pool) != n:
            raise ConfigError(f"pool: has {len(pool)} samples, the curation is of {n}; give the pool of it")
        if coordinates is not None and np.shape(coordinates) != (n, 2):
            raise ConfigError(f"coordinates: expected shape ({n}, 2), found {np.shape(coordinates)}")
        if images is not None and (type(images) is not int or not 1 <= images <= 4096):
            raise ConfigError(f"images: expected the side of thumbnails in pixels, found {images!r}")
        self._shards = pool if isinstance(pool, ShardPool) else None
        if images is not None and self._shards is None:
            raise ConfigError("images: only a pool of shards has them; give it, or leave them out")
        if columns and pool is None:
            raise ConfigError("columns: only a pool has them; give it, or leave them out")
        self._more = None if pool is None or not columns else pool.columns(list(columns))
        self._curation, self._pool = curation, pool
        self._images, self._coordinates = images, coordinates
        self._extensions = set() if self._shards is None else set(self._shards.index().extensions)
        self._ids = np.unique(curation.ids) if selected else None
        folder = curation.folders.get("near_duplicates")
        self._removed = None if folder is None else Removed.load(folder)
        folder = curation.folders.get("retrieval")
        by_weights = folder is not None and curation.config.retrieval.method == "weights"
        self._retrieved = None if folder is None or by_weights else load_retrieved(folder, n)
        self._labels = None if self._shards is None else read_labels(self._shards, self._ids)

    def __len__(self) -> int:
        return self._curation.tree.n_samples if self._ids is None else len(self._ids)

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns. With images, the metadata say so to the library `datasets`, too."""
        fields: dict[str, pa.DataType] = {"id": pa.int64()}
        if self._pool is not None:
            fields["shard"] = pa.string()
        if self._shards is not None:
            fields["key"] = pa.string()
        if self._labels is not None:
            fields["label"] = pa.int64()
            if self._class_names is not None:
                fields["class"] = pa.string()
        if self._extensions & {"txt", "text"} or getattr(self._shards, "caption_column", None) is not None:
            fields["caption"] = pa.string()
        for level in range(1, self._curation.tree.n_levels + 1):
            fields[f"cluster_{level}"] = pa.int32()
        if self._curation.tree.distance is not None:
            fields["distance"] = pa.float32()
        fields |= {"selected": pa.bool_(), "times": pa.int32(), "reason": pa.string()}
        if self._removed is not None:
            fields |= {"duplicate_of": pa.int64(), "held_out": pa.int64(), "cosine": pa.float32()}
        if self._retrieved is not None:
            fields |= {"seed_set": pa.string(), "seed": pa.int64()}
            fields |= {"seed_rank": pa.int64(), "seed_cosine": pa.float32()}
        fields["failure"] = pa.string()
        if self._coordinates is not None:
            fields |= {"x": pa.float32(), "y": pa.float32()}
        if self._more is not None:
            known = [name for name in self._more.schema.names if name in fields]
            if known:
                raise ConfigError(f"columns: the table has a {known[0]!r} of its own; leave it out")
            fields |= {column.name: column.type for column in self._more.schema}
        if self._images is None:
            return pa.schema(fields)
        features: dict[str, Any] = {
            name: {"dtype": {"float": "float32"}.get(str(kind), str(kind)), "_type": "Value"}
            for name, kind in fields.items()
        }
        fields["image"] = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        features["image"] = {"_type": "Image"}
        return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})

    def blocks(self) -> Iterator[pa.RecordBatch]:
        """The rows in blocks, of which one is in memory at a time."""
        size = _BLOCK if self._images is None else _IMAGES
        for first in range(0, len(self), size):
            last = min(first + size, len(self))
            yield self._block(np.arange(first, last) if self._ids is None else self._ids[first:last])

    def read(self) -> pa.Table:
        """All rows in memory."""
        return pa.Table.from_batches(self.blocks(), self.schema)

    def write(self, path: str | Path, storage_options: Mapping[str, Any] | None = None) -> Path | str:
        """Write a parquet file, in blocks, whole or not at all; returns its path or URL.

        Raises:
            ConfigError: the name does not end in `.parquet`.
            CacheError: it cannot be written.
        """
        if not str(path).endswith(".parquet"):
            raise ConfigError(f"{path}: a table is written as parquet; give a name that ends in .parquet")
        folder, name = open_file(path, storage_options)
        with folder.create(name) as file, writing(folder.place(name)):
            self.write_to(file)
        log.info("wrote a table of %d samples", len(self))
        return folder.place(name)

    def write_to(self, file: IO[bytes]) -> None:
        """Write parquet to an open file, in blocks."""
        with (
            pq.ParquetWriter(
                file, self.schema, compression="zstd", store_schema=True, write_page_checksum=True
            ) as to,
            progress("table", len(self), "samples") as advance,
        ):
            for block in self.blocks():
                to.write_batch(block)
                advance(len(block))

    def write_keys(self, path: str | Path, storage_options: Mapping[str, Any] | None = None) -> Path | str:
        """Write `id`, `shard`, `key` and `times` of the rows as a CSV file; returns its path or URL."""
        if self._shards is None:
            raise PoolError("keys: only a pool of shards has them; give it")
        folder, name = open_file(path, storage_options)
        times = self._times
        with folder.create(name) as file, writing(folder.place(name)):
            text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
            rows = csv.writer(text)
            rows.writerow(("id", "shard", "key", "times"))
            for first in range(0, len(self), _BLOCK):
                ids = np.arange(len(self)) if self._ids is None else self._ids
                ids = ids[first : first + _BLOCK]
                shards = [self._shards.urls[number] for number in self._shards.shard_of(ids).tolist()]
                rows.writerows(zip(ids.tolist(), shards, self._shards.keys(ids), times[ids].tolist()))
            text.flush()
            text.detach()
        return folder.place(name)

    @cached_property
    def _times(self) -> np.ndarray:
        """(n,) how often each sample is selected."""
        return np.bincount(self._curation.ids, minlength=self._curation.tree.n_samples).astype(np.int32)

    @cached_property
    def _class_names(self) -> list[str] | None:
        from curated_data.report.page import class_names_beside  # here, because it imports scikit-learn

        return None if self._shards is None else class_names_beside(self._shards)

    def _block(self, ids: np.ndarray) -> pa.RecordBatch:
        """The rows of some samples, by ascending id."""
        tree = self._curation.tree
        columns: dict[str, Any] = {"id": ids}
        if self._pool is not None:
            columns |= self._places(ids)
        if self._shards is not None:
            columns |= self._contents(self._shards, ids)
        took_part = tree.parent[1][ids] >= 0
        for level in range(1, tree.n_levels + 1):
            cluster = tree.assignment(level, ids)
            columns[f"cluster_{level}"] = pa.array(cluster, pa.int32(), mask=cluster < 0)
        if tree.distance is not None:
            columns["distance"] = pa.array(tree.distance[ids], mask=~took_part)
        times = self._times[ids]
        reason = np.where(times > 0, 0, np.where(took_part, 1, REASONS.index("excluded")))
        left_out = getattr(self._curation.embeddings, "left_out", None)
        if left_out is not None:
            reason = np.where(left_out[ids], REASONS.index("filtered"), reason)
        columns |= {"selected": times > 0, "times": times}
        if self._removed is not None:
            near, held_out = self._removed.near[ids], self._removed.held_out[ids]
            held_out = np.where(self._removed.keep[ids], -1, held_out)
            cosine = self._removed.cosine[ids]
            reason = np.where(near >= 0, 2, np.where(held_out >= 0, 3, reason))
            columns["duplicate_of"] = pa.array(near, mask=near < 0)
            columns["held_out"] = pa.array(held_out, mask=held_out < 0)
            columns["cosine"] = pa.array(cosine, mask=np.isnan(cosine) | ((near < 0) & (held_out < 0)))
        if self._retrieved is not None:
            columns |= _reasons(self._retrieved, ids)
        failures: list[str | None] = [None] * len(ids)
        if not took_part.all():
            for failure in self._curation.embeddings.iterate_failures(int(ids[0]), int(ids[-1]) + 1):
                place = int(np.searchsorted(ids, failure["id"]))
                if place < len(ids) and ids[place] == failure["id"]:
                    failures[place], reason[place] = _text(failure["reason"]), 4
        columns["failure"] = pa.array(failures, pa.string())
        columns["reason"] = pa.array(REASONS).take(pa.array(reason))
        if self._coordinates is not None:
            for name, values in zip("xy", np.asarray(self._coordinates[ids], np.float32).T):
                columns[name] = pa.array(values, mask=~np.isfinite(values))
        if self._more is not None:
            more = self._more.take(pa.array(ids)).combine_chunks()
            columns |= {name: more[name].combine_chunks() for name in more.schema.names}
        return pa.record_batch([columns[name] for name in self.schema.names], self.schema)

    def _places(self, ids: np.ndarray) -> dict[str, Any]:
        assert self._pool is not None
        number = np.searchsorted(self._pool.shard_ranges(), ids, side="right") - 1
        present, place = np.unique(number, return_inverse=True)
        urls = pa.array([_text(str(self._pool.urls[one])) for one in present.tolist()], pa.string())
        return {"shard": urls.take(pa.array(place))}

    def _contents(self, pool: ShardPool, ids: np.ndarray) -> dict[str, Any]:
        """What the members of samples hold."""
        columns: dict[str, Any] = {"key": pa.array(map(_text, pool.keys(ids)), pa.string())}
        if self._labels is not None:
            label = self._labels[ids if self._ids is None else np.searchsorted(self._ids, ids)]
            columns["label"] = pa.array(label, mask=label < 0)
            if (names := self._class_names) is not None:
                named = [names[one] if 0 <= one < len(names) else None for one in label.tolist()]
                columns["class"] = pa.array(named, pa.string())
        if "caption" in self.schema.names:
            columns["caption"] = pa.array(read_captions(pool, ids), pa.string())
        if self._images is not None:
            columns["image"] = pa.array(_images(pool, ids, self._images), self.schema.field("image").type)
        return columns


def _reasons(found: Retrieved, ids: np.ndarray) -> dict[str, Any]:
    """Why samples were retrieved; null of those that were not."""
    place = np.minimum(np.searchsorted(found.ids, ids), max(len(found.ids) - 1, 0))
    if not len(found.ids):
        return {name: pa.nulls(len(ids)) for name in ("seed_set", "seed", "seed_rank", "seed_cosine")}
    missing = found.ids[place] != ids
    names = pa.array(found.names, pa.string())
    return {
        "seed_set": names.take(pa.array(found.seed_set[place], mask=missing)),
        "seed": pa.array(found.seed[place], mask=missing | (found.seed[place] < 0)),
        "seed_rank": pa.array(found.rank[place], mask=missing),
        "seed_cosine": pa.array(
            found.cosine[place].astype(np.float32), mask=missing | np.isnan(found.cosine[place])
        ),
    }


def _images(pool: ShardPool, ids: np.ndarray, side: int) -> Iterator[dict[str, Any] | None]:
    for first in range(0, len(ids), 256):
        for tile in thumbnails(pool, ids[first : first + 256], side):
            file = io.BytesIO()
            Image.fromarray(tile).save(file, "JPEG", quality=85)
            yield {"bytes": file.getvalue(), "path": None}


def _text(value: str) -> str:
    """A text that any reader takes: bytes that are not UTF-8 are written out as `\\x..`."""
    if value.isascii():
        return value
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
