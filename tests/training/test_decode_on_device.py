"""JPEGs decoded on the training device: the same batches, and the same errors, as from the workers."""

import io
import logging
import re

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from curated_data.errors import ConfigError, SampleError
from curated_data.pool.decode import decode_image
from curated_data.streaming.device import PerSample, ResizedCrops
from curated_data.streaming.encoded import is_whole_jpeg
from curated_data.training.datamodule import CuratedDataModule
from tests.support.options import grouped
from tests.training.test_datamodule_options import JITTER, by_sample, trained

pytestmark = pytest.mark.filterwarnings("ignore")


def encoded(seed: int, format: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    """Smooth noise of some size."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    buffer = io.BytesIO()
    image = coarse.resize(tuple(rng.integers(16, 40, 2).tolist()), Image.Resampling.BICUBIC).convert(mode)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    """EXIF data with an orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def without_tables(jpeg: bytes) -> bytes:
    """A JPEG whose headers can be read, and nothing else: it has no quantisation tables."""
    place = 2
    kept = jpeg[:2]
    while jpeg[place + 1] != 0xDA:
        length = 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
        if jpeg[place + 1] != 0xDB:
            kept += jpeg[place : place + length]
        place += length
    return kept + jpeg[place:]


VARIETY = [
    encoded(0),
    encoded(1, progressive=True),
    encoded(2, mode="L"),
    encoded(3, "PNG"),
    encoded(4, mode="CMYK"),
    encoded(5, "WEBP"),
    encoded(6, "PNG", "L"),
    encoded(7, subsampling=0) + b"behind its end",
    encoded(8, quality=30),
]
TURNED = [encoded(8 + orientation, exif=turned(orientation)) for orientation in range(2, 9)]


@pytest.fixture
def write(tmp_path):
    def write(images: list[bytes]) -> str:
        with webdataset.TarWriter(str(tmp_path / "pool.tar"), mtime=0) as writer:
            for number, data in enumerate(images):
                writer.write({"__key__": f"{number:03d}", "img": data, "cls": str(number)})
        return str(tmp_path / "pool.tar")

    return write


def module(pool: str, **arguments) -> CuratedDataModule:
    settings = {"device_views": ResizedCrops(8), "batch_size": 3, "num_workers": 0, "image_size": 12}
    return CuratedDataModule(pool, **grouped({**settings, **arguments}))


def same(batches: list[dict], expected: list[dict], tolerance: float = 0.0) -> None:
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        assert torch.equal(batch["sample_id"].cpu(), other["sample_id"])
        assert torch.equal(batch["label"].cpu(), other["label"])
    found = by_sample(batches)
    for sample, views in by_sample(expected).items():
        for view, wanted in zip(found[sample], views, strict=True):
            torch.testing.assert_close(view, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("views", [ResizedCrops(8), JITTER, PerSample(lambda image: image)])
def test_batches_are_those_of_the_workers(write, views, num_workers):
    pool = write(VARIETY + TURNED)
    expected = trained(module(pool, device_views=views))
    batches = trained(module(pool, device_views=views, decode_on_device=True, num_workers=num_workers))
    same(batches, expected)


def test_what_travels_are_the_jpegs_themselves(write):
    data = module(write(VARIETY), decode_on_device=True, batch_size=9)
    (batch,) = data.train_dataloader()
    images = batch["encoded"]
    for sample, image in zip(batch["sample_id"].tolist(), images.pieces(), strict=True):
        whole = sample in (0, 1, 2, 8)
        assert is_whole_jpeg(VARIETY[sample]) == whole
        assert (image.ndim == 1) == whole
        assert not whole or image.numpy().tobytes() == VARIETY[sample]


BROKEN = {
    "no image": b"nonsense",
    "cut short": encoded(20)[:-100],
    "no tables": without_tables(encoded(21)),
    "empty": b"",
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_the_error_is_the_workers(write, broken):
    pool = write([*VARIETY[:5], broken])
    with pytest.raises(SampleError) as expected:
        trained(module(pool))
    with pytest.raises(SampleError, match=re.escape(str(expected.value))):
        trained(module(pool, decode_on_device=True))
    assert f"{pool}: sample '005', member 'img': " in str(expected.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_is_skipped_is_replaced_and_counted_as_by_the_workers(write, num_workers):
    pool = write([*VARIETY, *BROKEN.values(), *(encoded(seed) for seed in range(30, 37))])
    skipping = {"on_error": "skip", "max_skipped": 1.0, "batch_size": 5, "seed": 3}
    normal = module(pool, **skipping)
    expected = trained(normal, max_epochs=2)
    data = module(pool, **skipping, decode_on_device=True, num_workers=num_workers)
    batches = trained(data, max_epochs=2)
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch["sample_id"], other["sample_id"])
        assert torch.equal(batch["label"], other["label"])
        assert torch.equal(batch["label"], batch["sample_id"])
        for view, wanted in zip(batch["views"], other["views"], strict=True):
            assert torch.equal(view, wanted)
    assert data.statistics.n_skipped == normal.statistics.n_skipped >= 2 * len(BROKEN)
    assert data.statistics.skipped_by_shard == normal.statistics.skipped_by_shard


def test_too_many_skipped_are_an_error(write):
    pool = write([*VARIETY[:3], *[without_tables(encoded(21))] * 3])
    with pytest.raises(SampleError, match="max_skipped=0"):
        trained(module(pool, on_error="skip", max_skipped=0.0, decode_on_device=True))


def test_given_labels_follow_the_sample_that_stands_in(write):
    pool = write([*VARIETY, without_tables(encoded(21))])
    labels = 100 + np.arange(10)
    data = module(pool, on_error="skip", max_skipped=1.0, decode_on_device=True, labels=labels, batch_size=10)
    (batch,) = trained(data)
    assert torch.equal(batch["label"], 100 + batch["sample_id"])
    assert 9 not in batch["sample_id"]


def test_that_the_host_has_to_help_is_said_once(write, caplog):
    pool = write([*VARIETY[:3], *[without_tables(encoded(21))] * 2])
    data = module(pool, on_error="skip", max_skipped=1.0, decode_on_device=True, batch_size=5)
    with caplog.at_level(logging.WARNING, logger="curated_data"):
        trained(data, max_epochs=2)
    said = [record.getMessage() for record in caplog.records if "rejected" in record.getMessage()]
    assert said == [
        "the decoder of cpu rejected 2 of the 5 JPEGs of a batch; these, and any later ones, are decoded on "
        "the host"
    ]


def test_validation_is_decoded_in_the_workers(write):
    pool = write(VARIETY)
    data = module(pool, decode_on_device=True, val_pool=pool)
    trained(data)
    assert [batch["image"].shape for batch in data.val_dataloader()] == [(3, 3, 12, 12)] * 3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"device_views": None}, "device.decode: .*device.views"),
        ({"views": lambda image: image}, "views: "),
        ({"min_size": 16}, "decoding.min_size: "),
    ],
)
def test_wrong_arguments(write, arguments, named):
    with pytest.raises(ConfigError, match=f"^{named}"):
        module(write(VARIETY), decode_on_device=True, **arguments)


def test_own_decoders_give_images(write):
    pool = write(VARIETY)
    own = {"decoders": {"img": opposite}}
    same(trained(module(pool, decode_on_device=True, **own)), trained(module(pool, **own)))
    floats = {"decoders": {"img": lambda data: torch.zeros(3, 20, 20)}}
    with pytest.raises(ConfigError, match=r"torch\.float32 \(3, 20"):
        trained(module(pool, decode_on_device=True, **floats))


def opposite(data: bytes) -> torch.Tensor:
    return 255 - decode_image(data)


def test_a_sample_without_an_image_is_named(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "pool.tar")) as writer:
        writer.write({"__key__": "words", "txt": "none here"})
    with pytest.raises(SampleError, match="sample 'words': "):
        trained(module(str(tmp_path / "pool.tar"), decode_on_device=True, batch_size=1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(write):
    """nvJPEG rounds and samples chroma in its own way: a few levels of 255."""
    pool = write([*VARIETY, without_tables(encoded(21))])
    skipping = {"on_error": "skip", "max_skipped": 1.0, "batch_size": 10}
    expected = trained(module(pool, **skipping))
    data = module(pool, **skipping, decode_on_device=True, num_workers=1)
    batches = trained(data, accelerator="gpu", devices=1)
    assert batches[0]["views"][0].device.type == "cuda"
    same(batches, expected, tolerance=16 / 255)
