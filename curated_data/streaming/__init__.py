"""From a selection to batches: the order of an epoch, global batches, reading and augmenting."""

from curated_data.streaming.batch import collate
from curated_data.streaming.dataset import PoolDataset
from curated_data.streaming.device import PerSample, ResizedCrops
from curated_data.streaming.envelopes import BatchRequest, LoadedBatch
from curated_data.streaming.loader import StreamLoader
from curated_data.streaming.order import EpochOrder, permuted
from curated_data.streaming.sampler import GlobalBatchSampler
from curated_data.streaming.statistics import BatchReport, StreamStatistics
from curated_data.streaming.training import StreamPosition, TrainingStream

__all__ = [
    "BatchReport",
    "BatchRequest",
    "EpochOrder",
    "GlobalBatchSampler",
    "LoadedBatch",
    "PerSample",
    "PoolDataset",
    "ResizedCrops",
    "StreamLoader",
    "StreamPosition",
    "StreamStatistics",
    "TrainingStream",
    "collate",
    "permuted",
]
