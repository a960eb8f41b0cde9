"""The datasets of a suite as features: every part is embedded once, and then read from the cache."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset

from curated_data.clustering import kmeans
from curated_data.datasets.images import Images
from curated_data.datasets.suite import Dataset, Part
from curated_data.embedding import Embedder, EmbeddingStore, embed_pool
from curated_data.embedding.tokens import TokenEmbedder, block_embedder
from curated_data.errors import PoolError
from curated_data.selection.near_duplicates import image_contents, match_held_out

log = logging.getLogger(__name__)


class Features:
    """The features of all parts by one embedder.

    Args:
        embedder: of images.
        cache: folder of the cache.
        workers: loader processes.
        device: of the embedder, and of what `EmbeddedDataset.probed` gives.
    """

    def __init__(self, embedder: Embedder, cache: Path, *, workers: int, device: torch.device) -> None:
        self.embedder, self.cache, self.workers, self.device = embedder, cache, workers, device
        self.blocks = block_embedder(embedder)
        self._tokens: TokenEmbedder | None = None
        self._stores: dict[tuple[int, int], tuple[Part, Embedder, EmbeddingStore]] = {}

    def tokens(self) -> TokenEmbedder:
        """The embedder's patch tokens, for dense tasks."""
        if self._tokens is None:
            self._tokens = TokenEmbedder(self.embedder)
        return self._tokens

    def store(self, part: Part, embedder: Embedder | None = None) -> EmbeddingStore:
        """A part's embeddings, by this embedder or by one derived from it."""
        embedder = embedder or self.embedder
        key = id(part), id(embedder)
        if key not in self._stores:
            store = embed_pool(part.pool, embedder, self.cache, num_workers=self.workers, device=self.device)
            if failed := int((~store.valid).sum()):
                log.warning("%d of %d images cannot be read and are left out", failed, len(store))
            self._stores[key] = part, embedder, store  # objects that are kept keep their ids
        return self._stores[key][2]


@dataclass(frozen=True)
class EmbeddedDataset:
    """A dataset of a suite with its features, as `lightning_modules.evaluation.suite` asks for them.

    In its methods, a part is "train" or "test".
    """

    dataset: Dataset
    parts: Mapping[str, Part]
    embedded: Features

    @property
    def evaluations(self) -> list[str]:
        return self.dataset.evaluations

    @property
    def steps(self) -> int | None:
        return self.dataset.steps

    @property
    def base(self) -> str:
        return self.dataset.base

    def known(self, part: str) -> Images:
        """What the layout knows of the images."""
        return self.parts[part].images or Images(Path(), ())

    def features(self, part: str) -> tuple["Rows", np.ndarray]:
        """Rows and ids of the images that can be read."""
        store = self.embedded.store(self.parts[part])
        ids = np.flatnonzero(store.valid)
        return Rows(store, ids), ids

    def gallery(self) -> EmbeddingStore:
        """Rows of all train images, zero for those that cannot be read, so that places match."""
        return self.embedded.store(self.parts["train"])

    def labelled(self, part: str, embedder: Embedder | None = None) -> tuple["Rows", np.ndarray]:
        """Rows and labels of the images that can be read and have a label.

        Raises:
            PoolError: there are none.
        """
        store, labels = self.embedded.store(self.parts[part], embedder), self.parts[part].labels()
        ids = np.flatnonzero(store.valid & (labels >= 0))
        if not len(ids):
            raise PoolError(f"{self.parts[part].pool.urls[0]}: no image has a label (.cls)")
        return Rows(store, ids), labels[ids]

    def probed(self, part: str) -> tuple[np.ndarray | dict[str, torch.Tensor], np.ndarray]:
        """The same for linear heads: of a transformer all kinds of features that it offers, by name."""
        blocks = self.embedded.blocks
        rows, labels = self.labelled(part, blocks)
        x = rows[:].astype(np.float32)
        return x if blocks is None else blocks.kinds(torch.from_numpy(x).to(self.embedded.device)), labels

    def tokens(self, part: str) -> tuple["Tokens", Subset[np.ndarray]]:
        """Patch tokens and maps of the images that can be read.

        Raises:
            PoolError: the layout has no maps.
        """
        images = self.known(part)
        if images.maps is None:
            raise PoolError(f"layout {self.dataset.layout}: has no maps for a dense task")
        embedder = self.embedded.tokens()
        store = self.embedded.store(self.parts[part], embedder)
        ids = np.flatnonzero(store.valid)
        return Tokens(Rows(store, ids), embedder.grid), Subset(images.maps, ids.tolist())

    def answers(self, part: str) -> tuple[np.ndarray, list[list[int]] | None]:
        """Right classes of all images, (n,) or (n, m), and the base classes that each class stands for."""
        images = self.known(part)
        if images.labels is not None:
            return images.labels, images.class_map
        return self.parts[part].labels(), None

    def clusters(self, part: str, n_clusters: int) -> np.ndarray:
        """Clusters of the labelled images, by k-means on the cosine."""
        rows, _ = self.labelled(part)
        x = rows[:].astype(np.float32)
        return kmeans(x, n_clusters, metric="cosine", n_init=3).assignment

    def duplicates(self, near: float) -> tuple[list[dict[str, str]], int]:
        """Test images that are also in train, by equal bytes or by a cosine of `near` and above.

        Returns:
            A row for each: test and train (keys), kind ("same bytes" or "near"); and the number of test
            images.
        """
        train, test = self.parts["train"].pool, self.parts["test"].pool
        digests = [image_contents(pool).digest for pool in (train, test)]
        place = {d.tobytes(): i for i, d in reversed(list(enumerate(digests[0]))) if d.any()}
        found = {
            i: ("same bytes", place[d.tobytes()]) for i, d in enumerate(digests[1]) if d.tobytes() in place
        }
        (bank, train_ids), (queries, test_ids) = self.features("train"), self.features("test")
        match = match_held_out(queries.store, bank[:].astype(np.float32), threshold=near, ids=test_ids)
        for i, row in zip(test_ids.tolist(), match.tolist()):
            if row >= 0:
                found.setdefault(i, ("near", int(train_ids[row])))
        chosen = sorted(found)
        keys = train.keys(np.array([found[i][1] for i in chosen], np.int64))
        rows = [
            {"test": key, "train": twin, "kind": found[i][0]}
            for i, key, twin in zip(chosen, test.keys(np.array(chosen, np.int64)), keys)
        ]
        return rows, len(test)


class Rows:
    """Some rows of a store, read from disk on access."""

    def __init__(self, store: EmbeddingStore, ids: np.ndarray) -> None:
        self.store, self.ids = store, ids
        self.shape = (len(ids), store.shape[1])

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.store.rows(self.ids[rows])


class Tokens:
    """Rows of a store as maps of tokens (n, h, w, d)."""

    def __init__(self, rows: Rows, grid: tuple[int, ...]) -> None:
        self.rows, self.grid = rows, grid
        self.shape = (len(rows.ids), *grid)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, i: int) -> np.ndarray:
        return self.rows[i : i + 1].reshape(self.grid)
