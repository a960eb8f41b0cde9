"""Small shards of text, written anywhere."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import fsspec

from curated_data.pool import ShardWriter


def samples(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Samples with the keys 000, 001, …, a text and a class."""
    return [{"__key__": f"{i:03d}", "txt": f"text {i}", "cls": i % 3} for i in range(first, first + count)]


def write(place: str | Path, count: int = 5, first: int = 0, **options: Any) -> list[str | Path]:
    """Write samples, two a shard; returns the shards."""
    with ShardWriter(place, max_samples=2, **options) as writer:
        for sample in samples(count, first):
            writer.write(sample)
    return writer.shards


def names_in(url: str, **options: Any) -> list[str]:
    """The sorted names of what lies in a folder of a store, as it is now."""
    filesystem, path = fsspec.core.url_to_fs(url, **options)
    filesystem.invalidate_cache()
    return sorted(name.rpartition("/")[2] for name in filesystem.ls(path, detail=False))


def contents(samples: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Samples as read from a pool, without the shards that they come from."""
    return [{name: value for name, value in sample.items() if name != "__url__"} for sample in samples]
