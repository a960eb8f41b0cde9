"""A self-contained HTML page about a curation: what went in, what was selected, and why.

The file contains everything the page shows (numbers as JSON, images as one sheet of tiles). It loads nothing,
which a content security policy enforces. The same curation gives the same bytes.
"""

import dataclasses
import html
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curated_data.cache.checksums import read_bytes
from curated_data.cache.removal import shown
from curated_data.config import CurationConfig
from curated_data.embedding.equal import equal_rows
from curated_data.embedding.existing import EmbeddedPool
from curated_data.errors import PoolError, printable
from curated_data.levels import Level
from curated_data.pool.captions import read_captions
from curated_data.pool.out import write_file
from curated_data.report.claim import opening
from curated_data.report.clusters import catch_all_clusters, cluster_names
from curated_data.report.examples import random_subset
from curated_data.report.map import cluster_tables, rows_of, sample_map, samples_shown
from curated_data.report.plain import filled, style
from curated_data.report.tiles import (
    COLUMNS,
    TILE,
    Tiles,
    contact_sheets,
    near_duplicate_groups,
    single_samples,
)
from curated_data.selection import metrics

if TYPE_CHECKING:
    from curated_data.stages.curation import Curation
    from curated_data.stages.index import AnyPool

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).with_name("page")
_SCRIPTS = ("figures", "samples", "reasons", "viewer", "browse", "map")
"""In order: together they are one module."""

_CAPTION = 200  # characters
_MOST_IMAGES = 40_000  # thumbnails: a JPEG has at most 65,535 rows of pixels
_LARGE = 300  # examples that are on the page in a larger size, too


def write_report(
    curation: "Curation",
    pool: "AnyPool",
    path: str | Path,
    *,
    coordinates: np.ndarray | None = None,
    coordinates_name: str = "t-SimCNE",
    labels: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    vocabulary: tuple[Sequence[str], np.ndarray] | None = None,
    title: str = "Curation report",
    n_map_points: int = 20_000,
    n_map_images: int = 1_000,
    n_coverage: int = 5_000,
    seed: int = 0,
    storage_options: Mapping[str, Any] | None = None,
) -> Any:
    """Write the report page of a curation.

    Args:
        curation: from `curate`.
        pool: the pool that was curated; the page of an `EmbeddedPool` has no images.
        path: of the HTML file, on this machine or the URL of one in a store.
        coordinates: (n, 2) of every sample, for the map; None takes the first two principal components of the
            embeddings.
        coordinates_name: how the given coordinates were computed, for the map's caption.
        labels: (n,) integer class of each sample, -1 for none; None reads the pool's `.cls` members, and
            gives no figures about classes if these are not integers.
        class_names: of the classes; None reads `classes.json` beside the first shard, or numbers the classes.
        vocabulary: k words and their embeddings (k, d) by the text tower of the embedder; clusters are called
            by the nearest ones instead of by captions or classes.
        title: of the page.
        n_map_points: number of samples on the map, for which the page can also explain why they were chosen.
            From a larger pool, a random subset of which half is selected, and all samples shown elsewhere.
        n_map_images: how many of these have a thumbnail, at most 40,000. One takes 0.5 to 2.2 kB of the page.
        n_coverage: number of samples whose distance to the nearest selected one is measured.
        seed: for the subsets.
        storage_options: for fsspec, to write to a store; None takes those of the pool.

    Returns:
        The path, or the URL.

    Raises:
        ValueError: an array of another length than the pool, labels that are not integers, too many images.
        CacheError: the path cannot be written.
    """
    n = len(pool)
    check_arrays(n, coordinates=coordinates, labels=labels)
    if vocabulary is not None:
        wanted = (len(vocabulary[0]), curation.embeddings.shape[1])
        if not vocabulary[0] or np.shape(vocabulary[1]) != wanted:
            raise ValueError(f"vocabulary: needs embeddings {wanted}, got {np.shape(vocabulary[1])}")
    if curation.tree.n_samples != n:
        raise ValueError(f"the curation is of {curation.tree.n_samples} samples, the pool has {n}")
    if n_map_images > _MOST_IMAGES:
        raise ValueError(f"n_map_images: {n_map_images} are more than a page can hold, {_MOST_IMAGES:,}")
    if labels is not None:
        labels = metrics.checked_labels(labels)
    elif not isinstance(pool, EmbeddedPool):
        labels = metrics.read_labels(pool)
    if class_names is None and not isinstance(pool, EmbeddedPool):
        class_names = class_names_beside(pool)
    balance = None if labels is None else metrics.class_balance(labels, curation.ids)
    places = None if labels is None or balance is None else balance.places(labels)
    rng = np.random.default_rng(seed)
    tiles = Tiles(pool)
    examples = {
        "sheets": contact_sheets(curation, tiles, seed),
        "singles": single_samples(curation, tiles, rng),
        "duplicates": near_duplicate_groups(curation, tiles),
    }
    tiles.enlarge(np.array(sorted(tiles.shown), np.int64)[:_LARGE])
    shown = np.union1d(samples_shown(curation, n_map_points, rng), list(tiles.shown)).astype(np.int64)
    captions = _captions(pool, shown)
    classes = None if balance is None else balance.names(class_names)
    names = cluster_names(
        curation.tree,
        shown,
        captions=captions,
        labels=places,
        class_names=classes,
        rows=None if vocabulary is None else rows_of(curation, shown),
        vocabulary=vocabulary,
    )
    first = opening(curation, balance, classes, names)
    central = np.array([row["central"] for row in first["rows"] if row["central"] >= 0], np.int64)
    tiles.add(central)
    if not np.isin(central, shown).all():
        shown = np.union1d(shown, central)
        captions = _captions(pool, shown)

    data = {
        "title": title,
        "pool": {"samples": n, "shards": len(pool.urls), "first": Path(pool.urls[0]).name},
        "selected": len(curation.ids),
        "unique": len(np.unique(curation.ids)),
        "failed": curation.embeddings.n_failures,
        "filters": curation.report.get("filters"),
        "retrieval": curation.report.get("retrieval"),
        "excluded": curation.report.get("excluded", 0),
        "equal": _equal(curation),
        "embedder": _embedder(curation),
        "origin": [["pool", " … ".join(dict.fromkeys(map(str, (pool.urls[0], pool.urls[-1]))))]],
        "settings": _settings(curation.config),
        "tree": _tree_settings(curation.config),
        "seconds": curation.report.get("seconds", {}),
        "levels": _levels(curation, rng),
        "classes": None
        if balance is None or places is None
        else _classes(curation, balance, places, class_names, rng),
        "coverage": _coverage(curation, n_coverage, rng),
        "opening": first,
        "names": names,
        "catch_all": catch_all_clusters(curation),
        **examples,
        "failures": _failures(curation),
        "clusters": cluster_tables(curation, shown),
        "map": sample_map(curation, pool, shown, coordinates, places, tiles, n_map_images, rng),
    }
    if data["embedder"]:
        data["origin"].append(["embedder", data["embedder"]])
    data["map"]["made_by"] = coordinates_name if coordinates is not None else "principal components"
    data["map"]["captions"] = captions
    data["tiles"] = {"size": TILE, "columns": COLUMNS, "image": tiles.sheet()}
    data["large"] = tiles.large
    page = _page(title, data)
    content = page.encode("utf-8")
    options = getattr(pool, "storage_options", None) if storage_options is None else storage_options
    written = write_file(path, content, options)
    log.info("wrote the report, %.1f MB", len(content) / 1e6)
    return written


def _page(title: str, data: Mapping[str, Any]) -> str:
    """The page in one file, with its style, its script and its data."""
    script = "".join((_FOLDER / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    return filled(
        _FOLDER / "page.html", title=html.escape(title), style=style(), data=_json(data), script=script
    )


def _equal(curation: "Curation") -> dict[str, int] | None:
    """How many embeddings are one and the same, if that is many."""
    found = equal_rows(curation.embeddings)
    return {"largest": found.largest, "looked_at": found.looked_at} if found.are_many else None


def check_arrays(n: int, *, coordinates: np.ndarray | None, labels: np.ndarray | None) -> None:
    """Check the arrays for `write_report`, before the n samples are curated.

    Raises:
        ValueError: an array of another length than the pool, or of values that are not real numbers
            (coordinates) or integers (labels).
    """
    if coordinates is not None and np.shape(coordinates) != (n, 2):
        raise ValueError(f"coordinates need shape ({n}, 2), got {np.shape(coordinates)}")
    if coordinates is not None and np.asarray(coordinates).dtype.kind not in "iuf":
        raise ValueError(f"coordinates need real numbers, got {np.asarray(coordinates).dtype}")
    if labels is not None and np.shape(labels) != (n,):
        raise ValueError(f"labels need shape ({n},), got {np.shape(labels)}")
    if labels is not None:
        metrics.checked_labels(labels)


def _embedder(curation: "Curation") -> str:
    """The name of the embedder, empty if unknown."""
    return getattr(curation.embeddings, "embedder", "")


def _captions(pool: "AnyPool", shown: np.ndarray) -> list[str | None] | None:
    """The captions of the samples shown, the long ones cut; None if the pool has none."""
    captions = [] if isinstance(pool, EmbeddedPool) else read_captions(pool, shown)
    if not any(captions):
        return None
    return [
        text if text is None or len(text) <= _CAPTION else text[: _CAPTION - 1] + "…" for text in captions
    ]


def _settings(config: Any) -> list[list[Any]]:
    """Dotted name, value, and whether it is the default, for each setting except the levels."""
    default = dict(_flat(CurationConfig(target_size=0)))
    return [[name, value, default.get(name) == value] for name, value in _flat(config)]


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    fields = config if isinstance(config, Mapping) else dataclasses.asdict(config)
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif name != "levels":
            if isinstance(value, list | tuple) and len(value) > 20:
                value = f"{len(value):,} of them"
            elif isinstance(value, list | tuple):
                value = ", ".join(map(str, value)) or "none"
            words = {None: "none", True: "yes", False: "no"}
            yield prefix + name, words[value] if value is None or isinstance(value, bool) else str(value)


def _tree_settings(config: Any) -> list[list[str]]:
    """One row per level: number, clusters, resamplings, samples per cluster in each of them, splits."""
    levels = config.get("levels") if isinstance(config, Mapping) else config.levels
    rows = []
    for number, level in enumerate(levels or (), 1):
        level = level if isinstance(level, Level) else Level(**level)
        size = "half the mean size" if level.sample_size is None else f"{level.sample_size:,}"
        resampled = level.n_resamples if level.n_splits == 1 else 0
        clusters = f"{level.n_clusters * level.n_splits:,}"
        rows.append([str(number), clusters, str(resampled), size if resampled else "", str(level.n_splits)])
    return rows


def _levels(curation: "Curation", rng: np.random.Generator) -> list[dict[str, Any]]:
    """The balance of each level, with cluster sizes by rank; the same for a random selection."""
    tree, ids = curation.tree, curation.ids
    random = _random_selection(curation, rng)
    selected, by_chance = metrics.selected_sizes(tree, ids), metrics.selected_sizes(tree, random)
    levels = []
    for balance, chance in zip(metrics.cluster_balance(tree, ids), metrics.cluster_balance(tree, random)):
        sizes = tree.sizes(balance.level)
        levels.append(
            {
                **dataclasses.asdict(balance),
                "random_perplexity": chance.selected_perplexity,
                "random_gini": chance.selected_gini,
                "random_covered": chance.covered,
                "curves": {
                    "pool": _rank_curve(sizes),
                    "random": _rank_curve(by_chance[balance.level]),
                    "selected": _rank_curve(selected[balance.level]),
                },
            }
        )
    return levels


def _rank_curve(sizes: np.ndarray, most: int = 240) -> list[list[int]]:
    """[ranks, sizes] of the nonempty clusters, largest first, at ranks evenly spaced on a log scale."""
    ranked = np.sort(sizes[sizes > 0])[::-1]
    if not len(ranked):
        return [[], []]
    rank = np.unique(np.geomspace(1, len(ranked), most).round().astype(np.int64))
    return [rank.tolist(), ranked[rank - 1].tolist()]


def _classes(
    curation: "Curation",
    balance: metrics.ClassBalance,
    places: np.ndarray,
    names: Sequence[str] | None,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """The classes' figures; `places` (n,) are those of the samples' classes in them, -1 for no class."""
    random = metrics.class_balance(places, _random_selection(curation, rng))
    assert random is not None, "of the same labels"
    return {
        "names": balance.names(names),
        "before": balance.before.tolist(),
        "random": random.after.tolist(),
        "after": balance.after.tolist(),
        "entropy": [balance.entropy_before, random.entropy_after, balance.entropy_after],
        "ratio": [_finite(r) for r in (balance.ratio_before, random.ratio_after, balance.ratio_after)],
        "unlabelled": int((places < 0).sum()),
    }


def class_names_beside(pool: "AnyPool") -> list[str] | None:
    """The class names of a column of labels, or those that `import_folder` and `export_labelled` write beside
    local shards.
    """
    if not isinstance(pool, EmbeddedPool) and pool.label_column is not None:
        assert pool.described is not None, "with a column"
        return None if pool.described.names is None else list(pool.described.names)
    path = Path(pool.urls[0]).parent / "classes.json"
    if "://" in str(pool.urls[0]) or not path.is_file():
        return None
    try:
        names = json.loads(read_bytes(path))
    except Exception as error:  # a parser's own, such as of text nested too deeply
        raise PoolError(
            f"{path}: not a JSON list of class names ({printable(error)}); correct or remove it"
        ) from error
    if not isinstance(names, list):
        raise PoolError(f"{path}: expected a list of class names, found {shown(names)}; correct or remove it")
    return [str(name) for name in names]


def _coverage(curation: "Curation", n_queries: int, rng: np.random.Generator) -> dict[str, Any] | None:
    """Distances from samples of the pool to the nearest selected one, and to that of a random selection."""
    valid = np.flatnonzero(curation.tree.parent[1] >= 0)
    if not len(curation.ids):
        return None
    queries = np.sort(random_subset(valid, n_queries, rng))
    metric = curation.tree.metric
    share = np.linspace(0, 1, 101)
    curves = {}
    for name, ids in (("selected", curation.ids), ("random", _random_selection(curation, rng))):
        distance = metrics.coverage_distance(curation.embeddings, ids, queries=queries, metric=metric)
        curves[name] = np.quantile(distance, share).tolist()
    return {"metric": metric, "queries": len(queries), "share": share.tolist(), **curves}


def _random_selection(curation: "Curation", rng: np.random.Generator) -> np.ndarray:
    """A random selection of as many different samples, from those that could have been selected."""
    valid = np.flatnonzero(curation.tree.parent[1] >= 0)
    return random_subset(valid, len(np.unique(curation.ids)), rng)


def _failures(curation: "Curation", n_examples: int = 50) -> dict[str, Any]:
    """The number of failures, the most frequent reasons, and the first failures."""
    reasons: Counter[str] = Counter()
    examples: list[list[Any]] = []
    for failure in curation.embeddings.iterate_failures():
        reason = _without_sample(failure)
        reasons[reason] += 1
        if len(examples) < n_examples:
            examples.append([failure["id"], Path(failure["shard"]).name, failure["key"], reason])
    return {
        "count": curation.embeddings.n_failures,
        "reasons": reasons.most_common(10),
        "examples": examples,
    }


def _without_sample(failure: Mapping[str, Any]) -> str:
    """A failure's reason without its leading shard and key, so that equal reasons can be counted."""
    reason = failure["reason"].removeprefix(f"{failure['shard']}: ")
    return reason.removeprefix(f"sample {failure['key']!r}, ")


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _json(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c")
