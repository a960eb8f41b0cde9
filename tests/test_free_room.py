"""Boxes on a map: they overlap no other, stay inside, are near what they belong to, and hide few points."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from curated_data.free_room import FreeRoom, name_groups


def map_of(points: np.ndarray, width: float = 4, height: float = 3):
    figure = Figure(figsize=(width, height), dpi=100)
    axes = figure.add_axes((0.05, 0.05, 0.9, 0.9))
    axes.scatter(*points.T, s=4)
    axes.set_aspect("equal", adjustable="datalim")
    return figure, axes


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.tuples(st.floats(1, 120), st.floats(1, 60)), min_size=1, max_size=25),
    reach=st.sampled_from([30.0, np.inf]),
    hides=st.booleans(),
)
def test_boxes(seed, sizes, reach, hides):
    rng = np.random.default_rng(seed)
    points = np.concatenate([rng.normal(size=(150, 2)), rng.normal(8, 1, size=(50, 2))])
    _, axes = map_of(points)
    room = FreeRoom(axes, points)
    frame = axes.get_window_extent()
    pixels = room.pixels(points)
    np.testing.assert_allclose(room.data(pixels), points, atol=1e-9)
    taken: list[tuple[np.ndarray, np.ndarray]] = []
    for size, anchor in zip(sizes, pixels[rng.choice(len(points), len(sizes))], strict=True):
        centre = room.take(anchor, np.array(size), reach=reach, hides=hides)
        if centre is None:
            assert reach < np.inf or not hides or len(taken) > 3
            continue
        half = np.array(size) / 2
        assert (centre - half >= 0).all()
        assert (centre + half <= (frame.width, frame.height)).all()
        assert np.linalg.norm(centre - anchor) <= reach
        if not hides:
            assert not (np.abs(pixels - centre) < half).all(1).any()
        for other, other_half in taken:
            assert not (np.abs(centre - other) < half + other_half - 1e-9).all()
        taken.append((centre, half))


def test_a_box_stays_where_it_belongs_if_nothing_is_in_its_way():
    points = np.random.default_rng(0).normal(size=(100, 2))
    _, axes = map_of(np.append(points, [[20, 20]], 0))
    room = FreeRoom(axes, points)
    anchor = room.pixels(np.array([15.0, 15.0]))
    assert np.linalg.norm(room.take(anchor, np.array([40, 12])) - anchor) <= 4
    second = room.take(anchor, np.array([40, 12]))
    assert 8 <= np.linalg.norm(second - anchor) < 25


def test_names_of_groups_on_one_place_are_all_written_apart():
    points = np.random.default_rng(0).normal(size=(300, 2))
    figure, axes = map_of(points)
    places = np.concatenate([np.full((9, 2), 0.1), [[np.nan, 0]]])
    names = [f"a group of number {n}" for n in range(10)]
    name_groups(FreeRoom(axes, points), places, names, ["tab:blue"] * 10, fontsize=7)
    figure.draw_without_rendering()
    assert [text.get_text() for text in axes.texts] == names[:9]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    lines = [artist for artist in axes.get_children() if isinstance(artist, Line2D)]
    assert len(lines) >= 7
    for line in lines:
        assert line.get_xydata()[0] == pytest.approx([0.1, 0.1])


def test_a_name_without_room_is_left_out():
    points = np.random.default_rng(0).normal(size=(30, 2))
    _, axes = map_of(points, 1, 0.4)
    name_groups(FreeRoom(axes, points), points[:3], ["x", "far too long a name for this", "y"], ["k"] * 3, 7)
    assert [text.get_text() for text in axes.texts] == ["x", "y"]
