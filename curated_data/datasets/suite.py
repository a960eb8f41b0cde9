"""Suites of evaluation datasets, described in YAML, and their parts as pools of shards in the cache."""

import inspect
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from curated_data.cache.artifacts import fingerprint
from curated_data.cache.locks import locked
from curated_data.cache.publishing import atomic_path
from curated_data.config import read_yaml, structured
from curated_data.datasets.images import Images, image_files, subfolders, to_shards
from curated_data.datasets.layouts import LAYOUTS
from curated_data.errors import ConfigError, CuratedDataError, PoolError, first_line, nearest
from curated_data.pool import ShardPool, ShardWriter, import_folder
from curated_data.report.page import class_names_beside

log = logging.getLogger(__name__)

SHIFTED = ("class_folders", "imagenet_v2", "objectnet", "real", "dollar_street")


@dataclass
class Dataset:
    """A dataset of a suite.

    Attributes:
        layout: "shards" (WebDataset, with .cls), "folder" (one folder per class), "torchvision", or one of
            `curated_data.datasets.layouts.LAYOUTS`.
        root: its folder, relative to the suite's root.
        train, test: relative to it: a pattern of shards, a folder, a file that lists a part, or the name of a
            part; for torchvision the keyword arguments for the part, such as {split: train}. For instance
            retrieval, "train" is the gallery and "test" are the queries.
        dataset: the torchvision class.
        base: the dataset whose train part, or classes, these images are tested with.
        evaluations: to run.
        steps: of each training with SGD or AdamW; None takes the protocol's number.
    """

    layout: str
    root: str = ""
    train: Any = None
    test: Any = None
    dataset: str = ""
    base: str = ""
    evaluations: list[str] = field(default_factory=lambda: ["knn", "linear"])
    steps: int | None = None


@dataclass(frozen=True)
class Part:
    """One part of a dataset: its pool, and the layout's information on its images, in the pool's order.

    Attributes:
        numbers: for a test part whose class folders differ from train's, the number of each class in train.
    """

    pool: ShardPool
    images: Images | None = None
    numbers: np.ndarray | None = None

    def labels(self) -> np.ndarray:
        """(n,) classes as train numbers them, -1 for none."""
        labels = self.pool.labels(np.arange(len(self.pool)))
        return labels if self.numbers is None else np.where(labels >= 0, self.numbers[labels], -1)


def load_suite(path: str | Path, evaluations: Mapping[str, str]) -> dict[str, Dataset]:
    """The datasets of a suite by name.

    Args:
        path: a YAML file.
        evaluations: those that a suite may name, each with what it needs: "train", "test" and "base".

    Raises:
        ConfigError: an unknown field, layout or evaluation, or a missing base or part.
    """
    content = OmegaConf.to_container(read_yaml(Path(path)))
    datasets = content.get("datasets") if isinstance(content, dict) else None
    if not datasets or not isinstance(datasets, dict):
        raise ConfigError(f"{path}: no datasets; list them below `datasets:`, as NAME: {{layout: ...}}")
    suite = {}
    for name, fields in datasets.items():
        if not isinstance(fields, dict):
            raise ConfigError(f"{name}: expected fields and values, got {fields!r}")
        try:
            suite[str(name)] = structured(Dataset, fields)
        except ConfigError as error:
            raise ConfigError(f"{name}.{error}") from error
    layouts = ("shards", "folder", "torchvision", *LAYOUTS)
    for name, dataset in suite.items():
        if dataset.layout not in layouts:
            hint = nearest(dataset.layout, layouts)
            raise ConfigError(f"{name}.layout: expected {', '.join(layouts)}; got {dataset.layout!r}{hint}")
        unknown = set(dataset.evaluations) - set(evaluations)
        if unknown or not dataset.evaluations:
            raise ConfigError(
                f"{name}.evaluations: expected of {', '.join(evaluations)}, got {sorted(unknown)}"
            )
        needed = {word for each in dataset.evaluations for word in evaluations[each].split()}
        if ("base" in needed or dataset.base) and dataset.base not in suite:
            raise ConfigError(f"{name}.base: expected another dataset of the suite, got {dataset.base!r}")
        if "base" in needed and (
            suite[dataset.base].layout not in ("shards", "folder", "torchvision")
            or suite[dataset.base].train is None
        ):
            raise ConfigError(f"{name}.base: {dataset.base} has no train part to fit a head on")
        for part in ("train", "test"):
            from_base = part == "train" and dataset.base
            if part in needed and getattr(dataset, part) is None and not from_base:
                raise ConfigError(f"{name}.{part}: is missing; {', '.join(dataset.evaluations)} need it")
        if dataset.steps is not None and dataset.steps < 1:
            raise ConfigError(f"{name}.steps: expected 1 or more, got {dataset.steps}")
    return suite


def open_suite(
    suite: Mapping[str, Dataset], root: Path, cache: Path
) -> tuple[dict[str, dict[str, Part]], list[str]]:
    """The parts of all datasets that exist, by name, and for each other one a line that says what is missing.

    A dataset without a "train" part takes that of its base.
    """
    opened: dict[str, dict[str, Part]] = {}
    missing = []
    for name, dataset in sorted(suite.items(), key=lambda item: bool(item[1].base)):  # bases first
        try:
            if dataset.base and dataset.base not in opened:
                raise PoolError(f"needs {dataset.base}, which is missing")
            opened[name] = {
                part: open_part(name, suite, part, root, cache)
                for part in ("train", "test")
                if getattr(dataset, part) is not None
            }
            if dataset.layout == "folder" and {"train", "test"} <= opened[name].keys():
                opened[name]["test"] = _numbered_as(opened[name]["train"], opened[name]["test"], name)
            if dataset.base:
                opened[name].setdefault("train", opened[dataset.base]["train"])
        except (CuratedDataError, FileNotFoundError, RuntimeError) as error:
            missing.append(f"{name}: {first_line(error)}")
    return {name: opened[name] for name in suite if name in opened}, missing


def open_part(name: str, suite: Mapping[str, Dataset], part: str, root: Path, cache: Path) -> Part:
    """A dataset's train or test part, which is converted to shards in the cache unless it consists of shards.

    Raises:
        CuratedDataError, FileNotFoundError, RuntimeError: (the last two from torchvision) it is missing, or
            does not match its layout.
    """
    dataset = suite[name]
    source, folder = getattr(dataset, part), root / dataset.root
    if dataset.layout == "shards":
        patterns = [source] if isinstance(source, str) else source
        return Part(ShardPool([str(folder / pattern) for pattern in patterns], cache_dir=cache))
    images = None
    if dataset.layout == "torchvision":
        key = fingerprint(dataset=dataset.dataset, source=source, root=folder.absolute(),
                          layout=dataset.layout, version=2)  # fmt: skip
    elif dataset.layout == "folder":
        files = image_files(folder / source, "a folder of images for each class")
        key = fingerprint(**Images(folder, files).identity(), layout=dataset.layout, version=1)
    else:
        options = {"base": _classes(suite[dataset.base], root)} if dataset.layout in SHIFTED else {}
        images = LAYOUTS[dataset.layout](folder, str(source), **options)
        key = fingerprint(**images.identity(), layout=dataset.layout, version=1)
    shards = cache / "datasets" / f"{name}-{part}-{key}"
    with locked(shards):
        if not shards.exists():
            with atomic_path(shards) as temporary:
                if images is not None:
                    to_shards(images, temporary)
                elif dataset.layout == "folder":
                    import_folder(folder / source, temporary)
                else:
                    _convert(dataset.dataset, source, folder, temporary)
    return Part(ShardPool(str(shards / "*.tar"), cache_dir=cache), images)


def _numbered_as(train: Part, test: Part, name: str) -> Part:
    """The test part with its classes numbered as train's of the same name, others after them."""
    classes, own = class_names_beside(train.pool), class_names_beside(test.pool)
    if classes is None or own is None or classes == own:
        return test
    number = {each: i for i, each in enumerate(dict.fromkeys([*classes, *own]))}
    log.warning(
        "%s: test has no folder for %d of train's classes, and %d that train has not",
        name, len(set(classes) - set(own)), len(set(own) - set(classes)),
    )  # fmt: skip
    return replace(test, numbers=np.array([number[each] for each in own]))


def _classes(base: Dataset, root: Path) -> list[str]:
    """The class folders of a base set, in the order of its labels."""
    if base.layout != "folder":
        raise ConfigError(
            "a set with shifted classes needs a base in the layout `folder`, for the names of its classes"
        )
    folders = subfolders(root / base.root / base.train, "the base set's class folders")
    return [folder.name for folder in folders]


def _convert(dataset: str, part: Mapping[str, Any], root: Path, out: Path) -> None:
    """Write a torchvision classification set as shards: its image files as they are where torchvision lets
    choose the loader, or else what it decodes, as PNG.
    """
    from torchvision import datasets

    kind = getattr(datasets, dataset, None)
    if kind is None:
        raise ConfigError(f"torchvision.datasets has no {dataset!r}")
    loader = {"loader": Path} if "loader" in inspect.signature(kind).parameters else {}
    try:
        data = kind(root, **(loader | dict(part)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"torchvision.datasets.{dataset} does not take {part}: {error}") from error
    except Exception as error:  # of missing or damaged lists each set raises its own
        raise PoolError(
            f"torchvision.datasets.{dataset} does not find its files below {root} ({first_line(error)}): put "
            f"there what `{dataset}({str(root)!r}, download=True)` unpacks"
        ) from error
    with ShardWriter(out / "part-%05d.tar") as writer:
        for number in range(len(data)):
            try:
                image, label = data[number]
                content = _encoded(image)
            except (OSError, ValueError, SyntaxError) as error:  # whatever Pillow raises
                raise PoolError(
                    f"torchvision.datasets.{dataset} below {root}: image {number} of {part} cannot be read "
                    f"({first_line(error)}): put a whole copy there"
                ) from error
            if not isinstance(label, int | np.integer):
                raise ConfigError(
                    f"torchvision.datasets.{dataset} has targets of {type(label).__name__}; the layout "
                    "torchvision is for classification, with one class per image"
                )
            writer.write({"__key__": f"{number:07d}", **content, "cls": int(label)})


def _encoded(image: Any) -> dict[str, bytes]:
    """The bytes of an image by its extension, of a path or of a decoded image."""
    if isinstance(image, Path):
        return {image.suffix[1:].lower(): image.read_bytes()}
    content = io.BytesIO()
    image.convert("RGB").save(content, "PNG")
    return {"png": content.getvalue()}
