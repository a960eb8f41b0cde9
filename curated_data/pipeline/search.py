"""Search a pool by its embeddings: the samples nearest to an image, a text or a vector, as a sheet of images.

A search is exact and reads the embeddings once, from memory maps, see `curated_data.selection.retrieval`.
"""

import base64
import html
import io
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from curated_data.cache.artifacts import absolute
from curated_data.cache.paths import local_path
from curated_data.embedding import embed_pool
from curated_data.embedding.embedders import TextImageEmbedder
from curated_data.embedding.text import MiniLM
from curated_data.errors import CacheError, ConfigError, PoolError, SampleError
from curated_data.pool import ShardPool, ShardWriter
from curated_data.pool.captions import read_captions
from curated_data.report.examples import thumbnails
from curated_data.report.plain import plain_page
from curated_data.selection.removed import Removed
from curated_data.selection.retrieval import retrieve

if TYPE_CHECKING:
    from curated_data.embedding import EmbeddingStore
    from curated_data.embedding.embedders import Embedder
    from curated_data.matrix import Matrix
    from curated_data.stages.curation import Curation

log = logging.getLogger(__name__)

_INTRODUCTION = """<p class="soft">Nearest first, by the cosine of the embeddings; each below the query that
it is nearest to, with its id, cosine, key and shard. Where a selection was given, a blue frame marks its
samples.</p>
"""
_SIDE, _LINE, _COLUMNS = 128, 15, 6  # pixels of an image and of a line of text, and columns of a sheet


@dataclass(frozen=True)
class Found:
    """Samples by falling cosine with the query that each is nearest to.

    Attributes:
        ids: (k,) int64.
        cosine: (k,) float64.
        query: (k,) int64, the row of that query.
        times: (k,) how often each is selected; -1 without a curation.
        duplicate_of: (k,) the kept sample that each is a near-duplicate of, -1 for none; None if the
            curation looked for none, or there is no curation.
    """

    ids: np.ndarray
    cosine: np.ndarray
    query: np.ndarray
    times: np.ndarray
    duplicate_of: np.ndarray | None

    def __len__(self) -> int:
        return len(self.ids)


def search(
    embeddings: "Matrix",
    queries: np.ndarray,
    n: int = 24,
    *,
    least: float | None = None,
    valid: np.ndarray | None = None,
    curation: "Curation | None" = None,
) -> Found:
    """The samples whose embeddings are nearest to the queries by cosine.

    Args:
        embeddings: (n, d) of the pool.
        queries: (m, d), or one (d,).
        n: how many samples each query finds.
        least: the cosine that a sample needs at least.
        valid: (n,) bool, False for samples to leave out, such as those that failed.
        curation: of the pool, which says what of it was selected.

    Raises:
        ConfigError: arguments that do not fit each other.

    Examples:
        >>> import numpy as np
        >>> from curated_data.pipeline.search import search
        >>> rows = np.random.default_rng(0).normal(size=(1000, 8))
        >>> search(rows, rows[7], n=1).ids.tolist()
        [7]
    """
    queries = np.atleast_2d(queries)
    if curation is not None and curation.tree.n_samples != len(embeddings):
        raise ConfigError(
            f"curation: is of {curation.tree.n_samples} samples, the pool has {len(embeddings)}; give its own"
        )
    found = retrieve(embeddings, {"query": queries}, n, least=least, valid=valid)
    order = np.lexsort((found.ids, -found.cosine))
    ids = found.ids[order]
    times, near = np.full(len(ids), -1), None
    if curation is not None:
        times = np.bincount(curation.ids, minlength=len(embeddings))[ids]
        folder = curation.folders.get("near_duplicates")
        near = None if folder is None else Removed.load(folder).near[ids]
    return Found(ids, found.cosine[order], found.seed[order], times, near)


def embed_queries(
    pool: ShardPool, embedder: "Embedder", images: Sequence[str | Path] = (), texts: Sequence[str] = ()
) -> np.ndarray:
    """(m, d) embeddings of images, then of texts, made as those of the pool were.

    Raises:
        PoolError: no such file.
        SampleError: one cannot be embedded.
        ConfigError: a text for an embedder of images, or neither.
    """
    if not images and not texts:
        raise ConfigError("search: nothing to look for; give a text, an image, or vectors")
    rows = []
    if texts:
        if not isinstance(embedder, TextImageEmbedder | MiniLM):
            raise ConfigError(
                f"search: the embedder {getattr(embedder, 'name', 'given')!r} takes no text; give --image, "
                "an embedder with a text tower (transformers: and the name of a CLIP or SigLIP; minilm for "
                "pools of text), or --vectors with embeddings of your texts"
            )
        if not all(text.strip() for text in texts):
            raise SampleError("search: a text is empty")
        rows.append(embedder.embed_texts(texts).numpy())
    if images:
        rows.insert(0, _embed_images(pool, embedder, images))
    return np.concatenate(rows)


def _embed_images(pool: ShardPool, embedder: "Embedder", images: Sequence[str | Path]) -> np.ndarray:
    """(m, d), through a pool of their own, so that they are decoded and embedded as any other."""
    with tempfile.TemporaryDirectory(prefix="curated-data-") as folder:
        names = []
        with ShardWriter(Path(folder) / "queries-%06d.tar") as writer:
            for number, image in enumerate(images):
                path = local_path(image, "image")
                if not path.is_file():
                    raise PoolError(f"{path}: no such file; give an image")
                extension = path.suffix.lower().lstrip(".")
                if extension not in pool.image_extensions:
                    known = ", ".join(pool.image_extensions)
                    raise PoolError(f"{path}: no image by its name; expected one of {known}")
                writer.write({"__key__": f"{number:06d}", extension: path.read_bytes()})
                names.append(str(path))
        queries = ShardPool(str(Path(folder) / "queries-*.tar"), image_extensions=pool.image_extensions)
        queries.images = pool.images
        store = embed_pool(queries, embedder, Path(folder), num_workers=0, dtype="float32", fields=[])
        for failure in store.iterate_failures():
            raise SampleError(f"{names[failure['id']]}: cannot be embedded: {failure['reason']}")
        return store.as_array()


def newest_curation(cache_dir: str | Path, store: "EmbeddingStore") -> "Curation | None":
    """The newest curation in a cache that was made by these embeddings; None if there is none."""
    from curated_data.pipeline.reopen import reopen, selections  # here: it imports all stages

    for name in selections(absolute(cache_dir)):
        try:
            curation = reopen(cache_dir, name)
        except CacheError as error:  # of an earlier version, say, or one whose tree is gone
            log.warning("selection %s is passed over: %s", name, error)
            continue
        if curation.embeddings.fingerprint == store.fingerprint:
            return curation
    return None


def rows_of(found: Found, pool: ShardPool) -> list[dict[str, Any]]:
    """What was found as one mapping a sample, by falling cosine."""
    shards = [pool.urls[number] for number in pool.shard_of(found.ids).tolist()]
    rows = []
    for place, (sample, shard, key) in enumerate(zip(found.ids.tolist(), shards, pool.keys(found.ids))):
        row: dict[str, Any] = {"id": sample, "cosine": float(found.cosine[place]), "shard": shard, "key": key}
        if found.times[place] >= 0:
            row["times"] = int(found.times[place])
        if found.duplicate_of is not None:
            row["duplicate_of"] = None if found.duplicate_of[place] < 0 else int(found.duplicate_of[place])
        rows.append(row)
    return rows


def contact_page(found: Found, pool: ShardPool, queries: Sequence[str] = ()) -> bytes:
    """An HTML page, which needs nothing else, of the samples found, with their keys and captions, each below
    the query that it is nearest to.

    Args:
        found: from `search`.
        pool: that was searched.
        queries: what was looked for, for the headings; more queries than these are numbered.
    """
    has_images = any(extension in pool.index().extensions for extension in pool.image_extensions)
    tiles = thumbnails(pool, found.ids, _SIDE) if has_images else [None] * len(found)
    captions = read_captions(pool, found.ids)
    rows = rows_of(found, pool)
    sections = []
    for number in range(max(int(found.query.max(initial=-1)) + 1, len(queries))):
        cells = []
        for place in np.flatnonzero(found.query == number).tolist():
            row, tile, caption = rows[place], tiles[place], captions[place]
            state = {None: "", 0: "not selected", 1: "selected"}.get(
                row.get("times"), f"selected {row.get('times')} times"
            )
            image = "" if tile is None else f'<img alt="" src="{_data_url(tile)}">'
            words = [row["key"], caption or "", Path(row["shard"]).name, state]
            if row.get("duplicate_of") is not None:
                words.append(f"near-duplicate of {row['duplicate_of']}")
            lines = "".join(f"<span>{html.escape(word)}</span>" for word in words if word)
            marked = ' class="selected"' if row.get("times") else ""
            cells.append(
                f"<figure{marked}>{image}<figcaption><b>{row['id']}</b> {row['cosine']:.3f}{lines}"
                "</figcaption></figure>"
            )
        name = html.escape(queries[number]) if number < len(queries) else f"query {number}"
        shown = f'<div class="found">{"".join(cells)}</div>' if cells else "<p>Nothing found.</p>"
        sections.append(f"<section><h2>{name}</h2>{shown}</section>")
    return plain_page("Samples found", _INTRODUCTION + "".join(sections)).encode("utf-8", "surrogateescape")


def _data_url(tile: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(tile).save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def contact_sheet(found: Found, pool: ShardPool) -> bytes:
    """A PNG of the images found, each with its id and cosine; a frame marks those that are selected."""
    n_rows = max(-(-len(found) // _COLUMNS), 1)
    cell = (_SIDE + 12, _SIDE + 12 + 2 * _LINE)
    sheet = Image.new("RGB", (cell[0] * _COLUMNS, cell[1] * n_rows), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, tile in enumerate(thumbnails(pool, found.ids, _SIDE)):
        left, top = cell[0] * (place % _COLUMNS) + 6, cell[1] * (place // _COLUMNS) + 6
        sheet.paste(Image.fromarray(tile), (left, top))
        times = int(found.times[place])
        if times > 0:
            pen.rectangle((left - 3, top - 3, left + _SIDE + 2, top + _SIDE + 2), outline="#2563eb", width=3)
        state = {-1: "", 0: "not selected", 1: "selected"}.get(times, f"selected {times} times")
        pen.text((left, top + _SIDE + 3), f"{found.ids[place]}  {found.cosine[place]:.3f}", "black", font)
        pen.text((left, top + _SIDE + 3 + _LINE), state, "#5d6878", font)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()
