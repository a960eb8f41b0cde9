"""The images on the report page: which examples are shown, and one sheet with their thumbnails."""

import base64
import dataclasses
import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from curated_data.embedding.existing import EmbeddedPool
from curated_data.report.examples import cluster_rows, random_subset, thumbnails
from curated_data.selection.removed import Removed

if TYPE_CHECKING:
    from curated_data.stages.curation import Curation
    from curated_data.stages.index import AnyPool

TILE = 48  # pixels of a thumbnail's side
COLUMNS = 32  # of the sheet of tiles
LARGE = 192  # pixels of a larger image's side


class Tiles:
    """Collects the samples whose thumbnails the page needs."""

    def __init__(self, pool: "AnyPool") -> None:
        self.pool = pool
        self.place: dict[int, int] = {}
        self.shown: set[int] = set()
        self.large: dict[int, str] = {}
        self.available = not isinstance(pool, EmbeddedPool) and any(
            e in pool.index().extensions for e in pool.image_extensions
        )

    def add(self, ids: np.ndarray) -> list[int]:
        """The number of each id's tile; -1 if the pool has no images."""
        self.shown.update(ids.tolist())
        if not self.available:
            return [-1] * len(ids)
        return [self.place.setdefault(int(i), len(self.place)) for i in ids]

    def examples(self, ids: np.ndarray) -> list[list[int]]:
        """The ids, and the numbers of their tiles."""
        return [ids.tolist(), self.add(ids)]

    def enlarge(self, ids: np.ndarray) -> None:
        """Keep these images in a larger size, too, each as a data URL."""
        if self.available and not isinstance(self.pool, EmbeddedPool):
            tiles = thumbnails(self.pool, ids, LARGE)
            self.large |= {int(i): _data_url(tile) for i, tile in zip(ids.tolist(), tiles, strict=True)}

    def sheet(self) -> str:
        """All tiles in one JPEG, row by row, as a data URL."""
        if not self.place or isinstance(self.pool, EmbeddedPool):
            return ""
        tiles = thumbnails(self.pool, np.array(list(self.place)), TILE)
        n_rows = -(-len(tiles) // COLUMNS)
        blank = np.full((n_rows * COLUMNS - len(tiles), TILE, TILE, 3), 255, np.uint8)
        grid = np.concatenate([tiles, blank]).reshape(n_rows, COLUMNS, TILE, TILE, 3)
        return _data_url(grid.swapaxes(1, 2).reshape(n_rows * TILE, COLUMNS * TILE, 3))


def _data_url(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def contact_sheets(curation: "Curation", tiles: Tiles, seed: int) -> list[dict[str, Any]]:
    """Rows of the contact sheets: clusters of level 1, each at most once, and none with a single sample."""
    sheets: list[dict[str, Any]] = []
    for choose in ("largest", "smallest", "most cut"):
        seen = [sheet["cluster"] for sheet in sheets]
        for row in cluster_rows(
            curation.tree,
            curation.ids,
            choose=choose,
            n_clusters=4,
            n_images=9,
            exclude=seen,
            least=2,
            seed=seed,
        ):
            content = dataclasses.asdict(row)
            for kind in ("kept", "dropped"):
                content[kind] = tiles.examples(content[kind])
            sheets.append(content)
    return sheets


def single_samples(curation: "Curation", tiles: Tiles, rng: np.random.Generator) -> dict[str, Any] | None:
    """Lowest clusters with a single sample: how many there are and how many were kept, with examples."""
    leaf = curation.tree.parent[1]
    single = np.append(curation.tree.sizes(1) == 1, False)  # the last for -1, excluded
    alone = np.flatnonzero(single[leaf])
    if not len(alone):
        return None
    kept = np.isin(alone, curation.ids)
    sides = {}
    for name, ids in (("kept", alone[kept]), ("dropped", alone[~kept])):
        some = np.sort(random_subset(ids, 18, rng))
        sides[name] = tiles.examples(some)
    return {"n": len(alone), "n_kept": int(kept.sum()), **sides}


def near_duplicate_groups(curation: "Curation", tiles: Tiles, n_groups: int = 12) -> dict[str, Any] | None:
    """The largest groups of near-duplicates with examples, and the copies of held-out samples."""
    folder = curation.folders.get("near_duplicates")
    if folder is None:
        return None
    found = Removed.load(folder)
    copies = np.bincount(found.near[found.near >= 0], minlength=len(found.keep))
    several = np.flatnonzero(copies)
    groups = []
    for kept in several[np.argsort(-copies[several], kind="stable")[:n_groups]].tolist():
        dropped = np.flatnonzero(found.near == kept)
        dropped = dropped[np.argsort(found.cosine[dropped], kind="stable")][:9]  # the least alike
        groups.append(
            {
                "size": 1 + int(copies[kept]),
                "kept": tiles.examples(np.array([kept])),
                "dropped": tiles.examples(dropped),
            }
        )
    held_out = np.flatnonzero((found.held_out >= 0) & ~found.keep)
    return {
        "removed": int((found.near >= 0).sum()),
        "held_out": len(held_out),
        "held_out_examples": tiles.examples(held_out[:18]),
        "n_groups": len(several),
        "groups": groups,
    }
