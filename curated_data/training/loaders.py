"""The datasets and loaders of a data module, for training and for evaluation."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from curated_data.pool import ShardPool
from curated_data.pool.decode import as_decoders
from curated_data.processes import check_picklable
from curated_data.streaming.batch import collate
from curated_data.streaming.classes import ClassNumbers
from curated_data.streaming.crop import CenterCrop
from curated_data.streaming.dataset import PoolDataset
from curated_data.streaming.loader import StreamLoader
from curated_data.streaming.mixed import MixtureDataset, check_alike
from curated_data.streaming.mixture import AnyOrder
from curated_data.streaming.order import EpochOrder
from curated_data.streaming.sampler import GlobalBatchSampler
from curated_data.streaming.statistics import StreamStatistics
from curated_data.training.components import Source, check_fields_of_batches
from curated_data.training.trainer import cores_per_rank, from_module, ranks, setting

if TYPE_CHECKING:
    from curated_data.training.datamodule import CuratedDataModule

_RELOAD = "reload_dataloaders_every_n_epochs"
_PROBED = 16  # samples of a component, of which one that can be decoded is compared with the others
_SPARES = 6  # with a tenth of the pool bad, a sample and all of its spares are bad once in ten million


def training_loader(
    data: "CuratedDataModule", order: AnyOrder, stream: Any, *, overfits: bool
) -> StreamLoader:
    """The loader of a training stream, and its dataset."""
    n_streamed = order.n_samples // ranks(data.trainer)[1]
    dataset: PoolDataset | MixtureDataset
    if data.mixture is None:
        (dataset,) = source_datasets(data, data.sources, statistics=data.statistics, n_streamed=n_streamed)
    else:
        parts = source_datasets(data, data.sources)
        first_ids = [source.first_id for source in data.sources]
        dataset = MixtureDataset(parts, first_ids, data.statistics, n_streamed)
    keep = data.loader.persistent_workers
    if keep is None:  # kept workers, pinned memory and a reload leak file handles (Lightning #18487)
        keep = not (_pins(data) and setting(data.trainer, _RELOAD))
    loader = _loader(
        data,
        dataset,
        order,
        data.batch_size,
        keep_workers=keep,
        position=None if overfits else stream.position,
        n_spares=_SPARES if data.decoding.on_error == "skip" else 0,
        endless=data.trainer is not None and not overfits,
        whole_epochs=data.trainer is None,
    )
    loader.stream = stream if data.trainer is None else None
    return loader


def source_datasets(
    data: "CuratedDataModule", sources: Sequence[Source], **settings: Any
) -> list[PoolDataset]:
    """The datasets of some sources, for training."""
    common = _training_views(data)  # the same object for all, by which readers are shared
    return [
        _dataset(
            data,
            source.pool,
            source.views or common,
            labels=source.labels(),
            seeds_for_device=data.device.views is not None,
            encoded=data.device.decode,
            views_name="views" if source.views is None else f"views of component {source.name!r}",
            **settings,
        )
        for source in sources
    ]


def check_components(data: "CuratedDataModule", mixed: Sequence[Source]) -> None:
    """Check that samples of all components that share batches make one batch, see `check_alike`."""
    if len(mixed) > 1:
        datasets = source_datasets(data, mixed)
        check_alike(
            {source.name: dataset for source, dataset in zip(mixed, datasets, strict=True)},
            {source.name: source.candidates(_PROBED) for source in mixed},
        )


def evaluation_loader(
    data: "CuratedDataModule", pools: Sequence[ShardPool], *, plain: bool = False
) -> StreamLoader:
    """All samples of some pools in their order, each once.

    Args:
        data: whose loader it is.
        pools: one, or those of a mixture.
        plain: see `GlobalBatchSampler`.
    """
    transform = (
        data.eval_transform or from_module(data.trainer, "eval_transform") or CenterCrop(data.image_size)
    )
    size = int(data.loader.eval_batch_size or data.batch_size)
    order = EpochOrder(
        sum(map(len, pools)),
        seed=data.seed,
        batch_size=size * ranks(data.trainer)[1],
        shuffle="none",
        last_batch="short",
    )
    datasets = [_dataset(data, pool, transform, views_name="eval_transform") for pool in pools]
    dataset: PoolDataset | MixtureDataset = datasets[0]
    if data.mixture is not None and plain:
        first_ids = np.cumsum([0, *(len(pool) for pool in pools[:-1])]).tolist()
        dataset = MixtureDataset(datasets, first_ids, StreamStatistics(data.decoding.max_skipped))
    return _loader(data, dataset, order, size, keep_workers=False, plain=plain)


def _training_views(data: "CuratedDataModule") -> Callable[[Tensor], Any] | None:
    """What workers apply to a decoded image; None for nothing."""
    if data.device.decode:
        return None
    if data.device.views is not None:
        return data.views or CenterCrop(data.image_size, scale=False)
    return data.views or from_module(data.trainer, "views") or CenterCrop(data.image_size)


def _dataset(
    data: "CuratedDataModule", pool: ShardPool, views: Callable[[Tensor], Any] | None, **settings: Any
) -> PoolDataset:
    options = data.decoding
    decoders = dict(as_decoders(options.decoders) or {})
    reads_labels = settings.get("labels") is None and "label" in check_fields_of_batches(pool, options)
    if reads_labels and "cls" not in decoders:
        names = data.known_class_names()
        if names is not None:
            decoders["cls"] = ClassNumbers(names)
    return PoolDataset(
        pool,
        views,
        seed=data.seed,
        decoders=decoders,
        fields=options.fields,
        min_size=options.min_size,
        on_error=options.on_error,
        max_skipped=options.max_skipped,
        **settings,
    )


def _loader(
    data: "CuratedDataModule",
    dataset: PoolDataset | MixtureDataset,
    order: AnyOrder,
    batch_size: int,
    *,
    keep_workers: bool,
    **sampling: Any,
) -> StreamLoader:
    number, n_ranks = ranks(data.trainer)
    sampler = GlobalBatchSampler(
        None, batch_size, order.last_batch == "drop", order=order, rank=number, world_size=n_ranks, **sampling
    )
    options = data.loader
    n_workers = options.num_workers
    n_workers = min(16, cores_per_rank(data.trainer)) if n_workers is None else int(n_workers)
    loader = StreamLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,  # type: ignore[arg-type]  # torch declares lists of samples
        num_workers=n_workers,
        pin_memory=_pins(data),
        persistent_workers=keep_workers and n_workers > 0,
        prefetch_factor=options.prefetch_factor if n_workers else None,
        multiprocessing_context=options.multiprocessing_context if n_workers else None,
        timeout=options.worker_timeout if n_workers else 0,
        # The workers' base seed is drawn from this generator instead of the global one.
        generator=torch.Generator().manual_seed(data.seed),
    )
    loader.slow_after = options.slow_after
    check_picklable(loader, **dataset.users_parts)
    return loader


def _pins(data: "CuratedDataModule") -> bool:
    pin_memory = data.loader.pin_memory
    return torch.cuda.is_available() if pin_memory is None else pin_memory
