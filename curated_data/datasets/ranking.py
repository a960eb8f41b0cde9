"""The two labelled datasets on which architectures are ranked."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curated_data.arguments import checked_selection, load_ids
from curated_data.errors import ConfigError
from curated_data.pool import ShardPool

log = logging.getLogger(__name__)

SIDES = ("a", "b")


@dataclass(frozen=True)
class Data:
    """A labelled dataset: which samples to train on, and which classes."""

    name: str
    train: ShardPool
    test: ShardPool
    ids: np.ndarray
    classes: np.ndarray
    n_test: int


def open_data(
    options: argparse.Namespace, sides: Sequence[str], cache: Path, *, default: Path
) -> dict[str, Data]:
    """The datasets of some sides, by the command line's options.

    By default, A is the folder `default`, and B consists of A's images: the other selection, or the other
    half of the classes.

    Raises:
        ConfigError: no labels, classes without training or test samples, or a selection of another pool.
        PoolError: missing shards.
    """
    patterns: dict[str, tuple[Any, ...]] = {}
    names: dict[str, str] = {}
    for side in SIDES:
        folder = getattr(options, side)
        given = getattr(options, f"train_{side}"), getattr(options, f"test_{side}")
        if any(given) and not all(given):
            raise ConfigError(f"--train-{side} and --test-{side} go together; give both")
        if any(given) and folder:
            raise ConfigError(f"--{side} {folder}: given together with --train-{side}; drop either")
        if any(given):
            patterns[side], names[side] = given, Path(given[0][0]).name.split("-train")[0]
        elif side == "b" and not folder:
            patterns[side], names[side] = patterns["a"], names["a"]
        else:
            path = Path(folder) if folder else default
            found = tuple(sorted(map(str, path.glob(f"*{part}*.tar"))) for part in ("train", "test"))
            if not all(found):
                raise ConfigError(
                    f"--{side} {path}: expected shards *train*.tar and *test*.tar in this folder; or give "
                    f"--train-{side} and --test-{side}"
                )
            patterns[side], names[side] = found, path.name
    choices = {side: getattr(options, f"classes_{side}") for side in SIDES}
    selections = {side: getattr(options, f"selection_{side}") for side in SIDES}
    if patterns["a"] == patterns["b"] and not any([*choices.values(), *selections.values()]):
        pool = ShardPool(patterns["a"][0], cache_dir=cache)
        labels = pool.labels(np.arange(len(pool)))
        classes = np.unique(labels[labels >= 0])
        half = (len(classes) + 1) // 2
        if len(classes) >= 4:
            choices = {"a": classes[:half].tolist(), "b": classes[half:].tolist()}
    return {
        side: open_dataset(side, names[side], patterns[side], choices[side], selections[side], cache)
        for side in sides
    }


def open_dataset(
    side: str,
    name: str,
    patterns: tuple[list[str], list[str]],
    chosen: list[int] | None,
    selection: str | None,
    cache: Path,
) -> Data:
    """One dataset: its pools, the ids to train on (those with one of the chosen labels), and its classes."""
    train, test = (ShardPool(pattern, cache_dir=cache) for pattern in patterns)
    labels, test_labels = (pool.labels(np.arange(len(pool))) for pool in (train, test))
    for pool, found in ((train, labels), (test, test_labels)):
        if not (found >= 0).any():
            raise ConfigError(f"dataset {side}: {pool.urls[0]}: no sample has a label; each needs a .cls")
    there = np.unique(labels[labels >= 0])
    classes = there if chosen is None else np.unique(chosen)
    for where, found in (("training", there), ("test", np.unique(test_labels))):
        if missing := sorted(set(classes.tolist()) - set(found.tolist())):
            raise ConfigError(f"dataset {side} ({name}): classes {missing} have no {where} sample")
    if chosen is None and (
        extra := sorted(set(test_labels[test_labels >= 0].tolist()) - set(there.tolist()))
    ):
        raise ConfigError(
            f"dataset {side} ({name}): classes {extra} are tested but not trained; choose --classes-{side}"
        )
    if len(classes) < 2:
        raise ConfigError(f"dataset {side} ({name}): needs two classes or more, found {classes.tolist()}")
    ids = np.arange(len(train))
    if selection is not None:
        ids = checked_selection(load_ids(selection, f"--selection-{side}"), train, f"--selection-{side}")
    kept = ids[np.isin(labels[ids], classes)]
    if len(kept) < 2:
        raise ConfigError(
            f"--selection-{side} {selection}: {len(kept)} of its samples have a label that counts"
        )
    n_test = int(np.isin(test_labels, classes).sum())
    if len(classes) < len(there):
        name = f"{name} {','.join(map(str, classes))}"
    if selection is not None:
        name = f"{name} ({Path(selection).stem})"
    log.info("dataset %s, %s: %d training images of %d, %d classes, %d test images", side, name, len(kept),
             len(train), len(classes), n_test)  # fmt: skip
    return Data(name, train, test, kept, classes, n_test)
