"""Which fields batches have, class names, outputs of own decoders, and what is not asked for."""

import io
import json

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from curated_data import CuratedDataModule, ShardPool
from curated_data.errors import ConfigError, SampleError
from curated_data.streaming import PoolDataset
from curated_data.streaming.classes import ClassNumbers, class_names
from tests.support.options import grouped


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, samples: list[dict]) -> str:
    with webdataset.TarWriter(str(path)) as writer:
        for number, members in enumerate(samples):
            writer.write({"__key__": f"s{number:03d}", "png": png(number), **members})
    return str(path)


def batches(pool, **arguments) -> list[dict]:
    settings = {"batch_size": 4, "num_workers": 0, "image_size": 8, "shuffle": "none"} | arguments
    return list(CuratedDataModule(pool, **grouped(settings)).train_dataloader())


BROKEN = {"cls": b"\xff\xfe", "txt": b"\xff\xfe", "json": b"{"}
FIELD = {"cls": "label", "txt": "caption", "json": "metadata"}


@pytest.mark.parametrize("extension", BROKEN)
def test_members_that_nobody_asked_for_may_hold_anything(tmp_path, extension):
    whole = {"cls": b"3", "txt": b"words", "json": b"{}"}
    pool = write(tmp_path / "a.tar", [whole] * 3 + [whole | {extension: BROKEN[extension]}])
    with pytest.raises(SampleError, match=f"s003.*{extension}"):
        batches(pool)
    others = [field for field in FIELD.values() if field != FIELD[extension]]
    (batch,) = batches(pool, fields=others)
    assert set(batch) == {"image", "sample_id", *others}
    (batch,) = batches(pool, fields=[])
    assert set(batch) == {"image", "sample_id"}


def test_a_text_that_lies_in_the_metadata_is_read_without_them(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "t.tar")) as writer:
        writer.write({"__key__": "a", "json": {"text": "words", "more": 1}})
    dataset = PoolDataset(ShardPool(str(tmp_path / "t.tar")), fields=["label"])
    assert dataset[0] == {"sample_id": 0, "text": "words"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [(["captions"], "caption"), (["image"], "image"), ("label", "label"), (["npz"], "npz"), ([3], "3")],
)
def test_unknown_fields_are_named(tmp_path, fields, named):
    pool = write(tmp_path / "a.tar", [{}])
    with pytest.raises(ConfigError, match=f"fields.*{named}"):
        CuratedDataModule(pool, decoding={"fields": fields})


def boxes(data: bytes):
    return np.frombuffer(data, np.float32)


def test_outputs_of_own_decoders_reach_the_batch(tmp_path):
    samples = [
        {"box": np.full(4, number, np.float32).tobytes(), "score": f"{number / 2}".encode(), "note": b"n"}
        for number in range(4)
    ]
    pool = write(tmp_path / "a.tar", samples)
    decoders = {"box": boxes, ".SCORE": float, "note": bytes.decode, "absent": bytes.decode}
    (batch,) = batches(pool, decoders=decoders, num_workers=1)
    assert torch.equal(batch["box"], torch.arange(4.0)[:, None].expand(4, 4))
    assert torch.equal(batch["score"], torch.arange(4) / 2)
    assert batch["note"] == ["n"] * 4
    assert "absent" not in batch
    (batch,) = batches(pool, decoders=decoders, fields=["box"])
    assert set(batch) == {"image", "sample_id", "box"}


def test_outputs_that_some_samples_lack_are_a_list(tmp_path):
    pool = write(tmp_path / "a.tar", [{"box": np.zeros(1, np.float32).tobytes()}, {}, {}, {}])
    (batch,) = batches(pool, decoders={"box": boxes})
    assert batch["box"][0].tolist() == [0]
    assert batch["box"][1:] == [None] * 3


def test_outputs_that_cannot_be_stacked_are_named(tmp_path):
    pool = write(tmp_path / "a.tar", [{"box": np.zeros(n, np.float32).tobytes()} for n in range(1, 5)])
    with pytest.raises(ConfigError, match="box"):
        batches(pool, decoders={"box": boxes})


def test_outputs_with_the_name_of_something_else_are_refused(tmp_path):
    pool = write(tmp_path / "a.tar", [{"padding": b"1"}])
    with pytest.raises(ConfigError, match="padding"):
        CuratedDataModule(pool, decoding={"decoders": {"padding": int}})


NAMES = ["zebra", "Äffchen", "cat", "C++", "cat\n", "10", "dog", "zebra"]
SORTED = ("10", "C++", "cat", "dog", "zebra", "Äffchen")


@pytest.mark.parametrize("cached", [True, False])
def test_class_names_are_numbered_in_sorted_order_over_both_pools(tmp_path, cached):
    pool = write(tmp_path / "a.tar", [{"cls": name.encode()} for name in NAMES[:4]])
    val = write(tmp_path / "b.tar", [{"cls": name.encode()} for name in NAMES[4:]])
    cache = {"cache_dir": tmp_path / "cache"} if cached else {}
    for _ in range(2):
        loaded = CuratedDataModule(
            pool, val_pool=val, batch_size=4, loader={"num_workers": 0}, image_size=8, shuffle="none", **cache
        )
        (batch,) = loaded.train_dataloader()
        (validation,) = loaded.val_dataloader()
        assert loaded.class_names == SORTED
        labels = [SORTED.index(name.strip()) for name in NAMES]
        assert batch["label"].tolist() + validation["label"].tolist() == labels


def test_numbers_do_not_depend_on_how_a_pool_is_cut(tmp_path):
    whole = write(tmp_path / "a.tar", [{"cls": name.encode()} for name in NAMES])
    parts = [
        write(tmp_path / f"p{number}.tar", [{"cls": NAMES[number].encode()}])
        for number in reversed(range(len(NAMES)))
    ]
    assert class_names([ShardPool(whole)], None) == class_names([ShardPool(parts)], tmp_path / "c") == SORTED


def test_integers_stay_what_they_are(tmp_path):
    pool = write(tmp_path / "a.tar", [{"cls": f"{number}\n".encode()} for number in (7, -1, 10**12, 0)])
    (batch,) = batches(pool)
    assert batch["label"].tolist() == [7, -1, 10**12, 0]


@pytest.mark.parametrize("bad", [b"", b"\xff", b"  "])
def test_a_name_that_is_none_is_its_samples_error(tmp_path, bad):
    pool = write(tmp_path / "a.tar", [{"cls": b"cat"}, {"cls": bad}, {"cls": b"dog"}, {"cls": b"cat"}])
    with pytest.raises(SampleError, match=r"s001.*cls"):
        batches(pool)
    (batch,) = batches(pool, on_error="skip", max_skipped=1.0)
    assert set(batch["label"].tolist()) <= {0, 1}


def test_labels_and_decoders_of_ones_own_come_first(tmp_path):
    pool = write(tmp_path / "a.tar", [{"cls": name.encode()} for name in NAMES[:4]])
    (batch,) = batches(pool, labels=np.arange(4))
    assert batch["label"].tolist() == [0, 1, 2, 3]
    (batch,) = batches(pool, decoders={"cls": len})
    assert batch["label"].tolist() == [len(name.encode()) for name in NAMES[:4]]
    assert ClassNumbers(["a", "b"])(b" b\n") == 1


def test_damaged_names_in_the_cache_are_an_error(tmp_path):
    pool = ShardPool(write(tmp_path / "a.tar", [{"cls": b"cat"}]))
    class_names([pool], tmp_path / "c")
    (manifest,) = (tmp_path / "c" / "classes").glob("*/manifest.json")
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"names": [1]}))
    with pytest.raises(ValueError, match=r"classes/\w+/manifest\.json: "):
        class_names([pool], tmp_path / "c")


CURATION = {"target_size": 12, "levels": [{"n_clusters": 3}], "embedding": {"num_workers": 0}}


@pytest.mark.parametrize("extension", BROKEN)
def test_a_curation_takes_no_sample_that_training_could_not_decode(tmp_path, extension):
    """Unless nobody asks for what cannot be decoded."""
    whole = {"cls": b"cat", "txt": b"words", "json": b"{}"}
    samples = [whole | ({extension: BROKEN[extension]} if number % 4 == 1 else {}) for number in range(16)]
    pool = write(tmp_path / "a.tar", samples)
    settings = {"embedder": "pixels:4", "cache_dir": tmp_path / "cache", "batch_size": 4,
                "loader": {"num_workers": 0}, "image_size": 8}  # fmt: skip
    loaded = CuratedDataModule(pool, CURATION, **settings)
    seen = torch.cat([batch["sample_id"] for batch in loaded.train_dataloader()])
    assert sorted(seen.tolist()) == [number for number in range(16) if number % 4 != 1]
    assert loaded.curation.report["failed"] == 4
    assert all(f"'{extension}'" in failure["reason"] for failure in loaded.curation.embeddings.failures)
    others = [field for field in FIELD.values() if field != FIELD[extension]]
    loaded = CuratedDataModule(pool, CURATION | {"target_size": 16}, decoding={"fields": others}, **settings)
    seen = torch.cat([batch["sample_id"] for batch in loaded.train_dataloader()])
    assert sorted(seen.tolist()) == list(range(16))
