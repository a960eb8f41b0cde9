"""One shard in one state: its place, size and version."""

import os
from dataclasses import dataclass
from functools import cached_property

from curated_data.cache.artifacts import fingerprint
from curated_data.cache.paths import is_url
from curated_data.pool.index import CODE_VERSION


@dataclass(frozen=True)
class ShardFile:
    """One shard in one state.

    Attributes:
        url: a local path or a remote URL.
        size: bytes.
        version: `mtime_ns` of a local file; the ETag, or its equivalent, of a remote one.
    """

    url: str
    size: int
    version: str

    @cached_property
    def fingerprint(self) -> str:
        """The name, 20 hexadecimal digits, of this state: what is known of it need not be read again."""
        place = self.url if is_url(self.url) else os.path.abspath(self.url)
        return fingerprint(
            stage="state", code=CODE_VERSION, place=place, size=self.size, version=self.version
        )
