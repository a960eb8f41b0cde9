"""Labels that a report cannot number from zero: hashes as ids, and `.cls` members that are not integers."""

import numpy as np

from curated_data import ShardPool, curate
from curated_data.report.page import write_report
from tests.report.test_report_page import content, unpack

CONFIG = {"target_size": 8, "levels": [{"n_clusters": 3}], "embedding": {"num_workers": 0}}


def test_ids_far_apart_are_shown_by_their_numbers(write_pool, tmp_path):
    pool = ShardPool(write_pool([12]))
    curation = curate(pool, CONFIG, embedder="pixels:4", cache_dir=tmp_path / "cache")
    labels = np.array([10**11, -1, 5, 10**11 + 1])[np.arange(12) % 4]
    data = content(write_report(curation, pool, tmp_path / "r.html", labels=labels))
    assert data["classes"]["names"] == ["5", "100000000000", "100000000001"]
    assert data["classes"]["before"] == [3, 3, 3]
    assert sum(data["classes"]["random"]) <= 8
    assert data["classes"]["unlabelled"] == 3
    assert unpack(data["map"]["label"], "<i4").tolist() == [1, -1, 0, 2] * 3


def test_cls_members_that_are_no_integers_give_no_class_figures(tmp_path, caplog):
    from curated_data import ShardWriter
    from tests.support.images import png

    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "pool-%d.tar") as writer:
        for number in range(12):
            image = png(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            writer.write({"__key__": str(number), "png": image, "cls": "cat"})
    pool = ShardPool(writer.shards)
    place = {"embedder": "pixels:4", "cache_dir": tmp_path / "cache", "decoders": {"cls": len}}
    curation = curate(pool, CONFIG, **place)
    data = content(write_report(curation, pool, tmp_path / "r.html"))
    assert data["classes"] is None
    assert data["map"]["label"] is None
    assert "no figures about classes: " in caplog.text
    assert "its .cls is not an integer: b'cat'" in caplog.text
