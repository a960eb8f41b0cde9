"""Colours of groups in figures, and where in a map their names stand."""

import numpy as np

HUES = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#b8a800", "#7f7f7f")
"""Those of Okabe and Ito, which the colour-blind can tell apart, with a darker yellow and grey for black."""


def place_of(points: np.ndarray) -> np.ndarray:
    """The point (2,) of (n, 2) that is nearest to their median, so that there is one; NaN of none."""
    points = points[np.isfinite(points).all(1)]
    if not len(points):
        return np.full(2, np.nan)
    return points[np.square(points - np.median(points, axis=0)).sum(1).argmin()]


def far_apart(places: np.ndarray) -> list[str]:
    """A hue for each of the places (k, 2), so that those of the same hue lie far apart."""
    chosen: list[int] = []
    for number, place in enumerate(places):
        room = np.full(len(HUES), np.inf)  # from the place to the nearest one of each hue
        for hue, other in zip(chosen, places[:number], strict=True):
            room[hue] = np.fmin(room[hue], np.linalg.norm(other - place))
        chosen.append(int(room.argmax()))
    return [HUES[hue] for hue in chosen]
