"""Plots: that they show the numbers they are given, and the images that the pool holds."""

import io

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image

from curated_data.report import figures
from curated_data.report.examples import cluster_rows, thumbnails


def texts(figure) -> str:
    figure.canvas.draw()
    return "\n".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))


def rendered(figure) -> np.ndarray:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB"))


def test_class_balance_bars_have_the_counts_in_the_order_of_the_pool():
    figure = figures.class_balance(
        {"pool": np.array([5, 50, 10]), "kept": np.array([5, 6, 7])}, class_names=["a", "b", "c"]
    )
    axes = figure.axes[0]
    assert [round(bar.get_width()) for bar in axes.patches] == [50, 10, 5, 6, 7, 5]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "c", "a"]
    assert "kept: 18 images, entropy 1.09 of 1.10" in texts(figure)
    assert pyplot.get_fignums() == []  # nothing global is left behind


def test_class_balance_of_many_classes_is_a_rank_curve():
    counts = np.arange(100, 0, -1)
    figure = figures.class_balance({"pool": counts, "kept": np.minimum(counts, 7)})
    lines = figure.axes[0].lines
    assert lines[1].get_ydata().tolist() == sorted(np.minimum(counts, 7), reverse=True)
    rendered(figure)


def test_class_balance_refuses_arrays_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)"):
        figures.class_balance({"pool": np.ones(3), "kept": np.ones(4)})
    with pytest.raises(ValueError, match=r"2 class_names .*3"):
        figures.class_balance({"pool": np.ones(3)}, class_names=["a", "b"])


def test_size_curves_show_sorted_sizes_of_each_level(small):
    figure = figures.size_curves(small.tree, small.ids)
    assert len(figure.axes) == 2
    for level, axes in enumerate(figure.axes, 1):
        assert axes.lines[0].get_ydata().tolist() == sorted(small.tree.sizes(level), reverse=True)
        assert sum(axes.lines[1].get_ydata()) == len(small.ids)
    rendered(figure)


def test_selection_map_leaves_out_rows_that_are_not_finite(small):
    coordinates = small.x[:, :2].copy()
    coordinates[7] = np.nan
    figure = figures.selection_map(coordinates, small.ids, labels=small.labels, class_names=["r", "g", "b"])
    drawn = figure.axes[0].collections
    assert [len(c.get_offsets()) for c in drawn] == [199, 60]
    assert [len(c.get_offsets()) for c in figure.axes[1].collections] == [139, 50, 10]
    rendered(figure)


def test_cluster_rows_are_the_clusters_and_samples_that_they_say(small):
    sizes = small.tree.sizes(1)
    largest = cluster_rows(small.tree, small.ids, choose="largest", n_clusters=3, n_images=4)
    assert [row.size for row in largest] == sorted(sizes, reverse=True)[:3]
    smallest = cluster_rows(small.tree, small.ids, choose="smallest", exclude=[largest[0].cluster])
    assert smallest[0].size == sizes.min()
    cut = cluster_rows(small.tree, small.ids, choose="most cut", n_clusters=12)
    shares = [row.n_kept / row.size for row in cut]
    assert shares == sorted(shares)
    for row in largest + smallest + cut:
        members = small.tree.members(1, row.cluster)
        assert row.n_kept == len(np.intersect1d(members, small.ids))
        assert np.isin(row.kept, np.intersect1d(members, small.ids)).all()
        assert np.isin(row.dropped, np.setdiff1d(members, small.ids)).all()
        assert len(row.kept) == min(row.n_kept, 4 if row in largest else 8)
    with pytest.raises(ValueError, match="choose='big'"):
        cluster_rows(small.tree, small.ids, choose="big")


def test_thumbnails_are_the_images_whole_on_white_and_broken_ones_are_crossed(small):
    tiles = thumbnails(small.pool, np.array([3, 7, 3]), 30)
    assert tiles.shape == (3, 30, 30, 3)
    assert (tiles[0, 5:25] == small.colours[3]).all()  # 20 by 30 pixels, so bands of 5 above and below
    assert (tiles[0, :5] == 255).all()
    assert (tiles[0] == tiles[2]).all()
    assert tiles[1, 0, 0, 0] == tiles[1, 29, 0, 0] == 160


def test_contact_sheet_draws_the_pools_colours(small):
    rows = cluster_rows(small.tree, small.ids, n_clusters=2, n_images=3)
    figure = figures.contact_sheet(small.pool, rows, title="Largest")
    assert f"cluster {rows[0].cluster}" in texts(figure)
    image = rendered(figure).reshape(-1, 3)
    for i in rows[0].kept:
        assert (image == small.colours[i]).all(axis=1).any()
    with pytest.raises(ValueError, match="at least one row"):
        figures.contact_sheet(small.pool, [])
