"""The report page: its numbers against the metrics, and the page itself in a headless browser."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from curated_data.cache.artifacts import write_manifest
from curated_data.clustering.tree import ClusterTree
from curated_data.config import CurationConfig
from curated_data.levels import Level
from curated_data.pool import ShardPool, ShardWriter
from curated_data.report.explain import explain
from curated_data.report.map import _leaf_ranks
from curated_data.report.page import write_report
from curated_data.report.tiles import TILE, Tiles
from curated_data.selection import metrics
from curated_data.selection.near_duplicates import near_duplicates
from curated_data.selection.removed import Removed
from curated_data.selection.sampling import hierarchical_sample

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Rows(np.ndarray):
    """Embeddings with the failures that a store would tell of."""

    failures = ({"id": 7, "shard": "pool-000000.tar", "key": "img<007>", "reason": "not an <image>"},)

    @property
    def n_failures(self) -> int:
        return len(self.failures)

    def iterate_failures(self):
        return iter(self.failures)

    def failure(self, sample: int):
        return next((failure for failure in self.failures if failure["id"] == sample), None)


@pytest.fixture(scope="module")
def curation(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("near_duplicates")
    found = near_duplicates(small.x, threshold=0.9999, valid=small.tree.parent[1] >= 0)
    Removed(found.keep, found.near, found.held_out_match, found.cosine).save(folder)
    write_manifest(folder, "near_duplicates", {})
    return SimpleNamespace(
        ids=small.ids,
        tree=small.tree,
        embeddings=small.x.view(Rows),
        report={"seconds": {"embed": 1.25}},
        config={"target_size": 60, "strategy": "random", "levels": [{"n_clusters": 12}, {"n_clusters": 4}]},
        folders={"near_duplicates": folder},
    )


@pytest.fixture(scope="module")
def page(small, curation, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    names = ["red", "green", "</script><b>blue"]
    return write_report(curation, small.pool, path, class_names=names, title="A <b>pool</b>", n_coverage=100)


def content(page) -> dict:
    text = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text()).group(1)
    return json.loads(text)


def unpack(text: str, dtype) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


def test_numbers_are_those_of_the_metrics(page, small, curation):
    data = content(page)
    assert data["pool"] == {"samples": 200, "shards": 3, "first": "pool-000000.tar"}
    assert data["selected"] == data["unique"] == 60
    for level, expected in zip(data["levels"], metrics.cluster_balance(small.tree, small.ids)):
        assert level["selected_perplexity"] == pytest.approx(expected.selected_perplexity)
        assert level["covered"] == expected.covered
        assert level["curves"]["pool"][1] == sorted(small.tree.sizes(level["level"]), reverse=True)
    assert data["classes"]["before"] == [140, 50, 10]
    assert data["classes"]["after"] == np.bincount(small.labels[small.ids], minlength=3).tolist()
    assert ["target_size", "60", False] in data["settings"]
    assert ["strategy", "random", True] in data["settings"]
    assert [row[:3] for row in data["tree"]] == [["1", "12", "0"], ["2", "4", "0"]]
    assert data["failures"]["examples"] == [[7, "pool-000000.tar", "img<007>", "not an <image>"]]
    keep = np.load(curation.folders["near_duplicates"] / "keep.npy")
    assert data["duplicates"]["removed"] == 199 - keep.sum()


def test_every_sample_of_the_map_leads_to_its_clusters(page, small):
    data = content(page)
    table = [{k: unpack(v, "<i4") for k, v in level.items()} for level in data["clusters"]]
    leaf = unpack(data["map"]["leaf"], "<i4")
    assert leaf[7] == -1
    held = np.flatnonzero(leaf >= 0)
    assert len(held) == 199
    assert (table[0]["id"][leaf[held]] == small.tree.parent[1][held]).all()
    top = table[1]["id"][table[0]["parent"][leaf[held]]]
    assert (top == small.tree.assignment(2)[held]).all()
    assert (table[0]["size"] == small.tree.sizes(1)[table[0]["id"]]).all()
    assert table[1]["given"].sum() == len(small.ids)
    count = unpack(data["map"]["count"], "<u2")
    assert (np.flatnonzero(count) == small.ids).all()
    rank = unpack(data["map"]["rank"], "<i4")
    members = small.tree.members(1, 3)
    assert (members[np.argsort(rank[members])] == members[np.argsort(small.tree.distance[members])]).all()


def test_tiles_are_the_samples_images(page, small):
    data = content(page)
    sheet = Image.open(io.BytesIO(base64.b64decode(data["tiles"]["image"].split(",")[1])))
    size, columns = data["tiles"]["size"], data["tiles"]["columns"]
    for sheet_row in data["sheets"][:4]:
        for i, tile in zip(*sheet_row["kept"]):
            x, y = (tile % columns + 0.5) * size, (tile // columns + 0.5) * size
            shown = np.array(sheet.getpixel((int(x), int(y))), int)
            assert np.abs(shown - small.colours[i]).max() < 12  # JPEG


def test_a_large_pool_is_shown_in_part(small, curation, tmp_path):
    path = write_report(curation, small.pool, tmp_path / "report.html", n_map_points=50, n_map_images=5)
    data = content(path)
    ids = unpack(data["map"]["id"], "<i4")
    examples = np.unique(
        np.concatenate([sheet[side][0] for sheet in data["sheets"] for side in ("kept", "dropped")])
    )
    assert np.isin(examples, ids).all()  # each is explained when it is chosen
    assert 50 <= len(ids) < 200
    assert (np.diff(ids) > 0).all()
    assert np.isin(ids, small.ids).sum() >= 25
    assert not data["map"]["whole"]


def test_ten_thousand_thumbnails_take_less_than_30_mb(small, curation, tmp_path):
    """Of noise, which compresses worst, and a tenth of them, as a page grows by the thumbnail."""
    images = np.random.default_rng(0).integers(0, 256, (1000, TILE, TILE, 3), np.uint8)
    with ShardWriter(tmp_path / "pool-%06d.tar") as writer:
        for number, image in enumerate(images):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG", compress_level=0)
            writer.write({"__key__": str(number), "png": file.getvalue()})
    tiles = Tiles(ShardPool(str(tmp_path / "pool-*.tar")))
    tiles.add(np.arange(1000))
    assert 100_000 < len(tiles.sheet()) < 3_000_000
    with pytest.raises(ValueError, match="n_map_images: 40001"):
        write_report(curation, small.pool, tmp_path / "report.html", n_map_images=40_001)


@pytest.fixture(scope="module")
def text_page(tmp_path_factory):
    """Of a pool without images, labels, distances or failures, in one level of clusters."""
    folder = tmp_path_factory.mktemp("text")
    with ShardWriter(folder / "pool-%06d.tar") as writer:
        for i in range(40):
            writer.write({"__key__": f"t{i}", "txt": f"words {i}"})
    rows = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32).view(Rows)
    rows.failures = ()
    tree = ClusterTree({1: np.asarray(rows[:4])}, {1: np.arange(40) % 4})
    curation = SimpleNamespace(
        ids=hierarchical_sample(tree, 80, max_repeats=3),
        tree=tree,
        embeddings=rows,
        report={},
        config={"target_size": 80, "max_repeats": 3},
        folders={},
    )
    return write_report(curation, ShardPool(str(folder / "pool-*.tar")), folder / "report.html")


def test_a_pool_of_texts_without_labels(text_page):
    data = content(text_page)
    assert data["classes"] is None
    assert data["tiles"]["image"] == ""
    assert data["map"]["rank"] is None
    assert data["duplicates"] is None
    assert (data["selected"], data["unique"]) == (80, 40)
    assert unpack(data["map"]["count"], "<u2").sum() == 80


def test_same_curation_same_bytes(small, curation, tmp_path):
    coordinates = small.x[:, :2]
    pages = [
        write_report(curation, small.pool, tmp_path / n, coordinates=coordinates)
        for n in ("a.html", "b.html")
    ]
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_arrays_of_another_pool_are_refused(small, curation, tmp_path):
    with pytest.raises(ValueError, match=r"coordinates .*\(200, 2\)"):
        write_report(curation, small.pool, tmp_path / "r.html", coordinates=np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"labels .*\(200,\)"):
        write_report(curation, small.pool, tmp_path / "r.html", labels=np.zeros(3, int))
    with pytest.raises(ValueError, match=r"labels .*float64"):
        write_report(curation, small.pool, tmp_path / "r.html", labels=np.zeros(200))
    with pytest.raises(ValueError, match=r"coordinates .*<U1"):
        write_report(curation, small.pool, tmp_path / "r.html", coordinates=np.full((200, 2), "x"))
    with pytest.raises(ValueError, match="1 class_names"):
        write_report(curation, small.pool, tmp_path / "r.html", class_names=["a"])
    assert list(tmp_path.iterdir()) == []


def test_class_names_are_found_beside_the_shards(small, curation, tmp_path):
    (tmp_path / "pool").mkdir()
    for url in small.pool.urls:
        shutil.copy(url, tmp_path / "pool")
    (tmp_path / "pool" / "classes.json").write_text('["x", "y", "z"]')
    pool = ShardPool(str(tmp_path / "pool" / "*.tar"))
    path = write_report(curation, pool, tmp_path / "report.html", n_coverage=10)
    assert content(path)["classes"]["names"] == ["x", "y", "z"]


def test_nothing_on_the_page_points_outside_of_it(page):
    text = page.read_text()
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {
        "http://www.w3.org/2000/svg"
    }  # a name, not an address
    assert not re.search(r"<(link|img|iframe|script)[^>]*(src|href)=", text)
    assert "<b>pool</b>" not in text


def in_browser(address: str, profile) -> tuple[str, str]:
    """The opening tag, and the text and markup after the script ran; the console must have stayed silent."""
    result = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--no-first-run", f"--user-data-dir={profile}", "--virtual-time-budget=2000",
            "--enable-logging=stderr", "--dump-dom", address,
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in result.stderr  # neither errors nor refused loads
    opening = re.search(r"<html[^>]*>", result.stdout).group()
    assert 'data-ready="yes"' in opening
    assert "data-error" not in opening
    return opening, html.unescape(re.sub(r"<script.*?</script>", "", result.stdout, flags=re.S))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_page_runs_in_a_browser_without_an_error(page, small, tmp_path):
    chosen = int(small.ids[5])
    opening, shown = in_browser(f"{page.as_uri()}#sample={chosen}", tmp_path)
    assert f'data-sample="{chosen}"' in opening
    assert "A <b>pool</b>" in shown
    assert "60 samples selected from 200 in 3 shards" in shown
    assert f'Sample <a href="#sample={chosen}">{chosen}</a>, key <b>img<{chosen:03d}></b>' in shown
    assert re.search(r'aria-label="sample \d+, class red"', shown)
    assert "not an <image>" in shown
    assert "</script><b>blue" in shown
    assert shown.count("<svg") == small.tree.n_levels + 1


GESTURES = """
canvas.setPointerCapture = () => {};  // of pointers that no hardware has
const log = [], note = () => log.push(+view.zoom.toFixed(3));
const at = (type, id, x, y) => {
  const frame = canvas.getBoundingClientRect();
  canvas.dispatchEvent(new PointerEvent(type, { pointerId: id, clientX: frame.left + x, clientY: frame.top + y
  }));
};
const wheel = (ctrlKey, deltaY) => {
  const frame = canvas.getBoundingClientRect();
  canvas.dispatchEvent(new WheelEvent("wheel", { ctrlKey, deltaY, clientX: frame.left + 60, clientY: frame.top
  + 80,
    cancelable: true }));
};
const under = () => {  // the place on the map, in 0..1, below the point where the wheel turns
  const side = canvas.clientWidth, k = 0.94 * view.zoom;
  return [(60 / side - 0.5) / k + 0.5 + view.x, (80 / side - 0.5) / k + 0.5 + view.y];
};
wheel(false, -300); note();
const before = under(); wheel(true, -300); note(); const after = under();
find("#out").click(); note(); find("#in").click(); find("#in").click(); note();
const touched = canvas.style.touchAction;
find("#whole").click(); note();
at("pointerdown", 1, 100, 100); at("pointerdown", 2, 200, 100); at("pointermove", 2, 300, 100); note();
at("pointerup", 1, 100, 100); at("pointerup", 2, 300, 100);
canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "+" })); note();
const still = Math.max(Math.abs(before[0] - after[0]), Math.abs(before[1] - after[1])) < 0.01;
document.documentElement.dataset.zooms = JSON.stringify([log, touched, still]);
"""  # at the end of the page's own script, whose names are not to be seen from outside of it


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_map_zooms_by_wheel_fingers_buttons_and_keys(page, tmp_path):
    copy = tmp_path / "gestures.html"
    end = 'root.dataset.ready = "yes";'
    copy.write_text(page.read_text().replace(end, GESTURES + end))
    opening, _ = in_browser(copy.as_uri(), tmp_path / "profile")
    zooms, touch_action, still = json.loads(
        html.unescape(re.search(r'data-zooms="([^"]*)"', opening).group(1))
    )
    e = 2.718
    assert zooms == pytest.approx([1, e, e / 1.6, e * 1.6, 1, 2, 3], rel=1e-3)
    assert touch_action == "none"  # a finger moves the map where there is more of it than is shown
    assert still  # what is under the wheel stays there


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_page_of_texts_runs_in_a_browser(text_page, tmp_path):
    _, shown = in_browser(f"{text_page.as_uri()}#sample=3", tmp_path)
    assert 'Sample <a href="#sample=3">3</a>, key <b>t3</b>' in shown
    assert "Selected 2 times" in shown
    assert "Classes, before" not in shown
    assert "Near-duplicates" not in shown


@pytest.fixture(scope="module")
def copies(small, tmp_path_factory):
    """A curation where sample 20 was found a copy of sample 10, and sample 30 one of a held-out sample."""
    folder = tmp_path_factory.mktemp("copies")
    keep, near, held_out = np.ones(200, bool), np.full(200, -1), np.full(200, -1)
    cosine = np.full(200, np.nan, np.float32)
    keep[[20, 30]] = False
    near[20], held_out[30], cosine[20], cosine[30] = 10, 4, 0.9712, 0.9654
    Removed(keep, near, held_out, cosine).save(folder)
    write_manifest(folder, "near_duplicates", {})
    parent = small.tree.parent | {1: np.where(keep, small.tree.parent[1], -1)}
    tree = ClusterTree(small.tree.centroids, parent, small.tree.distance)
    return SimpleNamespace(
        ids=np.setdiff1d(small.ids, [20, 30]),
        tree=tree,
        embeddings=small.x.view(Rows),
        report={},
        config=CurationConfig(target_size=60, levels=[Level(12, n_resamples=3), Level(4)], seed=5),
        folders={"near_duplicates": folder},
    )


def test_copies_are_explained_by_what_stayed(copies, small, tmp_path):
    assert explain(copies, 20) == [
        "Sample 20 took no part: it is a near-duplicate of sample 10, which stayed, at a cosine of 0.9712."
    ]
    assert explain(copies, 30) == [
        "Sample 30 took no part: it is a near-duplicate of sample 4 of the held-out pool, at a cosine of "
        "0.9654."
    ]
    data = content(write_report(copies, small.pool, tmp_path / "report.html", n_coverage=10))
    copy = unpack(data["map"]["copy"], "<i4")
    assert (copy[20], copy[30], (copy == -1).sum()) == (10, -2, 198)
    found = data["duplicates"]
    assert (found["removed"], found["held_out"], found["n_groups"]) == (1, 1, 1)
    assert found["held_out_examples"][0] == [30]
    changed = {name: value for name, value, usual in data["settings"] if not usual}
    assert changed == {"target_size": "60", "seed": "5"}
    assert data["tree"] == [["1", "12", "3", "half the mean size", "1"], ["2", "4", "0", "", "1"]]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_copies_in_a_browser(copies, small, tmp_path):
    page = write_report(copies, small.pool, tmp_path / "report.html", n_coverage=10)
    _, shown = in_browser(f"{page.as_uri()}#sample=20", tmp_path / "first")
    assert (
        'It is a near-duplicate of sample <a href="#sample=10">10</a>, which stayed (cosine 0.9712).' in shown
    )
    assert "1 copy in 1 group left the pool" in shown
    assert "1 sample left because it is a copy of held-out ones." in shown
    _, shown = in_browser(f"{page.as_uri()}#sample=30", tmp_path / "second")
    assert "It is a copy of a held-out sample (cosine 0.9654)." in shown
    _, shown = in_browser(f"{page.as_uri()}#sample=999", tmp_path / "third")
    assert "The pool has ids 0 to 199." in shown


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_many_classes_are_a_curve_and_a_table(small, curation, tmp_path):
    labels = np.arange(200) % 120
    names = [f"class {c} with a name that is as long as those of some taxonomies are" for c in range(120)]
    page = write_report(
        curation, small.pool, tmp_path / "report.html", labels=labels, class_names=names, n_coverage=10
    )
    _, shown = in_browser(page.as_uri(), tmp_path / "profile")
    assert "all 120 classes" in shown
    assert f'<td data-label="class">{names[119]}</td>' in shown
    assert 'class="bar"' not in shown


def test_equal_reasons_of_failures_are_counted_together(small, curation, tmp_path):
    rows = small.x.view(Rows)
    rows.failures = tuple(
        {"id": i, "shard": "far/p.tar", "key": f"k{i}",
         "reason": f"far/p.tar: sample 'k{i}', member 'png': {what}"}
        for i, what in enumerate(["is empty", "is empty", "cannot be decoded"])
    )  # fmt: skip
    failed = SimpleNamespace(**vars(curation) | {"embeddings": rows})
    found = content(write_report(failed, small.pool, tmp_path / "report.html", n_coverage=10))["failures"]
    assert found["reasons"] == [["member 'png': is empty", 2], ["member 'png': cannot be decoded", 1]]
    assert found["examples"][1] == [1, "p.tar", "k1", "member 'png': is empty"]


def test_clusters_of_one_sample_are_counted_once(small, tmp_path):
    parent = small.tree.parent | {1: small.tree.parent[1].copy()}
    of_first = small.tree.members(1, 0)
    parent[1][of_first[1:]] = 1  # cluster 0 is left with one sample
    tree = ClusterTree(small.tree.centroids, parent, small.tree.distance)
    curation = SimpleNamespace(
        ids=of_first[:1], tree=tree, embeddings=small.x.view(Rows), report={}, config={}, folders={}
    )
    data = content(write_report(curation, small.pool, tmp_path / "report.html", n_coverage=10))
    assert (data["singles"]["n"], data["singles"]["n_kept"]) == (1, 1)
    assert data["singles"]["kept"][0] == of_first[:1].tolist()
    assert all(sheet["size"] > 1 for sheet in data["sheets"])


def test_ranks_within_the_lowest_clusters(small):
    tree, shown = small.tree, np.array([3, 4, 7, 90, 150, 199])
    ranks = []
    for sample in shown:
        members = tree.members(1, tree.parent[1][sample]) if sample != 7 else []  # 7 is excluded
        ranks.append(int((tree.distance[members] <= tree.distance[sample]).sum()) if len(members) else 0)
    assert _leaf_ranks(tree, tree.distance, shown).tolist() == ranks


def test_the_page_and_the_reasons_do_not_sort_the_pool(small, curation, tmp_path):
    """Lists of all members take time and memory in a pool of 1e8, for the sake of a few examples."""
    tree = ClusterTree(small.tree.centroids, small.tree.parent, small.tree.distance)
    curation = SimpleNamespace(**vars(curation) | {"tree": tree})
    write_report(curation, small.pool, tmp_path / "report.html", n_coverage=10)
    explain(curation, int(small.ids[0]))
    assert not tree._children


def test_explain_follows_the_tree(small, curation):
    kept, dropped = int(small.ids[0]), int(np.setdiff1d(np.arange(8, 200), small.ids)[0])
    lines = explain(curation, kept)
    assert lines[0].startswith(f"Level 2: cluster {small.tree.assignment(2)[kept]}, one of 4 that share 60,")
    assert f"Sample {kept} was selected" in lines[-1]
    assert f"Sample {dropped} was not selected" in explain(curation, dropped)[-1]
    assert explain(curation, 7) == ["Sample 7 took no part: not an <image>."]
    with pytest.raises(ValueError, match="sample 200"):
        explain(curation, 200)
