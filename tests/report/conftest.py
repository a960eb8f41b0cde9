"""One small pool, its embeddings and its tree, shared by the report's tests."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.cluster import KMeans

from curated_data.clustering.tree import ClusterTree
from curated_data.pool import ShardPool, ShardWriter
from curated_data.selection.sampling import hierarchical_sample


def png(colour, shape=(20, 30)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((*shape, 3), colour, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> SimpleNamespace:
    """200 coloured images in three classes of 140, 50 and 10, one of them broken, clustered in two levels."""
    folder: Path = tmp_path_factory.mktemp("pool")
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [140, 50, 10])
    centres = np.array([[200, 40, 40], [40, 180, 60], [50, 60, 210]])
    colours = np.clip(centres[labels] + rng.normal(0, 15, (200, 3)), 0, 255).astype(np.uint8)
    with ShardWriter(folder / "pool-%06d.tar", max_samples=80) as writer:
        for i, (colour, label) in enumerate(zip(colours, labels.tolist())):
            data = b"not an image" if i == 7 else png(colour)
            writer.write({"__key__": f"img<{i:03d}>", "png": data, "cls": label})
    pool = ShardPool(str(folder / "pool-*.tar"))
    x = colours.astype(np.float32)
    low = KMeans(12, n_init=1, random_state=0).fit(x)
    high = KMeans(4, n_init=1, random_state=0).fit(low.cluster_centers_)
    leaf = low.labels_.copy()
    leaf[7] = -1
    distance = np.linalg.norm(x - low.cluster_centers_[low.labels_], axis=1)
    tree = ClusterTree(
        {1: low.cluster_centers_, 2: high.cluster_centers_}, {1: leaf, 2: high.labels_}, distance
    )
    ids = hierarchical_sample(tree, 60)
    return SimpleNamespace(pool=pool, labels=labels, colours=colours, x=x, tree=tree, ids=ids)
