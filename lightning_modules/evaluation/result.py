"""What every evaluation's result can do: print as a table, save as JSON and CSV."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

# Of a field with values for each of this rank's test samples: for comparisons, and left out of files.
PER_SAMPLE = {"per_sample": True}


@dataclass(frozen=True)
class Result:
    """Base of the evaluations' result dataclasses; a subclass says what its table's rows are."""

    def rows(self) -> list[dict[str, Any]]:
        """The table, a mapping from column to value for each row."""
        raise NotImplementedError

    def table(self) -> str:
        """A Markdown table."""
        rows = self.rows()
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(_shown(row.get(column)) for column in columns) + " |" for row in rows]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def to_json(self, path: str | Path) -> None:
        """Write all fields but those by sample as JSON; what is not a number (an undefined metric) becomes
        null.
        """
        content = asdict(self)
        for each in fields(self):
            if each.metadata.get("per_sample"):
                del content[each.name]
        write_json(path, content)

    def to_csv(self, path: str | Path) -> None:
        """Write the table's rows with all their digits."""
        write_csv(path, self.rows())


def write_json(path: str | Path, content: Any) -> None:
    """Write containers of numbers, arrays and strings; what is not a finite number becomes null."""
    Path(path).write_text(json.dumps(_plain(content), indent=2) + "\n")


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows by column; a column that a row lacks is empty in it."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(rows)


def _shown(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | Tensor):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
