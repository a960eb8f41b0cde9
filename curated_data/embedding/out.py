"""Writing embeddings to files that others read: parquet, or `.npy` as clip-retrieval has them."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from curated_data.cache.paths import local_path
from curated_data.cache.publishing import atomic_path
from curated_data.checks import check_choice
from curated_data.embedding.store import EmbeddingStore
from curated_data.errors import ConfigError
from curated_data.progress import progress

Keys = Callable[[np.ndarray], list[str]]
FORMATS = ("parquet", "npy")
_PART = 1 << 18  # rows in a file
_BLOCK = 1 << 14  # rows that are in memory at once


def check_folder(folder: str | Path, form: str) -> Path:
    """Check, before anything is embedded, where embeddings are to be written.

    Raises:
        ConfigError: an unknown format, or something is there already.
    """
    path = local_path(folder, "out")
    check_choice("format", form, FORMATS)
    if os.path.lexists(path):
        raise ConfigError(f"{path}: exists already; give a new folder, or move it away")
    return path


def write_embeddings(
    store: EmbeddingStore,
    keys: Keys,
    folder: str | Path,
    *,
    form: str = "parquet",
) -> Path:
    """Write the embeddings of all samples that have one, with their keys; the whole folder or nothing.

    `EmbeddedPool` and `precomputed:` read either format.

    Args:
        store: n rows, as `embed_pool` gives them.
        keys: gives the keys of samples by their ids.
        folder: a new folder.
        form: "parquet" for files with the columns `key` and `embedding`, or "npy" for the folders `img_emb`
            and `metadata`, as clip-retrieval has them.

    Returns:
        The folder.

    Raises:
        ConfigError: an unknown format, or something is there already.
        CacheError: the folder cannot be written.
    """
    path = check_folder(folder, form)
    write = _parquet if form == "parquet" else _arrays
    store.verify()
    ids = np.flatnonzero(store.valid)
    starts = range(0, len(ids), _PART)
    with atomic_path(path) as temporary, progress("writing", len(starts), "files") as advance:
        temporary.mkdir()
        for number, start in enumerate(starts):
            part = ids[start : start + _PART]
            blocks = [part[at : at + _BLOCK] for at in range(0, len(part), _BLOCK)]
            write(temporary, number, store, keys, blocks)
            advance()
    return path


def _parquet(folder: Path, number: int, store: EmbeddingStore, keys: Keys, blocks: list[np.ndarray]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.list_(pa.from_numpy_dtype(store.dtype), store.shape[1])
    schema = pa.schema([("key", pa.string()), ("embedding", kind)])
    place = folder / f"embeddings_{number:05d}.parquet"
    with pq.ParquetWriter(place, schema, compression="none", write_page_checksum=True) as file:
        for some in blocks:
            rows = pa.FixedSizeListArray.from_arrays(pa.array(store.rows(some).ravel()), store.shape[1])
            file.write_table(pa.table([_texts(keys(some)), rows], schema))


def _arrays(folder: Path, number: int, store: EmbeddingStore, keys: Keys, blocks: list[np.ndarray]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = np.concatenate(blocks)
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(exist_ok=True)
    with open(folder / "img_emb" / f"img_emb_{number}.npy", "wb") as file:
        shape = (len(ids), store.shape[1])
        header = {"descr": store.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for some in blocks:
            file.write(store.rows(some).data)
    table = pa.table({"key": _texts(keys(ids))})
    pq.write_table(table, folder / "metadata" / f"metadata_{number}.parquet", write_page_checksum=True)


def _texts(keys: list[str]) -> "object":
    """Keys as texts.

    Raises:
        ConfigError: one is not UTF-8, which parquet cannot hold.
    """
    import pyarrow as pa

    try:
        return pa.array(keys, pa.string())
    except (UnicodeEncodeError, pa.ArrowInvalid) as error:
        bad = next(key for key in keys if not key.isprintable())
        raise ConfigError(
            f"key {bad!r}: is not UTF-8, which parquet cannot hold; rename that sample"
        ) from error
