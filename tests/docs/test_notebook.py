"""The notebook runs from an empty folder, cell by cell, in a kernel of its own."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TOUR = Path(__file__).parents[2] / "docs" / "notebooks" / "tour.ipynb"


@pytest.mark.long
def test_the_tour_runs_and_is_stored_without_outputs(tmp_path):
    notebook = nbformat.read(TOUR, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = ["".join(out.get("text", "") for out in cell.outputs) for cell in cells]
    assert "\n1100 samples, by class" in printed[1]  # below the log
    assert any("16 steps" in text for text in printed)  # 4 epochs of 220 / 55 batches
    share = float(printed[-1].rpartition("% of 1500")[0].splitlines()[-1]) / 100
    assert 0.2 < share < 1  # ten classes
    assert (tmp_path / "tour" / "report.html").is_file()
