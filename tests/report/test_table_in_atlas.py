"""The table of a curation in Apple's Embedding Atlas: its server, and its page in a browser.

Atlas brings many packages, so it is not among those for development:

    uv run --with embedding-atlas pytest -m long tests/report/test_table_in_atlas.py

The map itself is not looked at: it needs WebGPU, which a headless browser without a GPU lacks.
"""

import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from curated_data import ShardPool, ShardWriter, curate
from curated_data.report.table import CurationTable
from tests.support.browser import BROWSER, drive
from tests.support.images import png

pytestmark = [pytest.mark.long, pytest.mark.skipif(BROWSER is None, reason="no browser")]


@pytest.fixture
def table(tmp_path):
    """Of 120 images with captions, ten of which are copies; with a place for each but the fourth."""
    rng = np.random.default_rng(0)
    images = [png(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(120)]
    images[100:110] = [images[9]] * 10
    with ShardWriter(tmp_path / "pool-%d.tar", max_samples=50) as writer:
        for i, image in enumerate(images):
            writer.write(
                {"__key__": f"é{i:03d}", "png": image, "cls": i % 3, "txt": f"caption {i}, “quoted”"}
            )
    pool = ShardPool(writer.shards)
    settings = {"target_size": 30, "levels": [{"n_clusters": 12}, {"n_clusters": 4}]}
    settings |= {"near_duplicates": {"enabled": True}}
    curation = curate(pool, settings, embedder="pixels:8", cache_dir=tmp_path / "cache")
    places = rng.normal(size=(120, 2))
    places[3] = np.nan
    return CurationTable(curation, pool, images=16, coordinates=places)


@pytest.fixture
def server(table, tmp_path):
    """The address of Embedding Atlas on the table."""
    pytest.importorskip("embedding_atlas")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = "--x x --y y --image image --disable-projection --no-auto-port --host 127.0.0.1 --port"
    path = table.write(tmp_path / "curation.parquet")
    with open(tmp_path / "atlas.log", "w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "embedding_atlas.cli", str(path), *options.split(), str(port)],
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            for _ in range(240):
                assert process.poll() is None, (tmp_path / "atlas.log").read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
                    break
                except urllib.error.URLError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.terminate()
            process.wait(30)


def test_atlas_shows_every_column_and_row(table, server, tmp_path):
    rows = table.read().to_pylist()
    counts = {}
    for row in rows:
        counts[row["reason"]] = counts.get(row["reason"], 0) + 1

    async def look(tab):
        text = "document.body.innerText"
        await tab.size(1600, 1200)
        await tab.open(server, f"{text}.includes('caption 5,')")  # the rows are queried last
        await tab.until(f"{text}.includes('120 / 120 points')")
        for reason, count in counts.items():  # the bars of a chart
            await tab.until(f"{text}.includes('{reason}\\n{count}\\n')")
        shown = await tab.value(text)
        for name in table.schema.names[:-1]:
            assert f"\n{name} (" in shown  # with its type
        for row in rows[:6]:
            cells = rf"\s{row['id']}\s+{re.escape(row['shard'])}\s+{row['key']}\s+{row['label']}\s"
            assert re.search(cells, shown), row["key"]
            assert row["caption"] in shown
        await tab.until("[...document.images].some(image => image.naturalWidth === 16)")  # a thumbnail
        await tab.picture(tmp_path / "atlas.png", whole=False)

    assert counts == {"selected": 30, "not drawn": 80, "near-duplicate": 10}
    drive(tmp_path / "profile", look)
