"""From shards to batches of preprocessed inputs, read and decoded in loader workers."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from curated_data.embedding.embedders import Embedder
from curated_data.errors import CuratedDataError, EmbedderError, first_line
from curated_data.pool import ShardPool
from curated_data.pool.decode import Decoders, as_decoders, check_beside, decode_content, has_images, place_of
from curated_data.processes import start_method, starting_workers


class InputLoader:
    """Turns shards into batches of preprocessed inputs, in workers.

    Args:
        context: how workers start, see `EmbeddingConfig.multiprocessing_context`.
        ranges: (n_shards + 1,) the first row of each shard in the store, then the number of rows.
        ids: the sample of each row; None: row i is sample i.
    """

    def __init__(
        self,
        pool: ShardPool,
        embedder: Embedder,
        batch_size: int,
        num_workers: int,
        decoders: Decoders | None,
        device: torch.device,
        context: str | None,
        ranges: np.ndarray,
        ids: np.ndarray | None,
        fields: frozenset[str] = frozenset(),
    ) -> None:
        self.pool, self.embedder, self.batch_size, self.num_workers = pool, embedder, batch_size, num_workers
        self.device, self.ranges, self.ids = device, ranges, ids
        self.dataset = _Preprocessed(pool, embedder.preprocess, as_decoders(decoders), fields)
        self.context = context

    def batches(self, claims: Iterator[int]) -> Iterator[tuple[np.ndarray, Tensor | None, list[str]]]:
        """Batches of the claimed shards, in order: rows, inputs of the good rows (or None), and for each row
        the reason why it failed, empty if good.
        """
        cuts = (
            self._cut(start, min(start + self.batch_size, int(self.ranges[shard + 1])))
            for shard in claims
            for start in range(int(self.ranges[shard]), int(self.ranges[shard + 1]), self.batch_size)
        )
        first = next(cuts, None)
        if first is None:
            return  # no workers for nothing: spawned ones take seconds
        loader = DataLoader(
            self.dataset,
            sampler=_Once(itertools.chain([first], cuts)),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self.num_workers,
            multiprocessing_context=self.context if self.num_workers else None,
            pin_memory=self.device.type == "cuda",
        )
        try:
            with starting_workers(loader, preprocess=self.dataset.preprocess, decoders=self.dataset.decoders):
                items = iter(loader)
            for item in items:
                if isinstance(item, CuratedDataError):
                    raise item
                yield item
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            cause = "was killed, most likely for lack of memory"
            if start_method(loader) != "fork":
                cause = (
                    "ended: for lack of memory, or because what the script does is not under its "
                    '`if __name__ == "__main__":`'
                )
            raise CuratedDataError(
                f"a worker process that decodes samples {cause} ({' '.join(str(error).split())[:300]}); "
                "lower embedding.num_workers or embedding.batch_size, and run again to continue"
            ) from error

    def samples(self, rows: np.ndarray) -> np.ndarray:
        """The ids of the samples in some rows of the store."""
        return rows if self.ids is None else self.ids[rows]

    def _cut(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.arange(start, stop)
        return rows, self.samples(rows)


class _Once:
    """An iterator as a sampler."""

    def __init__(self, items: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return self.items


class _Preprocessed(Dataset):
    """Maps rows and the ids of their samples to the rows, stacked inputs and reasons of failures.

    An error that must stop everything is returned, not raised: a worker passes it on unchanged, instead of
    wrapped in a traceback.
    """

    def __init__(
        self,
        pool: ShardPool,
        preprocess: Callable[[Any], Tensor],
        decoders: Decoders | None,
        fields: frozenset[str],
    ) -> None:
        self.pool, self.preprocess, self.decoders, self.fields = pool, preprocess, decoders, fields

    def __getitem__(
        self, cut: tuple[np.ndarray, np.ndarray]
    ) -> tuple[np.ndarray, Tensor | None, list[str]] | CuratedDataError:
        try:
            return self._inputs(*cut)
        except CuratedDataError as error:
            return error

    def _inputs(self, rows: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, Tensor | None, list[str]]:
        inputs, reasons = [], []
        needs_image = has_images(self.pool.index().extensions, self.pool.image_extensions)
        for sample in self.pool.read(ids):
            try:
                value = decode_content(
                    sample,
                    decoders=self.decoders,
                    image_extensions=self.pool.image_extensions,
                    needs_image=needs_image,
                )
                check_beside(
                    sample, self.fields, decoders=self.decoders, image_extensions=self.pool.image_extensions
                )
                inputs.append(_checked_input(self.preprocess(value)))
                reasons.append("")
            except EmbedderError as error:  # the embedder is wrong for this pool, not the sample
                raise EmbedderError(f"{error} (first met in {place_of(sample)})") from error
            except Exception as error:  # the user's decoder or preprocess may raise anything
                reasons.append(
                    str(error) if isinstance(error, CuratedDataError) else f"{type(error).__name__}: {error}"
                )
        shapes = {tuple(value.shape) for value in inputs}
        if len(shapes) > 1:
            raise EmbedderError(
                f"preprocess returned inputs of different shapes, {sorted(shapes)[:2]}: it must fix the size"
            )
        return rows, _shared(torch.stack(inputs)) if inputs else None, reasons


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
