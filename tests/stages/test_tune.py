"""Settings compared by labels."""

import html
import re

import numpy as np
import pytest
from omegaconf import OmegaConf

from curated_data import curate_embeddings
from curated_data.cli import main
from curated_data.config import load_config
from curated_data.errors import ConfigError
from curated_data.pipeline.tune import SETTINGS, _entropies, chances, compare, tune, verdict


def pool(informative: bool):
    """Eight classes of falling size, which lie apart or are not told apart by the rows."""
    rng = np.random.default_rng(0)
    label = rng.choice(8, 1600, p=2.0 ** -np.arange(1, 9) / (2.0 ** -np.arange(1, 9)).sum())
    rows = rng.normal(size=(1600, 6)) + (9 * rng.normal(size=(8, 6))[label] if informative else 0)
    return rows.astype(np.float32), np.where(rng.random(1600) < 0.25, label, -1)


def compared(rows, labels, tmp_path):
    config = load_config({"target_size": 200})
    return tune(lambda c: curate_embeddings(rows, c, cache_dir=tmp_path / "c"), config, labels)


def test_where_clusters_are_classes_even_clusters_are_better(tmp_path):
    rows = compared(*pool(True), tmp_path)
    assert {row.name for row in rows} == set(SETTINGS)
    assert rows[0].name == "default"
    assert rows[0].gain == rows[0].low == rows[0].high == 0
    by_name = {row.name: row for row in rows}
    assert by_name["two levels, l2"].entropy > by_name["as the pool"].entropy
    assert by_name["as the pool"].high < by_name["two levels, l2"].gain


def test_where_features_say_nothing_of_classes_the_default_stays(tmp_path):
    rows = compared(*pool(False), tmp_path)
    best, why = verdict(rows)
    assert best.name == "default"
    assert "No setting is better" in why


def test_entropies_are_those_of_counted_classes():
    rng = np.random.default_rng(0)
    label, weight, times = rng.integers(0, 3, 20), rng.random((2, 20)), rng.integers(0, 3, (4, 20))
    found = _entropies(weight, label, 3, times)
    for s in range(2):
        for b in range(4):
            share = np.array([(weight[s] * times[b])[label == c].sum() for c in range(3)])
            share /= share.sum()
            assert found[s, b] == pytest.approx(-(share * np.log(share)).sum())


def test_too_few_labels(tmp_path):
    rows, labels = pool(True)
    labels[np.flatnonzero(labels >= 0)[10:]] = -1
    with pytest.raises(ConfigError, match=r"^labels: 10 "):
        compared(rows, labels, tmp_path)


def test_shares_are_those_of_what_is_drawn(tmp_path):
    rows, labels = pool(True)
    found = chances(
        lambda c: curate_embeddings(rows, c, cache_dir=tmp_path / "c"),
        load_config({"target_size": 200}),
        1600,
    )
    for row in compare(found, labels):
        assert found[row.name].chance.sum() == pytest.approx(200)
        of_classes = [found[row.name].chance[labels == c].sum() for c in np.unique(labels[labels >= 0])]
        assert row.shares == pytest.approx(np.array(of_classes) / np.sum(of_classes))


def test_the_command(tmp_path, capsys):
    rows, labels = pool(True)
    np.save(tmp_path / "x.npy", rows)
    np.save(tmp_path / "y.npy", labels)
    lines = [f"{i},<{c}>\n" for i, c in enumerate(labels) if c >= 0]
    (tmp_path / "y.csv").write_text("id,label\n" + "".join(lines))
    given = ["tune", str(tmp_path / "x.npy"), "--embeddings", "--target-size", "200"]
    given += ["--cache-dir", str(tmp_path / "cache"), "--labels"]
    assert main(["-q", *given, str(tmp_path / "y.npy")]) == 0
    said = capsys.readouterr().out
    assert all(name.split(",")[0] in said for name in SETTINGS)
    assert main(["-q", *given, str(tmp_path / "y.csv"), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == said + f"page: {tmp_path / 'page.html'}\n"
    page = (tmp_path / "page.html").read_text()
    assert page.count('class="change"') == len(SETTINGS)
    assert "&lt;3&gt;" in page
    assert "<3>" not in page
    yaml = html.unescape(re.search("<pre[^>]*>(.*?)</pre>", page, re.S)[1])
    assert yaml.removeprefix("target_size: 200\n") in said
    load_config(OmegaConf.create(yaml))
    np.save(tmp_path / "y.npy", labels[:5])
    assert main(["-q", *given, str(tmp_path / "y.npy")]) == 2
    assert "expected 1600 integers" in capsys.readouterr().err
