"""Plots of a curation, for papers, notebooks and loggers: class counts, cluster sizes, contact sheets, a map.

Every function returns a new matplotlib `Figure`, without global state; `figure.savefig(path)` writes it.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from curated_data.clustering.tree import ClusterTree
from curated_data.colours import far_apart, place_of
from curated_data.free_room import FreeRoom, name_groups
from curated_data.report.examples import ClusterRow, random_subset, thumbnails
from curated_data.selection.metrics import entropy, perplexity, selected_sizes

if TYPE_CHECKING:
    from curated_data.pool import ShardPool

INK, FAINT, POOL = "#1f2937", "#d6dae1", "#9aa3b0"
SERIES = ("#2563eb", "#d97706", "#0f8a6a", "#a33ea1", "#c2413b")
_MANY_CLASSES = 40


def class_balance(
    counts: Mapping[str, np.ndarray], *, class_names: Sequence[str] | None = None, title: str = ""
) -> Figure:
    """Class counts before and after a selection: bars for a few classes, rank curves for many.

    Args:
        counts: (n_classes,) numbers by series, first the pool, then selections from it:
            `{"pool": before, "random": ..., "hierarchical": ...}`.
        class_names: (n_classes,); None numbers the classes.
        title: above the plot.
    """
    series = {name: np.asarray(values) for name, values in counts.items()}
    lengths = {name: values.shape for name, values in series.items()}
    if not series or len(set(lengths.values())) > 1 or len(next(iter(lengths.values()))) != 1:
        raise ValueError(f"counts need arrays (n_classes,) of one length, got {lengths}")
    n_classes = len(next(iter(series.values())))
    names = [str(c) for c in range(n_classes)] if class_names is None else list(class_names)
    if len(names) != n_classes:
        raise ValueError(f"{len(names)} class_names for {n_classes} classes")
    order = np.argsort(-next(iter(series.values())), kind="stable")
    labels = [
        f"{name}: {int(values.sum()):,} images, entropy {entropy(values):.2f} of {np.log(n_classes):.2f}"
        for name, values in series.items()
    ]
    colours = _colours(list(series))
    if n_classes > _MANY_CLASSES:
        figure, axes = _figure(7.2, 4.4, title)
        for values, label, colour in zip(series.values(), labels, colours):
            ranked = np.sort(values)[::-1]
            axes.plot(np.arange(1, n_classes + 1), np.maximum(ranked, 0.5), color=colour, lw=2, label=label)
        _log_rank(axes, "classes, the largest first", "images in the class")
    else:
        height = 0.8 / len(series)
        figure, axes = _figure(7.2, 1.2 + 0.15 * n_classes * (len(series) + 0.6), title)
        place = np.arange(n_classes)
        for i, (values, label, colour) in enumerate(zip(series.values(), labels, colours)):
            at = place + (i - (len(series) - 1) / 2) * height
            axes.barh(at, values[order], height * 0.92, color=colour, label=label)
            for y, value in zip(at, values[order]):
                axes.annotate(f"{value:,}", (value, y), (3, 0), textcoords="offset points", va="center",
                              fontsize=7, color=INK)  # fmt: skip
        axes.set_yticks(place, [names[c] for c in order])
        axes.invert_yaxis()
        axes.margins(x=0.1, y=0.02)
        axes.set_xlabel("images", fontsize=9, color=INK)
        axes.grid(axis="x", color=FAINT, lw=0.6)
        axes.tick_params(axis="y", length=0)
    _legend_below(figure, axes)
    return figure


def size_curves(tree: ClusterTree, ids: np.ndarray, *, title: str = "") -> Figure:
    """Cluster sizes by rank, on logarithmic axes, for the pool and for a selection: one panel per level.

    A flat line is perfect balance. The perplexity is the number of equal clusters with the same entropy.

    Args:
        tree: over the pool.
        ids: (m,) selected samples.
    """
    figure = Figure(figsize=(3.4 * tree.n_levels + 0.6, 3.6), layout="constrained")
    panels = figure.subplots(1, tree.n_levels, squeeze=False)[0]
    selected = selected_sizes(tree, ids)
    for axes, level in zip(panels, sorted(selected)):
        sizes = tree.sizes(level)
        held = sizes > 0
        for values, name, colour in ((sizes, "pool", POOL), (selected[level], "selected", SERIES[0])):
            ranked = np.sort(values[held])[::-1]
            ranked = ranked[ranked > 0]
            axes.plot(np.arange(1, len(ranked) + 1), ranked, color=colour, lw=2, label=name)
        before, after = perplexity(sizes), perplexity(selected[level])
        axes.set_title(
            f"level {level}: {held.sum():,} clusters\nperplexity {before:,.0f}, selection {after:,.0f}",
            fontsize=9, color=INK, loc="left",
        )  # fmt: skip
        _log_rank(axes, "clusters, the largest first", "samples" if level == 1 else "")
    panels[0].legend(frameon=False, fontsize=8, loc="lower left")
    if title:
        figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    return figure


def selection_map(
    coordinates: np.ndarray,
    ids: np.ndarray,
    *,
    labels: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    most: int = 50_000,
    seed: int = 0,
    title: str = "",
) -> Figure:
    """The pool in two dimensions, in grey, with the selection on top; beside it the classes, if given.

    Args:
        coordinates: (n, 2) of every sample; rows that are not finite are omitted.
        ids: (m,) selected samples.
        labels: (n,) class of each sample, -1 for none.
        class_names: of the classes, which stand at their places.
        most: points to draw of pool and selection, each; random subsets of larger ones.
    """
    coordinates = np.asarray(coordinates)
    if coordinates.ndim != 2 or coordinates.shape[1] != 2:
        raise ValueError(f"coordinates need shape (n, 2), got {coordinates.shape}")
    rng = np.random.default_rng(seed)
    shown = np.isfinite(coordinates).all(axis=1)
    pool = random_subset(np.flatnonzero(shown), most, rng)
    chosen = np.unique(ids)
    chosen = random_subset(chosen[shown[chosen]], most, rng)
    n_panels = 1 if labels is None else 2
    figure = Figure(figsize=(4.6 * n_panels, 5.2), layout="constrained")
    panels = figure.subplots(1, n_panels, squeeze=False)[0]
    size = float(np.clip(20_000 / max(len(pool), 1), 0.6, 9))
    panels[0].scatter(
        *coordinates[pool].T, s=size, color="#c5cbd4", lw=0, label=f"pool, {len(coordinates):,}"
    )
    panels[0].scatter(*coordinates[chosen].T, s=size, color=SERIES[0], lw=0, label=f"selected, {len(ids):,}")
    if labels is not None:
        classes = np.unique(labels[labels >= 0])
        places = np.array([place_of(coordinates[labels == c]) for c in classes])
        colours = far_apart(places)
        for c, colour in zip(classes.tolist(), colours, strict=True):
            panels[1].scatter(*coordinates[pool[labels[pool] == c]].T, s=size, lw=0, color=colour)
    panels[0].legend(
        frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4,
        markerscale=5 / size**0.5, handletextpad=0.2, columnspacing=1,
    )  # fmt: skip
    for axes in panels:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_aspect("equal", "datalim")
        axes.spines[:].set_color(FAINT)
    if title:
        figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    if labels is not None:
        figure.draw_without_rendering()  # which lays it out
        order = np.argsort([-np.count_nonzero(labels == c) for c in classes], kind="stable")
        name_groups(
            FreeRoom(panels[1], coordinates[pool]),
            places[order],
            [str(c) if class_names is None else class_names[c] for c in classes[order].tolist()],
            [colours[c] for c in order],
            fontsize=7,
        )
    return figure


def contact_sheet(
    pool: "ShardPool", rows: Sequence[ClusterRow], *, title: str = "", size: int = 56
) -> Figure:
    """Images of some clusters, one row each: kept samples on the left, dropped ones on the right.

    Args:
        pool: to read the images from.
        rows: from `cluster_rows`.
        size: of a thumbnail, in pixels.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    n_left = max(max(len(row.kept) for row in rows), 4)
    n_right = max(max(len(row.dropped) for row in rows), 4)
    images = iter(thumbnails(pool, np.concatenate([np.r_[row.kept, row.dropped] for row in rows]), size))
    left, right, top, bottom = -2.6, n_left + n_right + 0.5, -0.45, len(rows)  # in thumbnails
    figure = Figure(
        figsize=(0.62 * (right - left), 0.62 * (bottom - top) + (0.3 if title else 0)), layout="constrained"
    )
    axes = figure.subplots()
    for y, row in enumerate(rows):
        for x in range(len(row.kept) + len(row.dropped)):
            dropped = x >= len(row.kept)
            at = x if not dropped else n_left + 0.5 + x - len(row.kept)
            axes.imshow(next(images), extent=(at + 0.03, at + 0.97, y + 0.97, y + 0.03))
        text = f"{row.why}, cluster {row.cluster}\n{row.n_kept:,} of {row.size:,} kept"
        axes.text(-0.15, y + 0.5, text, ha="right", va="center", fontsize=8, color=INK)
        for count, at in ((len(row.kept), 0.0), (len(row.dropped), n_left + 0.5)):
            if not count:
                axes.text(at + 0.1, y + 0.5, "none", va="center", fontsize=8, color=POOL)
    axes.text(0, -0.12, "kept", fontsize=9, color=INK, weight="bold")
    axes.text(n_left + 0.5, -0.12, "dropped", fontsize=9, color=INK, weight="bold")
    axes.axvline(n_left + 0.25, color=FAINT, lw=1)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    return figure


def _colours(names: Sequence[str]) -> list[str]:
    """Colours by name: for what the report page draws too, those that it takes; for others, the rest."""
    fixed = {"pool": POOL, "random": SERIES[1], "selected": SERIES[0], "curated": SERIES[0]}
    used = {fixed[name] for name in names if name in fixed}
    rest = cycle([colour for colour in (POOL, *SERIES) if colour not in used])
    return [fixed[name] if name in fixed else next(rest) for name in names]


def _figure(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    if title:
        axes.set_title(title, fontsize=11, color=INK, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(POOL)
    axes.tick_params(colors=INK, labelsize=8)
    axes.set_axisbelow(True)
    return figure, axes


def _log_rank(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis, extent in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        narrow = extent[1] < 100 * max(extent[0], 1e-9)
        axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if narrow else (1,)))
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
        )
    axes.set_xlabel(x_label, fontsize=9, color=INK)
    axes.set_ylabel(y_label, fontsize=9, color=INK)
    axes.grid(color=FAINT, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(POOL)
    axes.tick_params(colors=INK, labelsize=8)


def _legend_below(figure: Figure, axes: Axes) -> None:
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower left", frameon=False, fontsize=8, ncols=1
    )  # fmt: skip
