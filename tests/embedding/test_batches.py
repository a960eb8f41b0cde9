"""What of a sample is embedded: one member, decoded alone, and in a pool of images only images."""

import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from curated_data.cache.artifacts import open_cache
from curated_data.embedding import (
    EmbeddingStore,
    ImagePreprocess,
    ModuleEmbedder,
    embed_pool,
    resolve_embedder,
)
from curated_data.errors import ConfigError, EmbedderError
from curated_data.pool import ShardPool
from tests.support.images import png

IMAGE = png(np.full((4, 4, 3), 90, np.uint8))


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write(path, samples: list[dict]) -> str:
    """A shard of samples a, b, c, …"""
    with webdataset.TarWriter(str(path)) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": "abcdefghijk"[number], **sample})
    return str(path)


def embed(path: str, embedder, root, **settings) -> EmbeddingStore:
    return embed_pool(ShardPool(path), embedder, open_cache(root), num_workers=0, dtype="float32", **settings)


def of_length(text: str) -> torch.Tensor:
    return torch.tensor([float(len(text))])


TEXTS = ModuleEmbedder(torch.nn.Identity(), of_length, dimension=1)


def test_members_that_are_not_embedded_do_no_harm(tmp_path):
    bad = (
        {"cls": b"cat"},
        {"cls": b"3.0"},
        {"txt": b"caf\xe9"},
        {"json": b"{"},
        {"npy": b"?"},
        {"wav": b"?"},
    )
    path = write(tmp_path / "images.tar", [{"png": IMAGE, **extra} for extra in bad])
    decoders = {"wav": lambda data: 1 / 0}
    store = embed(path, resolve_embedder("pixels:2"), tmp_path / "c", decoders=decoders, fields=[])
    assert store.failures == []
    assert len(np.unique(np.asarray(store), axis=0)) == 1
    path = write(tmp_path / "texts.tar", [{"txt": b"four", "cls": b"cat"}, {"txt": b"sixsix", "json": b"{"}])
    assert np.asarray(embed(path, TEXTS, tmp_path / "c", fields=[])).tolist() == [[4], [6]]


def test_what_is_embedded_must_be_readable(tmp_path):
    samples = [
        {"txt": b"four"},
        {"txt": b"caf\xe9"},
        {"json": json.dumps({"caption": "sixsix"}).encode()},
        {"json": b"{"},
        {"json": b"{}"},
        {"text": b"", "cls": b"1"},
    ]
    decoders = {"text": lambda data: None}
    store = embed(write(tmp_path / "t.tar", samples), TEXTS, tmp_path / "c", decoders=decoders)
    assert np.asarray(store)[store.valid].tolist() == [[4], [6]]
    reasons = [failure["reason"].partition("sample ")[2] for failure in store.failures]
    assert reasons[0].startswith("'b', member 'txt': UnicodeDecodeError")
    assert reasons[1].startswith("'d', member 'json': JSONDecodeError")
    assert reasons[2].endswith("array or text; it has: json")
    assert reasons[3] == "'f', member 'text': its decoder gave None"


def as_tensor(content) -> torch.Tensor:
    """A preprocessing that would take an array or an image."""
    return torch.as_tensor(content).float()


@pytest.mark.parametrize(
    "embedder", ["pixels:2", ModuleEmbedder(torch.nn.Flatten(), as_tensor, dimension=48)]
)
def test_a_sample_without_an_image_in_a_pool_of_images_is_counted(tmp_path, embedder):
    others = [{"txt": b"red", "json": b"{}"}, {"npy": npy(np.zeros((3, 4, 4)))}, {"wav": b"?"}]
    shard = write(tmp_path / "a.tar", [{"png": IMAGE, "txt": b"red"}, *others, {"x.png": IMAGE}])
    store = embed(shard, resolve_embedder(embedder), tmp_path / "c")
    assert store.valid.tolist() == [True, False, False, False, True]
    assert [failure["reason"] for failure in store.failures] == [
        f"{shard}: sample {key!r}: no image member; it has: {has}"
        for key, has in (("b", "json, txt"), ("c", "npy"), ("d", "wav"))
    ]


def test_an_own_decoder_may_make_the_image(tmp_path):
    samples = [{"png": IMAGE}, {"npy": npy(np.full((3, 4, 4), 90, np.uint8))}, {"txt": b"red"}]
    decoders = {"npy": lambda data: torch.from_numpy(np.load(io.BytesIO(data)))}
    store = embed(
        write(tmp_path / "a.tar", samples), resolve_embedder("pixels:2"), tmp_path / "c", decoders=decoders
    )
    assert store.valid.tolist() == [True, True, False]
    np.testing.assert_array_equal(np.asarray(store)[0], np.asarray(store)[1])


def test_an_embedder_of_images_stops_at_a_pool_without_any(tmp_path):
    shard = write(tmp_path / "a.tar", [{"txt": b"red"}, {"txt": b"blue"}])
    with pytest.raises(EmbedderError, match=r" str\b.*a\.tar: sample 'a'\)$"):
        embed(shard, resolve_embedder("pixels:2"), tmp_path / "c")
    shard = write(tmp_path / "b.tar", [{"png": IMAGE}, {"txt": b"red"}])
    texts = ShardPool(shard, image_extensions=["jpg"])  # its png are no images, so it is a pool of texts
    store = embed_pool(texts, TEXTS, open_cache(tmp_path / "c"), num_workers=0)
    assert store.valid.tolist() == [False, True]


def test_extensions_count_in_any_spelling_and_name_the_same_embeddings(tmp_path):
    shard = write(tmp_path / "a.tar", [{"png": IMAGE}, {"txt": b"red"}])
    names = set()
    for decoders, images in (({"png": black}, ["jpg", "png"]), ({".PNG": black}, (".Jpg", "PNG"))):
        pool = ShardPool(shard, image_extensions=images)
        store = embed_pool(
            pool, resolve_embedder("pixels:2"), open_cache(tmp_path / "c"), num_workers=0, decoders=decoders
        )
        names.add(store.folder.name)
        assert float(np.asarray(store)[0, 0]) == pytest.approx(-1, abs=1e-3)
    assert len(names) == 1
    assert ShardPool(shard, image_extensions=".png").image_extensions == ("png",)
    with pytest.raises(ConfigError, match=r"^image_extensions: .*'\.'"):
        ShardPool(shard, image_extensions=["."])


def black(data: bytes) -> torch.Tensor:
    """An image, whatever it is decoded from."""
    return torch.zeros((3, 4, 4), dtype=torch.uint8)


class Inverted(ImagePreprocess):
    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return -super().__call__(image)


@settings(max_examples=15, deadline=None)
@given(
    sides=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8),
    size=st.integers(1, 20),
    crop=st.sampled_from([1.0, 0.875]),
    mode=st.sampled_from(["bicubic", "bilinear"]),
    kind=st.sampled_from([ImagePreprocess, Inverted]),
    with_floats=st.booleans(),
)
def test_inputs_of_a_batch_are_those_of_its_images_one_by_one(sides, size, crop, mode, kind, with_floats):
    """Whatever their sizes; also beside images of an own decoder in another type, or of one channel."""
    preprocess = kind(size, crop_ratio=crop, interpolation=mode)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sides]
    samples = [{"png": png(image)} for image in images]
    values = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
    if with_floats:
        for channels in (3, 1):
            values.append(torch.from_numpy(rng.random((channels, 9, 7), dtype=np.float32)))
            samples.append({"npy": npy(values[-1].numpy())})
        values.append(torch.from_numpy(rng.integers(0, 256, (1, 6, 6), dtype=np.uint8)))
        samples.append({"npy": npy(values[-1].numpy())})
    own = {"npy": lambda data: torch.from_numpy(np.load(io.BytesIO(data)))}
    embedder = ModuleEmbedder(torch.nn.Flatten(), preprocess, dimension=3 * size * size)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.tar", [{**s, "cls": b"1"} for s in samples])
        store = embed(path, embedder, Path(folder) / "c", decoders=own)
        assert store.failures == []
        found = np.asarray(store)
    expected = torch.stack([preprocess(value) for value in values]).flatten(1).numpy()
    assert np.array_equal(found, expected)
