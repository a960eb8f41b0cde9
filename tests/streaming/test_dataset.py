"""Whole batches from a pool: the same for any number of workers, and clear about what cannot be read."""

import io
import logging
import os
import pickle
import random
import signal

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch import Tensor

from curated_data.errors import ConfigError, PoolError, SampleError
from curated_data.pool import ShardPool, ShardWriter
from curated_data.streaming import (
    EpochOrder,
    GlobalBatchSampler,
    PoolDataset,
    StreamLoader,
    StreamPosition,
    collate,
)
from curated_data.streaming.crop import CenterCrop
from curated_data.streaming.generators import Generators


def noisy(image: Tensor) -> Tensor:
    """Views that draw from every global generator."""
    noise = torch.rand(3) + random.random() + torch.from_numpy(np.random.random(3)).float()  # noqa: NPY002
    return image.float().mean(dim=(1, 2)) + noise


def two_views(image: Tensor) -> list[Tensor]:
    return [noisy(image), torch.rand(2)]


def loader_of(dataset: PoolDataset, num_workers: int = 0, batch_size: int = 4, **order) -> StreamLoader:
    order = EpochOrder(len(dataset), **{"seed": 0, "batch_size": batch_size, **order})
    sampler = GlobalBatchSampler(
        None,
        batch_size,
        True,
        order=order,
        rank=0,
        world_size=1,
        position=StreamPosition(lambda: 0),
        n_spares=6,
    )
    return StreamLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),
    )


def test_batches_are_the_same_for_any_number_of_workers(write_pool):
    pool = ShardPool(write_pool([9, 0, 7, 8]))
    reference = list(loader_of(PoolDataset(pool, two_views, seed=5)))
    assert len(reference) == 6
    for num_workers in (1, 2):
        batches = list(loader_of(PoolDataset(pool, two_views, seed=5), num_workers))
        for batch, expected in zip(batches, reference, strict=True):
            assert torch.equal(batch["sample_id"], expected["sample_id"])
            assert torch.equal(batch["label"], expected["label"])
            assert all(torch.equal(a, b) for a, b in zip(batch["views"], expected["views"], strict=True))


def test_ranks_and_batch_sizes_do_not_change_a_samples_views(write_pool):
    pool = ShardPool(write_pool([24]))
    dataset = PoolDataset(pool, noisy, seed=5)
    views = {}
    for world_size in (1, 2, 3):
        order = EpochOrder(24, seed=0, batch_size=6)
        for rank in range(world_size):
            sampler = GlobalBatchSampler(None, 1, True, order=order, rank=rank, world_size=world_size)
            for request in sampler:
                batch, _ = collate(dataset.__getitems__(request))
                for sample_id, image in zip(batch["sample_id"].tolist(), batch["image"], strict=True):
                    assert torch.equal(views.setdefault(sample_id, image), image)
    assert len(views) == 24


def test_epochs_and_seeds_give_other_views(write_pool):
    pool = ShardPool(write_pool([8]))
    order = EpochOrder(8, seed=0, batch_size=8, shuffle="none")
    images = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        request = next(GlobalBatchSampler(None, 8, True, order=order, rank=0, world_size=1)._cut(epoch, 0, 1))
        images.append(collate(PoolDataset(pool, noisy, seed=seed).__getitems__(request))[0]["image"])
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_the_global_generators_are_left_alone(write_pool):
    pool = ShardPool(write_pool([12]))

    def drawn():
        return torch.rand(1).item(), random.random(), np.random.random()  # noqa: NPY002

    def seed():
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002

    seed()
    expected = [drawn(), drawn()]
    for num_workers in (0, 2):
        seed()
        first = drawn()
        for _ in loader_of(PoolDataset(pool, two_views), num_workers):
            pass
        assert [first, drawn()] == expected


@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.Philox])
def test_generators_are_put_back_and_draws_noticed(kind):
    usual = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(kind(5))
        for draw in (random.random, np.random.random, np.random.normal, lambda: np.random.bytes(3000)):  # noqa: NPY002
            next_numbers = []
            for draws in (0, 1, 3):
                torch.manual_seed(3)
                random.seed(3)
                np.random.set_bit_generator(kind(5))
                np.random.random(600)  # noqa: NPY002
                generators, drawn = Generators(), []

                def load(draws=draws, drawn=drawn, draw=draw, generators=generators):
                    generators.seed(5)
                    drawn.append([torch.rand(draws).tolist(), *(draw() for _ in range(draws))])
                    return drawn[-1]

                again = generators.kept(load) == generators.kept(load)
                assert again or kind is not np.random.MT19937  # numpy keeps a normal number of others
                assert len(drawn) == (2 if draws == 0 else 3)  # made again once
                numbers = np.random.normal(size=100).tolist()  # noqa: NPY002
                next_numbers.append([*numbers, random.random(), torch.rand(1).item()])
            assert next_numbers[0] == next_numbers[1] == next_numbers[2]
    finally:
        np.random.set_bit_generator(usual)


def test_what_samples_hold_becomes_the_batch(tmp_path):
    def image(mode: str) -> bytes:
        buffer = io.BytesIO()
        Image.new(mode, (6, 5)).save(buffer, "PNG")
        return buffer.getvalue()

    path = tmp_path / "mixed.tar"
    with webdataset.TarWriter(str(path)) as writer:
        writer.write({"__key__": "a", "png": image("RGB"), "cls": b"7", "txt": b"red", "json": b'{"w": 6}'})
        writer.write({"__key__": "b", "png": image("L"), "json": b'{"w": 7}'})
    dataset = PoolDataset(ShardPool(path))
    batch, report = collate(dataset.__getitems__([1, 0, 1]))
    assert batch["image"].shape == (3, 3, 5, 6)
    assert batch["image"].dtype == torch.uint8
    assert batch["sample_id"].tolist() == [1, 0, 1]
    assert batch["label"].tolist() == [-1, 7, -1]
    assert batch["caption"] == ["", "red", ""]
    assert batch["metadata"] == [{"w": 7}, {"w": 6}, {"w": 7}]
    assert report.n_samples == 3
    assert dataset[0]["label"] == 7
    raw, _ = collate(PoolDataset(dataset.pool, decode=False).__getitems__([0]))
    assert raw["members"][0]["txt"] == b"red"
    images = collate(PoolDataset(dataset.pool, extensions=["png"]).__getitems__([0]))[0]
    assert sorted(images) == ["image", "sample_id"]


def test_text_and_arrays_stream_as_images_do(tmp_path):
    bands = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    buffer = io.BytesIO()
    np.save(buffer, bands)
    with webdataset.TarWriter(str(tmp_path / "t.tar")) as writer:
        writer.write({"__key__": "a", "txt": b"some words"})
        writer.write({"__key__": "b", "txt": b"other words"})
    with webdataset.TarWriter(str(tmp_path / "n.tar")) as writer:
        writer.write({"__key__": "a", "npy": buffer.getvalue()})
    texts = ShardPool(tmp_path / "t.tar")
    assert collate(PoolDataset(texts).__getitems__([1, 0]))[0]["text"] == ["other words", "some words"]
    lengths = collate(PoolDataset(texts, lambda text: torch.tensor([len(text)])).__getitems__([0, 1]))[0]
    assert lengths["image"].tolist() == [[10], [11]]
    array = collate(PoolDataset(ShardPool(tmp_path / "n.tar")).__getitems__([0]))[0]["array"]
    assert np.array_equal(array[0], bands)
    custom = PoolDataset(texts, decoders={"txt": lambda data: data.decode().upper()})
    assert custom[0]["text"] == "SOME WORDS"


def test_default_views_of_what_is_no_image_say_what_to_give(tmp_path):
    with ShardWriter(tmp_path / "text-%d.tar") as writer:
        writer.write({"__key__": "a", "txt": "a text"})
    with pytest.raises(ConfigError, match=r"^views: .*str"):
        PoolDataset(ShardPool(str(tmp_path / "text-0.tar")), CenterCrop(8))[0]


@pytest.mark.parametrize("views", [CenterCrop(4), noisy, lambda content: content])
def test_a_sample_without_an_image_in_a_pool_of_images_is_one_that_cannot_be_decoded(tmp_path, views):
    path = tmp_path / "p.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(8):
            buffer = io.BytesIO()
            Image.new("RGB", (6, 5)).save(buffer, "PNG")
            members = {"png": buffer.getvalue(), "txt": b"red", "json": b"{}"}
            if number == 3:
                del members["png"]
            writer.write({"__key__": f"{number}", **members})
    pool = ShardPool(path)
    with pytest.raises(SampleError, match=r"p\.tar: sample '3': .*json, txt$"):
        PoolDataset(pool, views)[3]
    dataset = PoolDataset(pool, views, on_error="skip")
    batch, report = collate(dataset.__getitems__([2, 3]))
    assert batch["padding"].tolist() == [False, True]
    assert [skipped.shard for skipped in report.skipped] == [str(path)]
    texts = PoolDataset(pool, lambda text: torch.tensor(len(text)), extensions=[".TXT"])
    assert collate(texts.__getitems__([2, 3]))[0]["image"].tolist() == [3, 3]
    assert PoolDataset(pool)[3]["text"] == "red"


@pytest.mark.parametrize("label", ["cat", None, 1 << 64, [0, "1"], float("nan")])
def test_a_decoder_that_makes_no_label_is_named(write_pool, label):
    paths = write_pool([3])
    dataset = PoolDataset(ShardPool(paths), decoders={"cls": lambda data: label}, on_error="skip")
    with pytest.raises(ConfigError, match=r"^label: .*000\.tar: sample '000/0002'"):
        dataset.__getitems__([2])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_raise_names_shard_key_member_and_reason(write_pool, num_workers):
    paths = write_pool([6, 6], bad={(1, 3): b"no image at all"})
    with pytest.raises(SampleError) as caught:
        list(loader_of(PoolDataset(ShardPool(paths), noisy), num_workers))
    for named in (paths[1], "001/0003", "png"):
        assert named in str(caught.value)


def test_a_fault_in_the_views_names_the_sample(write_pool):
    def broken(image):
        raise ZeroDivisionError("views fault")

    paths = write_pool([3])
    with pytest.raises(ZeroDivisionError) as caught:
        PoolDataset(ShardPool(paths), broken, on_error="skip").__getitems__([2])
    assert paths[0] in caught.value.__notes__[0]
    assert "000/0002" in caught.value.__notes__[0]


def test_views_may_refuse_a_sample(write_pool):
    def at_least_100_pixels(image):
        raise SampleError("is smaller than 100 pixels")

    paths = write_pool([3])
    with pytest.raises(SampleError, match=r"000/0002.*100 pixels"):
        PoolDataset(ShardPool(paths), at_least_100_pixels).__getitems__([2])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skip_replaces_counts_and_logs_once_a_shard(write_pool, num_workers, caplog):
    bad = {(0, 1): b"x", (0, 4): b"y", (1, 2): b""}
    pool = ShardPool(write_pool([20, 20], bad=bad))
    unreadable = {1, 4, 22}
    reference = list(loader_of(PoolDataset(pool, noisy, on_error="skip")))
    dataset = PoolDataset(pool, noisy, on_error="skip")
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="curated_data"):
        batches = list(loader_of(dataset, num_workers))
    ids = torch.cat([batch["sample_id"] for batch in batches]).tolist()
    assert len(ids) == 40
    assert not unreadable & set(ids)
    assert set(range(40)) - unreadable <= set(ids)
    for batch, expected in zip(batches, reference, strict=True):
        assert torch.equal(batch["sample_id"], expected["sample_id"])
        assert torch.equal(batch["image"], expected["image"])
    assert dataset.statistics.n_samples == 40
    assert dataset.statistics.n_skipped >= 3  # a spare may be one of the bad ones
    assert sorted(dataset.statistics.skipped_by_shard) == sorted(pool.urls)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "skipped in 2 shards" in caplog.records[-1].getMessage()


def test_in_validation_a_skipped_sample_is_padding(write_pool):
    pool = ShardPool(write_pool([7], bad={(0, 2): b"x"}))
    order = EpochOrder(7, seed=0, batch_size=4, shuffle="none", last_batch="short")
    sampler = GlobalBatchSampler(None, 4, False, order=order, rank=0, world_size=1)
    dataset = PoolDataset(pool, noisy, on_error="skip")
    batches = [collate(dataset.__getitems__(request))[0] for request in sampler]
    assert [len(batch["sample_id"]) for batch in batches] == [4, 3]
    real = torch.cat([batch["sample_id"][~batch["padding"]] for batch in batches])
    assert real.tolist() == [0, 1, 3, 4, 5, 6]


@pytest.mark.parametrize("n_bad", [2, 5])
def test_in_validation_a_batch_of_skipped_samples_is_padding(write_pool, n_bad):
    """Also at the pool's end; where all are broken there is nothing to pad with."""
    pool = ShardPool(write_pool([5], bad={(0, 4 - place): b"broken" for place in range(n_bad)}))
    dataset = PoolDataset(pool, noisy, on_error="skip", max_skipped=1.0)
    order = EpochOrder(5, seed=0, batch_size=1, shuffle="none", last_batch="short")
    sampler = GlobalBatchSampler(None, 1, False, order=order, rank=0, world_size=1)
    loader = StreamLoader(dataset, batch_sampler=sampler, collate_fn=collate)
    if n_bad == 5:
        with pytest.raises(SampleError, match=r"4 .*pool-000"):
            list(loader)
        return
    batches = list(loader)
    assert [batch["padding"].tolist() for batch in batches] == [[False]] * 3 + [[True]] * 2
    assert dataset.statistics.n_skipped == 2


def test_too_many_skipped_are_an_error(write_pool):
    bad = {(0, place): b"broken" for place in range(0, 60, 5)}
    pool = ShardPool(write_pool([60], bad=bad))
    list(loader_of(PoolDataset(pool, noisy, on_error="skip", max_skipped=0.1)))
    refusing = loader_of(PoolDataset(pool, noisy, on_error="skip", max_skipped=0.01))
    with pytest.raises(SampleError, match=r"max_skipped=0\.01 .*pool-000"):
        list(refusing)


def test_when_all_are_broken_the_spares_run_out(write_pool):
    pool = ShardPool(write_pool([8], bad={(0, place): b"broken" for place in range(8)}))
    with pytest.raises(SampleError, match=r"pool-000\.tar: sample"):
        next(iter(loader_of(PoolDataset(pool, noisy, on_error="skip", max_skipped=1.0))))


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("what", ["vanished", "truncated", "changed"])
def test_a_shard_that_is_no_longer_what_was_indexed_is_named(write_pool, on_error, what):
    paths = write_pool([6, 6])
    pool = ShardPool(paths)
    assert len(pool) == 12
    if what == "vanished":
        os.unlink(paths[1])
    elif what == "truncated":
        os.truncate(paths[1], 1000)
    else:
        write_pool([7], seed=9, name="other")
        os.replace(paths[1].replace("pool-001", "other-000"), paths[1])
    with pytest.raises(PoolError, match=paths[1]):
        list(loader_of(PoolDataset(pool, noisy, on_error=on_error)))


def test_a_killed_worker_does_not_hang_the_loader(write_pool):
    pool = ShardPool(write_pool([40]))

    def fatal(image):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match=r"worker .* (killed by signal|exited unexpectedly)"):
        list(loader_of(PoolDataset(pool, fatal), num_workers=1))


def test_bytes_read_are_counted_against_bytes_needed(write_pool):
    pool = ShardPool(write_pool([40, 40]))
    dataset = PoolDataset(pool, noisy)
    pool.read([0, 1, 2])  # before the workers start: not theirs
    list(loader_of(dataset, num_workers=2))
    needed = sum(
        len(member) for sample in pool.read(range(80)) for name, member in sample.items() if name[0] != "_"
    )
    assert dataset.statistics.bytes_needed == needed
    assert needed <= dataset.statistics.bytes_read < 20 * needed  # tiny images: the gaps are tar headers


def test_a_dataset_reaches_workers_small(write_pool, tmp_path):
    pool = ShardPool(write_pool([300, 300]), cache_dir=tmp_path / "cache")
    dataset = PoolDataset(pool, noisy)
    before = collate(dataset.__getitems__([3, 599]))[0]["image"]
    sent = pickle.dumps(dataset)
    assert len(sent) < 5000
    assert torch.equal(collate(pickle.loads(sent).__getitems__([3, 599]))[0]["image"], before)


def test_views_that_draw_from_python_or_numpy_late_are_seeded_all_the_same(write_pool):
    """Whether they do is noticed by the first batch in which they do, which is then made again."""
    dataset = PoolDataset(ShardPool(write_pool([20])), seed=1)

    def sometimes(image: Tensor) -> Tensor:
        drawn = random.random() if image.float().mean() > threshold else 0.0
        return torch.rand(1) + drawn

    means = sorted(
        sample["image"].float().mean().item() for sample in dataset.__getitems__(range(20)).samples
    )
    threshold = means[14]
    dataset.views = sometimes
    alone = [dataset[i]["image"] for i in range(20)]
    again = PoolDataset(dataset.pool, sometimes, seed=1)
    backwards = [again.__getitems__(ids) for ids in np.array_split(np.arange(20)[::-1], 4)]
    made = {sample["sample_id"]: sample["image"] for batch in backwards for sample in batch.samples}
    assert all(torch.equal(made[i], alone[i]) for i in range(20))
