"""Embedding a pool: right rows, counted failures, and the same result whoever does the work and whenever it
stops.
"""

import io
import os
import pickle
import re
import signal
import threading

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from curated_data.cache.artifacts import open_cache
from curated_data.embedding import EmbeddingStore, ModuleEmbedder, embed_pool, forward, resolve_embedder
from curated_data.embedding import extract as extract_module
from curated_data.embedding import store as store_module
from curated_data.embedding.embedders import ImagePreprocess
from curated_data.embedding.extract import embed_samples
from curated_data.errors import CacheError, ConfigError, CuratedDataError, EmbedderError
from curated_data.pool import ShardPool
from tests.support.images import png


def mean_colours(batch):
    """A (B, 3) embedding that can be checked by hand."""
    return batch.mean((2, 3))


def as_float(image):
    """Images in 0..1, at their own size."""
    return image.float() / 255


@pytest.fixture
def embedder():
    return ModuleEmbedder(mean_colours, as_float, dimension=3)


def test_rows_are_the_pools_images_in_order(write_pool, tmp_path, embedder):
    pool = ShardPool(write_pool([10, 0, 7]))
    store = embed_pool(
        pool, embedder, open_cache(tmp_path / "c"), batch_size=4, num_workers=0, dtype="float32"
    )
    expected = [
        np.asarray(Image.open(io.BytesIO(sample["png"])), np.float64).mean((0, 1)) / 255
        for sample in pool.read(np.arange(17))
    ]
    assert store.shape == (17, 3)
    np.testing.assert_allclose(np.asarray(store), expected, rtol=1e-6)
    ids = np.array([16, 0, 9, 9, 3])
    np.testing.assert_array_equal(store.rows(ids), np.asarray(store)[ids])
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in store.blocks()]), np.asarray(store))
    for which in (
        slice(None),
        slice(3, 12),
        slice(9, 11),
        slice(10, 10),
        slice(-4, None),
        slice(0, 17, 5),
        ids,
    ):
        np.testing.assert_array_equal(store[which], np.asarray(store)[which])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).rows(ids), store.rows(ids))
    with pytest.raises(IndexError, match=r"0\.\.16, found 0\.\.17"):
        store.rows([0, 17])
    assert store.valid.all()
    assert store.failures == []


class Convolution(torch.nn.Module):
    """A network that notes which threads call it, and in which mode."""

    fingerprint = "convolution"

    def __init__(self, together=1):
        super().__init__()
        self.layer = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Dropout()
        )
        self.calls, self.together = [], threading.Barrier(together)

    def forward(self, batch):
        self.together.wait(10)
        self.calls.append((threading.get_ident(), torch.get_num_threads(), self.layer.training))
        return self.layer(batch).mean((2, 3))


def test_threads_give_the_same_rows_and_are_for_networks_that_allow_it(write_pool, tmp_path, monkeypatch):
    monkeypatch.setattr(forward, "_PIXELS", 4 * 16 * 16)
    pool = ShardPool(write_pool([16, 16]), num_workers=0)
    small = lambda image: torch.nn.functional.interpolate(image[None] / 255.0, (16, 16))[0]  # noqa: E731
    torch.manual_seed(0)
    weights = Convolution().state_dict()

    def embed(name, threads, together, thread_safe, precision="32"):
        network = Convolution(together)
        network.load_state_dict(weights)
        embedder = ModuleEmbedder(network, small, dimension=8, thread_safe=thread_safe)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            store = embed_pool(
                pool, embedder, open_cache(tmp_path / name), num_workers=0, device="cpu", precision=precision
            )
        finally:
            torch.set_num_threads(before)
        assert network.layer.training, "the mode that it had"
        assert not any(training for *_, training in network.calls)
        return np.asarray(store), network.calls

    alone, calls = embed("alone", 1, 1, True)
    assert {thread for thread, *_ in calls} == {threading.get_ident()}
    # Each pair of calls waits for the other, so these are at once; torch has one core for each.
    together, calls = embed("together", 2, 2, True)
    assert len({thread for thread, *_ in calls} - {threading.get_ident()}) == 2
    assert {cores for _, cores, _ in calls} == {1}
    np.testing.assert_array_equal(together, alone)
    _, calls = embed("not-safe", 2, 1, False)
    assert {thread for thread, *_ in calls} == {threading.get_ident()}
    bf16 = [embed(f"bf16-{n}", n, 1, True, "bf16")[0] for n in (1, 2)]
    np.testing.assert_array_equal(*bf16)
    assert (bf16[0] != alone).any(), "autocast reaches the threads"


class Layout(torch.nn.Module):
    """A network that notes whether its inputs come in `channels_last`."""

    fingerprint = "layout"

    def __init__(self, **convolution):
        super().__init__()
        self.layer = torch.nn.Conv2d(256, 256, **convolution)
        self.found = set()

    def forward(self, batch):
        self.found.add(batch.is_contiguous(memory_format=torch.channels_last))
        return batch.mean((2, 3))


@pytest.mark.parametrize(
    ("convolution", "size", "in_channels_last"),
    [
        ({"kernel_size": 3}, 64, False),  # as in ResNets
        ({"kernel_size": 3}, 224, True),
        ({"kernel_size": 3, "groups": 256}, 64, True),
        ({"kernel_size": 1}, 64, True),
    ],
)
def test_images_come_in_the_memory_format_that_is_faster(
    write_pool, tmp_path, convolution, size, in_channels_last
):
    network = Layout(**convolution)
    embedder = ModuleEmbedder(network, ImagePreprocess(size), dimension=3)
    pool = ShardPool(write_pool([3]), num_workers=0)
    embed_pool(pool, embedder, open_cache(tmp_path / "cache"), num_workers=0, device="cpu")
    assert network.found == {in_channels_last}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_failures_are_counted_and_named(write_pool, tmp_path, num_workers):
    shards = write_pool([6, 5], bad={(0, 2): b"not an image", (1, 0): b"", (1, 4): b"\x89PNG\r\n\x1a\n"})

    def grows(batch):
        values = batch.mean((2, 3))
        values[:, 0] = torch.where(
            values[:, 1] > values[:, 1].median(), 1e6, values[:, 0]
        )  # more than float16 holds
        return values

    pool = ShardPool(shards)
    embedder = ModuleEmbedder(grows, as_float, dimension=3)
    store = embed_pool(
        pool, embedder, open_cache(tmp_path / "c"), batch_size=3, num_workers=num_workers, dtype="float16"
    )
    failures = {failure["id"]: failure for failure in store.failures}
    assert {2, 6, 10} <= set(failures)
    assert len(failures) > 3
    assert sorted(failures) == np.flatnonzero(~store.valid).tolist()
    for number, failure in failures.items():
        assert failure["key"] == pool.keys([number])[0]
        assert failure["shard"] == shards[number >= 6]
        assert failure["reason"]
        if number not in (2, 6, 10):
            assert failure["reason"].startswith("its embedding exceeds 65504, beyond what float16")
    assert np.isfinite(np.asarray(store)).all()
    assert (np.asarray(store)[~store.valid] == 0).all()
    assert [store.failure(number) for number in range(11)] == [failures.get(number) for number in range(11)]


def test_a_few_samples_are_embedded_as_the_pool_is_and_leave_nothing(write_pool, tmp_path, monkeypatch):
    pool = ShardPool(write_pool([6, 0, 5, 4], bad={(2, 1): b"?"}))
    embedder, root = resolve_embedder("pixels:2"), open_cache(tmp_path / "c")
    store = embed_pool(pool, embedder, root, num_workers=0)
    monkeypatch.setattr(extract_module, "ShardFiles", None)
    for ids in (np.array([1, 6, 7, 8, 14]), np.array([7]), np.arange(15)):
        rows, valid = embed_samples(pool, embedder, ids, batch_size=2, num_workers=0)
        np.testing.assert_array_equal(rows, store.rows(ids))
        np.testing.assert_array_equal(valid, store.valid[ids])


def test_rows_open_the_files_of_their_shards_alone(write_pool, tmp_path):
    pool = ShardPool(write_pool([3, 0, 4, 1, 2]))
    store = embed_pool(pool, resolve_embedder("pixels:2"), open_cache(tmp_path / "c"), num_workers=0)
    whole = store.as_array(np.float16)
    for ids, shards in (([7, 3, 3, 6], {2, 3}), ([9], {4}), ([], set()), (list(range(10)), {0, 2, 3, 4})):
        store._maps.clear()
        np.testing.assert_array_equal(store.rows(ids), whole[np.array(ids, int)])
        assert set(store._maps) == shards


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        (1e6, "65504.*float16.*embedding.dtype"),
        (1e-9, "6e-08.*float16.*embedding.dtype"),
        (float("inf"), "not finite"),
    ],
)
def test_embeddings_that_float16_cannot_hold_are_said_to_be_so(write_pool, tmp_path, scale, reason):
    class Scaled(torch.nn.Module):
        dimension = 192

        def preprocess(self, image):
            return image.float() / 255

        def forward(self, images):
            return images.flatten(1) * scale

    pool = ShardPool(write_pool([4]), cache_dir=tmp_path)
    embedder = resolve_embedder(Scaled())
    narrow = embed_pool(pool, embedder, tmp_path, num_workers=0)
    assert not narrow.valid.any()
    assert not np.asarray(narrow).any()
    assert all(re.search(reason, failure["reason"]) for failure in narrow.failures)
    wide = embed_pool(pool, embedder, tmp_path, num_workers=0, dtype="float32")
    assert wide.valid.all() == (scale < float("inf"))


def test_second_call_and_new_shards_embed_only_what_is_missing(write_pool, tmp_path):
    seen = []

    class Counting(torch.nn.Module):
        fingerprint = "counting"

        def forward(self, batch):
            seen.append(len(batch))
            return batch.mean((2, 3))

    embedder = ModuleEmbedder(Counting(), as_float, dimension=3)
    shards = write_pool([5, 6, 7])
    root = open_cache(tmp_path / "c")
    settings = {"batch_size": 100, "num_workers": 0}
    first = embed_pool(ShardPool(shards[:2]), embedder, root, **settings)
    assert seen == [5, 6]
    embed_pool(ShardPool(shards[:2]), embedder, root, **settings)
    assert seen == [5, 6]
    grown = embed_pool(ShardPool(shards), embedder, root, **settings)
    assert seen == [5, 6, 7]
    np.testing.assert_array_equal(np.asarray(grown)[:11], np.asarray(first))
    assert grown.fingerprint != first.fingerprint


def test_wrong_embedders_stop_at_once(write_pool, tmp_path):
    pool, root = ShardPool(write_pool([4])), open_cache(tmp_path / "c")
    with pytest.raises(EmbedderError, match=r"\(4, 3\).*\(4, 5\)"):
        embed_pool(pool, ModuleEmbedder(mean_colours, as_float, dimension=5), root, num_workers=0)
    crop = iter(range(100))

    def uneven(image):
        return image.float()[:, : 1 + next(crop) % 2]

    uneven.fingerprint = "uneven"
    with pytest.raises(EmbedderError, match=r"preprocess .*3, 1, 8.*3, 2, 8"):
        embed_pool(pool, ModuleEmbedder(mean_colours, uneven, dimension=3), root, num_workers=0)


class Odd:
    """An embedder by the protocol alone, wrong in one way."""

    name = "odd"
    dimension = 3

    def __init__(self, fingerprint, **changes):
        self.fingerprint = fingerprint
        vars(self).update(changes)

    def preprocess(self, image):
        return as_float(image)

    def __call__(self, batch):
        return self.output(batch)


def _fails(batch):
    raise RuntimeError("boom\nand more")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": _fails}, r"odd: .*\(4, 3, 8, 8\) on cpu .*RuntimeError: boom"),
        ({"output": lambda batch: {"x": batch}}, "odd: .* dict"),
        ({"output": lambda batch: batch.mean((2, 3)) * 1j}, r"odd: .*torch\.complex64"),
        ({"dimension": 0}, "odd: .*dimension.* 0"),
        ({"dimension": "3"}, "odd: .*dimension.*'3'"),
        ({"preprocess": lambda image: image.numpy()}, "preprocess .*ndarray"),
    ],
)
def test_embedders_that_are_wrong_in_one_way_are_named(changes, message, write_pool, tmp_path):
    pool, root = ShardPool(write_pool([4])), open_cache(tmp_path / "c")
    with pytest.raises(EmbedderError, match=message):
        embed_pool(pool, Odd("odd", **changes), root, num_workers=0)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device, write_pool, tmp_path):
    pool, root = ShardPool(write_pool([4])), open_cache(tmp_path / "c")
    with pytest.raises(ConfigError, match=f"device '{device}'"):
        embed_pool(pool, resolve_embedder("pixels:2"), root, num_workers=0, device=device)


def test_a_network_in_training_embeds_in_evaluation_mode_and_is_left_as_it_was(write_pool, tmp_path):
    """Also one that brings all that an embedder needs, so that nothing is put around it."""

    class Whole(torch.nn.Module):
        dimension, fingerprint = 3, "whole"

        def __init__(self):
            super().__init__()
            self.norm, self.drop = torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.5)

        def preprocess(self, image):
            return as_float(image)

        def forward(self, batch):
            return self.drop(self.norm(batch)).mean((2, 3))

    network = Whole().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    pool = ShardPool(write_pool([6]))
    found = [
        np.asarray(embed_pool(pool, network, open_cache(tmp_path / name), num_workers=0)) for name in "ab"
    ]
    np.testing.assert_array_equal(*found)
    assert network.training
    assert network.drop.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_the_pools_preferred_image_is_embedded(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        dark, light = (png(np.full((4, 4, 3), value, np.uint8)) for value in (10, 200))
        writer.write({"__key__": "a", "png": dark, "webp": light})
    stores = [
        embed_pool(
            ShardPool(str(tmp_path / "a.tar"), image_extensions=extensions),
            resolve_embedder("pixels:2"), open_cache(tmp_path / "c"), num_workers=0, dtype="float32",
        )
        for extensions in (("png", "webp"), ("webp", "png"))
    ]  # fmt: skip
    assert stores[0].folder != stores[1].folder
    assert np.asarray(stores[0]).max() < np.asarray(stores[1]).min()


def test_another_decoder_embeds_anew(write_pool, tmp_path):
    pool, root = ShardPool(write_pool([3])), open_cache(tmp_path / "c")

    def decoder(value):
        return lambda data: torch.full((3, 8, 8), value, dtype=torch.uint8)

    found = [
        embed_pool(pool, resolve_embedder("pixels:2"), root, num_workers=0, decoders={"png": decoder(value)})
        for value in (1, 200, 1)
    ]
    assert found[0].folder == found[2].folder != found[1].folder
    assert not np.array_equal(np.asarray(found[0]), np.asarray(found[1]))
    with open("/dev/null") as held, pytest.raises(ConfigError, match=r"decoders\['png'\]: .*fingerprint"):
        embed_pool(pool, resolve_embedder("pixels:2"), root, decoders={"png": lambda data: (held, data)})


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_workers_are_one_line(write_pool, tmp_path, num_workers):
    pool, root = ShardPool(write_pool([4])), open_cache(tmp_path / "c")
    decoders = {"png": lambda data: 1}
    with pytest.raises(EmbedderError, match=r"^[^\n]* int;[^\n]*sample '000/0000'[^\n]*$"):
        embed_pool(pool, resolve_embedder("pixels:2"), root, num_workers=num_workers, decoders=decoders)


def test_a_killed_worker_is_said_to_be_one(write_pool, tmp_path):
    pool, root = ShardPool(write_pool([4])), open_cache(tmp_path / "c")
    deadly = Odd("deadly", preprocess=lambda image: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(CuratedDataError, match=r"killed.*embedding\.num_workers"):
        embed_pool(pool, deadly, root, num_workers=1)


def test_full_shared_memory_is_said_and_not_waited_for(write_pool, tmp_path, monkeypatch):
    def refuse(tensor):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    pool, root = ShardPool(write_pool([4])), open_cache(tmp_path / "c")
    with pytest.raises(CuratedDataError, match=r"shared memory.*/dev/shm"):
        embed_pool(pool, resolve_embedder("pixels:2"), root, num_workers=1)


def test_a_store_of_many_shards_is_opened_by_one_file(write_pool, tmp_path, monkeypatch):
    pool, root = (
        ShardPool(write_pool([5, 0, 4], bad={(2, 1): b"?", (0, 3): b"?"})),
        open_cache(tmp_path / "c"),
    )
    embedder = resolve_embedder("pixels:2")
    first = embed_pool(pool, embedder, root, num_workers=0)
    read = []
    details = store_module.read_details
    monkeypatch.setattr(store_module, "read_details", lambda *which: read.append(which) or details(*which))
    again = EmbeddingStore(first.folder, first.shard_fingerprints, first.shape[1], "float16")
    assert (len(again), again.n_failures, read) == (9, 2, [])
    np.testing.assert_array_equal(again.valid, first.valid)
    assert [failure["id"] for failure in again.iterate_failures()] == [3, 6]
    assert len(read) == 2
    # A shard that is embedded again brings its own failures.
    for path in first.folder.glob(f"{first.shard_fingerprints[2]}.*"):
        path.unlink()
    decoders = {"png": lambda data: torch.zeros((3, 8, 8), dtype=torch.uint8)}
    monkeypatch.setattr(extract_module, "_decoder_fingerprints", lambda decoders: [])
    healed = embed_pool(pool, embedder, root, num_workers=0, decoders=decoders)
    assert [failure["id"] for failure in healed.failures] == [3]
    assert healed.valid.sum() == 8


def test_damaged_files_of_the_store_are_named(write_pool, tmp_path, embedder):
    pool, root = ShardPool(write_pool([4])), open_cache(tmp_path / "c")
    store = embed_pool(pool, embedder, root, num_workers=0)
    array = store.folder / f"{store.shard_fingerprints[0]}.npy"
    array.write_bytes(array.read_bytes()[:40])
    again = EmbeddingStore(store.folder, store.shard_fingerprints, 3, "float16")
    with pytest.raises(CacheError, match=f"^{array}: "):
        again.rows([0])


def test_real_images_separate_by_class(fashion_train, tmp_path):
    """Same-class images are nearer each other than others, by EfficientNet-Lite0 on one real shard."""
    from sklearn.neighbors import KNeighborsClassifier

    pool = ShardPool(fashion_train[:1])
    store = embed_pool(pool, resolve_embedder("efficientnet_lite0:32"), open_cache(tmp_path), num_workers=2)
    x, labels = store.as_array(), pool.labels(np.arange(len(pool)))
    half = len(x) // 2
    accuracy = (
        KNeighborsClassifier(5, metric="cosine").fit(x[:half], labels[:half]).score(x[half:], labels[half:])
    )
    assert accuracy > 0.7
