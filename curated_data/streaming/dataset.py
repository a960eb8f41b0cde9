"""A pool as a map-style dataset that loads whole batches."""

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from curated_data.errors import ConfigError, SampleError
from curated_data.pool import ShardPool
from curated_data.pool.decode import (
    Decoders,
    EncodedImage,
    as_decoders,
    as_extensions,
    check_has_image,
    decode_encoded,
    decode_sample,
    has_images,
    place_of,
)
from curated_data.pool.fields import asked_members, checked_fields
from curated_data.pool.orientation import jpeg_orientation
from curated_data.streaming.batch import as_views
from curated_data.streaming.encoded import EncodedSample, is_whole_jpeg
from curated_data.streaming.envelopes import BatchRequest, LoadedBatch, as_request
from curated_data.streaming.fields import MODALITIES
from curated_data.streaming.generators import Generators
from curated_data.streaming.labels import SampleLabels
from curated_data.streaming.order import view_seeds
from curated_data.streaming.statistics import BatchReport, Skipped, StreamStatistics

OnError = Literal["raise", "skip"]

_FOLLOWING = 16  # samples among which one that can be decoded is searched


class PoolDataset(Dataset):
    """All samples of a pool by id; `__getitems__` loads a whole batch.

    A sample's views are seeded by (seed, epoch, position in the epoch), whichever process makes them. The
    global generators of torch, numpy and Python are restored afterwards. The first batch whose views draw
    from those of numpy or Python is made twice.

    Args:
        pool: to read from.
        views: maps a decoded sample (an image is a uint8 tensor (3, H, W)) to one tensor or a list of
            tensors; None returns the sample as decoded.
        seed: for the views.
        extensions: read only the members with these extensions; None reads all.
        decode: False returns the undecoded bytes of the members, under "members".
        decoders, min_size: custom decoders by extension, and decoding at a reduced size, see `decode_sample`.
        fields: what samples have besides their image, array or text: "label", "caption", "metadata", and the
            extensions of custom decoders whose outputs they have under that name. Other members are not
            decoded.
            None: all.
        on_error: what to do about a sample that cannot be decoded: "raise", or "skip", which replaces it by
            one of the request's spares, or by padding if the request has none.
        max_skipped: the largest share of samples that may be skipped, of those that this process was given so
            far (of at least 1,000).
        labels: replace the labels of the pool's `.cls` members.
        seeds_for_device: also return `view_seed`, (B,) int64, for making views on a device.
        encoded: return images for a `DeviceDecoder`: JPEGs as they are, others decoded. Excludes `views`.
        statistics: to count in; None: of this dataset alone.
        views_name: the argument that the views were given as, for errors.
        n_streamed: samples of a rank's epoch, which Lightning's Tuner asks for; None: of the pool.
    """

    def __init__(
        self,
        pool: ShardPool,
        views: Callable[[Any], Tensor | Sequence[Tensor]] | None = None,
        *,
        seed: int = 0,
        extensions: Sequence[str] | None = None,
        decode: bool = True,
        decoders: Decoders | None = None,
        min_size: int | None = None,
        fields: Sequence[str] | None = None,
        on_error: OnError = "raise",
        max_skipped: float = 0.01,
        labels: SampleLabels | None = None,
        seeds_for_device: bool = False,
        encoded: bool = False,
        statistics: StreamStatistics | None = None,
        views_name: str = "views",
        n_streamed: int | None = None,
    ) -> None:
        self.pool = pool
        self.views = views
        self.seed = seed
        self.extensions = extensions
        self.decode = decode
        self.decoders = as_decoders(decoders)
        self.min_size = min_size
        self.fields = checked_fields(fields, self.decoders, pool.image_extensions)
        self.on_error = on_error
        self.statistics = StreamStatistics(max_skipped) if statistics is None else statistics
        self.labels = labels
        self.seeds_for_device = seeds_for_device
        self.encoded = encoded
        self.n_streamed = n_streamed
        self.views_name = views_name
        self.generators = Generators()
        pool.described  # read once, before workers are forked  # noqa: B018

    def __len__(self) -> int:
        return len(self.pool) if self.n_streamed is None else self.n_streamed

    def __getitem__(self, sample_id: int) -> dict[str, Any]:
        return self.__getitems__([sample_id]).samples[0]

    def __getitems__(self, request: BatchRequest | Sequence[int]) -> LoadedBatch:
        """The samples of a request, or of plain ids, with the views of epoch 0.

        Raises:
            PoolError: a shard is missing or has changed since it was indexed, whatever `on_error` says.
            SampleError: a sample cannot be decoded.
        """
        request = as_request(request)
        if not self.decode:
            return self.loaded(request)
        return self.generators.kept(lambda: self.loaded(request))

    def loaded(self, request: BatchRequest) -> LoadedBatch:
        """As `__getitems__`, but that the random generators are left as they are then."""
        skipped: list[Skipped] = []
        counters = self.pool.counters
        before = counters.bytes_read, counters.bytes_needed
        members = self._read(request.ids)
        if self.decode:
            samples = self._decoded(request, members, skipped)
        else:
            samples = [{"sample_id": i, "members": m} for i, m in zip(request.ids, members, strict=True)]
        if request.padding is not None:
            for sample, padded in zip(samples, request.padding.tolist(), strict=True):
                sample.setdefault("padding", padded)
        if self.pool.counters is not counters:  # the pool starts new counters in a forked process
            counters, before = self.pool.counters, (0, 0)
        read, needed = counters.bytes_read - before[0], counters.bytes_needed - before[1]
        return LoadedBatch(samples, BatchReport(len(samples), read, needed, skipped))

    def _read(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        samples = self.pool.read(ids, self.extensions)
        if self.pool.described is not None:
            self.pool.described.describe(ids, samples)
        return samples

    def decoding_at_once(self) -> "PoolDataset":
        """The same dataset, but for decoding images itself instead of leaving them to a `DeviceDecoder`."""
        found = copy.copy(self)
        found.encoded = False
        return found

    def spare(self, ids: Sequence[int], seed: int, skipped: list[Skipped]) -> dict[str, Any]:
        """A replacement for a sample that cannot be decoded: the first of several candidates that can be.

        Args:
            ids: the candidates, in order.
            seed: for the views.
            skipped: the sample that is replaced comes last; candidates that cannot be decoded are appended.

        Raises:
            SampleError: no candidate can be decoded.
        """
        for sample_id in ids:
            members = self._read([sample_id])
            sample = self._loaded([sample_id], members, [seed], skipped, leaves_jpegs=False)[0]
            if sample is not None:
                return sample
        raise SampleError(
            f"a sample and the {len(ids)} drawn to replace it cannot be decoded; the last: "
            f"{skipped[-1].reason}"
        )

    def _decoded(
        self, request: BatchRequest, members: list[dict[str, Any]], skipped: list[Skipped]
    ) -> list[dict[str, Any]]:
        places = np.asarray(request.ids if request.positions is None else request.positions, np.int64)
        seeds = view_seeds(self.seed, request.epoch, places).tolist()
        found = self._loaded_or_spare(request, members, seeds, skipped)
        if all(sample is None for sample in found):
            found[0] = self._stand_in(request.ids[0], seeds[0], skipped) | {"padding": True}
        loaded = _filled(found)
        if self.labels is not None:
            labels = self.labels.of(np.array([sample["sample_id"] for sample in loaded]))
            for sample, label in zip(loaded, labels.tolist(), strict=True):
                sample["label"] = label
        if self.seeds_for_device:
            for sample, seed in zip(loaded, seeds, strict=True):
                sample["view_seed"] = seed >> 1  # as an int64
        return loaded

    def _loaded_or_spare(
        self, request: BatchRequest, members: list[dict[str, Any]], seeds: list[int], skipped: list[Skipped]
    ) -> list[dict[str, Any] | None]:
        loaded = self._loaded(request.ids, members, seeds, skipped)
        if request.spares is not None:
            for place, spares in enumerate(request.spares.tolist()):
                sample = loaded[place]
                if sample is None:
                    sample = loaded[place] = self.spare(spares, seeds[place], skipped)
                if self.encoded:  # whether a JPEG can be decoded is found out on the device
                    sample["encoded"] = sample["encoded"]._replace(spares=spares)
        return loaded

    def _loaded(
        self,
        ids: Sequence[int],
        members: list[dict[str, Any]],
        seeds: list[int],
        skipped: list[Skipped],
        *,
        leaves_jpegs: bool = True,
    ) -> list[dict[str, Any] | None]:
        """The samples decoded and augmented; None for one that is skipped.

        In two passes: code that runs between two images finds the CPU's caches full of pixels and is several
        times slower, so the second pass does as little as possible besides the images.
        """
        loaded: list[dict[str, Any] | None] = []
        for sample_id, sample_members in zip(ids, members, strict=True):
            try:
                loaded.append(self._fields(sample_id, sample_members))
            except SampleError as error:
                self._skipped(error, sample_members, skipped)
                loaded.append(None)
        for place, sample in enumerate(loaded):
            if sample is not None:
                try:
                    if self.encoded:
                        self._keep_encoded(sample, members[place], leaves_jpegs)
                    else:
                        self._augment(sample, seeds[place], members[place])
                except SampleError as error:
                    self._skipped(error, members[place], skipped)
                    loaded[place] = None
        return loaded

    def _stand_in(self, sample_id: int, seed: int, skipped: list[Skipped]) -> dict[str, Any]:
        """One of the next samples of the pool, as padding for a batch of which no sample can be decoded."""
        n = len(self.pool)
        following = [(sample_id + step) % n for step in range(1, min(n, _FOLLOWING))]
        try:
            return self.spare(following, seed, list(skipped))
        except SampleError as error:
            raise SampleError(
                f"no sample of a batch can be decoded, nor any of the {len(following)} that follow; the "
                f"first: {skipped[0].reason}"
            ) from error

    def _skipped(self, error: SampleError, members: dict[str, Any], skipped: list[Skipped]) -> None:
        """Record a skipped sample, or raise its error again; to be called in the error's handler."""
        if self.on_error == "raise":
            raise error
        skipped.append(Skipped(members["__url__"], str(error)))

    def _fields(self, sample_id: int, members: dict[str, Any]) -> dict[str, Any]:
        """The fields of a sample, all decoded except its image."""
        fields = self.fields if self.labels is None else self.fields - {"label"}
        decoded = decode_sample(
            asked_members(members, fields, self.decoders, self.pool.image_extensions),
            decoders=self.decoders,
            image_extensions=self.pool.image_extensions,
            min_size=self.min_size,
            encoded=True,
            settings=self.pool.images,
        )
        if self.decoders and "label" in decoded:
            _check_label(decoded["label"], members)
        if "metadata" not in fields:  # decoded for its text
            decoded.pop("metadata", None)
        return {"sample_id": sample_id} | decoded

    def _augment(self, sample: dict[str, Any], seed: int, members: dict[str, Any]) -> None:
        """Decode the image, and replace it, or the array or text, by its views."""
        name = next((name for name in MODALITIES if name in sample), None)
        if name is None:
            if self.views is None:
                return
            has = ", ".join(sorted(sample.keys() - {"sample_id"}))
            raise SampleError(f"{place_of(members)}: nothing to make views from; it holds only {has}")
        if name != "image" and self.views is not None and self._is_of_images:
            check_has_image(members, decoders=self.decoders, image_extensions=self.pool.image_extensions)
        content = sample.pop(name)
        if type(content) is EncodedImage:
            content = self._decode(content, members)
        if self.views is None:
            sample[name] = content
            return
        self.generators.seed(seed)
        try:
            views = as_views(self.views(content), self.views_name)
        except SampleError as error:  # raised by views to reject a sample
            raise SampleError(f"{place_of(members)}: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"{error}, in {place_of(members)}") from error
        except Exception as error:  # an error in the views, whatever `on_error` says
            error.add_note(f"in the views of {place_of(members)}")
            raise
        if isinstance(views, Tensor):
            sample["image"] = views
        else:
            sample["views"] = views

    def _decode(self, image: EncodedImage, members: dict[str, Any]) -> Tensor:
        return decode_encoded(image, members, min_size=self.min_size, settings=self.pool.images)

    @property
    def parts(self) -> "list[PoolDataset]":
        """Itself, as of a mixture of one."""
        return [self]

    @property
    def first_ids(self) -> np.ndarray:
        """Of the pools of `parts`."""
        return np.zeros(1, np.int64)

    @property
    def users_parts(self) -> dict[str, Any]:
        """What users gave that goes to workers, by the name of the argument."""
        return {self.views_name: self.views, "decoders": self.decoders}

    @cached_property
    def _is_of_images(self) -> bool:
        """Whether the samples, as far as they are read, are images."""
        found = self.pool.index().extensions
        if self.extensions is not None:
            wanted = as_extensions(self.extensions, "extensions")
            found = [name for name in found if name in wanted]
        return has_images(found, self.pool.image_extensions)

    def _keep_encoded(self, sample: dict[str, Any], members: dict[str, Any], leaves_jpegs: bool) -> None:
        """Leave a JPEG to the device; decode any other image."""
        image = sample.pop("image", None)
        if image is None:
            raise SampleError(f"{place_of(members)}: holds no image to decode on a device")
        if type(image) is EncodedImage and not (leaves_jpegs and is_whole_jpeg(image.data)):
            image = self._decode(image, members)
        if isinstance(image, EncodedImage) or _is_rgb(image):
            turned = isinstance(image, EncodedImage) and self.pool.images.exif_orientation
            orientation = jpeg_orientation(image.data) if turned else 1
            sample["encoded"] = EncodedSample(
                image, members["__url__"], members["__key__"], orientation=orientation
            )
            return
        raise ConfigError(
            f"device.decode: takes images, uint8 (3, H, W), and a decoder gave {_kind(image)} for "
            f"{place_of(members)}"
        )


def _check_label(label: Any, members: dict[str, Any]) -> None:
    """Check what a custom decoder made of a label, which is collated as an integer unless it is an array."""
    if isinstance(label, Tensor | np.ndarray):
        return
    try:
        torch.tensor(label, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(
            f"label: a decoder gave {label!r} for {place_of(members)}, expected an integer "
            "of 64 bits, or an array"
        ) from error


def _is_rgb(image: Any) -> bool:
    return isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3


def _kind(image: Any) -> str:
    return f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__


def _filled(loaded: list[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """With padding in the places of skipped samples, for batches without spares, as in validation."""
    good = next(sample for sample in loaded if sample is not None)
    return [good | {"padding": True} if sample is None else sample for sample in loaded]
