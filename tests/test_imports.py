"""Imports run downwards: no circles, and each package takes only what it may from the others."""

import pytest

from tests.house import circles, modules, rooms

GROUND = {
    f"curated_data.{name}"
    for name in ("colours", "devices", "errors", "free_room", "matrix", "networks", "parallel", "randomness")
}
"""What `lightning_modules` may take from `curated_data`."""


@pytest.fixture(scope="module")
def graph():
    return modules()


def test_there_are_no_circles(graph):
    assert circles(graph) == []
    assert circles(rooms(graph)) == []


def test_packages_know_only_what_is_below_them(graph):
    for module, other in graph.edges:
        packages = module.split(".")[0], other.split(".")[0]
        if packages[0] == "curated_data":
            assert packages[1] == "curated_data", f"{module} imports {other}"
        if packages == ("lightning_modules", "curated_data"):
            assert other in GROUND, f"{module} imports {other}"
        if packages[0] == "lightning_modules":
            assert packages[1] != "recipes", f"{module} imports {other}"


def test_the_ground_floor_imports_little(graph):
    allowed = GROUND | {"curated_data.waiting"}
    for module in GROUND:
        assert set(graph.successors(module)) <= allowed, module


def test_recipes_import_no_other_recipe(graph):
    """What two of them share is in the packages."""
    for module, other in graph.edges:
        if module.split(".")[0] == "recipes":
            assert other.split(".")[0] != "recipes", f"{module} imports {other}"
