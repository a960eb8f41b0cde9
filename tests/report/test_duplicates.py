"""The page by which a threshold is chosen: its pairs and counts, its keys escaped, and nothing loaded."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from curated_data import ShardPool, ShardWriter
from curated_data.cli import main
from curated_data.embedding import embed_pool, resolve_embedder
from curated_data.errors import ConfigError
from curated_data.report.duplicates import write_pairs
from curated_data.selection.near_duplicates import near_duplicates, similar_pairs


def picture(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Ten images, each with copies that are ever less alike, and one twice; odd keys; one that is broken."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    with ShardWriter(folder / "pool-%06d.tar") as writer:
        for place in range(10):
            original = rng.integers(0, 256, (8, 8, 3))
            for number, noise in enumerate((0, 5, 30, 60)):
                noisy = np.clip(original + noise * rng.normal(size=original.shape), 0, 255)
                writer.write({"__key__": f'<b>&"{place}-{number}', "png": picture(noisy)})
        writer.write({"__key__": "twice", "png": picture(original)})
        writer.write({"__key__": "broken", "png": b"?"})
    shards = ShardPool(str(folder / "pool-*.tar"), cache_dir=folder / "cache")
    return shards, embed_pool(shards, resolve_embedder("pixels:8"), folder / "cache", num_workers=0)


def test_bands_count_all_pairs_and_show_some(pool, tmp_path):
    shards, store = pool
    bands = write_pairs(shards, store, tmp_path / "page.html", least=0.6, n_pairs=4)
    x = store.as_array(np.float64)
    unit = x[store.valid] / np.linalg.norm(x[store.valid], axis=1, keepdims=True)
    cosine = (unit @ unit.T)[np.triu_indices(len(unit), 1)]
    assert bands[-1].least == 0.6
    for band in bands[1:]:
        assert band.n_pairs_above == pytest.approx((cosine >= band.least).sum(), abs=16)  # 16 per sample
        assert len(band.pairs) == min(band.n_pairs, 4)
        assert (np.diff(band.cosine) <= 0).all()
        assert ((band.cosine >= band.least) & (band.cosine < band.below)).all()
        left_out = (store.valid & ~near_duplicates(store, valid=store.valid, threshold=band.least).keep).sum()
        assert band.n_left_out == pytest.approx(left_out, abs=3)
    assert sum(band.n_pairs for band in bands) == bands[-1].n_pairs_above
    equal = bands[0]
    assert equal.pairs.tolist() == [[36, 40]]
    assert equal.n_left_out == 1


def test_equal_rows_are_in_one_pair_each():
    pairs, cosine = similar_pairs(np.array([[1, 0], [1, 0], [0, 0], [1, 0.1], [1, 0]]), threshold=0.9)
    assert sorted(map(tuple, pairs.tolist())) == [(0, 1), (0, 3), (0, 4)]
    assert cosine[pairs[:, 1] == 3] == pytest.approx(1 / np.sqrt(1.01))


def test_the_page_is_self_contained_and_keys_are_text(pool, tmp_path):
    shards, store = pool
    write_pairs(shards, store, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;&amp;&quot;0-0" in page
    assert "<b>&" not in page
    assert not re.findall(r"(?:src|href)=\"(?!data:image/jpeg;base64,)", page)
    assert "<script" not in page
    assert "1 could not be embedded" in page


def test_the_command(pool, tmp_path, capsys):
    shards, _ = pool
    place = ["--cache-dir", str(tmp_path / "cache"), "--examples", str(tmp_path / "page.html")]
    command = ["duplicates", *map(str, shards.urls), "--embedder", "pixels:8", *place]
    assert main([*command, "--least", "0.9"]) == 0
    assert (tmp_path / "page.html").exists()
    assert "0.95" in capsys.readouterr().out
    assert main([*command, "--least", "1"]) == 2
    assert "--least 1.0" in capsys.readouterr().err
    assert main([*command, "--pairs", "0"]) == 2
    with pytest.raises(ConfigError, match="--least -1"):
        write_pairs(*pool, tmp_path / "page.html", least=-1)
