"""The files with the embeddings of a shard: a `.npy`, and a `.json` that lists what failed and why."""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from curated_data.cache.artifacts import FORMAT_VERSION, fingerprint, read_json, with_checksum
from curated_data.cache.checksums import check_file, file_checksum, load_npy
from curated_data.cache.publishing import atomic_path, atomic_write_json
from curated_data.cache.removal import shown
from curated_data.errors import CacheError

REMEDY = "remove the shard's .npy and .json there to embed it again"

_PART = "-"  # between the name of a shard's content and that of the samples that are embedded


class ShardFiles:
    """The files of a folder that hold the embeddings of shards, whole or in part.

    A file is named by the content of its shard. Where a filter drops samples before they are embedded, it
    has rows of zeros for them, and its name says of which samples it has embeddings. A file that is made
    later takes over the rows of earlier ones, and has theirs and its own; it replaces none, since another
    run may read them.

    Args:
        folder: of the embeddings.
        ranges: (shards + 1,) the first row of each shard, then the number of rows.
        keep: (n,) bool, the rows that are needed; None: all.
    """

    def __init__(self, folder: Path, ranges: np.ndarray, keep: np.ndarray | None = None) -> None:
        self.folder, self.ranges, self.keep = folder, ranges, keep
        self.refresh()

    def refresh(self) -> None:
        """List the folder."""
        try:
            there = set(os.listdir(self.folder))
        except FileNotFoundError:
            there = set()
        names = [name.removesuffix(".json") for name in there if name.endswith(".json")]
        self._names: dict[str, list[str]] = defaultdict(list)
        for name in sorted(name for name in names if f"{name}.npy" in there):
            self._names[name.partition(_PART)[0]].append(name)
        self._has_parts = any(name != content for content, names in self._names.items() for name in names)

    def look(self, content: str | None) -> None:
        """Take in the files of one content that other processes have written since."""
        if self.keep is not None or self._has_parts:
            self.refresh()
        elif content is not None and not self._names[content] and is_embedded(self.folder, content):
            self._names[content].append(content)

    def needed(self, number: int) -> np.ndarray:
        """(m,) bool, which rows of a shard are needed."""
        first, last = self.ranges[number : number + 2].tolist()
        return np.ones(last - first, bool) if self.keep is None else self.keep[first:last]

    def find(self, number: int, content: str | None) -> str | None:
        """The name of a file with all rows of a shard that are needed; None if there is none."""
        names = self._names.get(content or "", [])
        if content in names:
            return content
        if self.keep is None or not names:
            return None
        needed = self.needed(number)
        exact = part_name(names[0].partition(_PART)[0], needed)
        for name in [exact] if exact in names else names:
            if not (needed & ~self.embedded(name, len(needed))).any():
                return name
        return None

    def missing(self, contents: Sequence[str | None]) -> list[int]:
        """The numbers of the shards without a file of all that is needed."""
        return [number for number, content in enumerate(contents) if self.find(number, content) is None]

    def names(self, contents: Sequence[str | None]) -> list[str]:
        """A file of all that is needed of each shard, as far as there is one."""
        found = [self.find(number, content) for number, content in enumerate(contents)]
        return [name for name in found if name is not None]

    def to_embed(self, number: int, content: str | None) -> np.ndarray:
        """(m,) bool, the rows of a shard that are needed and not in any file."""
        needed = self.needed(number).copy()
        for name in self._names.get(content or "", []):
            needed &= ~self.embedded(name, len(needed))
        return needed

    def embedded(self, name: str, n: int) -> np.ndarray:
        """(n,) bool, of which samples of its shard a file holds embeddings."""
        details = read_details(self.folder, name)
        if details["samples"] != n:
            raise CacheError(
                f"{self.folder / name}.json: damaged (samples: {details['samples']}, expected {n}); {REMEDY}"
            )
        return embedded_in(details)

    def publish(
        self,
        content: str,
        rows: np.ndarray,
        embedded: np.ndarray,
        failures: list[dict[str, Any]],
        origin: dict[str, Any],
    ) -> None:
        """Write the rows of a shard, together with those that earlier files of it have.

        Args:
            content: the name of the shard's content.
            rows: (m, d), zeros where they are not embedded; filled in.
            embedded: (m,) bool.
            failures, origin: see `write_shard`.
        """
        embedded = embedded.copy()
        for name in self._names.get(content, []):
            theirs = self.embedded(name, len(rows))
            check_shard(self.folder, name)
            rows[theirs] = load_npy(self.folder / f"{name}.npy", REMEDY, map_mode="r")[theirs]
            failures = [failure for failure in failures if not theirs[failure["place"]]]
            failures += read_details(self.folder, name)["failures"]
            embedded |= theirs
        failures = sorted(failures, key=lambda failure: failure["place"])
        mask = None if embedded.all() else embedded
        write_shard(self.folder, part_name(content, embedded), rows, failures, origin, mask)


def part_name(content: str, embedded: np.ndarray) -> str:
    """The name of a file with embeddings of some of a shard's samples, (m,) bool."""
    return content if embedded.all() else f"{content}{_PART}{fingerprint(embedded=np.packbits(embedded))}"


def is_embedded(folder: Path, name: str) -> bool:
    """Whether a file of embeddings is complete. The details are published last."""
    return all((folder / f"{name}{end}").exists() for end in (".npy", ".json"))


def check_shard(folder: Path, shard_fingerprint: str) -> None:
    """Read a shard's embeddings and compare them with the checksum in its details.

    Raises:
        CacheError: the embeddings or the details are missing or damaged.
    """
    details = read_details(folder, shard_fingerprint)
    if "file" in details:
        check_file(folder / f"{shard_fingerprint}.npy", details["file"], REMEDY)


def write_shard(
    folder: Path,
    shard_fingerprint: str,
    rows: np.ndarray,
    failures: list[dict[str, Any]],
    origin: dict[str, Any],
    embedded: np.ndarray | None = None,
) -> None:
    """Publish a shard's embeddings (n, d): first the array, then the details that mark it as complete.

    Args:
        failures: `place` in the shard, `shard`, `key` and `reason` of each failed sample.
        origin: where the rows come from, for the details.
        embedded: (n,) bool, which rows are embeddings; None: all.
    """
    if embedded is not None:
        origin = origin | {"embedded": np.packbits(embedded).tobytes().hex()}
    with atomic_path(folder / f"{shard_fingerprint}.npy") as temporary:
        with open(temporary, "wb") as file:
            np.save(file, rows, allow_pickle=False)
        checksum = file_checksum(temporary)
    content = {
        "format": FORMAT_VERSION,
        "samples": len(rows),
        "failures": failures,
        "file": checksum,
        **origin,
    }
    atomic_write_json(folder / f"{shard_fingerprint}.json", with_checksum(content))


def read_details(folder: Path, shard_fingerprint: str) -> dict[str, Any]:
    path = folder / f"{shard_fingerprint}.json"
    details = read_json(path, REMEDY)
    if details.get("format") != FORMAT_VERSION:
        raise CacheError(f"{path}: written in cache format {shown(details.get('format'))}; {REMEDY}")
    samples, failures = details.get("samples"), details.get("failures")
    file = details.get("file", {"bytes": -1, "crc32": 0})  # which an earlier version did not record
    is_right = {
        "samples": type(samples) is int and samples >= 0,
        "failures": isinstance(failures, list) and all(_is_failure(item, samples) for item in failures),
        "file": isinstance(file, dict) and [type(file.get(key)) for key in ("bytes", "crc32")] == [int, int],
        "embedded": _are_bits(details.get("embedded", ""), samples if "embedded" in details else 0),
    }
    for name, is_so in is_right.items():
        if not is_so:
            raise CacheError(f"{path}: damaged ({name}: {shown(details.get(name))}); {REMEDY}")
    return details


def _are_bits(text: object, n: Any) -> bool:
    """Whether a text is that of n packed bits."""
    return (
        isinstance(text, str)
        and type(n) is int
        and len(text) == 2 * -(-n // 8)
        and all(letter in "0123456789abcdef" for letter in text)
    )


def embedded_in(details: dict[str, Any]) -> np.ndarray:
    """(n,) bool, of which samples there are embeddings, by the details of a file."""
    if "embedded" not in details:
        return np.ones(details["samples"], bool)
    bits = np.frombuffer(bytes.fromhex(details["embedded"]), np.uint8)
    return np.unpackbits(bits, count=details["samples"]).astype(bool)


def _is_failure(item: object, samples: Any) -> bool:
    return (
        isinstance(item, dict)
        and type(item.get("place")) is int
        and type(samples) is int
        and 0 <= item["place"] < samples
        and all(isinstance(item.get(name), str) for name in ("shard", "key", "reason"))
    )
