"""A page of pairs at falling cosine, by which the threshold of near-duplicates is chosen by looking."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from curated_data.cache.publishing import atomic_path
from curated_data.errors import ConfigError
from curated_data.report.examples import thumbnails
from curated_data.report.plain import plain_page, table
from curated_data.selection.near_duplicates import similar_pairs, would_leave_out

if TYPE_CHECKING:
    from curated_data.embedding import EmbeddingStore
    from curated_data.pool import ShardPool

_EDGES = (1.0, 0.999, 0.99, 0.98, 0.97, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7, 0.5)
_SIDE = 96  # pixels of a thumbnail


@dataclass(frozen=True)
class Band:
    """Pairs whose cosine lies between two possible thresholds.

    Attributes:
        least: the lowest cosine of the band, which is the threshold that is being considered.
        below: the end of the band, which is not in it; infinite for the first.
        n_pairs: how many pairs were found in it.
        n_pairs_above: how many at `least` or higher.
        n_left_out: about how many samples would be left out with `least` as the threshold.
        pairs: (p, 2) some of them, at falling cosine.
        cosine: (p,).
    """

    least: float
    below: float
    n_pairs: int
    n_pairs_above: int
    n_left_out: int
    pairs: np.ndarray
    cosine: np.ndarray


def write_pairs(
    pool: "ShardPool",
    store: "EmbeddingStore",
    path: str | Path,
    *,
    least: float = 0.85,
    n_pairs: int = 12,
    seed: int = 0,
) -> list[Band]:
    """Write one HTML page that needs nothing else, and return what is on it.

    Args:
        pool: whose images are shown; of samples without an image, the keys are.
        store: the embeddings of the pool.
        least: the lowest cosine to look for.
        n_pairs: how many pairs to show of each band, of different samples if there are as many.

    Raises:
        ConfigError: `least` is not a cosine below 1.
    """
    store.verify()
    edges = band_edges(least)
    pairs, cosine = similar_pairs(store, valid=store.valid, threshold=least)
    rng = np.random.default_rng(seed)
    bands = []
    for below, edge in pairwise([np.inf, *edges]):
        inside = np.flatnonzero((cosine >= edge) & (cosine < below))
        some = inside[_distinct(pairs[inside], n_pairs, rng)]
        some = some[np.argsort(-cosine[some], kind="stable")]
        above = cosine >= edge
        n_left_out = would_leave_out(len(store), pairs[above])
        bands.append(Band(edge, below, len(inside), int(above.sum()), n_left_out, pairs[some], cosine[some]))
    page = _page(pool, store, bands)
    with atomic_path(Path(path).expanduser()) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return bands


def band_edges(least: float) -> list[float]:
    """The thresholds to consider, falling, the last of them `least`.

    Raises:
        ConfigError: it is not a cosine below 1.
    """
    if not -1 < least < 1:
        raise ConfigError(f"--least {least}: give a cosine above -1 and below 1")
    return [*(edge for edge in _EDGES if edge > least), least]


def _distinct(pairs: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Places of up to n random pairs; a sample is in one of them, unless there are too few without."""
    order = rng.permutation(len(pairs))[: 100 * n]
    used: set[int] = set()
    fresh: list[int] = []
    others: list[int] = []
    for place in order.tolist():
        ends = set(pairs[place].tolist())
        (others if ends & used else fresh).append(place)
        used |= ends
    return np.array((fresh + others)[:n], np.int64)


def _page(pool: "ShardPool", store: "EmbeddingStore", bands: Sequence[Band]) -> str:
    shown = np.unique(np.concatenate([band.pairs.ravel() for band in bands]).astype(np.int64))
    keys = dict(zip(shown.tolist(), pool.keys(shown), strict=True))
    has_images = any(extension in pool.index().extensions for extension in pool.image_extensions)
    tiles = dict(zip(shown.tolist(), thumbnails(pool, shown, _SIDE), strict=True)) if has_images else {}

    def side(sample: int) -> str:
        tile = f'<img alt="" src="{_data_url(tiles[sample])}">' if has_images else ""
        key = html.escape(keys[sample])
        return f'<div class="side">{tile}<span title="{key}">{key}</span><small>{sample}</small></div>'

    sections = []
    for band in bands:
        name = "1: equal embeddings" if np.isinf(band.below) else f"{band.least:g} to {band.below:g}"
        figures = "".join(
            f'<figure><div class="two">{side(a)}{side(b)}</div><figcaption>{cosine:.4f}</figcaption></figure>'
            for (a, b), cosine in zip(band.pairs.tolist(), band.cosine.tolist(), strict=True)
        )
        count = f"{band.n_pairs:,} pairs" if band.n_pairs != 1 else "1 pair"
        count += f", {len(band.pairs)} of them shown" if len(band.pairs) < band.n_pairs else ""
        sections.append(
            f'<section><h2>Cosine {name}</h2><p class="soft">{count}</p><div class="pairs">{figures}</div>'
            "</section>"
        )
    n = len(store) - store.n_failures
    rows = [
        [
            f"{band.least:g}",
            f"{band.n_pairs_above:,}",
            f"{band.n_left_out:,}",
            f"{band.n_left_out / max(n, 1):.1%}",
        ]
        for band in bands
    ]  # fmt: skip
    head = ("threshold", "pairs at or above it", "samples left out, about", "of all")
    failed = f"; {store.n_failures:,} could not be embedded" if store.n_failures else ""
    return plain_page(
        "Pairs of near-duplicates",
        Path(__file__).with_name("duplicates.html").read_text(encoding="utf-8")
        + f"<p>{n:,} samples{failed}. Embedder: {html.escape(store.embedder)}.</p>"
        + f"<section>{table(head, rows)}</section>{''.join(sections)}",
    )


def _data_url(tile: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(tile).save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
