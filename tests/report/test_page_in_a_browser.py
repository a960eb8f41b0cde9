"""The report page as it is used: on three screens, with keys, by its search; and a linter on its script."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from curated_data import ShardPool, ShardWriter, curate
from curated_data.report.page import write_report
from tests.support.browser import BROWSER, check_on_screens, drive
from tests.support.images import png

READY = "document.documentElement?.dataset.ready === 'yes'"
COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (50, 60, 210)}
SIZES = {"red": 200, "green": 60, "blue": 15}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return make_page(tmp_path_factory.mktemp("pool"), "hierarchical")


def make_page(folder: Path, sampling: str) -> Path:
    """Of 275 images in three colours, with captions that tell theirs, and copies."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "pool-%06d.tar", max_samples=100) as writer:
        number = 0
        for label, (name, size) in enumerate(SIZES.items()):
            for _ in range(size):
                noise = rng.normal(0, 25, (12, 12, 3))
                image = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
                text = f"a photo of something {name}, number {number}"
                writer.write({"__key__": f"k{number:03d}", "png": png(image), "cls": label, "txt": text})
                number += 1
    (folder / "classes.json").write_text(json.dumps(["first", "second", "third"]))
    pool = ShardPool(str(folder / "pool-*.tar"))
    levels = [{"n_clusters": 9}, {"n_clusters": 3}]
    settings = {"target_size": 60, "levels": levels, "sampling": sampling}
    curation = curate(pool, settings, embedder="pixels:8", cache_dir=folder / "cache")
    return write_report(curation, pool, folder / "report.html", n_coverage=50)


def data(page: Path) -> dict:
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page.read_text())[1])


def test_the_claim_is_of_the_selection(page):
    content = data(page)
    assert content["opening"]["kind"] == "class"
    rows = {row["name"]: row for row in content["opening"]["rows"]}
    after = np.array(content["classes"]["after"]) / 60
    assert rows["first"]["before"] == pytest.approx(200 / 275)
    assert [rows[name]["after"] for name in ("first", "second", "third")] == pytest.approx(after.tolist())
    assert content["opening"]["claim"].startswith(f"First falls from 73 % to {100 * after[0]:.0f} %")


def test_clusters_are_called_by_their_captions(page):
    names = data(page)["names"]
    assert len(names) == 2
    for level in names:
        assert level
        assert all(set(name.split(", ")) & set(COLOURS) for name in level.values())


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_nothing_is_cut_off(page, tmp_path):
    check_on_screens(tmp_path / "profile", page.as_uri(), READY, tmp_path / "page.png")


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_images_are_enlarged_and_walked_by_arrow_keys(page, tmp_path):
    async def steps(tab):
        await tab.size(1000, 800)
        await tab.open(page.as_uri(), READY)
        group = "[...document.querySelector('#sheets .shots').querySelectorAll('[data-id]')]"
        ids = await tab.value(f"{group}.map(e => e.dataset.id)")
        await tab.value("document.querySelector('#sheets .shots [data-id]').click()")
        viewed = "document.documentElement.dataset.viewed"
        assert await tab.value(viewed) == ids[0]
        await tab.until("document.querySelector('#picture img').naturalWidth >= 150")
        assert "a photo of something" in await tab.value("document.querySelector('#told').textContent")
        for key, expected in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
            await tab.press(key)
            assert await tab.value(viewed) == ids[expected % len(ids)]
        await tab.press("Escape")
        assert not await tab.value("document.querySelector('#viewer').open")

    drive(tmp_path / "profile", steps)


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_samples_are_searched_and_filtered(page, tmp_path):
    content = data(page)
    selected = dict(zip(COLOURS, content["classes"]["after"]))

    async def steps(tab):
        await tab.size(1000, 800)
        await tab.open(page.as_uri(), READY)
        count = "parseInt(document.querySelector('#n-found').textContent)"

        async def choose(**values):
            for name in ("text", "reason", "class", "cluster"):
                value = json.dumps(values.get(name, ""))
                await tab.value(
                    f"e = document.querySelector('#by-{name}'); e.value = {value};"
                    "e.dispatchEvent(new Event('input', { bubbles: true }));"
                )
            return await tab.value(count)

        assert await choose() == 275
        assert await choose(text="blue") == 15
        assert await choose(text="k003") == 1
        assert await choose(text="something GREEN") == 60
        assert await choose(**{"class": "1"}) == 60
        assert await choose(reason="selected") == 60
        for label, name in enumerate(COLOURS):
            assert await choose(reason="selected", **{"class": str(label)}) == selected[name]
        options = "[...document.querySelectorAll('#by-cluster option')].slice(1)"
        for value, text in (await tab.value(f"{options}.map(e => [e.value, e.textContent])"))[:4]:
            assert await choose(cluster=value) == int(re.search(r"(\d+) samples", text)[1])

    drive(tmp_path / "profile", steps)


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_clusters_are_named_on_the_map(page, tmp_path):
    async def steps(tab):
        await tab.size(1000, 800)
        await tab.open(page.as_uri(), READY)
        await tab.value("""(() => {
          window.written = [];
          const fill = CanvasRenderingContext2D.prototype.fillText;
          CanvasRenderingContext2D.prototype.fillText = function (text, ...more) {
            window.written.push(text);
            return fill.call(this, text, ...more);
          };
          const colour = document.querySelector("#colour");
          colour.value = "class";
          colour.dispatchEvent(new Event("change"));
        })()""")
        await tab.until("window.written.length > 0")
        assert set(await tab.value("window.written")) <= {"first", "second", "third"}

    drive(tmp_path / "profile", steps)


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        ("hierarchical", "shared evenly by the clusters"),
        ("sparse", "by how alone they lie"),
        ("greedy", "how much nearer"),
    ],
)
def test_reasons_are_those_of_the_sampling(tmp_path, sampling, told):
    page = make_page(tmp_path, sampling)

    async def steps(tab):
        await tab.size(1000, 800)
        await tab.open(page.as_uri(), READY)
        text = await tab.value("document.querySelector('#why').textContent")
        assert told in text
        assert ("equal share" in text) == ("drawn at random" in text) == (sampling == "hierarchical")

    drive(tmp_path / "profile", steps)


def test_script_and_style_are_linted():
    root = Path(__file__).parents[2]
    biome = shutil.which("biome", path=str(Path(sys.executable).parent))
    if biome is None:
        pytest.skip("no biome here")
    done = subprocess.run([biome, "ci", "."], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
