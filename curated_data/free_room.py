"""Room on a figure for names and images: boxes that overlap no other and hide few points."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

_CELL = 4.0  # pixels, by which boxes are moved
_WORTH = 10_000.0  # pixels that a box would move so as not to hide every point


class FreeRoom:
    """The axes of a map, and the boxes on it so far. Lengths are in pixels, from the lower left of the axes.

    The axes keep their limits from here on: where there is room depends on them.
    """

    def __init__(self, axes: Axes, coordinates: np.ndarray) -> None:
        axes.apply_aspect()
        axes.autoscale(False)
        frame = axes.get_window_extent()
        self.axes, self.corner = axes, np.array([frame.x0, frame.y0])
        self._shape = np.maximum(np.array([frame.width, frame.height]) // _CELL, 1).astype(np.int64)
        cell = self.pixels(coordinates[np.isfinite(coordinates).all(1)]) // _CELL
        cell = cell[((cell >= 0) & (cell < self._shape)).all(1)].astype(np.int64)
        count = np.bincount(cell @ [self._shape[1], 1], minlength=int(self._shape.prod()))
        self._points = count.reshape(self._shape)
        self._taken = np.zeros(self._shape, np.int64)

    def pixels(self, coordinates: np.ndarray) -> np.ndarray:
        """(n, 2) of the axes' data as pixels."""
        return self.axes.transData.transform(coordinates) - self.corner

    def data(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels as the axes' data."""
        return self.axes.transData.inverted().transform(pixels + self.corner)

    def take(
        self, anchor: np.ndarray, size: np.ndarray, *, reach: float = np.inf, hides: bool = True
    ) -> np.ndarray | None:
        """The centre (2,) of a box of a size (2,), which is taken from now on; None if there is no room.

        It is near the anchor (2,), at most at `reach`, and hides few points, or none unless `hides`.
        """
        sides = np.ceil(np.asarray(size) / _CELL).astype(np.int64)
        if (sides > self._shape).any():
            return None
        hidden, taken = _sums(self._points, sides), _sums(self._taken, sides)
        x, y = ((np.arange(n) + side / 2) * _CELL for n, side in zip(hidden.shape, sides, strict=True))
        distance = np.hypot(x[:, None] - anchor[0], y[None, :] - anchor[1])
        cost = distance + _WORTH * hidden / max(self._points.sum(), 1)
        cost[(taken > 0) | (distance > reach) | ((hidden > 0) & (not hides))] = np.inf
        i, j = np.unravel_index(np.argmin(cost), cost.shape)
        if not np.isfinite(cost[i, j]):
            return None
        self._taken[i : i + sides[0], j : j + sides[1]] = 1
        return np.array([x[i], y[j]])


def name_groups(
    room: FreeRoom, places: np.ndarray, names: Sequence[str], colours: Sequence[str], fontsize: float
) -> None:
    """Write each name near its place (k, 2), with a line to it from elsewhere; one without room is left out.

    Places that are not finite have no name.
    """
    line_width = fontsize / 10
    for place, name, colour in zip(places, names, colours, strict=True):
        if not np.isfinite(place).all():
            continue
        box = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": colour, "alpha": 0.85, "lw": line_width}
        text = room.axes.text(
            place[0], place[1], name, ha="center", va="center", fontsize=fontsize, zorder=5, bbox=box
        )
        text.set_in_layout(False)
        extent = text.get_window_extent().padded(0.3 * fontsize * room.axes.figure.dpi / 72)
        centre = room.take(room.pixels(place), np.array([extent.width, extent.height]))
        if centre is None:
            text.remove()
            continue
        text.set_position(tuple(room.data(centre)))
        if (np.abs(room.pixels(place) - centre) > np.array([extent.width, extent.height]) / 2).any():
            ends = np.stack([place, room.data(centre)])
            room.axes.add_artist(Line2D(*ends.T, color=colour, lw=2 * line_width, zorder=4, in_layout=False))


def _sums(grid: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """The sum of a grid under a box of `sides` cells, at each place where it fits."""
    total = np.pad(grid.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    a, b = sides
    return total[a:, b:] - total[:-a, b:] - total[a:, :-b] + total[:-a, :-b]
