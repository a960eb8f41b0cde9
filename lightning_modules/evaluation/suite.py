"""All evaluations of an embedder on the datasets of a suite, with results per image for comparisons."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from curated_data.errors import first_line
from lightning_modules.evaluation.clustering import clustering
from lightning_modules.evaluation.dense import DenseSettings
from lightning_modules.evaluation.depth import depth
from lightning_modules.evaluation.fairness import fairness
from lightning_modules.evaluation.health import health
from lightning_modules.evaluation.inputs import Array
from lightning_modules.evaluation.knn import knn
from lightning_modules.evaluation.linear import LinearSettings, linear
from lightning_modules.evaluation.longtail import GROUPS
from lightning_modules.evaluation.multilabel import multilabel
from lightning_modules.evaluation.nearest import RowSource
from lightning_modules.evaluation.retrieval import retrieval
from lightning_modules.evaluation.robustness import ShiftedSet, robustness
from lightning_modules.evaluation.segmentation import mean_iou, segmentation

log = logging.getLogger(__name__)

NEAR = 0.99  # cosine from which a test image counts as a near-duplicate of a train image


@dataclass(frozen=True)
class Figure:
    """A figure of an evaluation.

    Attributes:
        value: the figure.
        samples: the result of each test image, for comparisons; None if the figure is not made of them.
        statistic: computes the figure from the mean of `samples`; None if it is the mean.
        is_share: whether it lies in 0..1.
        is_better: the "higher" or the "lower" one.
        details: rows of a table with details.

    Examples:
        >>> import numpy as np
        >>> from lightning_modules.evaluation import Figure
        >>> right = np.array([1.0, 0.0, 1.0, 1.0])
        >>> Figure(float(right.mean()), samples=right).value
        0.75
    """

    value: float
    samples: np.ndarray | None = None
    statistic: Callable[[np.ndarray], np.ndarray] | None = None
    is_share: bool = True
    is_better: Literal["higher", "lower"] = "higher"
    details: Sequence[Mapping[str, str]] = ()


Figures = dict[str, Figure]


class SuiteDataset(Protocol):
    """A dataset of a suite, embedded. Parts are "train" and "test"; features are read when asked for.

    Examples:
        >>> from curated_data.datasets.embedded import EmbeddedDataset  # shards, folders, benchmarks
        >>> from lightning_modules.evaluation import SuiteDataset
        >>> {name for name in vars(SuiteDataset) if not name.startswith("_")} <= set(dir(EmbeddedDataset))
        True
    """

    @property
    def evaluations(self) -> Sequence[str]:
        """Names from `EVALUATIONS`."""

    @property
    def steps(self) -> int | None:
        """Of each training with SGD or AdamW; None takes the protocol's number."""

    @property
    def base(self) -> str:
        """The dataset whose train part, or classes, these images are tested with."""

    def known(self, part: str) -> Any:
        """What is known of the images besides a label, as attributes that may be None: marks, groups,
        ground_truth, n_classes, depth_range.
        """

    def features(self, part: str) -> tuple[RowSource, np.ndarray]:
        """(n, d) of the images that can be read, and their ids (n,) among all."""

    def gallery(self) -> RowSource:
        """(m, d) of all train images, zero for those that cannot be read."""

    def labelled(self, part: str) -> tuple[RowSource, np.ndarray]:
        """(n, d) of the images that can be read and have a label, and their labels (n,)."""

    def probed(self, part: str) -> tuple[Array | Mapping[str, Any], np.ndarray]:
        """The same for linear heads, as one array or by the kind of features."""

    def tokens(self, part: str) -> tuple[Any, Any]:
        """Patch tokens (n, h, w, d) of the images that can be read, and their n maps (H, W)."""

    def answers(self, part: str) -> tuple[np.ndarray, list[list[int]] | None]:
        """Right classes of all images, (n,) or (n, m), and a class map, as in `ShiftedSet`."""

    def clusters(self, part: str, n_clusters: int) -> np.ndarray:
        """A k-means clustering of the labelled images, (n,)."""

    def duplicates(self, near: float) -> tuple[list[dict[str, str]], int]:
        """Test images that are also in train, a row with its `kind` for each; and the number of test
        images.
        """


def suite(
    datasets: Mapping[str, SuiteDataset], *, device: Any = "cpu"
) -> tuple[dict[str, Figures], list[str]]:
    """Run all evaluations of all datasets.

    Sets with the same base share one head, fitted on the base's train part.

    Args:
        datasets: by name, such as `curated_data.datasets.EmbeddedDataset`.
        device: where heads are trained and features compared.

    Returns:
        The figures of every dataset, and one line for each evaluation that its images or labels do not allow.

    Examples:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> labels = np.repeat([0, 1, 2], 20)
        >>> features = np.eye(3)[labels] + 0.1 * rng.normal(size=(60, 3))
        >>> from lightning_modules.evaluation import suite
        >>> class Shapes:  # what `suite` asks of a dataset for its k-NN; see `SuiteDataset` for the rest
        ...     evaluations, base = ["knn"], "shapes"
        ...     def labelled(self, part):
        ...         return features, labels
        >>> figures, failures = suite({"shapes": Shapes()})
        >>> figures["shapes"]["k-NN, k = 10"].value
        1.0
    """
    found: dict[str, Figures] = {name: {} for name in datasets}
    failures = []
    for name, dataset in datasets.items():
        for evaluation in dataset.evaluations:
            if run := _BY_NAME.get(evaluation):
                try:
                    found[name] |= run(dataset, device)
                except ValueError as error:
                    failures.append(f"{name}, {evaluation}: {first_line(error)}")
    shifted = {n: data for n, data in datasets.items() if {"robustness", "fairness"} & set(data.evaluations)}
    for base in dict.fromkeys(data.base for data in shifted.values()):
        own = {name: data for name, data in shifted.items() if data.base == base}
        try:
            for name, figures in _shifted(own, datasets[base], device).items():
                found[name] |= figures
        except ValueError as error:
            failures.append(f"{', '.join(own)}: {first_line(error)}")
    return found, failures


def _knn(dataset: SuiteDataset, device: Any) -> Figures:
    (bank, labels), (test, truth) = dataset.labelled("train"), dataset.labelled("test")
    k = [k for k in (10, 20, 100, 200) if k <= len(labels)] or [1]
    result = knn(bank, labels, _array(test), truth, k=k, device=device)
    figures = {f"k-NN, k = {k}": Figure(result.accuracy[k], result.correct[k].astype(float)) for k in k}
    figures["k-NN, best, class average"] = Figure(max(result.class_accuracy.values()))
    return figures


def _heads(protocol: str) -> Callable[[SuiteDataset, Any], Figures]:
    def run(dataset: SuiteDataset, device: Any) -> Figures:
        of = dataset.probed if protocol == "sgd" else _arrays(dataset)
        (train, labels), (test, truth) = of("train"), of("test")
        settings = LinearSettings(protocols=(protocol,))
        if dataset.steps:
            settings = replace(settings, n_iter=dataset.steps)
        counts = np.bincount(labels, minlength=int(truth.max()) + 1)
        result = linear(train, labels, test, truth, settings=settings, train_counts=counts, device=device)
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


def _multilabel(dataset: SuiteDataset, device: Any) -> Figures:
    sets = []
    for part in ("train", "test"):
        marks = _needed(dataset, part, "marks", "marks of several classes per image")
        rows, ids = dataset.features(part)
        sets += [_array(rows), marks[ids]]
    result = multilabel(*sets, device=device)
    return {"several classes, mAP": Figure(result.mean_average_precision)}


def _retrieval(dataset: SuiteDataset, device: Any) -> Figures:
    (gallery, labels), (test, truth) = dataset.labelled("train"), dataset.labelled("test")
    k = [k for k in (1, 5, 10) if k <= len(labels)]
    result = retrieval(_array(test), gallery, query_labels=truth, gallery_labels=labels, k=k, device=device)
    return {
        f"retrieval, mAP@{k}": Figure(scores["map"], result.average_precision[k])
        for k, scores in result.scores.items()
    }


def _instances(dataset: SuiteDataset, device: Any) -> Figures:
    truth = _needed(dataset, "test", "ground_truth", "lists of easy, hard and junk images")
    (queries, ids), gallery = dataset.features("test"), dataset.gallery()
    result = retrieval(
        _array(queries),
        gallery,
        ground_truth=[truth[i] for i in ids],
        k=[k for k in (1, 5, 10) if k <= gallery.shape[0]],
        device=device,
    )
    return {
        f"instances, {name}, mAP": Figure(scores["map"], result.average_precision[name])
        for name, scores in result.scores.items()
    }


def _clustering(dataset: SuiteDataset, device: Any) -> Figures:
    _, truth = dataset.labelled("test")
    agreement = clustering(dataset.clusters("test", len(np.unique(truth))), truth)
    return {"k-means, accuracy": Figure(agreement.accuracy), "k-means, NMI": Figure(agreement.nmi)}


def _health(dataset: SuiteDataset, device: Any) -> Figures:
    rows, _ = dataset.features("test")
    return {"effective rank": Figure(health(_array(rows)).effective_rank, is_share=False)}


def _duplicates(dataset: SuiteDataset, device: Any) -> Figures:
    rows, n = dataset.duplicates(NEAR)
    kinds = [row["kind"] for row in rows]
    return {
        "duplicates, test images also in train": Figure(
            kinds.count("same bytes") / n, is_better="lower", details=rows
        ),
        f"duplicates, near a train image (cosine {NEAR})": Figure(len(kinds) / n, is_better="lower"),
    }


def _segmentation(dataset: SuiteDataset, device: Any) -> Figures:
    train, test = dataset.tokens("train"), dataset.tokens("test")
    n_classes = dataset.known("train").n_classes
    result = segmentation(*train, *test, n_classes=n_classes, settings=_settings(dataset), device=device)
    return {
        "segmentation, mIoU": Figure(result.miou, result.counts, mean_iou),
        "segmentation, pixel accuracy": Figure(result.pixel_accuracy),
    }


def _depth(dataset: SuiteDataset, device: Any) -> Figures:
    train, test = dataset.tokens("train"), dataset.tokens("test")
    low, high = dataset.known("train").depth_range or (1e-3, 10.0)
    settings = _settings(dataset)
    result = depth(*train, *test, min_depth=low, max_depth=high, settings=settings, device=device)
    values = (result.rmse, result.absolute_relative, result.delta_1)
    names = ("depth, RMSE", "depth, AbsRel", "depth, delta < 1.25")
    return {
        name: Figure(value, result.scores[:, i], is_share=i == 2, is_better="higher" if i == 2 else "lower")
        for i, (name, value) in enumerate(zip(names, values))
    }


def _shifted(datasets: Mapping[str, SuiteDataset], base: SuiteDataset, device: Any) -> dict[str, Figures]:
    """Robustness and fairness on all sets with the same base."""
    train, labels = base.labelled("train")
    found: dict[str, Figures] = {name: {} for name in datasets}
    for evaluation, top in (("robustness", 1), ("fairness", 5)):
        sets, kept = {}, {}
        for name, dataset in datasets.items():
            if evaluation in dataset.evaluations:
                (rows, kept[name]), (answers, classes) = dataset.features("test"), dataset.answers("test")
                sets[name] = ShiftedSet(_array(rows), answers[kept[name]], classes)
        if not sets:
            continue
        result = robustness(_array(train), labels, sets, top=top, device=device)
        for name in sets:
            scores, hits = result.sets[name], result.correct[name]
            title = "accuracy" if top == 1 else f"right among {top}"
            found[name][f"{evaluation}, {title}"] = Figure(scores["accuracy"], hits)
            if evaluation == "fairness":
                found[name] |= _by_group(datasets[name].known("test").groups, kept[name], hits)
    return found


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
        figures[f"fairness, gap by {column}"] = Figure(result.gap, is_better="lower")
    return figures


def _arrays(dataset: SuiteDataset) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    def labelled(part: str) -> tuple[np.ndarray, np.ndarray]:
        rows, labels = dataset.labelled(part)
        return _array(rows), labels

    return labelled


def _array(rows: RowSource) -> np.ndarray:
    """All rows in memory, as float32."""
    return np.asarray(rows[:], np.float32)


def _needed(dataset: SuiteDataset, part: str, name: str, what: str) -> Any:
    found = getattr(dataset.known(part), name)
    if found is None:
        raise ValueError(f"its layout has no {what}")
    return found


def _settings(dataset: SuiteDataset) -> DenseSettings:
    settings = DenseSettings()
    if not dataset.steps:
        return settings
    return replace(settings, n_iter=dataset.steps, warmup=min(settings.warmup, dataset.steps // 10))


_BY_NAME: dict[str, Callable[[SuiteDataset, Any], Figures]] = {
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
EVALUATIONS = dict.fromkeys(_BY_NAME, "train test") | {
    "long_tail": "train test",  # groups of classes beside the heads' accuracies
    "clustering": "test",
    "health": "test",
    "robustness": "test base",
    "fairness": "test base",
}
"""The parts, and the base, that each evaluation needs."""
