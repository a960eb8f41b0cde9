"""From shards to batches of preprocessed inputs, read and decoded in loader workers."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from curated_data.embedding.contents import sample_digest
from curated_data.embedding.embedders import Embedder, ImagePreprocess, normalised, resized
from curated_data.errors import CuratedDataError, EmbedderError, first_line
from curated_data.pool import ShardPool
from curated_data.pool.decode import Decoders, as_decoders, check_beside, decode_content, has_images, place_of
from curated_data.pool.image import COUNTS
from curated_data.pool.passing import is_samples
from curated_data.processes import start_method, starting_workers

_READ = 256  # samples that are read at once at least


class Claim(NamedTuple):
    """A shard to embed, or a part of it.

    Attributes:
        shard: its number.
        wanted: (m,) bool, which of its samples to embed; None: all.
        is_read: read the others too, for their digests.
    """

    shard: int
    wanted: np.ndarray | None = None
    is_read: bool = False


class _Cut(NamedTuple):
    """What a worker makes a batch of; see `Inputs`."""

    shard: int
    rows: np.ndarray
    read: np.ndarray  # the rows to read, ascending, among them `rows`
    is_last: bool


class Inputs(NamedTuple):
    """A batch of rows of the store.

    Attributes:
        shard: its number.
        rows: their numbers.
        is_last: whether it is the last of its shard.
        inputs: of the good rows, stacked; None if there are none. See `complete`.
        reasons: for each row why it failed, empty if good.
        digests: of the bytes of each sample that was read.
        transparent: the number of images with transparent pixels.
        transparent_example: where one is, empty if there are none.
    """

    shard: int
    rows: np.ndarray
    is_last: bool
    inputs: Tensor | None
    reasons: list[str]
    digests: list[bytes]
    transparent: int = 0
    transparent_example: str = ""


def complete(inputs: Tensor, preprocess: Callable[[Any], Tensor]) -> Tensor:
    """Inputs as the embedder takes them.

    Images for `ImagePreprocess` come resized, as uint8: to normalise them as a batch, where the network is,
    costs less than image by image, and a fourth of the bytes is passed between processes and to a device.
    """
    if type(preprocess) is not ImagePreprocess or inputs.dtype != torch.uint8:  # which it gives to none
        return inputs
    return normalised(inputs, preprocess.mean, preprocess.std)


@dataclass(eq=False)
class InputLoader:
    """Turns shards into batches of preprocessed inputs, in workers.

    Args:
        context: how workers start, see `EmbeddingConfig.multiprocessing_context`.
        ranges: (n_shards + 1,) the first row of each shard in the store, then the number of rows.
        ids: the sample of each row; None: row i is sample i.
    """

    pool: ShardPool
    embedder: Embedder
    batch_size: int
    num_workers: int
    decoders: Decoders | None
    device: torch.device
    context: str | None
    ranges: np.ndarray
    ids: np.ndarray | None
    fields: frozenset[str] = frozenset()

    def batches(self, claims: Iterator[Claim]) -> Iterator[Inputs]:
        """Batches of the claimed shards, in order.

        Raises:
            CuratedDataError: a worker died, or a sample met an error that does not come from its bytes.
        """
        cuts = (cut for claim in claims for cut in self._cuts(claim))
        first = next(cuts, None)
        if first is None:
            return  # no workers for nothing: spawned ones take seconds
        decoders = as_decoders(self.decoders)
        preprocess = self.embedder.preprocess
        loader = DataLoader(
            _Preprocessed(self.pool, preprocess, decoders, self.fields, self.ids),
            sampler=itertools.chain([first], cuts),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self.num_workers,
            multiprocessing_context=self.context if self.num_workers else None,
            pin_memory=self.device.type == "cuda",
        )
        try:
            with starting_workers(loader, preprocess=preprocess, decoders=decoders):
                items = iter(loader)
            for item in items:
                if isinstance(item, CuratedDataError):
                    raise item
                yield item
        except RuntimeError as error:
            if not is_of_worker(error):
                raise
            raise worker_ended(error, start_method(loader)) from error

    def samples(self, rows: np.ndarray) -> np.ndarray:
        """The ids of the samples in some rows of the store."""
        return rows if self.ids is None else self.ids[rows]

    def _cuts(self, claim: Claim) -> Iterator[_Cut]:
        first, last = self.ranges[claim.shard : claim.shard + 2].tolist()
        rows = np.arange(first, last) if claim.wanted is None else first + np.flatnonzero(claim.wanted)
        begun = first
        for start in range(0, max(len(rows), 1), self.batch_size):
            part = rows[start : start + self.batch_size]
            is_last = start + self.batch_size >= len(rows)
            end = last if is_last else int(part[-1]) + 1
            yield _Cut(claim.shard, part, np.arange(begun, end) if claim.is_read else part, is_last)
            begun = end


def is_of_worker(error: BaseException) -> bool:
    """Whether torch reports a dead worker. It does so by a signal, amidst whatever this process is doing."""
    return type(error) is RuntimeError and "DataLoader worker" in str(error)


def worker_ended(error: BaseException, start_method: str = "fork") -> CuratedDataError:
    """The error for a dead worker process."""
    cause = "was killed, most likely for lack of memory"
    if start_method != "fork":
        cause = (
            "ended: for lack of memory, or because what the script does is not under its "
            '`if __name__ == "__main__":`'
        )
    return CuratedDataError(
        f"a worker process that decodes samples {cause} ({' '.join(str(error).split())[:300]}); "
        "lower embedding.num_workers or embedding.batch_size, and run again to continue"
    )


@dataclass(eq=False)
class _Preprocessed(Dataset):
    """Maps rows to stacked inputs, reasons of failures and digests.

    An error that must stop everything is returned, not raised: a worker passes it on unchanged, instead of
    wrapped in a traceback.
    """

    pool: ShardPool
    preprocess: Callable[[Any], Tensor]
    decoders: Decoders | None
    fields: frozenset[str]
    ids: np.ndarray | None

    def __getitem__(self, cut: _Cut) -> Inputs | CuratedDataError:
        try:
            return self._inputs(cut)
        except CuratedDataError as error:
            return error

    def _samples(self, cut: _Cut) -> Iterator[tuple[bool, dict[str, Any]]]:
        """The samples that are read, in order, and whether each is to be embedded."""
        for start in range(0, len(cut.read), size := max(len(cut.rows), _READ)):
            rows = cut.read[start : start + size]
            samples = self.pool.read(rows if self.ids is None else self.ids[rows])
            yield from zip(np.isin(rows, cut.rows).tolist(), samples, strict=True)

    def _inputs(self, cut: _Cut) -> Inputs:
        inputs, reasons, digests = [], [], []
        needs_image = has_images(self.pool.index().extensions, self.pool.image_extensions)
        transparent, example = COUNTS.transparent, ""
        for is_wanted, sample in self._samples(cut):
            digests.append(sample_digest(sample))
            if not is_wanted:
                continue
            try:
                value = decode_content(
                    sample,
                    decoders=self.decoders,
                    image_extensions=self.pool.image_extensions,
                    needs_image=needs_image,
                    settings=self.pool.images,
                )
                if not example and COUNTS.transparent > transparent:
                    example = place_of(sample)
                check_beside(
                    sample, self.fields, decoders=self.decoders, image_extensions=self.pool.image_extensions
                )
                inputs.append(self._input(value))
                reasons.append("")
            except Exception as error:  # the user's decoder or preprocess may raise anything
                if not is_samples(error):
                    raise _stopped(error, sample) from error
                reasons.append(
                    str(error) if isinstance(error, CuratedDataError) else f"{type(error).__name__}: {error}"
                )
        if len({value.dtype for value in inputs}) > 1:  # of several decoders
            inputs = [complete(value, self.preprocess) for value in inputs]
        shapes = {tuple(value.shape) for value in inputs}
        if len(shapes) > 1:
            raise EmbedderError(
                f"preprocess returned inputs of different shapes, {sorted(shapes)[:2]}: it must fix the size"
            )
        stacked = _shared(torch.stack(inputs)) if inputs else None
        n_transparent = COUNTS.transparent - transparent
        return Inputs(cut.shard, cut.rows, cut.is_last, stacked, reasons, digests, n_transparent, example)

    def _input(self, value: Any) -> Tensor:
        """What `complete` makes an input of; other images than of three channels of uint8 are complete."""
        own = self.preprocess
        is_image = isinstance(value, Tensor) and value.dtype == torch.uint8 and value.shape[:-2] == (3,)
        if is_image and type(own) is ImagePreprocess:
            return resized(value, own.size, own.crop_ratio, own.interpolation)
        return _checked_input(own(value))


def _stopped(error: Exception, sample: dict[str, Any]) -> CuratedDataError:
    """The error that stops the stage at a sample whose bytes are not at fault, as far as can be told."""
    if isinstance(error, EmbedderError):  # the embedder is wrong for this pool
        return EmbedderError(f"{error} (first met in {place_of(sample)})")
    if isinstance(error, CuratedDataError):
        return error
    return CuratedDataError(
        f"{place_of(sample)}: embedding stopped there at an error that does not come from its bytes "
        f"({first_line(error, with_type=True)}); fix its cause and run again to continue. If a custom "
        "decoder or preprocess raised it because of the bytes, have it raise curated_data.errors.SampleError"
    )


def _checked_input(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise EmbedderError(f"preprocess returned a {type(value).__name__}, expected a tensor")
    return value


def _shared(batch: Tensor) -> Tensor:
    """Move a worker's batch to the memory shared with its parent.

    Done here because torch's own thread, which would do it later, only prints its error if that memory is
    full (64 MB by default in a container), and the parent would wait forever.
    """
    if get_worker_info() is None:
        return batch
    try:
        return batch.share_memory_()
    except RuntimeError as error:
        raise CuratedDataError(
            f"no shared memory for a batch of {batch.nbytes / 1e6:,.1f} MB ({first_line(error)}); "
            "make /dev/shm larger (docker run --shm-size=8g), lower embedding.batch_size, or set "
            "embedding.num_workers to 0"
        ) from error


def _unchanged(batch: Any) -> Any:
    """The identity as a collate function; the default one would turn the rows into a tensor."""
    return batch
