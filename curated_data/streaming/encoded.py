"""JPEGs that workers pass on undecoded, to be decoded in the training process, one batch at a time."""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from curated_data.errors import SampleError
from curated_data.pool.decode import EncodedImage, decode_encoded
from curated_data.pool.image import check_pixels, oriented
from curated_data.pool.passing import is_samples
from curated_data.streaming.fields import BESIDE_IMAGES, MISSING
from curated_data.streaming.statistics import Skipped

if TYPE_CHECKING:
    from curated_data.streaming.dataset import PoolDataset
    from curated_data.streaming.mixed import MixtureDataset

log = logging.getLogger(__name__)


class EncodedSample(NamedTuple):
    """An image to be decoded on a device.

    Attributes:
        image: a JPEG, or the pixels, uint8 (3, H, W), of an image in another format.
        shard, key: of its sample.
        spares: ids of its pool to try in order if it cannot be decoded.
        orientation: of a JPEG, by its EXIF data, see `oriented`.
    """

    image: EncodedImage | Tensor
    shard: str
    key: str
    spares: Sequence[int] = ()
    orientation: int = 1


class EncodedImages:
    """The images of a batch, concatenated to one tensor, because each tensor that a worker sends has a cost.

    It is neither a tensor nor a collection of tensors, so that a Trainer leaves it in host memory, where
    decoders expect it.
    """

    def __init__(self, samples: Sequence[EncodedSample]) -> None:
        pieces = [_flat(sample.image) for sample in samples]
        self.content = torch.cat(pieces)
        self.sizes = [len(piece) for piece in pieces]
        self.shapes = [sample.image.shape if isinstance(sample.image, Tensor) else None for sample in samples]
        self.members = [
            sample.image.member if isinstance(sample.image, EncodedImage) else "" for sample in samples
        ]
        self.shards = [sample.shard for sample in samples]
        self.keys = [sample.key for sample in samples]
        self.spares = [sample.spares for sample in samples]
        self.orientations = [sample.orientation for sample in samples]

    def __len__(self) -> int:
        return len(self.sizes)

    def pieces(self) -> list[Tensor]:
        """The images: uint8 (n,) for a JPEG, or pixels (3, H, W)."""
        pieces = self.content.split(self.sizes)
        return [p if shape is None else p.view(shape) for p, shape in zip(pieces, self.shapes, strict=True)]


class DeviceDecoder:
    """Decodes the images of a batch on the device.

    Images that the device's decoder rejects are decoded on the host as usual, so that the same samples fail
    with the same errors. Samples that may be skipped are replaced by a spare.

    Args:
        dataset: the batch's dataset, which counts skipped samples and loads spares.
        crop: maps an image on the device, uint8 (3, H, W), to the common size.
    """

    def __init__(self, dataset: "PoolDataset | MixtureDataset", crop: Callable[[Tensor], Tensor]) -> None:
        self.statistics, self.first_ids = dataset.statistics, dataset.first_ids.tolist()
        self.parts = [part.decoding_at_once() for part in dataset.parts]
        self.crop = crop
        self._warned = False

    def __call__(self, batch: dict[str, Any], device: torch.device) -> None:
        """Replace `encoded` by `image`, (B, 3, size, size) on the device.

        Raises:
            SampleError: an image cannot be decoded.
        """
        encoded: EncodedImages = batch.pop("encoded")
        images = encoded.pieces()
        jpegs = [place for place, shape in enumerate(encoded.shapes) if shape is None]
        decoded = _decode([images[place] for place in jpegs], device)
        self._warn(sum(image is None for image in decoded), len(jpegs), device)
        for place, image in zip(jpegs, decoded, strict=True):
            if image is None:
                images[place] = self._decoded_on_host(place, encoded, batch)
            else:
                images[place] = oriented(image, encoded.orientations[place])
        batch["image"] = torch.stack([self.crop(image.to(device)) for image in images])

    def _decoded_on_host(self, place: int, encoded: EncodedImages, batch: dict[str, Any]) -> Tensor:
        members = {"__url__": encoded.shards[place], "__key__": encoded.keys[place]}
        number = int(batch["source"][place]) if "source" in batch else 0
        part = self.parts[number]
        image = EncodedImage(encoded.members[place], encoded.pieces()[place].numpy().tobytes())
        try:
            return decode_encoded(image, members, min_size=None, settings=part.pool.images)
        except SampleError as reason:
            if not encoded.spares[place]:
                raise
            error = reason
        skipped = [Skipped(encoded.shards[place], str(error))]
        sample = part.spare(encoded.spares[place], 0, skipped)
        self.statistics.skip(skipped)
        if part.labels is not None:
            sample["label"] = int(part.labels.of(np.array([sample["sample_id"]]))[0])
        sample["sample_id"] += self.first_ids[number]
        for name in batch.keys() & {"sample_id", *BESIDE_IMAGES}:
            batch[name][place] = sample.get(name, MISSING.get(name))
        return sample["image"]

    def _warn(self, n_refused: int, n: int, device: torch.device) -> None:
        if n_refused and not self._warned:
            self._warned = True
            log.warning(
                "the decoder of %s rejected %d of the %d JPEGs of a batch; these, and any later ones, are "
                "decoded on the host",
                device,
                n_refused,
                n,
            )


def is_whole_jpeg(data: bytes) -> bool:
    """Whether data can be decoded on a device: a JPEG with its first and last marker, of an allowed number of
    pixels, in a colour space that all decoders support.
    """
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        return False
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        check_pixels(width, height)
    except (ValueError, KeyError, Image.DecompressionBombWarning):  # damaged, or of too many pixels
        return False
    return colours not in ("CMYK", "YCCK")


def _decode(jpegs: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """RGB images; None for each one that torchvision's decoder rejects."""
    if not jpegs:
        return []
    with warnings.catch_warnings():  # its successor, torchcodec, is a separate package
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not is_samples(error):
                raise
            if len(jpegs) == 1:
                return [None]
    return [image for jpeg in jpegs for image in _decode([jpeg], device)]


def _flat(image: EncodedImage | Tensor) -> Tensor:
    if isinstance(image, Tensor):
        return image.reshape(-1)
    return torch.frombuffer(bytearray(image.data), dtype=torch.uint8)
