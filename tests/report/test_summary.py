"""What a curation shows of itself: as text, in a notebook's cell, and while it is made there."""

import html.parser
import re

import numpy as np
import pytest

from curated_data import curate_embeddings
from curated_data.clustering.tree import ClusterTree
from curated_data.report.claim import opening
from curated_data.report.clusters import catch_all_clusters, distinctive_words, nearest_words

SETTINGS = {"target_size": 30, "levels": [{"n_clusters": 8}, {"n_clusters": 2}], "sampling": "hierarchical"}


class Cells(html.parser.HTMLParser):
    """The texts of a table's cells; raises on nothing, so tags are counted too."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


@pytest.fixture(scope="module")
def curation(tmp_path_factory):
    rows = np.random.default_rng(0).normal(size=(200, 4))
    return curate_embeddings(rows, SETTINGS, cache_dir=tmp_path_factory.mktemp("cache"))


def test_text_and_html_have_the_figures_of_the_report(curation, capsys):
    assert "30 of 200 samples" in repr(curation)
    assert len(repr(curation)) < 200
    page = curation._repr_html_()
    found = Cells(page)
    assert found.open == []
    assert found.cells[5:7] == ["1", "8"]
    assert found.cells[9] == f"{curation.report['levels'][0]['selected_perplexity']:,.1f}"
    assert "data:image/png;base64," in page
    curation.show()
    printed = capsys.readouterr().out
    assert "30 of 200 samples selected" in printed
    assert re.search(r"[Cc]luster \d falls from", printed)


def test_the_claim_counts_clusters_that_were_cut(curation):
    claim = opening(curation, None, None, [{}, {}])["claim"]
    sizes = curation.tree.sizes(1)
    given = np.bincount(curation.tree.parent[1][curation.ids], minlength=8)
    expected = sizes * 30 / 200
    told = expected >= 4
    for what, n in (
        ("less than half", int((given < expected / 2)[told].sum())),
        ("more than double", int((given > 2 * expected)[told].sum())),
    ):
        assert (f"{n} give" in claim and what in claim) == (n > 0)


def test_words_that_set_captions_apart():
    captions = ["a red truck on a road"] * 5 + ["a bowl of hot soup"] * 5 + [None, "red soup on a road"]
    names = distinctive_words(np.array([0] * 5 + [7] * 5 + [7, -1]), captions)
    assert set(names) == {0, 7}
    assert "truck" in names[0]
    assert set(names[7].split(", ")) == {"bowl", "hot", "soup"}
    assert distinctive_words(np.zeros(2, int), [None, "12 34"]) == {}


def test_words_of_a_vocabulary_are_the_nearest_of_each_cluster():
    """Clusters about one direction each, and words that are these directions, but for what all have."""
    rng = np.random.default_rng(0)
    cluster = np.repeat([3, 5, 8, -1], 50)
    rows = np.eye(6)[np.repeat([0, 1, 2, 3], 50)] + 5 * np.eye(6)[4] + 0.05 * rng.normal(size=(200, 6))
    rows[7] = np.nan
    words = ["zero", "one", "two", "of all"]
    vectors = np.stack([*np.eye(6)[:3], np.eye(6)[4]]) * [[1], [30], [0.1], [9]]
    names = nearest_words(cluster, rows.astype(np.float32), words, vectors)
    assert {key: name.split(", ")[0] for key, name in names.items()} == {3: "zero", 5: "one", 8: "two"}
    assert nearest_words(np.full(200, -1), rows, words, vectors) == {}


def test_a_large_wide_cluster_of_which_little_is_kept_is_a_catch_all():
    sizes = [200, 20, 20, 20, 20]
    leaf = np.repeat(np.arange(5), sizes)
    distance = np.where(leaf == 0, 3.0, 1.0)
    tree = ClusterTree({1: np.zeros((5, 2))}, {1: leaf}, distance)
    ids = np.r_[[0, 1], np.arange(200, 260)]

    class Made:
        pass

    made = Made()
    made.tree, made.ids = tree, ids
    assert catch_all_clusters(made) == [{"cluster": 0, "size": 200, "kept": 2, "width": 3.0}]
    made.ids = np.arange(150)
    assert catch_all_clusters(made) == []


@pytest.mark.long
def test_a_cell_of_a_notebook(write_pool, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    write_pool([40, 30])
    code = """
        from curated_data import ShardPool, curate
        pool = ShardPool("pool-*.tar")
        curation = curate(pool, {"target_size": 20}, embedder="pixels:4", cache_dir="cache")
        curation.show(pool)
        curation
    """
    cell = nbformat.v4.new_code_cell("\n".join(line.strip() for line in code.splitlines()))
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = notebook.cells[0].outputs
    streams = [output for output in outputs if output.output_type == "stream"]
    text = "".join(output.text for output in streams if output.name == "stdout")
    assert "70 samples in 2 shards" in text  # a line of the log
    assert "level 1:" in text  # one from beside a bar, whole
    assert not [output.text for output in streams if output.name == "stderr" and output.text[:1].isdigit()]
    pages = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert sum("20 of 70 samples selected" in page for page in pages) == 2
    assert sum("data:image/png;base64," in page for page in pages) == 3
    assert outputs[-1].output_type == "execute_result"
