"""One self-contained HTML page about a curation: what went in, what came out, and why.

Everything the page shows is in the file (numbers as JSON, images as one sheet of tiles): it loads nothing,
and a content policy in its head forbids it to. The same curation gives the same bytes.
"""

import base64
import dataclasses
import html
import io
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from sklearn.decomposition import PCA

from curated_data.cache import atomic_path
from curated_data.clustering.hierarchy import Level
from curated_data.config import CurationConfig
from curated_data.report import metrics
from curated_data.report.examples import cluster_rows, random_subset, thumbnails
from curated_data.selection.removed import Removed

if TYPE_CHECKING:
    from curated_data.pipeline import Curation
    from curated_data.pool import ShardPool

log = logging.getLogger(__name__)

_TEMPLATE = Path(__file__).with_name("template.html")
_TILE = 48  # pixels of a thumbnail's side
_COLUMNS = 32  # of the sheet of tiles


def write_report(
    curation: "Curation",
    pool: "ShardPool",
    path: str | Path,
    *,
    coordinates: np.ndarray | None = None,
    coordinates_name: str = "t-SimCNE",
    labels: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    title: str = "Curation report",
    n_map_points: int = 20_000,
    n_map_images: int = 1_000,
    n_coverage: int = 5_000,
    seed: int = 0,
) -> Path:
    """Write the report page of a curation.

    Args:
        curation: what `curate` returned.
        pool: the pool that it curated.
        path: of the HTML file.
        coordinates: (n, 2) of every sample, for the map; None takes the first two principal components of the
            embeddings.
        coordinates_name: how the given coordinates were made, for the map's caption.
        labels: (n,) class of each sample, -1 for none; None reads them from the pool's `.cls` members.
        class_names: of the classes; None takes `classes.json` from beside the first shard, or numbers them.
        title: of the page.
        n_map_points: samples on the map, and that "why was this chosen" knows of; a random subset of a larger
            pool, half of it selected, and all that the page shows elsewhere.
        n_map_images: how many of these have a thumbnail.
        n_coverage: samples whose distance to the nearest selected one is measured.
        seed: of the subsets.

    Returns:
        The path.

    Raises:
        ValueError: an array whose length is not the pool's.
        CacheError: the path cannot be written.
    """
    n = len(pool)
    check_arrays(n, coordinates=coordinates, labels=labels)
    if curation.tree.n_samples != n:
        raise ValueError(f"the curation is of {curation.tree.n_samples} samples, the pool has {n}")
    if labels is None and "cls" in pool.index().extensions:
        labels = pool.labels(np.arange(n))
    if class_names is None:
        class_names = class_names_beside(pool)
    rng = np.random.default_rng(seed)
    images = _Images(pool)
    examples = {
        "sheets": _sheets(curation, images, seed),
        "singles": _singles(curation, images, rng),
        "duplicates": _duplicates(curation, images),
    }
    shown = np.union1d(_shown(curation, n_map_points, rng), list(images.shown)).astype(np.int64)

    data = {
        "title": title,
        "pool": {"samples": n, "shards": len(pool.urls), "first": Path(pool.urls[0]).name},
        "selected": len(curation.ids),
        "unique": len(np.unique(curation.ids)),
        "failed": len(curation.embeddings.failures),
        "embedder": _embedder(curation),
        "origin": [["pool", " … ".join(dict.fromkeys(map(str, (pool.urls[0], pool.urls[-1]))))]],
        "settings": _settings(curation.config),
        "tree": _tree_settings(curation.config),
        "seconds": curation.report.get("seconds", {}),
        "levels": _levels(curation, rng),
        "classes": _classes(curation, labels, class_names, rng),
        "coverage": _coverage(curation, n_coverage, rng),
        **examples,
        "failures": _failures(curation),
        "clusters": _cluster_tables(curation, shown),
        "map": _map(curation, pool, shown, coordinates, labels, images, n_map_images, rng),
    }
    if data["embedder"]:
        data["origin"].append(["embedder", data["embedder"]])
    data["map"]["made_by"] = coordinates_name if coordinates is not None else "principal components"
    data["tiles"] = {"size": _TILE, "columns": _COLUMNS, "image": images.sheet()}
    page = _TEMPLATE.read_text(encoding="utf-8").replace("{{title}}", html.escape(title))
    page = page.replace("{{data}}", _json(data))
    path = Path(path)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    log.info("report: %s, %.1f MB", path, path.stat().st_size / 1e6)
    return path


def check_arrays(n: int, *, coordinates: np.ndarray | None, labels: np.ndarray | None) -> None:
    """Refuse what `write_report` is given beside a curation of n samples, before that is made.

    Raises:
        ValueError: an array whose length is not the pool's.
    """
    if coordinates is not None and np.shape(coordinates) != (n, 2):
        raise ValueError(f"coordinates need shape ({n}, 2), got {np.shape(coordinates)}")
    if labels is not None and np.shape(labels) != (n,):
        raise ValueError(f"labels need shape ({n},), got {np.shape(labels)}")


class _Images:
    """Collects the samples whose thumbnails the page needs, each once."""

    def __init__(self, pool: "ShardPool"):
        self.pool = pool
        self.place: dict[int, int] = {}
        self.shown: set[int] = set()
        self.available = any(e in pool.index().extensions for e in pool.image_extensions)

    def add(self, ids: np.ndarray) -> list[int]:
        """Each id's tile; -1 where the pool has no images."""
        self.shown.update(ids.tolist())
        if not self.available:
            return [-1] * len(ids)
        return [self.place.setdefault(int(i), len(self.place)) for i in ids]

    def sheet(self) -> str:
        """All tiles on one JPEG, row by row, as a data URL."""
        if not self.place:
            return ""
        tiles = thumbnails(self.pool, np.array(list(self.place)), _TILE)
        n_rows = -(-len(tiles) // _COLUMNS)
        blank = np.full((n_rows * _COLUMNS - len(tiles), _TILE, _TILE, 3), 255, np.uint8)
        grid = np.concatenate([tiles, blank]).reshape(n_rows, _COLUMNS, _TILE, _TILE, 3)
        file = io.BytesIO()
        Image.fromarray(grid.swapaxes(1, 2).reshape(n_rows * _TILE, _COLUMNS * _TILE, 3)).save(
            file, "JPEG", quality=82
        )
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _shown(curation: "Curation", most: int, rng: np.random.Generator) -> np.ndarray:
    """Ids, ascending, of the samples that the page knows: all, or up to half of them selected and others."""
    n = curation.tree.n_samples
    if n <= most:
        return np.arange(n)
    selected = random_subset(np.unique(curation.ids), most // 2, rng)
    others = rng.choice(n, min(n, 2 * most), replace=False)
    others = others[~np.isin(others, curation.ids)][: most - len(selected)]
    return np.sort(np.concatenate([selected, others]))


def _embedder(curation: "Curation") -> str:
    """What the features came from, as the embeddings say; empty where they do not."""
    return getattr(curation.embeddings, "embedder", "")


def _settings(config: Any) -> list[list[Any]]:
    """Dotted name, value, and whether that is the default, of each setting but the levels."""
    default = dict(_flat(CurationConfig(target_size=0)))
    return [[name, value, default.get(name) == value] for name, value in _flat(config)]


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    fields = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif name != "levels":
            if isinstance(value, list | tuple):
                value = ", ".join(map(str, value)) or "none"
            words = {None: "none", True: "yes", False: "no"}
            yield prefix + name, words[value] if value is None or isinstance(value, bool) else str(value)


def _tree_settings(config: Any) -> list[list[str]]:
    """One row a level: its number, clusters, resamplings, samples a cluster in each of them, splits."""
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
    """Balance of each level, with curves of cluster sizes by rank, and the same for a random selection."""
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
    """[ranks, sizes] of the clusters that hold something, the largest first, thinned evenly in log rank."""
    ranked = np.sort(sizes[sizes > 0])[::-1]
    if not len(ranked):
        return [[], []]
    rank = np.unique(np.geomspace(1, len(ranked), most).round().astype(np.int64))
    return [rank.tolist(), ranked[rank - 1].tolist()]


def _classes(
    curation: "Curation",
    labels: np.ndarray | None,
    names: Sequence[str] | None,
    rng: np.random.Generator,
) -> dict[str, Any] | None:
    balance = None if labels is None else metrics.class_balance(labels, curation.ids)
    if balance is None:
        return None
    random = metrics.class_balance(labels, _random_selection(curation, rng))
    n_classes = len(balance.before)
    if names is not None and len(names) < n_classes:
        raise ValueError(f"{len(names)} class_names, but the labels go up to {n_classes - 1}")
    return {
        "names": [str(c) for c in range(n_classes)] if names is None else list(names[:n_classes]),
        "before": balance.before.tolist(),
        "random": random.after.tolist(),
        "after": balance.after.tolist(),
        "entropy": [balance.entropy_before, random.entropy_after, balance.entropy_after],
        "ratio": [_finite(r) for r in (balance.ratio_before, random.ratio_after, balance.ratio_after)],
        "unlabelled": int((labels < 0).sum()),
    }


def class_names_beside(pool: "ShardPool") -> list[str] | None:
    """The class names that `import_folder` and `export_labelled` leave beside local shards."""
    path = Path(pool.urls[0]).parent / "classes.json"
    if "://" in str(pool.urls[0]) or not path.is_file():
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON list of class names ({error}); mend it, or remove it") from error
    return [str(name) for name in names]


def _coverage(curation: "Curation", n_queries: int, rng: np.random.Generator) -> dict[str, Any] | None:
    """Distance from samples of the pool to the nearest selected one, against a random selection's."""
    valid = np.flatnonzero(curation.tree.parent[1] >= 0)
    if not len(curation.ids):
        return None
    queries = np.sort(random_subset(valid, n_queries, rng))
    metric = getattr(curation.config, "metric", "l2")
    share = np.linspace(0, 1, 101)
    curves = {}
    for name, ids in (("selected", curation.ids), ("random", _random_selection(curation, rng))):
        distance = metrics.coverage_distance(curation.embeddings, ids, queries=queries, metric=metric)
        curves[name] = np.quantile(distance, share).tolist()
    return {"metric": metric, "queries": len(queries), "share": share.tolist(), **curves}


def _random_selection(curation: "Curation", rng: np.random.Generator) -> np.ndarray:
    """As many different samples as the selection has, drawn evenly from those that could have been
    selected.
    """
    valid = np.flatnonzero(curation.tree.parent[1] >= 0)
    return random_subset(valid, len(np.unique(curation.ids)), rng)


def _sheets(curation: "Curation", images: _Images, seed: int) -> list[dict[str, Any]]:
    """Rows of the contact sheets, level 1, no cluster twice, and none of a single sample."""
    sheets: list[dict[str, Any]] = []
    for choose in ("largest", "smallest", "most cut"):
        seen = [sheet["cluster"] for sheet in sheets]
        for row in cluster_rows(
            curation.tree,
            curation.ids,
            choose=choose,
            n_clusters=4,
            n_images=9,
            exclude=seen,
            least=2,
            seed=seed,
        ):
            content = dataclasses.asdict(row)
            for kind in ("kept", "dropped"):
                content[kind] = [content[kind].tolist(), images.add(content[kind])]
            sheets.append(content)
    return sheets


def _singles(curation: "Curation", images: _Images, rng: np.random.Generator) -> dict[str, Any] | None:
    """The lowest clusters of one sample: how many there are, how many were kept, and examples of both."""
    leaf = curation.tree.parent[1]
    single = np.append(curation.tree.sizes(1) == 1, False)  # the last for -1, excluded
    alone = np.flatnonzero(single[leaf])
    if not len(alone):
        return None
    kept = np.isin(alone, curation.ids)
    sides = {}
    for name, ids in (("kept", alone[kept]), ("dropped", alone[~kept])):
        some = np.sort(random_subset(ids, 18, rng))
        sides[name] = [some.tolist(), images.add(some)]
    return {"n": len(alone), "n_kept": int(kept.sum()), **sides}


def _duplicates(curation: "Curation", images: _Images, n_groups: int = 12) -> dict[str, Any] | None:
    """The largest groups of near-duplicates, what was kept of each and some of what was not; and the copies
    of held-out samples.
    """
    folder = curation.folders.get("near_duplicates")
    if folder is None:
        return None
    found = Removed.load(folder)
    members = np.bincount(found.group[found.group >= 0], minlength=len(found.group))
    largest = np.argsort(-members, kind="stable")[:n_groups]
    groups = []
    for first in largest[members[largest] > 1].tolist():
        ids = np.flatnonzero(found.group == first)
        kept, dropped = ids[found.keep[ids]][:3], ids[~found.keep[ids]][:9]
        groups.append(
            {
                "size": len(ids),
                "kept": [kept.tolist(), images.add(kept)],
                "dropped": [dropped.tolist(), images.add(dropped)],
            }
        )
    held_out = np.flatnonzero(found.held_out >= 0)
    return {
        "removed": int(((found.group >= 0) & ~found.keep).sum()) - len(held_out),
        "held_out": len(held_out),
        "held_out_examples": [held_out[:18].tolist(), images.add(held_out[:18])],
        "n_groups": int((members > 1).sum()),
        "groups": groups,
    }


def _failures(curation: "Curation", n_examples: int = 50) -> dict[str, Any]:
    failures = curation.embeddings.failures
    plain = [_without_sample(failure) for failure in failures]
    examples = [
        [f["id"], Path(f["shard"]).name, f["key"], reason] for f, reason in zip(failures[:n_examples], plain)
    ]
    return {"count": len(failures), "reasons": Counter(plain).most_common(10), "examples": examples}


def _without_sample(failure: Mapping[str, Any]) -> str:
    """A failure's reason without the shard and key that it begins with, so that equal reasons are equal."""
    reason = failure["reason"].removeprefix(f"{failure['shard']}: ")
    return reason.removeprefix(f"sample {failure['key']!r}, ")


def _cluster_tables(curation: "Curation", shown: np.ndarray) -> list[dict[str, str]]:
    """For each level, the clusters above the samples shown: number, size, given, row of the parent,
    siblings.
    """
    tree = curation.tree
    given = metrics.selected_sizes(tree, curation.ids)
    node = tree.parent[1][shown]
    tables: list[dict[str, str]] = []
    clusters = np.unique(node[node >= 0])
    for level in range(1, tree.n_levels + 1):
        sizes = tree.sizes(level)
        top = level == tree.n_levels
        parent = np.zeros(len(sizes), np.int64) if top else tree.parent[level + 1]
        attached = (parent >= 0) & (sizes > 0)
        siblings = np.bincount(parent[attached], minlength=parent.max(initial=0) + 1)
        above = np.unique(parent[clusters])
        columns = {
            "id": clusters,
            "size": sizes[clusters],
            "given": given[level][clusters],
            "parent": np.searchsorted(above, parent[clusters]),
            "siblings": siblings[parent[clusters]],
        }
        tables.append({name: _packed(values, np.int32) for name, values in columns.items()})
        clusters = above
    return tables


def _map(
    curation: "Curation",
    pool: "ShardPool",
    shown: np.ndarray,
    coordinates: np.ndarray | None,
    labels: np.ndarray | None,
    images: _Images,
    n_images: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """What the page knows of each sample shown; arrays in base64, little endian."""
    tree = curation.tree
    xy = _principal_components(curation, shown, rng) if coordinates is None else coordinates[shown]
    xy = np.asarray(xy, np.float64)
    finite = np.isfinite(xy).all(axis=1)
    low, high = (xy[finite].min(0), xy[finite].max(0)) if finite.any() else (np.zeros(2), np.ones(2))
    scale = max(float((high - low).max()), 1e-12)
    placed = np.where(finite[:, None], (xy - low) / scale * 65_534 + 1, 0)  # 0 says: nowhere on the map
    leaf = tree.parent[1][shown]
    count = np.bincount(curation.ids, minlength=tree.n_samples)[shown]
    folder = curation.folders.get("near_duplicates")
    wide = tree.n_samples >= 2**31
    tile = np.full(len(shown), -1, np.int32)
    with_image = np.sort(rng.permutation(len(shown))[:n_images])
    tile[with_image] = images.add(shown[with_image])
    known = np.array([images.place.get(int(i), -1) for i in shown])
    return {
        "n": len(shown),
        "whole": len(shown) == tree.n_samples,
        "aspect": ((high - low) / scale).tolist(),
        "keys": pool.keys(shown),
        "shards": [Path(url).name for url in pool.urls] if len(pool.urls) <= 10_000 else [],
        "shard": _packed(pool.shard_of(shown), np.int32),
        "id": _packed(shown, np.float64 if wide else np.int32),
        "wide_ids": wide,
        "copy": None if folder is None else _packed(_copies(folder, shown), np.float64 if wide else np.int32),
        "x": _packed(placed[:, 0], np.uint16),
        "y": _packed(placed[:, 1], np.uint16),
        "leaf": _packed(np.where(leaf >= 0, np.searchsorted(np.unique(leaf[leaf >= 0]), leaf), -1), np.int32),
        "count": _packed(np.minimum(count, 65_535), np.uint16),
        "tile": _packed(np.maximum(tile, known), np.int32),
        "label": None if labels is None else _packed(labels[shown], np.int32),
        "rank": None if tree.distance is None else _packed(_leaf_ranks(tree)[shown], np.int32),
        "distance": None if tree.distance is None else _packed(tree.distance[shown], np.float32),
    }


def _copies(folder: Path, shown: np.ndarray) -> np.ndarray:
    """(m,) the sample that stayed in a copy's place, -2 for a copy of a held-out one, -1 for no copy."""
    found = Removed.load(folder)
    return np.where(found.held_out[shown] >= 0, -2, found.copy_of(shown))


def _leaf_ranks(tree: Any) -> np.ndarray:
    """(n,) each sample's place from 1 by distance to the centroid within its lowest cluster; 0 where
    excluded.
    """
    leaf = tree.parent[1]
    order = np.lexsort((tree.distance, leaf))
    order = order[leaf[order] >= 0]
    start = np.concatenate([[0], np.cumsum(tree.sizes(1))[:-1]])
    rank = np.zeros(len(leaf), np.int64)
    rank[order] = np.arange(1, len(order) + 1) - start[leaf[order]]
    return rank


def _principal_components(
    curation: "Curation", shown: np.ndarray, rng: np.random.Generator, most: int = 20_000
) -> np.ndarray:
    """(m, 2) of the samples shown, fitted on a random subset of them; NaN for samples without an
    embedding.
    """
    store = curation.embeddings
    rows = np.asarray(store.rows(shown) if hasattr(store, "rows") else store[shown], np.float32)
    usable = np.flatnonzero(np.isfinite(rows).all(axis=1) & (curation.tree.parent[1][shown] >= 0))
    xy = np.full((len(shown), 2), np.nan)
    if len(usable) < 2 or rows.shape[1] < 2:
        xy[usable] = 0
        return xy
    fitted = PCA(2, svd_solver="covariance_eigh" if rows.shape[1] <= 4096 else "randomized", random_state=0)
    xy[usable] = fitted.fit(rows[random_subset(usable, most, rng)]).transform(rows[usable])
    return xy


def _packed(values: np.ndarray, dtype: Any) -> str:
    return base64.b64encode(np.asarray(values).astype(np.dtype(dtype).newbyteorder("<")).tobytes()).decode()


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _json(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c")
