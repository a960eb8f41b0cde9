"""A labelled dataset from captions alone, constructed as in LAIONet and ImageNot (arXiv 2404.02112).

A sample gets the label of a class if its caption contains a name of the class, as a whole word and not within
a longer name, and no name of another class, and if it is close to the class in the space of a text embedder:
to "name: definition" by a threshold, or to its definition more than to any other. Images are not looked at,
so that the labels do not depend on them.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch

from curated_data.cache.artifacts import read_array, read_manifest, write_manifest
from curated_data.cache.publishing import atomic_path
from curated_data.errors import ConfigError, EmbedderError, PoolError, SampleError
from curated_data.matrix import unit
from curated_data.pool.captions import read_captions
from curated_data.pool.decode import as_extensions
from curated_data.pool.writer import ShardWriter
from curated_data.progress import progress
from curated_data.selection.names import CaptionClass, NameMatcher, read_classes, sharing_a_name
from curated_data.selection.text import TextEmbedder, resolve_text_embedder

if TYPE_CHECKING:
    from curated_data.pool import ShardPool

log = logging.getLogger(__name__)


class CaptionBlock(NamedTuple):
    """The captions of some samples, with their metadata if filters need it.

    Attributes:
        ids: (b,) int64.
        captions: b strings.
        metadata: b mappings, or None.
    """

    ids: np.ndarray
    captions: Sequence[str]
    metadata: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class CaptionLabels:
    """A labelled selection.

    Attributes:
        ids: (m,) int64 samples, ascending.
        labels: (m,) int64 into `classes`.
        similarity: (m,) float32 cosine of caption and class.
        classes: the remaining classes, in the given order.
        report: counts of captions by outcome, and which classes and names were dropped and why.
    """

    ids: np.ndarray
    labels: np.ndarray
    similarity: np.ndarray
    classes: list[CaptionClass]
    report: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write a folder of arrays; its `ids.npy` is a selection for `CuratedDataModule`."""
        with atomic_path(path) as folder:
            folder.mkdir()
            for name in ("ids", "labels", "similarity"):
                np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
            (folder / "classes.json").write_text(json.dumps([asdict(c) for c in self.classes], indent=1))
            write_manifest(folder, "captions", {"report": self.report})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            CacheError: the folder is missing or damaged.
        """
        folder = Path(path)
        manifest = read_manifest(folder, "captions")
        ids, labels, similarity = (
            read_array(folder, name, manifest) for name in ("ids", "labels", "similarity")
        )
        return cls(ids, labels, similarity, read_classes(folder / "classes.json"), manifest["report"])


def label_captions(
    blocks: Iterable[CaptionBlock],
    classes: Sequence[CaptionClass],
    *,
    embedder: str | TextEmbedder,
    threshold: float | None = None,
    margin: float | None = None,
    rivals: Sequence[CaptionClass] = (),
    per_class: int | None = None,
    min_per_class: int | None = None,
    avoid: Collection[str] = (),
    filters: Mapping[str, Callable[[Any], bool] | Collection[Any]] | None = None,
    image_text: str | None = None,
) -> CaptionLabels:
    """Select and label samples by their captions.

    Args:
        blocks: of captions; one at a time is in memory.
        classes: to look for.
        embedder: `minilm`, `sentence-transformers:NAME`, or a function from a list of strings to (n, d).
        threshold: minimum cosine between caption and "name: definition"; LAIONet used 0.82 with the text
            tower of CLIP B/32 and 0.58 with all-mpnet-base-v2. None for no threshold.
        margin: by how much the caption must be nearer to the definition of its class (without the name) than
            to that of any other class (a class without definition counts by its name). 0 only requires that
            its own definition is the nearest. A name used in another sense does not pass this test, and it
            does not depend on the embedder's scale. Takes memory for block x classes numbers. None for no
            such test; the default is 0 if there are no threshold, rivals or per_class.
        rivals: other senses, which are not looked for, such as all of WordNet (`read_wordnet`). A caption
            must be at least as near to the definition of its class as to that of every rival that shares a
            name with the class, or nearer by `margin` if given. Only those rivals are embedded.
        per_class: keep this many samples of each class, the most similar ones. None keeps all.
        min_per_class: classes with fewer samples are dropped; None takes `per_class`, so that all classes are
            equally large, or 1.
        avoid: ids of classes not to use, such as those of ImageNet. They are dropped from `classes`, but
            their names still count as names of other classes.
        filters: by metadata column: the values to keep, or a function that decides. A missing column is None.
        image_text: metadata column with text recognised in the image; samples whose text contains a name of
            their class are dropped.

    Raises:
        ConfigError: inconsistent classes, a number out of range, or an unknown embedder.
    """
    if threshold is None and per_class is None and margin is None and not rivals:
        margin = 0.0
    if not classes:
        raise ConfigError("no classes to look for: give at least one")
    if per_class is not None and per_class < 1:
        raise ConfigError(f"per_class={per_class}: give at least 1, or None for all")
    matcher = NameMatcher(classes)
    embed = resolve_text_embedder(embedder)
    class_rows = _embedded(embed, [c.text for c in classes])
    definitions = _embedded(embed, [c.definition or c.text for c in classes])
    senses = _other_senses(embed, classes, rivals) if rivals else None
    usable = np.array([c.id not in set(avoid) for c in classes])
    counts: Counter[str] = Counter()
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for block in blocks:
        label = matcher.match(block.captions)
        counts["captions"] += len(label)
        counts["no name"] += int((label == NameMatcher.NONE).sum())
        counts["several classes"] += int((label == NameMatcher.SEVERAL).sum())
        place = np.flatnonzero(label >= 0)
        counts["classes to avoid"] += int((~usable[label[place]]).sum())
        place = place[usable[label[place]]]
        if filters or image_text:
            place = _filtered(block, place, label, matcher, filters or {}, image_text, counts)
        if len(place):
            rows = _embedded(embed, [block.captions[i] for i in place.tolist()])
            similarity = np.einsum("nd,nd->n", rows, class_rows[label[place]]).astype(np.float32)
            if margin is not None:
                near = _lead(rows, definitions, label[place]) >= margin
                counts["nearer to another class"] += int((~near).sum())
                place, rows, similarity = place[near], rows[near], similarity[near]
            if senses is not None:
                near = _lead_of_sense(rows, definitions, senses, label[place]) >= (margin or 0)
                counts["nearer to another sense"] += int((~near).sum())
                place, similarity = place[near], similarity[near]
            found.append((np.asarray(block.ids)[place], label[place], similarity))
    ids, labels, similarity = (np.concatenate(parts) for parts in zip(*found)) if found else _nothing()
    return _chosen(
        ids, labels, similarity, classes, threshold, per_class, min_per_class, avoid, matcher, counts
    )


def label_pool(
    pool: "ShardPool",
    classes: Sequence[CaptionClass],
    *,
    caption: str = "txt",
    metadata: str = "json",
    block_size: int = 8192,
    **settings: Any,
) -> CaptionLabels:
    """`label_captions` over the samples of a pool.

    Args:
        caption: extension of the captions' members; samples without one have no caption. A pool's column of
            captions takes the place of `txt`.
        metadata: extension of the JSON members for `filters` and `image_text`.
        block_size: captions in memory at a time.
        settings: of `label_captions`.

    Raises:
        PoolError: no sample has a caption.
        SampleError: metadata that is not a JSON object; names shard and key.
    """
    caption, metadata = as_extensions([caption, metadata], "caption, metadata")
    present = pool.index().extensions
    has_column = caption == "txt" and pool.caption_column is not None
    if caption not in present and not has_column:
        raise PoolError(
            f"no sample of the pool has a .{caption} member, only {', '.join(present)}: give caption="
        )
    needs_metadata = bool(settings.get("filters") or settings.get("image_text"))
    wanted = [*([] if has_column else [caption]), *([metadata] if needs_metadata else [])]
    wanted = [extension for extension in wanted if extension in present]

    def blocks() -> Iterator[CaptionBlock]:
        with progress("matching captions", len(pool), "captions") as advance:
            for first in range(0, len(pool), block_size):
                ids = np.arange(first, min(first + block_size, len(pool)))
                samples = pool.read(ids, wanted) if wanted else [{}] * len(ids)
                if has_column:
                    captions = [text or "" for text in read_captions(pool, ids)]
                else:
                    captions = [sample.get(caption, b"").decode("utf-8", "replace") for sample in samples]
                content = [_metadata(sample, metadata) for sample in samples] if needs_metadata else None
                yield CaptionBlock(ids, captions, content)
                advance(len(ids))

    return label_captions(blocks(), classes, **settings)


def export_labelled(
    pool: "ShardPool", found: CaptionLabels, pattern: str | Path, *, block_size: int = 512
) -> list[str]:
    """Write the labelled samples as a new pool of shards, with the labels as `.cls`.

    Args:
        pattern: of the shards to write, such as `out/train-%06d.tar`; also writes `classes.json` beside them.

    Returns:
        The paths of the shards.
    """
    with ShardWriter(pattern) as writer:
        for first in range(0, len(found.ids), block_size):
            part = slice(first, first + block_size)
            for sample, label in zip(pool.read(found.ids[part]), found.labels[part].tolist(), strict=True):
                members = {name: value for name, value in sample.items() if not name.startswith("__")}
                writer.write({"__key__": sample["__key__"], **members, "cls": label})
        names = json.dumps([c.names[0] for c in found.classes], indent=1)
        writer.write_beside("classes.json", names.encode())
    return [str(path) for path in writer.shards]


def _chosen(
    ids: np.ndarray,
    labels: np.ndarray,
    similarity: np.ndarray,
    classes: Sequence[CaptionClass],
    threshold: float | None,
    per_class: int | None,
    min_per_class: int | None,
    avoid: Collection[str],
    matcher: NameMatcher,
    counts: Counter[str],
) -> CaptionLabels:
    """Apply the threshold and the limits on class sizes, and number the remaining classes."""
    if threshold is not None:
        near = similarity >= threshold
        counts["under the threshold"] = int((~near).sum())
        ids, labels, similarity = ids[near], labels[near], similarity[near]
    order = np.lexsort((ids, -similarity, labels))  # by class, the most similar first
    ids, labels, similarity = ids[order], labels[order], similarity[order]
    size = np.bincount(labels, minlength=len(classes))
    least = min_per_class if min_per_class is not None else per_class or 1
    keep = size[labels] >= least
    counts["in classes too small"] = int((~keep).sum())
    if per_class is not None:
        start = np.cumsum(size) - size
        beyond = np.arange(len(ids)) - start[labels] >= per_class
        counts["beyond the number of a class"] = int((keep & beyond).sum())
        keep &= ~beyond
    kept = np.flatnonzero(size >= max(least, 1))
    number = np.full(len(classes), -1, np.int64)
    number[kept] = np.arange(len(kept))
    ids, labels, similarity = ids[keep], number[labels[keep]], similarity[keep]
    order = np.argsort(ids, kind="stable")
    counts["selected"] = len(ids)
    overlap = sorted(c.id for c in classes if c.id in set(avoid))
    small = [i for i in range(len(classes)) if size[i] < max(least, 1) and classes[i].id not in overlap]
    report = {
        "counts": dict(counts),
        "min_per_class": least,
        "classes_avoided": overlap,
        "classes_dropped": {classes[i].id: int(size[i]) for i in small},
        "classes_without_unique_name": [classes[i].id for i in matcher.nameless],
        "ambiguous_names": matcher.ambiguous,
    }
    log.info(
        "captions: %d of %d labelled, %d of %d classes left (%d too small, %d to avoid); %s",
        len(ids), counts["captions"], len(kept), len(classes), len(small), len(overlap),
        ", ".join(f"{n} {what}" for what, n in counts.items() if what not in ("captions", "selected")),
    )  # fmt: skip
    return CaptionLabels(
        ids[order], labels[order], similarity[order], [classes[i] for i in kept.tolist()], report
    )


def _lead(rows: np.ndarray, definitions: np.ndarray, own: np.ndarray) -> np.ndarray:
    """(n,) how much nearer each row is to its own definition than to any other; inf if there is no other."""
    similarity = rows @ definitions.T
    to_own = similarity[np.arange(len(rows)), own]
    similarity[np.arange(len(rows)), own] = -np.inf
    return to_own - similarity.max(1)


def _other_senses(
    embed: TextEmbedder, classes: Sequence[CaptionClass], rivals: Sequence[CaptionClass]
) -> list[np.ndarray]:
    """For each class, the embedded definitions of its rivals, (r, d)."""
    sharing = sharing_a_name(classes, rivals)
    used = sorted({i for own in sharing for i in own})
    log.info("captions: %d other senses of %d classes' names", len(used), sum(map(bool, sharing)))
    rows = _embedded(embed, [rivals[i].definition or rivals[i].text for i in used]) if used else None
    number = {i: at for at, i in enumerate(used)}
    none = np.empty((0, 0), np.float32)
    return [rows[[number[i] for i in own]] if rows is not None and own else none for own in sharing]


def _lead_of_sense(
    rows: np.ndarray, definitions: np.ndarray, senses: Sequence[np.ndarray], own: np.ndarray
) -> np.ndarray:
    """(n,) how much nearer each row is to its own definition than to its rivals'; inf without rivals."""
    lead = np.full(len(rows), np.inf)
    for label in np.unique(own):
        if len(senses[label]):
            of = own == label
            lead[of] = rows[of] @ definitions[label] - (rows[of] @ senses[label].T).max(1)
    return lead


def _filtered(
    block: CaptionBlock,
    place: np.ndarray,
    label: np.ndarray,
    matcher: NameMatcher,
    filters: Mapping[str, Callable[[Any], bool] | Collection[Any]],
    image_text: str | None,
    counts: Counter[str],
) -> np.ndarray:
    """Positions in the block that pass the metadata filters and whose image shows no name of the class."""
    if block.metadata is None:
        raise ConfigError("filters and image_text need metadata, the captions came without any")
    tests = {
        column: rule if callable(rule) else frozenset([rule] if isinstance(rule, str) else rule).__contains__
        for column, rule in filters.items()
    }
    passed = []
    for i in place.tolist():
        content = block.metadata[i]
        if not all(test(content.get(column)) for column, test in tests.items()):
            counts["filtered"] += 1
        elif image_text and matcher.holds(str(content.get(image_text) or ""), int(label[i])):
            counts["name in the image"] += 1
        else:
            passed.append(i)
    return np.array(passed, np.int64)


def _metadata(sample: Mapping[str, Any], extension: str) -> Mapping[str, Any]:
    try:
        content = json.loads(sample.get(extension, b"{}"))
    except ValueError as error:
        raise SampleError(
            f"{sample['__url__']}: key {sample['__key__']!r}: .{extension} is not JSON ({error})"
        ) from error
    if not isinstance(content, dict):
        place = f"{sample['__url__']}: key {sample['__key__']!r}"
        raise SampleError(f"{place}: .{extension} is not a JSON object")
    return content


def _embedded(embed: TextEmbedder, texts: list[str]) -> np.ndarray:
    """(n, d) float32 rows of norm 1."""
    rows = embed(texts)
    rows = (
        rows.detach().float().cpu().numpy()
        if isinstance(rows, torch.Tensor)
        else np.asarray(rows, np.float32)
    )
    if rows.ndim != 2 or len(rows) != len(texts) or not np.isfinite(rows).all():
        raise EmbedderError(
            f"the text embedder gave {rows.shape} for {len(texts)} texts: needs finite rows (n, d)"
        )
    return unit(rows)


def _nothing() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
