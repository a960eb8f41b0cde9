"""Pages without a script as they are seen: pairs, what a search found, mixtures, settings compared."""

import io

import numpy as np
import pytest
from PIL import Image

from curated_data import Component, CuratedDataModule, LoaderOptions, Mixture, ShardPool, ShardWriter, curate
from curated_data.embedding import embed_pool, resolve_embedder
from curated_data.pipeline.search import contact_page, search
from curated_data.pipeline.tune import Tried
from curated_data.pipeline.tune_page import tune_page
from curated_data.report.duplicates import write_pairs
from curated_data.training.mixture_report import write_mixture_report
from tests.support.browser import BROWSER, check_on_screens, drive

pytestmark = [pytest.mark.long, pytest.mark.skipif(BROWSER is None, reason="no Chromium here")]

READY = "document.readyState === 'complete'"
LONG = "a-name-as-long-as-those-that-crawlers-make-of-addresses/with/folders/0123456789abcdef0123456789"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pool of 30 images, each twice, with long keys and captions; its embeddings and a curation."""
    folder = tmp_path_factory.mktemp("pool")
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "pool-%06d.tar", max_samples=20) as writer:
        images = rng.integers(0, 256, (30, 24, 32, 3), np.uint8)
        for number in range(60):
            file = io.BytesIO()
            Image.fromarray(images[number // 2]).save(file, "PNG")
            text = f"the caption of number {number}, which says {LONG}"
            writer.write({"__key__": f"{LONG}-{number:03d}", "png": file.getvalue(), "txt": text})
    pool = ShardPool(str(folder / "pool-*.tar"))
    settings = {"target_size": 20}
    curation = curate(pool, settings, embedder="pixels:8", cache_dir=folder / "cache")
    return folder, pool, curation


def test_pairs(made, tmp_path):
    folder, pool, _ = made
    store = embed_pool(pool, resolve_embedder("pixels:8"), folder / "cache", num_workers=0)
    write_pairs(pool, store, tmp_path / "page.html", least=0.5)
    check_on_screens(tmp_path / "profile", (tmp_path / "page.html").as_uri(), READY, tmp_path / "picture.png")


def test_what_a_search_found(made, tmp_path):
    _, pool, curation = made
    found = search(curation.embeddings, curation.embeddings[[7, 20]], 9, curation=curation)
    (tmp_path / "page.html").write_bytes(contact_page(found, pool, [LONG, "another"]))
    check_on_screens(tmp_path / "profile", (tmp_path / "page.html").as_uri(), READY, tmp_path / "picture.png")


def test_a_mixture(made, tmp_path):
    folder, pool, _ = made
    parts = [
        Component("selected", pool, curation={"target_size": 20}),
        Component("everything as it was crawled in the year before", pool),
        Component("a small part", str(pool.urls[0])),
    ]
    data = CuratedDataModule(
        mixture=Mixture(parts, weights={0: [2, 1, 1], 100: [1, 2, 1]}),
        batch_size=4, image_size=16, embedder="pixels:8", cache_dir=folder / "cache",
        loader=LoaderOptions(num_workers=0),
    )  # fmt: skip
    data.setup("fit")
    page = write_mixture_report(data, tmp_path / "report")
    check_on_screens(tmp_path / "profile", page.as_uri(), READY, tmp_path / "picture.png")


def test_settings_compared(tmp_path):
    """With a name, a class and settings that are longer than a phone is wide."""
    rng = np.random.default_rng(0)
    labels = np.where(rng.random(2000) < 0.2, rng.integers(0, 50, 2000), -1)
    shares = rng.dirichlet(np.ones(50), 13)
    rows = [Tried("default", {}, 1.9, 0.0, 0.0, 0.0, shares[0])] + [
        Tried(
            "clusters by size ** 0.25, with a name that is long", {"levels": [{"n_clusters": 123456}] * 3},
            1.9 + gain, gain, gain - 0.1, gain + 0.1, some,
        )
        for gain, some in zip(np.linspace(0.3, -0.5, 12), shares[1:], strict=True)
    ]  # fmt: skip
    names = [f"class {c}, {LONG}" for c in range(50)]
    (tmp_path / "page.html").write_text(tune_page(rows, labels, 400, class_names=names))
    url = (tmp_path / "page.html").as_uri()
    check_on_screens(tmp_path / "profile", url, READY, tmp_path / "picture.png")

    async def steps(tab):
        for width, phone in ((1440, False), (390, True)):
            await tab.size(width, 844, phone=phone)
            await tab.open(url, READY)
            await tab.value("document.querySelector('details').open = true")
            box = "e => e.getBoundingClientRect().right <= document.documentElement.clientWidth"
            assert await tab.value(f"[...document.querySelectorAll('td, pre')].every({box})")
            zero = "e => Math.round(e.getBoundingClientRect().left)"
            assert await tab.value(f"new Set([...document.querySelectorAll('u')].map({zero})).size") == 1

    drive(tmp_path / "profile", steps)
