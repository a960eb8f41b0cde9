"""All evaluations of an embedder on a dataset of a suite, with results per image for comparisons."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curated_data import kmeans
from curated_data.embedding import Embedder, EmbeddingStore, embed_pool
from curated_data.errors import PoolError, first_line
from curated_data.selection.near_duplicates import image_contents, match_held_out
from lightning_modules.evaluation.clustering import clustering
from lightning_modules.evaluation.dense import DenseSettings
from lightning_modules.evaluation.depth import depth
from lightning_modules.evaluation.fairness import fairness
from lightning_modules.evaluation.health import health
from lightning_modules.evaluation.knn import knn
from lightning_modules.evaluation.linear import LinearSettings, linear
from lightning_modules.evaluation.longtail import GROUPS
from lightning_modules.evaluation.multilabel import multilabel
from lightning_modules.evaluation.retrieval import retrieval
from lightning_modules.evaluation.robustness import ShiftedSet, robustness
from lightning_modules.evaluation.segmentation import mean_iou, segmentation
from recipes.features import TokenEmbedder, block_embedder
from recipes.suite import Dataset, Part

log = logging.getLogger("evaluate")

NEAR = 0.99  # cosine from which a test image counts as a near-duplicate of a train image


@dataclass(frozen=True)
class Figure:
    """A figure of an evaluation.

    Attributes:
        value: the figure.
        samples: the result of each test image, for comparisons; None if the figure is not made of them.
        statistic: computes the figure from the mean of `samples`; None if it is the mean.
        is_share: whether it lies in 0..1.
        details: rows of a table with details.
    """

    value: float
    samples: np.ndarray | None = None
    statistic: Callable[[np.ndarray], np.ndarray] | None = None
    is_share: bool = True
    details: Sequence[Mapping[str, str]] = ()


Figures = dict[str, Figure]


class Features:
    """The features of all parts by one embedder, embedded once and then read from the cache."""

    def __init__(self, embedder: Embedder, cache: Path, workers: int, device: str) -> None:
        self.embedder, self.cache, self.workers, self.device = embedder, cache, workers, device
        self.blocks = block_embedder(embedder)
        self._tokens: TokenEmbedder | None = None
        self._stores: dict[tuple[int, int], tuple[Part, Embedder, EmbeddingStore]] = {}

    def tokens(self) -> TokenEmbedder:
        if self._tokens is None:
            self._tokens = TokenEmbedder(self.embedder)
        return self._tokens

    def store(self, part: Part, embedder: Embedder | None = None) -> EmbeddingStore:
        embedder = embedder or self.embedder
        key = id(part), id(embedder)
        if key not in self._stores:
            store = embed_pool(part.pool, embedder, self.cache, num_workers=self.workers, device=self.device)
            if failed := int((~store.valid).sum()):
                log.warning("%d of %d images cannot be read and are left out", failed, len(store))
            self._stores[key] = part, embedder, store  # objects that are kept keep their ids
        return self._stores[key][2]

    def labelled(self, part: Part, embedder: Embedder | None = None) -> tuple["Rows", np.ndarray]:
        """The rows and labels of the images that can be read and have a label."""
        store = self.store(part, embedder)
        labels = part.labels()
        ids = np.flatnonzero(store.valid & (labels >= 0))
        if not len(ids):
            raise PoolError(f"{part.pool.urls[0]}: no image has a label")
        return Rows(store, ids), labels[ids]


class Rows:
    """Some rows of a store, read from disk on access."""

    def __init__(self, store: EmbeddingStore, ids: np.ndarray) -> None:
        self.store, self.ids = store, ids
        self.shape = (len(ids), store.shape[1])

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.store.rows(self.ids[rows])

    def array(self) -> np.ndarray:
        """All rows in memory, as float32."""
        return self[:].astype(np.float32)


def evaluate(dataset: Dataset, parts: Mapping[str, Part], features: Features) -> tuple[Figures, list[str]]:
    """All figures of a dataset, except those with respect to a base (see `evaluate_shifted`), and one line
    for each evaluation that its images or labels do not allow.
    """
    figures: Figures = {}
    failures = []
    for name in dataset.evaluations:
        if name in _BY_NAME:
            try:
                figures |= _BY_NAME[name](dataset, parts, features)
            except ValueError as error:
                failures.append(f"{name}: {first_line(error)}")
    return figures, failures


def evaluate_shifted(
    datasets: Mapping[str, Dataset], parts: Mapping[str, Mapping[str, Part]], base: Part, features: Features
) -> dict[str, Figures]:
    """Robustness and fairness on all sets with the same base, with one head fitted on its train part.

    Raises:
        ValueError: the sets do not allow it.
    """
    train, labels = features.labelled(base)
    found: dict[str, Figures] = {name: {} for name in datasets}
    for evaluation, top in (("robustness", 1), ("fairness", 5)):
        sets, kept = {}, {}
        for name, dataset in datasets.items():
            if evaluation in dataset.evaluations:
                sets[name], kept[name] = _shifted_set(parts[name]["test"], features)
        if not sets:
            continue
        result = robustness(train.array(), labels, sets, top=top, device=features.device)
        for name in sets:
            scores, hits = result.sets[name], result.correct[name]
            title = "accuracy" if top == 1 else f"right among {top}"
            found[name][f"{evaluation}, {title}"] = Figure(scores["accuracy"], hits)
            images = parts[name]["test"].images
            if evaluation == "fairness" and images is not None:
                found[name] |= _by_group(images.groups, kept[name], hits)
    return found


def duplicates(parts: Mapping[str, Part], features: Features) -> list[dict[str, str]]:
    """Test images that are also in train, by equal bytes or by the embedder.

    Returns:
        A row for each: test and train (keys), kind ("same bytes" or "near").
    """
    train, test = parts["train"].pool, parts["test"].pool
    digests = [image_contents(pool).digest for pool in (train, test)]
    place = {digest.tobytes(): i for i, digest in reversed(list(enumerate(digests[0]))) if digest.any()}
    found = {i: ("same bytes", place[d.tobytes()]) for i, d in enumerate(digests[1]) if d.tobytes() in place}
    stores = [features.store(parts[name]) for name in ("train", "test")]
    ids = [np.flatnonzero(store.valid) for store in stores]
    match = match_held_out(stores[1], stores[0].rows(ids[0]).astype(np.float32), threshold=NEAR, ids=ids[1])
    for i, row in zip(ids[1].tolist(), match.tolist()):
        if row >= 0:
            found.setdefault(i, ("near", int(ids[0][row])))
    chosen = sorted(found)
    keys = train.keys(np.array([found[i][1] for i in chosen], np.int64))
    return [
        {"test": key, "train": twin, "kind": found[i][0]}
        for i, key, twin in zip(chosen, test.keys(np.array(chosen, np.int64)), keys)
    ]


def _knn(dataset: Dataset, parts: Mapping[str, Part], features: Features) -> Figures:
    (bank, labels), (test, truth) = (features.labelled(parts[part]) for part in ("train", "test"))
    k = [k for k in (10, 20, 100, 200) if k <= len(labels)] or [1]
    result = knn(bank, labels, test.array(), truth, k=k, device=features.device)
    figures = {f"k-NN, k = {k}": Figure(result.accuracy[k], result.correct[k].astype(float)) for k in k}
    figures["k-NN, best, class average"] = Figure(max(result.class_accuracy.values()))
    return figures


def _heads(protocol: str) -> Callable[[Dataset, Mapping[str, Part], Features], Figures]:
    def run(dataset: Dataset, parts: Mapping[str, Part], features: Features) -> Figures:
        blocks = features.blocks if protocol == "sgd" else None
        (train, labels), (test, truth) = (features.labelled(parts[p], blocks) for p in ("train", "test"))

        def views(rows: Rows) -> np.ndarray | dict[str, torch.Tensor]:
            """The rows; of blocks, views of them already on the device."""
            x = rows.array()
            return x if blocks is None else blocks.kinds(torch.from_numpy(x).to(features.device))

        counts = np.bincount(labels, minlength=int(truth.max()) + 1)
        settings = LinearSettings(protocols=(protocol,))
        if dataset.steps:
            settings = replace(settings, n_iter=dataset.steps)
        result = linear(
            views(train), labels, views(test), truth,
            settings=settings, train_counts=counts, device=features.device,
        )  # fmt: skip
        figures: Figures = {}
        for head, hits in zip(result.heads, result.correct):
            name = f"linear, {head['protocol']}"
            figures[name] = Figure(head["accuracy"], hits)
            if "long_tail" in dataset.evaluations or len(set(np.bincount(truth).tolist()) - {0}) > 1:
                figures[f"{name}, class average"] = Figure(head["class_average"])
            if "long_tail" in dataset.evaluations:
                figures |= {f"{name}, {group} classes": Figure(head[group]) for group in GROUPS}
        return figures

    return run


def _multilabel(dataset: Dataset, parts: Mapping[str, Part], features: Features) -> Figures:
    sets = []
    for name in ("train", "test"):
        store, images = features.store(parts[name]), parts[name].images
        if images is None or images.marks is None:
            raise PoolError(f"layout {dataset.layout}: has no marks of several classes per image")
        ids = np.flatnonzero(store.valid)
        sets += [store.rows(ids).astype(np.float32), images.marks[ids]]
    result = multilabel(*sets, device=features.device)
    return {"several classes, mAP": Figure(result.mean_average_precision)}


def _retrieval(dataset: Dataset, parts: Mapping[str, Part], features: Features) -> Figures:
    (gallery, labels), (test, truth) = (features.labelled(parts[part]) for part in ("train", "test"))
    k = [k for k in (1, 5, 10) if k <= len(labels)]
    result = retrieval(
        test.array(), gallery, query_labels=truth, gallery_labels=labels, k=k, device=features.device
    )
    return {
        f"retrieval, mAP@{k}": Figure(scores["map"], result.average_precision[k])
        for k, scores in result.scores.items()
    }


def _instances(dataset: Dataset, parts: Mapping[str, Part], features: Features) -> Figures:
    gallery, queries = (features.store(parts[part]) for part in ("train", "test"))
    images = parts["test"].images
    if images is None or images.ground_truth is None:
        raise PoolError(f"layout {dataset.layout}: has no lists of easy, hard and junk images")
    ids = np.flatnonzero(queries.valid)
    result = retrieval(
        queries.rows(ids).astype(np.float32),
        gallery,  # with zero rows for unreadable images, so that places match
        ground_truth=[images.ground_truth[i] for i in ids],
        k=[k for k in (1, 5, 10) if k <= len(gallery)],
        device=features.device,
    )
    return {
        f"instances, {name}, mAP": Figure(scores["map"], result.average_precision[name])
        for name, scores in result.scores.items()
    }


def _clustering(dataset: Dataset, parts: Mapping[str, Part], features: Features) -> Figures:
    rows, truth = features.labelled(parts["test"])
    assignment = kmeans(rows.array(), len(np.unique(truth)), metric="cosine", n_init=3).assignment
    agreement = clustering(assignment, truth)
    return {"k-means, accuracy": Figure(agreement.accuracy), "k-means, NMI": Figure(agreement.nmi)}


def _health(dataset: Dataset, parts: Mapping[str, Part], features: Features) -> Figures:
    store = features.store(parts["test"])
    rows = Rows(store, np.flatnonzero(store.valid)).array()
    return {"effective rank": Figure(health(rows).effective_rank, is_share=False)}


def _duplicates(dataset: Dataset, parts: Mapping[str, Part], features: Features) -> Figures:
    rows = duplicates(parts, features)
    kinds, n = [row["kind"] for row in rows], len(parts["test"].pool)
    return {
        "duplicates, test images also in train": Figure(kinds.count("same bytes") / n, details=rows),
        f"duplicates, near a train image (cosine {NEAR})": Figure(len(kinds) / n),
    }


def _segmentation(dataset: Dataset, parts: Mapping[str, Part], features: Features) -> Figures:
    (train, masks, images), (test, truth, _) = (_dense(parts[part], features) for part in ("train", "test"))
    result = segmentation(train, masks, test, truth, n_classes=images.n_classes, settings=_settings(dataset),
                          device=features.device)  # fmt: skip
    return {
        "segmentation, mIoU": Figure(result.miou, result.counts, mean_iou),
        "segmentation, pixel accuracy": Figure(result.pixel_accuracy),
    }


def _depth(dataset: Dataset, parts: Mapping[str, Part], features: Features) -> Figures:
    (train, depths, images), (test, truth, _) = (_dense(parts[part], features) for part in ("train", "test"))
    low, high = images.depth_range or (1e-3, 10.0)
    result = depth(train, depths, test, truth, min_depth=low, max_depth=high, settings=_settings(dataset),
                   device=features.device)  # fmt: skip
    values = (result.rmse, result.absolute_relative, result.delta_1)
    names = ("depth, RMSE", "depth, AbsRel", "depth, delta < 1.25")
    return {
        name: Figure(value, result.scores[:, i], is_share=i == 2)
        for i, (name, value) in enumerate(zip(names, values))
    }


_BY_NAME: dict[str, Callable[[Dataset, Mapping[str, Part], Features], Figures]] = {
    "knn": _knn,
    "linear": _heads("sgd"),
    "logistic": _heads("logistic"),
    "few_shot": _heads("few_shot"),
    "multilabel": _multilabel,
    "retrieval": _retrieval,
    "instances": _instances,
    "clustering": _clustering,
    "health": _health,
    "duplicates": _duplicates,
    "segmentation": _segmentation,
    "depth": _depth,
}


class _Tokens:
    """Rows of a store as maps of tokens (n, h, w, d)."""

    def __init__(self, rows: Rows, grid: tuple[int, ...]) -> None:
        self.rows, self.grid = rows, grid
        self.shape = (len(rows.ids), *grid)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: int) -> np.ndarray:
        return self.rows[i : i + 1].reshape(self.grid)


class _Chosen:
    """A selection of maps."""

    def __init__(self, maps: Any, ids: np.ndarray) -> None:
        self.maps, self.ids = maps, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.maps[int(self.ids[i])]


def _dense(part: Part, features: Features) -> tuple[Any, Any, Any]:
    if part.images is None or part.images.maps is None:
        raise PoolError(f"{part.pool.urls[0]}: its layout has no maps for a dense task")
    embedder = features.tokens()
    store = features.store(part, embedder)
    ids = np.flatnonzero(store.valid)
    return _Tokens(Rows(store, ids), embedder.grid), _Chosen(part.images.maps, ids), part.images


def _settings(dataset: Dataset) -> DenseSettings:
    settings = DenseSettings()
    if not dataset.steps:
        return settings
    return replace(settings, n_iter=dataset.steps, warmup=min(settings.warmup, dataset.steps // 10))


def _shifted_set(part: Part, features: Features) -> tuple[ShiftedSet, np.ndarray]:
    """A shifted set's features, labels and classes, and the ids of its readable images."""
    store = features.store(part)
    ids = np.flatnonzero(store.valid)
    images = part.images
    if images is not None and images.labels is not None:
        labels, classes = images.labels, images.class_map
    else:
        labels, classes = part.labels(), None
    return ShiftedSet(store.rows(ids).astype(np.float32), labels[ids], classes), ids


def _by_group(groups: Mapping[str, list[str]], ids: np.ndarray, hits: np.ndarray) -> Figures:
    """Figures by group, and the gap between the best and the worst."""
    figures: Figures = {}
    known = np.isfinite(hits)
    for column, names in groups.items():
        own = [names[i] for i in ids[known]]
        try:
            result = fairness(hits[known], own)
        except ValueError as error:
            log.warning("no figures by %s: %s", column, error)
            continue
        for name, values in result.groups.items():
            of_group = np.full(len(hits), np.nan)
            of_group[known] = np.where(np.array(own) == name, hits[known], np.nan)
            figures[f"fairness, {column} {name}"] = Figure(values["mean"], of_group)
        figures[f"fairness, gap by {column}"] = Figure(result.gap)
    return figures
