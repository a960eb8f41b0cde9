"""Embed a pool: every process takes whole shards until none is left, so a killed run loses one shard's work a
process.

A batch never spans shards and is always cut the same way, so a shard's embeddings do not depend on who
computes them or beside which others.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from curated_data.cache import fingerprint, locked
from curated_data.distributed import rank, world_size
from curated_data.embedding.embedders import Embedder, evaluating
from curated_data.embedding.identity import module_fingerprint
from curated_data.embedding.store import (
    VERSION,
    EmbeddingStore,
    forget_table,
    is_embedded,
    missing_shards,
    store_fingerprint,
    write_shard,
)
from curated_data.errors import ConfigError, CuratedDataError, EmbedderError, SampleError
from curated_data.pool import ShardPool
from curated_data.pool.decode import decode_sample
from curated_data.progress import progress

log = logging.getLogger(__name__)

Decoders = Mapping[str, Callable[[bytes], Any]]


def embed_pool(
    pool: ShardPool,
    embedder: Embedder,
    cache_root: Path,
    *,
    batch_size: int = 256,
    num_workers: int = 2,
    dtype: str = "float16",
    device: str | torch.device = "auto",
    precision: str = "auto",
    decoders: Decoders | None = None,
    ids: np.ndarray | None = None,
) -> EmbeddingStore:
    """Embed what the cache does not hold yet, and open the store.

    Ranks of a process group, and unrelated runs that share the cache, divide the shards among them by locks;
    no collective call is made. A sample that cannot be decoded or preprocessed, or whose embedding is not
    finite, gets a row of zeros and an entry in the store's `failures`.

    Args:
        pool: n samples.
        embedder: see `resolve_embedder`.
        cache_root: an opened cache; the store goes to `embeddings/` in it.
        batch_size: samples a forward pass; kept from changing the result only within a dtype's rounding.
        num_workers: processes that read, decode and preprocess; 0 does it in this one.
        dtype: "float16" or "float32", of the stored rows.
        device: where the embedder runs; "auto" takes the current CUDA device, else the CPU.
        precision: "32", or "bf16" for autocast; "auto" takes bf16 where a CUDA device has it.
        decoders: by extension, see `decode_sample`.
        ids: (m,) int64, ascending and each once: embed these samples alone. The store then has a row for each
            of them, in their order, and is kept apart from that of the whole pool.

    Raises:
        EmbedderError: the embedder fails on good input or gives another shape than (B, dimension).
        PoolError: a shard cannot be read.
    """
    device = _device(device)
    if not isinstance(embedder.dimension, int) or embedder.dimension < 1:
        raise EmbedderError(
            f"{_name(embedder)}: its dimension is {embedder.dimension!r}, expected a positive integer"
        )
    use_bf16 = precision == "bf16" or (
        precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    name = embeddings_name(embedder, dtype=dtype, precision=precision, decoders=decoders, ids=ids)
    folder = Path(cache_root) / "embeddings" / name
    shards = pool.shard_fingerprints
    ranges = pool.shard_ranges() if ids is None else np.searchsorted(ids, pool.shard_ranges())
    missing = missing_shards(folder, shards)
    if missing:
        forget_table(folder, store_fingerprint(folder, shards, dtype))
        _move(embedder, device)
        samples = int(sum(ranges[number + 1] - ranges[number] for number in missing))
        started = time.monotonic()
        with progress(f"embedding ({device.type})", samples, "images") as advance:
            loader = _Loader(pool, embedder, batch_size, num_workers, decoders, device, ranges, ids)
            done = 0
            # Ranks begin at different places so that they do not queue for the same locks; a second, waiting
            # pass takes what another process gave up on.
            turned = (
                missing[rank() * len(missing) // world_size() :]
                + missing[: rank() * len(missing) // world_size()]
            )
            # That pass may wait for a shard while it holds others, so all processes go in one order.
            in_one_order = sorted(missing, key=shards.__getitem__)
            for wait, numbers in ((False, turned), (True, in_one_order)):
                done += _embed_shards(numbers, folder, loader, wait, dtype, use_bf16, advance)
        seconds = time.monotonic() - started
        if done:
            log.info("embedded %d samples at %.0f samples/s with %s", done, done / seconds, _name(embedder))
    store = EmbeddingStore(folder, shards, embedder.dimension, dtype, ids=ids)
    if store.n_failures:
        first = next(store.iterate_failures())
        log.warning(
            "%d of %d samples could not be embedded and will not be selected, the first: %s, key %r: %s",
            store.n_failures, len(store), first["shard"], first["key"], first["reason"],
        )  # fmt: skip
    log.info("embeddings: %d x %d %s, %d shards were cached", *store.shape, dtype, len(shards) - len(missing))
    return store


def embeddings_name(
    embedder: Embedder,
    *,
    dtype: str,
    precision: str,
    decoders: Decoders | None = None,
    ids: np.ndarray | None = None,
    **_: Any,
) -> str:
    """The name of the folder that `embed_pool` keeps its rows in, by what determines them."""
    subset = {} if ids is None else {"ids": ids}
    return fingerprint(
        embedder=embedder.fingerprint,
        dtype=dtype,
        precision=precision,
        decoders=_decoder_fingerprints(decoders),
        version=VERSION,
        **subset,
    )


def _decoder_fingerprints(decoders: Decoders | None) -> list[Any]:
    """Of each decoder by its extension, its code and what it holds."""
    found = []
    for extension, decode in sorted((decoders or {}).items()):
        try:
            found.append([extension, module_fingerprint(decode)])
        except EmbedderError as error:
            raise ConfigError(
                f"decoders[{extension!r}]: its identity cannot be told; give it an attribute `fingerprint` "
                "(a string that changes whenever its output would)"
            ) from error
    return found


class _Loader:
    """What turns claimed shards into preprocessed batches, in workers.

    Args:
        ranges: (shards + 1,) the rows of each shard in the store.
        ids: the sample of each row; None: row and sample are the same number.
    """

    def __init__(
        self,
        pool: ShardPool,
        embedder: Embedder,
        batch_size: int,
        num_workers: int,
        decoders: Decoders | None,
        device: torch.device,
        ranges: np.ndarray,
        ids: np.ndarray | None,
    ):
        self.pool, self.embedder, self.batch_size, self.num_workers = pool, embedder, batch_size, num_workers
        self.device, self.ranges, self.ids = device, ranges, ids
        self.dataset = _Preprocessed(pool, embedder.preprocess, decoders)

    def batches(self, claims: Iterator[int]) -> Iterator[tuple[np.ndarray, Tensor | None, list[str]]]:
        """(rows, inputs of the good ones or None, reason for each row: empty where good), shards in the order
        claimed.
        """
        cuts = (
            self._cut(start, min(start + self.batch_size, int(self.ranges[shard + 1])))
            for shard in claims
            for start in range(int(self.ranges[shard]), int(self.ranges[shard + 1]), self.batch_size)
        )
        loader = DataLoader(
            self.dataset,
            sampler=_Once(cuts),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        try:
            for item in loader:
                if isinstance(item, CuratedDataError):
                    raise item
                yield item
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise CuratedDataError(
                "a worker process that decodes samples was killed, for want of memory most likely "
                f"({' '.join(str(error).split())[:300]}); lower embedding.num_workers or "
                "embedding.batch_size, and run again to go on"
            ) from error

    def samples(self, rows: np.ndarray) -> np.ndarray:
        """The ids of the samples that stand in these rows of the store."""
        return rows if self.ids is None else self.ids[rows]

    def _cut(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.arange(start, stop)
        return rows, self.samples(rows)


class _Once:
    """An iterator as a sampler."""

    def __init__(self, items: Iterator[tuple[np.ndarray, np.ndarray]]):
        self.items = items

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return self.items


class _Preprocessed(Dataset):
    """Indexed by rows and their samples' ids, gives the rows and the preprocessed inputs stacked; or the
    error that stops all, which as a result comes whole from a worker, not within a traceback.
    """

    def __init__(self, pool: ShardPool, preprocess: Callable[[Any], Tensor], decoders: Decoders | None):
        self.pool, self.preprocess, self.decoders = pool, preprocess, decoders

    def __getitem__(
        self, cut: tuple[np.ndarray, np.ndarray]
    ) -> tuple[np.ndarray, Tensor | None, list[str]] | CuratedDataError:
        try:
            return self._inputs(*cut)
        except CuratedDataError as error:
            return error

    def _inputs(self, rows: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, Tensor | None, list[str]]:
        inputs, reasons = [], []
        for sample in self.pool.read(ids):
            try:
                decoded = decode_sample(sample, decoders=self.decoders)
                value = next((decoded[name] for name in ("image", "text", "array") if name in decoded), None)
                if value is None:
                    raise SampleError(f"nothing to embed among its members: {sorted(sample)}")
                inputs.append(_checked_input(self.preprocess(value)))
                reasons.append("")
            except EmbedderError:
                raise  # a wrong embedder for this pool, not a wrong sample
            except Exception as error:  # a decoder or a preprocess given by the user may raise anything
                reasons.append(
                    str(error) if isinstance(error, CuratedDataError) else f"{type(error).__name__}: {error}"
                )
        shapes = {tuple(value.shape) for value in inputs}
        if len(shapes) > 1:
            raise EmbedderError(
                f"preprocess gave inputs of different shapes, as {sorted(shapes)[:2]}: it must fix the size"
            )
        return rows, _shared(torch.stack(inputs)) if inputs else None, reasons


def _checked_input(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise EmbedderError(f"preprocess gave a {type(value).__name__}, expected a tensor")
    return value


def _shared(batch: Tensor) -> Tensor:
    """A batch in the memory that a worker shares with the process it works for.

    Put there at once: where it is full (64 MB in a container that was not told otherwise), the thread that
    would put it there later only prints its error, and the other side waits for ever.
    """
    if get_worker_info() is None:
        return batch
    try:
        return batch.share_memory_()
    except RuntimeError as error:
        raise CuratedDataError(
            f"no shared memory for a batch of {batch.nbytes / 1e6:,.1f} MB ({str(error).splitlines()[0]}); "
            "make /dev/shm larger (docker run --shm-size=8g), lower embedding.batch_size, or set "
            "embedding.num_workers to 0"
        ) from error


def _unchanged(batch: Any) -> Any:
    """As a collate function: the default one would turn the ids into a tensor."""
    return batch


def _embed_shards(
    numbers: list[int],
    folder: Path,
    loader: _Loader,
    wait: bool,
    dtype: str,
    use_bf16: bool,
    advance: Callable[..., None],
) -> int:
    """Embed those of the shards that are missing and can be claimed; returns how many samples that were."""
    pool, shards, ranges = loader.pool, loader.pool.shard_fingerprints, loader.ranges
    locks: dict[int, ExitStack] = {}
    done = 0

    def finish(number: int, rows: np.ndarray, failures: list[dict[str, Any]]) -> None:
        origin = {"url": pool.urls[number], "embedder": _name(loader.embedder)}
        write_shard(folder, shards[number], rows, failures, origin)
        locks.pop(number).close()

    def claims() -> Iterator[int]:
        for number in numbers:
            if is_embedded(folder, shards[number]):
                continue
            lock = ExitStack()
            if not lock.enter_context(locked(folder / shards[number], wait=wait)) or is_embedded(
                folder, shards[number]
            ):
                lock.close()
            else:
                locks[number] = lock
                yield number

    try:
        rows: np.ndarray | None = None
        failures: list[dict[str, Any]] = []
        for batch, inputs, reasons in loader.batches(
            _with_empty(claims(), ranges, loader.embedder.dimension, dtype, finish)
        ):
            number = int(np.searchsorted(ranges, batch[0], side="right") - 1)
            if rows is None:
                rows = np.zeros((ranges[number + 1] - ranges[number], loader.embedder.dimension), dtype)
            place = batch - ranges[number]
            values, reasons = _embed(loader, inputs, reasons, dtype, use_bf16)
            rows[place] = values
            failed = [position for position, reason in enumerate(reasons) if reason]
            for position, key in zip(failed, pool.keys(loader.samples(batch[failed])), strict=True):
                failures.append(
                    {
                        "place": int(place[position]),
                        "shard": pool.urls[number],
                        "key": key,
                        "reason": reasons[position],
                    }
                )
            done += len(batch)
            advance(len(batch))
            if batch[-1] == ranges[number + 1] - 1:
                finish(number, rows, failures)
                rows, failures = None, []
    finally:
        for lock in locks.values():
            lock.close()
    return done


def _with_empty(
    claims: Iterator[int], ranges: np.ndarray, dimension: int, dtype: str, finish: Callable[..., None]
) -> Iterator[int]:
    """Pass claims on; a shard without samples gives no batch, so it is finished here."""
    for number in claims:
        if ranges[number] == ranges[number + 1]:
            finish(number, np.zeros((0, dimension), dtype), [])
        else:
            yield number


def _embed(
    loader: _Loader, inputs: Tensor | None, reasons: list[str], dtype: str, use_bf16: bool
) -> tuple[np.ndarray, list[str]]:
    """(B, d) rows with zeros where a sample failed, and the reasons with non-finite embeddings added."""
    values = np.zeros((len(reasons), loader.embedder.dimension), dtype)
    if inputs is None:
        return values, reasons
    good = np.array([not reason for reason in reasons])
    device = loader.device
    output = _forward(loader.embedder, inputs, device, use_bf16)
    expected = (int(good.sum()), loader.embedder.dimension)
    if tuple(output.shape) != expected:
        raise EmbedderError(
            f"{_name(loader.embedder)}: gave shape {tuple(output.shape)}, expected {expected}"
        )
    wide = output.float().cpu().numpy()
    with np.errstate(over="ignore"):  # what float16 cannot hold becomes inf, and is reported below
        rows = wide.astype(dtype)
    lost = ~np.isfinite(rows).all(axis=1) | (wide.any(axis=1) & ~rows.any(axis=1))
    rows[lost] = 0
    values[good] = rows
    reasons = list(reasons)
    for place, row in zip(np.flatnonzero(good)[lost].tolist(), wide[lost], strict=True):
        reasons[place] = _why_lost(row, dtype)
    return values, reasons


def _why_lost(row: np.ndarray, dtype: str) -> str:
    """Why an embedding cannot be kept: it is not finite, or becomes so, or 0, in the stored type.

    In the same words for all that share a reason, so that these are counted together.
    """
    if not np.isfinite(row).all():
        return "its embedding is not finite"
    limits = np.finfo(dtype)
    what = f"exceeds {limits.max:g}" if np.abs(row).max() > 1 else f"is below {limits.smallest_subnormal:.0e}"
    return f"its embedding {what}, beyond what {dtype} can hold; set embedding.dtype to float32"


def _forward(embedder: Embedder, inputs: Tensor, device: torch.device, use_bf16: bool) -> Tensor:
    """One batch through the embedder in evaluation mode; what it raises is said to be its own."""
    network = embedder if isinstance(embedder, torch.nn.Module) else torch.nn.Identity()
    try:
        with (
            evaluating(network),
            torch.inference_mode(),
            torch.autocast(device.type, torch.bfloat16, enabled=use_bf16),
        ):
            output = embedder(inputs.to(device, non_blocking=True))
    except CuratedDataError:
        raise
    except torch.OutOfMemoryError as error:
        raise EmbedderError(
            f"{_name(embedder)}: out of memory on {device} with {len(inputs)} samples at once; lower "
            "embedding.batch_size"
        ) from error
    except Exception as error:  # of a network given by the user: anything
        raise EmbedderError(
            f"{_name(embedder)}: fails on a batch of shape {tuple(inputs.shape)} on {device} "
            f"({type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}); is its "
            "`preprocess` the one that it needs?"
        ) from error
    if not isinstance(output, Tensor) or output.is_complex():
        kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise EmbedderError(f"{_name(embedder)}: gave {kind}, expected a tensor of real numbers (B, d)")
    return output


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise _unusable(device, error) from error


def _move(embedder: Embedder, device: torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch that was built without it asserts
        raise _unusable(device, error) from error
    if isinstance(embedder, torch.nn.Module):
        embedder.to(device)


def _unusable(device: str | torch.device, error: BaseException) -> ConfigError:
    return ConfigError(
        f"device: {str(device)!r} cannot be used ({str(error).splitlines()[0][:200]}); give 'cpu', 'cuda', "
        "'cuda:1', …, or 'auto'"
    )


def _name(embedder: Embedder) -> str:
    return str(getattr(embedder, "name", type(embedder).__qualname__))
