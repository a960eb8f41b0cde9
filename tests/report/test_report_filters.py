"""What filters dropped, in the plan, the log, the report and its page in a browser, on a pool with scores."""

import json
import re

import numpy as np
import pytest
import webdataset

from curated_data import ShardPool, curate
from curated_data.pipeline.plan import plan, plan_tables
from curated_data.report.page import write_report
from tests.report.conftest import png
from tests.support.browser import BROWSER, drive

READY = "document.documentElement?.dataset.ready === 'yes'"
WHERE = "json.score > 0.3 AND NOT json.nsfw AND least(width, height) >= 20"


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """90 images in two shards; a tenth has no score, a fifth is marked, one is small, two are named."""
    folder = tmp_path_factory.mktemp("scored")
    rng = np.random.default_rng(0)
    score = [None if i % 10 == 0 else float(rng.random()) for i in range(90)]
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"{shard}.tar")) as writer:
            for i in range(45 * shard, 45 * shard + 45):
                said = json.dumps({"score": score[i], "nsfw": i % 5 == 1})
                image = png(rng.integers(0, 256, 3).tolist(), (20, 30) if i != 7 else (8, 8))
                writer.write({"__key__": f"k{i:02d}", "png": image, "json": said})
    given = np.array([np.nan if s is None else s for s in score])
    number = np.arange(90)
    parts = [given > 0.3, number % 5 != 1, number != 7]
    keep = np.all(parts, axis=0) & ~np.isin(number, [88, 89])
    only_null = np.isnan(given) & parts[1] & parts[2]
    expected = {
        "json.score > 0.3": (int((~parts[0]).sum()), 9),
        "NOT json.nsfw": (18, 0),
        "least(width, height) >= 20": (1, 0),
    }
    pool = ShardPool(str(folder / "*.tar"))
    config = {"target_size": 20, "levels": [{"n_clusters": 5}], "where": WHERE, "exclude": [88, "k89"]}
    return pool, config, folder / "cache", keep, int(only_null.sum()), expected


def test_counts_and_examples_are_told_everywhere(scored, caplog):
    pool, config, cache, keep, only_null, expected = scored
    first = np.flatnonzero(~keep)[:5]
    examples = [[i, key] for i, key in zip(first.tolist(), pool.keys(first), strict=True)]
    with caplog.at_level("INFO"):
        planned = plan(pool, config, embedder="pixels:4", cache_dir=cache, n_probe=8)
    found = curate(pool, config, embedder="pixels:4", cache_dir=cache)
    report = found.report["filters"]
    assert planned.filters == report
    assert {c["text"]: (c["drops"], c["nulls"]) for c in report["conditions"]} == expected
    assert (report["dropped"], report["nulls"]) == (int((~keep).sum()), only_null)
    assert report["examples"] == examples
    assert keep[found.ids].all()
    for text, (drops, nulls) in expected.items():
        assert f"where: {text} alone drops {drops} of 90 samples, {nulls} of them as NULL" in caplog.text
    assert f"filters: {keep.sum()} of 90 samples stay" in caplog.text
    rows = [cell for table in plan_tables(planned) for column in table.columns for cell in column.cells]
    assert "by json.score > 0.3 alone" in rows
    assert all(f"{number}: {key}" in rows for number, key in examples)


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_page_shows_them(scored, tmp_path):
    pool, config, cache, keep, only_null, expected = scored
    found = curate(pool, config, embedder="pixels:4", cache_dir=cache)
    page = write_report(found, pool, tmp_path / "report.html", n_coverage=10)
    shown = []

    async def steps(tab):
        await tab.size(1200, 900)
        await tab.open(page.as_uri(), READY)
        shown.append(await tab.value("document.querySelector('#filters').innerText"))
        assert tab.errors == []

    drive(tmp_path / "profile", steps)
    text = re.sub(r"\s+", " ", shown[0])
    assert f"{int((~keep).sum())} samples took no part" in text
    assert f"{only_null} for a value that is missing" in text
    for condition, (drops, nulls) in expected.items():
        assert f"{condition} {drops} {nulls}" in text
    for number in np.flatnonzero(~keep)[:5]:
        assert f"{number} {pool.keys([number])[0]}" in text
