"""JPEGs that travel to the training process as they are, and are decoded there, a batch at a time."""

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from curated_data.errors import SampleError
from curated_data.pool.decode import MAX_PIXELS, EncodedImage, decode_image, undecodable
from curated_data.streaming.fields import BESIDE_IMAGES, MISSING
from curated_data.streaming.statistics import Skipped

if TYPE_CHECKING:
    from curated_data.streaming.dataset import PoolDataset

log = logging.getLogger(__name__)


class EncodedSample(NamedTuple):
    """An image on its way to a device.

    Attributes:
        image: a JPEG, or pixels, uint8 (3, H, W), of what is none.
        shard, key: where it comes from.
        spares: ids to try in turn where it cannot be decoded.
    """

    image: EncodedImage | Tensor
    shard: str
    key: str
    spares: Sequence[int] = ()


class EncodedImages:
    """The images of a batch, end to end in one tensor: crossing from a worker costs by the tensor.

    Not a tensor, nor a collection of any: a Trainer leaves it in the host's memory, where decoders want it.
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

    def __len__(self) -> int:
        return len(self.sizes)

    def pieces(self) -> list[Tensor]:
        """Each image: uint8 (n,) of a JPEG, or (3, H, W)."""
        pieces = self.content.split(self.sizes)
        return [p if shape is None else p.view(shape) for p, shape in zip(pieces, self.shapes, strict=True)]


class DeviceDecoder:
    """Makes the `image` of a batch whose images are still encoded.

    What the device's decoder refuses is decoded as everywhere else, so that the same samples fail, with the
    same errors; where they may be skipped, a spare takes their place.

    Args:
        dataset: that gave the batch; where the skipped are counted, and where spares come from.
        crop: from an image on the device, uint8 (3, H, W), to one of the size that all have.
    """

    def __init__(self, dataset: "PoolDataset", crop: Callable[[Tensor], Tensor]) -> None:
        self.dataset = copy.copy(dataset)
        self.dataset.encoded = False  # spares are decoded at once
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
            images[place] = self._decoded_on_host(place, encoded, batch) if image is None else image
        batch["image"] = torch.stack([self.crop(image.to(device)) for image in images])

    def _decoded_on_host(self, place: int, encoded: EncodedImages, batch: dict[str, Any]) -> Tensor:
        members = {"__url__": encoded.shards[place], "__key__": encoded.keys[place]}
        try:
            return decode_image(encoded.pieces()[place].numpy().tobytes())
        except SampleError as reason:
            error = undecodable(members, encoded.members[place], reason)
            if not encoded.spares[place]:
                raise error from reason
        skipped = [Skipped(encoded.shards[place], str(error))]
        sample = self.dataset.spare(encoded.spares[place], 0, skipped)
        self.dataset.statistics.skip(skipped)
        if self.dataset.labels is not None:
            sample["label"] = int(self.dataset.labels.of(np.array([sample["sample_id"]]))[0])
        for name in batch.keys() & {"sample_id", *BESIDE_IMAGES}:
            batch[name][place] = sample.get(name, MISSING.get(name))
        return sample["image"]

    def _warn(self, n_refused: int, n: int, device: torch.device) -> None:
        if n_refused and not self._warned:
            self._warned = True
            log.warning(
                "%d of a batch's %d JPEGs were refused by the decoder of %s; they, and others to come, are "
                "decoded on the host",
                n_refused,
                n,
                device,
            )


def is_whole_jpeg(data: bytes) -> bool:
    """Whether a device may be given this to decode: a JPEG from its first marker to its last, of no more
    pixels than are allowed, and in colours that all decoders know.
    """
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        return False
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # of which it raises either for damage
        return False
    return width * height <= MAX_PIXELS and colours not in ("CMYK", "YCCK")


def _decode(jpegs: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """RGB images; None for each that torchvision's decoder refuses."""
    if not jpegs:
        return []
    with warnings.catch_warnings():  # its successor, torchcodec, is a package of its own
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if len(jpegs) == 1:
                return [None]
    return [image for jpeg in jpegs for image in _decode([jpeg], device)]


def _flat(image: EncodedImage | Tensor) -> Tensor:
    if isinstance(image, Tensor):
        return image.reshape(-1)
    return torch.frombuffer(bytearray(image.data), dtype=torch.uint8)
