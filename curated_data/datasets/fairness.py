"""Dollar Street: photographs of homes, with the income and the region of each."""

import csv
import json
from pathlib import Path

import numpy as np

from curated_data.datasets.images import Images, existing, need
from curated_data.errors import PoolError

COLUMNS = ("imageRelPath", "income", "region.id", "imagenet_sysnet_id")


def dollar_street(root: Path, part: str = "images_v2_imagenet_test.csv", *, base: list[str]) -> Images:
    """Dollar Street by its CSV: several right ImageNet classes an image, and groups by income and region.

    Incomes (a month, in adjusted dollars) form four groups of equally many images, from lowest to highest.

    Args:
        root: `dataset_dollarstreet`, with the CSV and the images (`assets/...`).
        part: the CSV.
        base: the base set's classes.
    """
    path = need(root / part, "dataset_dollarstreet, as its archive unpacks (CSV files, assets)")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or any(column not in rows[0] for column in COLUMNS):
        raise PoolError(f"{path}: expected columns {', '.join(COLUMNS)}, got {list(rows[0]) if rows else []}")
    answers, incomes = [], []
    for number, row in enumerate(rows, 2):
        try:
            answer = json.loads(row["imagenet_sysnet_id"])
            answers.append([int(label) for label in (answer if isinstance(answer, list) else [answer])])
            incomes.append(float(row["income"]) if row["income"].strip() else np.nan)
        except (ValueError, TypeError) as error:
            raise PoolError(f"{path}, line {number}: {error}") from error
        if max(answers[-1], default=0) >= len(base):
            raise PoolError(f"{path}, line {number}: the base set has no class {max(answers[-1])}")
    labels = np.full((len(rows), max(1, *(len(answer) for answer in answers))), -1, np.int64)
    for i, answer in enumerate(answers):
        labels[i, : len(answer)] = answer
    files = existing((root / row["imageRelPath"] for row in rows), "Dollar Street's images (assets/...)")
    region = [row["region.id"].strip() for row in rows]
    return Images(root, files, labels, groups={"income": _quartiles(np.array(incomes)), "region": region})


def _quartiles(income: np.ndarray) -> list[str]:
    known = np.isfinite(income)
    if not known.any():
        return [""] * len(income)
    cuts = np.quantile(income[known], [0.25, 0.5, 0.75])
    names = np.array(["1 lowest", "2 low", "3 high", "4 highest"])
    return np.where(known, names[np.searchsorted(cuts, np.where(known, income, 0))], "").tolist()
