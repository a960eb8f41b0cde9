"""Maps of features: t-SimCNE's loss on cached embeddings, the figure, and the table of coordinates."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import faiss
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from torch import Tensor

from curated_data.colours import far_apart, place_of
from curated_data.free_room import FreeRoom, name_groups
from curated_data.matrix import Matrix, read_rows
from curated_data.randomness import seeded
from lightning_modules.heads import mlp
from lightning_modules.losses import cauchy_contrast
from lightning_modules.schedules import warmup_cosine

log = logging.getLogger(__name__)

_NAMED = 40  # labels that are named on a map, the largest
_THUMBNAIL = 20  # points of the longer side of an image on a map


def embed_2d(
    features: Matrix,
    *,
    epochs: int = 40,
    seed: int = 0,
    n_neighbors: int = 15,
    max_train: int = 20_000,
    batch_size: int = 1024,
    hidden_dimension: int = 256,
    learning_rate: float = 2e-3,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """A map of features in minutes: a small network, t-SimCNE's loss, neighbours in place of views.

    Without images there is no augmentation; the positive pair of a sample is one of its nearest neighbours by
    cosine (InfoNC-t-SNE, arXiv 2206.01816, in its parametric form). The network is trained on at most
    `max_train` samples and maps all of them, so any number of rows, a memory map included, costs one pass
    more.

    Args:
        features: (n, d) array, memory map or tensor, any float type. Exact copies count as one sample: they
            would be each other's only neighbours.
        epochs: passes over the training samples.
        seed: same seed, same map, on one machine.
        n_neighbors: k of the neighbour graph.

    Returns:
        (n, 2) float32, centred.

    Raises:
        ValueError: fewer than three samples, or features that are not finite, with their rows.

    Examples:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> labels = np.repeat([0, 1, 2], 20)
        >>> features = np.eye(3)[labels] + 0.1 * rng.normal(size=(60, 3))
        >>> from lightning_modules.maps import embed_2d
        >>> embed_2d(features, epochs=2, batch_size=30, hidden_dimension=16).shape
        (60, 2)
    """
    n = len(features)
    if n < 3 or len(features.shape) != 2:
        raise ValueError(f"a map needs features (n, d) of at least 3 samples, got {tuple(features.shape)}")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    generator = torch.Generator().manual_seed(seed)
    distinct = _distinct(features)
    chosen = torch.randperm(len(distinct), generator=generator)[:max_train].sort().values.numpy()
    chosen = distinct[chosen]
    train = _rows(features, chosen)
    mean, least = train.mean(0), 1e-12 if train.dtype == torch.float32 else 1e-300
    scale = (train - mean).square().sum(1).mean().sqrt().clamp_min(least)
    neighbors = torch.from_numpy(_neighbor_graph(train.numpy(), min(n_neighbors, len(train) - 1)))
    dimension = train.shape[1]
    train = ((train - mean) / scale * dimension**0.5).float().to(device)

    with seeded(seed, torch.device(device)):
        network = mlp([dimension, hidden_dimension, hidden_dimension, 2]).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    # At least a few batches an epoch, however small the set: the map's detail comes from the number of steps.
    batch_size = max(min(batch_size, len(train) // 8), 2)
    n_batches = len(train) // batch_size
    with torch.enable_grad():
        for epoch in range(epochs):
            order = torch.randperm(len(train), generator=generator)
            partner = torch.randint(neighbors.shape[1], (len(train),), generator=generator)
            for i in range(n_batches):
                rows = order[i * batch_size : (i + 1) * batch_size]
                pairs = torch.cat([rows, neighbors[rows, partner[rows]]]).to(device)
                a, b = network(train[pairs]).chunk(2)
                loss = cauchy_contrast(a, b, all_ranks=False)
                rate = warmup_cosine(
                    epoch * n_batches + i, total=epochs * n_batches, peak=learning_rate, warmup=n_batches
                )
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    log.info(
        "map of %d samples: loss %.3f after %d epochs on %d of them",
        n,
        float(loss.detach()),
        epochs,
        len(train),
    )

    coordinates = np.empty((n, 2), np.float32)
    with torch.no_grad():
        for start in range(0, n, 65536):
            block = _rows(features, np.arange(start, min(start + 65536, n)))
            block = ((block - mean) / scale * dimension**0.5).float().to(device)
            coordinates[start : start + len(block)] = network(block).cpu().numpy()
    return coordinates - coordinates[chosen].mean(0)


def draw_map(
    coordinates: np.ndarray,
    *,
    labels: np.ndarray | None = None,
    names: Sequence[str] | None = None,
    selected: np.ndarray | None = None,
    outliers: np.ndarray | None = None,
    thumbnail: Callable[[int], np.ndarray] | None = None,
    title: str = "",
) -> Figure:
    """The figure of a map: points coloured by label or cluster, thumbnails where there is room.

    Colours are those that the colour-blind can tell apart. With more labels than these, far ones share a
    colour; the forty largest are named near their place. Names do not overlap, and thumbnails hide no point.

    Args:
        coordinates: (n, 2).
        labels: (n,) integers, for example classes or clusters; -1 is drawn grey.
        names: of the labels.
        selected: (n,) boolean: samples left out are drawn small and pale.
        outliers: (n,) boolean: marked with a cross; by default the most isolated one in a thousand points.
        thumbnail: gives the image (H, W, 3) uint8 of a row; drawn beside points that have room around them.

    Raises:
        ValueError: arrays of different lengths.

    Examples:
        >>> import numpy as np
        >>> from lightning_modules.maps import draw_map
        >>> coordinates = np.random.default_rng(0).normal(size=(60, 2))
        >>> figure = draw_map(coordinates, labels=np.repeat([0, 1], 30), names=["cat", "dog"])
        >>> figure.savefig("map.png")
    """
    n = len(coordinates)
    for name, array in (("labels", labels), ("selected", selected), ("outliers", outliers)):
        if array is not None and len(array) != n:
            raise ValueError(f"{name}: {len(array)} values for {n} points")
    figure = Figure(figsize=(9, 8), dpi=120)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.92))
    size = float(np.clip(40_000 / n, 0.5, 14))
    chosen = np.ones(n, bool) if selected is None else np.asarray(selected, bool)
    labels = np.zeros(n, np.int64) if labels is None else np.asarray(labels)
    values = np.unique(labels)
    places = np.array([place_of(coordinates[labels == value]) for value in values])
    groups = dict(zip(values[values >= 0].tolist(), far_apart(places[values >= 0]), strict=True))
    for value in values.tolist():
        colour = groups.get(value, "lightgrey")
        for subset, factor, alpha in (
            ((labels == value) & ~chosen, 0.5, 0.35),
            ((labels == value) & chosen, 1, 0.8),
        ):
            x, y = coordinates[subset].T
            axes.scatter(x, y, s=size * factor, color=colour, alpha=alpha, linewidths=0)
    marked = isolated(coordinates) if outliers is None else np.asarray(outliers, bool)
    x, y = coordinates[marked].T
    axes.scatter(x, y, s=30, marker="x", color="black", linewidths=0.7, label="outlier")
    axes.set(xticks=[], yticks=[], title=title)
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(loc="lower left", frameon=False, fontsize=8)
    room = FreeRoom(axes, coordinates)
    named = sorted(groups, key=lambda value: -np.count_nonzero(labels == value))[:_NAMED]
    if len(groups) > 1:
        name_groups(
            room,
            places[np.searchsorted(values, named)],
            [str(value) if names is None else names[value] for value in named],
            [groups[value] for value in named],
            fontsize=8,
        )
    if thumbnail is not None:
        _draw_thumbnails(room, coordinates, thumbnail)
    return figure


def save_coordinates(
    path: str | Path,
    coordinates: np.ndarray,
    *,
    ids: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> None:
    """Write the map as CSV: id, x, y, and the label where given.

    Examples:
        >>> import numpy as np
        >>> from lightning_modules.maps import save_coordinates
        >>> coordinates = np.random.default_rng(0).normal(size=(60, 2))
        >>> save_coordinates("map.csv", coordinates)
    """
    n = len(coordinates)
    columns = [np.arange(n) if ids is None else ids, coordinates[:, 0], coordinates[:, 1]]
    header, formats = "id,x,y", ["%d", "%.6g", "%.6g"]
    if labels is not None:
        columns.append(labels)
        header, formats = header + ",label", [*formats, "%d"]
    np.savetxt(path, np.column_stack(columns), fmt=formats, delimiter=",", header=header, comments="")


def isolated(coordinates: np.ndarray, *, share: float = 1e-3, n_neighbors: int = 5) -> np.ndarray:
    """The (n,) mask of the `share` of points that are farthest from their n-th neighbour on the map.

    Examples:
        >>> import numpy as np
        >>> from lightning_modules.maps import isolated
        >>> coordinates = np.append(np.random.default_rng(0).normal(size=(99, 2)), [[50.0, 50.0]], axis=0)
        >>> np.flatnonzero(isolated(coordinates, share=0.01))
        array([99])
    """
    points = np.ascontiguousarray(coordinates, np.float32)
    distance = faiss.knn(points, points, min(n_neighbors + 1, len(points)))[0][:, -1]
    mask = np.zeros(len(points), bool)
    mask[np.argsort(distance)[len(points) - int(share * len(points)) :]] = True
    return mask


def _rows(features: Matrix, rows: np.ndarray) -> Tensor:
    """Rows as float32, or as float64 if they are, or their squares would leave float32's range."""
    block = read_rows(features, rows).cpu()
    largest = float(block.abs().amax()) if block.numel() else 0.0
    return block if not largest or 1e-15 < largest < 1e15 else block.double()


def _distinct(features: Matrix) -> np.ndarray:
    """The first of each set of equal rows, ascending; all rows where fewer than three differ.

    Raises:
        ValueError: rows that are not finite.
    """
    n, bad = len(features), []
    keys = np.empty(n, np.int64)
    for start in range(0, n, 65536):
        block = read_rows(features, np.arange(start, min(start + 65536, n))).cpu()
        bad += (torch.nonzero(~torch.isfinite(block).all(1))[:, 0] + start).tolist()
        keys[start : start + len(block)] = [hash(row.tobytes()) for row in block.numpy()]
    if bad:
        raise ValueError(
            f"features are not finite in {len(bad)} rows, the first {bad[:10]}: leave excluded samples "
            "out of the map"
        )
    first = np.sort(np.unique(keys, return_index=True)[1])
    return first if len(first) >= 3 else np.arange(n)


def _neighbor_graph(x: np.ndarray, k: int) -> np.ndarray:
    """The k nearest others of each row by cosine, (n, k) int64."""
    x = (
        x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12 if x.dtype == np.float32 else 1e-300)
    ).astype(np.float32)
    found = faiss.knn(x, x, k + 1, metric=faiss.METRIC_INNER_PRODUCT)[1]
    # A row finds itself first, unless copies of it come before: drop itself where it stands, else the last.
    itself = found == np.arange(len(x))[:, None]
    itself[~itself.any(1), -1] = True
    return found[~itself].reshape(len(x), k).astype(np.int64)


def _draw_thumbnails(
    room: FreeRoom, coordinates: np.ndarray, thumbnail: Callable[[int], np.ndarray], cells: int = 24
) -> None:
    """An image of one point in each cell of a grid, beside it, where there is room; emptiest cells first."""
    low, high = np.percentile(coordinates, [0.5, 99.5], axis=0)
    cell = ((coordinates - low) / np.maximum(high - low, 1e-9) * cells).astype(np.int64).clip(0, cells - 1)
    _, first, counts = np.unique(cell @ [cells, 1], return_index=True, return_counts=True)
    pixels = room.pixels(coordinates)
    side = _THUMBNAIL * room.axes.figure.dpi / 72
    for row in first[np.argsort(counts, kind="stable")].tolist():
        centre = room.take(pixels[row], np.full(2, 1.25 * side), reach=2 * side, hides=False)
        if centre is None:
            continue
        image = thumbnail(row)
        box = AnnotationBbox(
            OffsetImage(image, zoom=_THUMBNAIL / max(image.shape[:2])),
            coordinates[row],
            tuple(room.data(centre)),
            pad=0.05,
            arrowprops={"arrowstyle": "-", "color": "grey", "lw": 0.5},
            bboxprops={"lw": 0.5, "ec": "grey"},
        )
        room.axes.add_artist(box)


__all__ = ["draw_map", "embed_2d", "isolated", "save_coordinates"]
