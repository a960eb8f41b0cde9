"""Transparent images are counted and told apart, and equal embeddings are noticed."""

import io
import json
import logging

import numpy as np
import pytest
import webdataset
from PIL import Image

from curated_data.cache.artifacts import open_cache
from curated_data.embedding import embed_pool, resolve_embedder
from curated_data.embedding.equal import equal_rows
from curated_data.pool import ShardPool


def write(path, images) -> str:
    with webdataset.TarWriter(str(path), mtime=0) as writer:
        for number, image in enumerate(images):
            content = io.BytesIO()
            image.save(content, "PNG")
            writer.write({"__key__": f"k{number:04d}", "png": content.getvalue()})
    return str(path)


def drawing(number: int) -> Image.Image:
    """Black lines on nothing."""
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[..., 3] = np.random.default_rng(number).integers(0, 2, (32, 32)) * 255
    return Image.fromarray(pixels, "RGBA")


def test_drawings_on_nothing_are_embedded_apart_and_counted(tmp_path, caplog):
    path = write(tmp_path / "a.tar", [drawing(n) for n in range(40)] + [Image.new("RGB", (32, 32))] * 3)
    root = open_cache(tmp_path / "c")
    with caplog.at_level(logging.WARNING):
        store = embed_pool(ShardPool(path), resolve_embedder("pixels:8"), root, num_workers=0)
    assert len(np.unique(np.asarray(store)[:40], axis=0)) == 40
    assert "40 of 43 images have transparent pixels, the first: " + path in caplog.text
    (details,) = store.folder.glob("*.json")
    assert json.loads(details.read_text())["transparent"] == 40
    assert "one and the same" not in caplog.text
    black = embed_pool(ShardPool(path, background=0), resolve_embedder("pixels:8"), root, num_workers=0)
    assert black.folder != store.folder
    assert len(np.unique(np.asarray(black)[:40], axis=0)) == 1
    assert "one and the same" in caplog.text


@pytest.mark.parametrize("setting", [{"background": (0, 0, 1)}, {"exif_orientation": False}])
def test_settings_of_images_name_the_embeddings(tmp_path, setting):
    path, root = write(tmp_path / "a.tar", [drawing(1)]), open_cache(tmp_path / "c")
    found = [
        embed_pool(ShardPool(path, **options), resolve_embedder("pixels:2"), root, num_workers=0).folder
        for options in ({}, setting, {})
    ]
    assert found[0] == found[2] != found[1]


def test_another_limit_on_pixels_tries_again(tmp_path, monkeypatch):
    path, root = write(tmp_path / "a.tar", [drawing(1)] * 2), open_cache(tmp_path / "c")
    pool, embedder = ShardPool(path), resolve_embedder("pixels:2")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert embed_pool(pool, embedder, root, num_workers=0).n_failures == 2
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert embed_pool(pool, embedder, root, num_workers=0).n_failures == 0


@pytest.mark.parametrize("copies", [0, 1, 30])
def test_equal_rows_are_numpys(tmp_path, copies):
    images = [drawing(n) for n in range(60)] + [drawing(7)] * copies
    images += [drawing(8)] * (1 if copies else 0)
    store = embed_pool(
        ShardPool(write(tmp_path / "a.tar", images)),
        resolve_embedder("pixels:4"),
        open_cache(tmp_path / "c"),
        num_workers=0,
    )
    _, counts = np.unique(np.asarray(store), axis=0, return_counts=True)
    found = equal_rows(store)
    assert found.looked_at == len(images)
    assert found.largest == counts.max()
    assert found.equal == counts[counts > 1].sum()
    assert found.are_many == (copies == 30)
    if copies == 30:
        assert found.example == 7
    assert equal_rows(np.asarray(store)) == found
    assert equal_rows(np.zeros((5, 3), np.float32)).looked_at == 0  # as of samples that failed
    assert equal_rows(np.zeros((0, 3), np.float32)).looked_at == 0
