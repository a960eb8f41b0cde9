"""The recorded figures, see `record.py`."""

import json

import pytest

from tests.golden.record import GOLDEN, figures


def test_ids_trees_orders_losses_and_figures_are_those_recorded(tmp_path):
    found, known = figures(tmp_path), json.loads(GOLDEN.read_text())
    assert found.keys() == known.keys()
    for name in ("images", "texts", "arrays", "order", "mixture"):
        assert found[name] == known[name], name
    for module, losses in known["losses"].items():  # rounded differently by other processors
        assert found["losses"][module] == pytest.approx(losses, rel=1e-2), module
    assert found["evaluations"] == pytest.approx(known["evaluations"], rel=1e-3)
