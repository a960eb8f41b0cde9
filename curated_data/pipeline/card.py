"""What stands beside exported shards for those who find them: a data set card and Croissant metadata."""

import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from omegaconf import OmegaConf

from curated_data.errors import printable
from curated_data.report.figures import size_curves
from curated_data.report.summary import HEADINGS, claim, headline, level_rows

if TYPE_CHECKING:
    from curated_data.pool import ShardPool
    from curated_data.stages.curation import Curation

TABLE, PICTURE, CARD, CROISSANT = "curation.parquet", "curation.png", "README.md", "croissant.json"
"""The files' names, of which the Hub knows the third and tools for Croissant the last."""

_SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
_TYPES = {
    "int64": "sc:Integer",
    "int32": "sc:Integer",
    "float": "sc:Float",
    "bool": "sc:Boolean",
    "string": "sc:Text",
}
_CONTEXT = {
    "@language": "en", "@vocab": "https://schema.org/", "citeAs": "cr:citeAs", "column": "cr:column",
    "conformsTo": "dct:conformsTo", "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/", "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"}, "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"}, "extract": "cr:extract", "field": "cr:field",
    "fileProperty": "cr:fileProperty", "fileObject": "cr:fileObject", "fileSet": "cr:fileSet",
    "format": "cr:format", "includes": "cr:includes", "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath", "key": "cr:key", "md5": "cr:md5", "parentField": "cr:parentField",
    "path": "cr:path", "recordSet": "cr:recordSet", "references": "cr:references", "regex": "cr:regex",
    "repeated": "cr:repeated", "replace": "cr:replace", "sc": "https://schema.org/",
    "separator": "cr:separator", "source": "cr:source", "subField": "cr:subField",
    "transform": "cr:transform",
}  # fmt: skip


def picture(curation: "Curation") -> bytes:
    """Sizes of clusters in the pool and in the selection, as a PNG."""
    file = io.BytesIO()
    size_curves(curation.tree, curation.ids).savefig(file, format="png", dpi=110)
    return file.getvalue()


def card(curation: "Curation", pool: "ShardPool", name: str, shards: Sequence[str]) -> str:
    """A data set card in Markdown, with the header that the Hub reads; the licence is left to the user.

    Args:
        name: of the data set.
        shards: their names, in the folder of the card.
    """
    settings = dataclasses.asdict(curation.config)
    embedder = getattr(curation.embeddings, "embedder", "") or "given embeddings"
    rows = "\n".join(f"| {' | '.join(row)} |" for row in level_rows(curation.report))
    rule = "|".join(["---"] * len(HEADINGS))
    header = {
        "pretty_name": name,
        "size_categories": [_size_category(len(curation.ids))],
        "tags": ["webdataset", "data-curation"],
        "configs": [{"config_name": "default", "data_files": _glob(shards)}],
    }
    return f"""---
# license: to be filled in, such as cc-by-4.0
{OmegaConf.to_yaml(OmegaConf.create(header))}---

# {name}

{headline(curation.report)}. {claim(curation, pool)}

![Sizes of clusters before and after]({PICTURE})

| {" | ".join(HEADINGS)} |
|{rule}|
{rows}

## How it was made

The samples were selected from {len(pool):,} in {len(pool.urls):,} shards by curated-data: embedded by
`{printable(embedder)}`, clustered by k-means, and drawn so that what is rare in the pool has more of a share.
Labels took no part. The settings:

```yaml
{OmegaConf.to_yaml(OmegaConf.create(settings)).strip()}
```

## Files

| file | what it holds |
|---|---|
| `{_glob(shards)}` | the samples, as WebDataset shards; members have their bytes of the pool |
| `{TABLE}` | a row for each selected sample: key, label, caption, clusters, how often it was selected |
| `ids.npy`, `clusters.npy` | for each exported sample in order, its number in the pool and its clusters |
| `manifest.json` | the pool, and the number of the first sample of every shard |
| `{CROISSANT}` | Croissant metadata |

```python
from datasets import load_dataset

dataset = load_dataset("webdataset", data_files="{_glob(shards)}", split="train", streaming=True)
```

## Licence

To be filled in by whoever publishes it: the licence of the pool's samples applies to these, too.

## Citation

The method follows [Vo et al. 2024, Automatic Data Curation for Self-Supervised Learning: A Clustering-Based
Approach](https://arxiv.org/abs/2405.15613). Cite the sources of the pool, too.
"""


def croissant(
    curation: "Curation", name: str, shards: Mapping[str, str], schema: pa.Schema, table: str
) -> dict[str, Any]:
    """Croissant 1.0 metadata, of the shards and of the columns of the table.

    Args:
        name: of the data set.
        shards: the SHA-256 of each by its name.
        schema: of the table.
        table: its SHA-256.
    """
    files = [(shard, "application/x-tar", digest) for shard, digest in shards.items()]
    files.append((TABLE, "application/x-parquet", table))
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"samples/{column.name}",
            "name": column.name,
            "dataType": _TYPES[str(column.type)],
            "source": {"fileObject": {"@id": TABLE}, "extract": {"column": column.name}},
        }
        for column in schema
        if str(column.type) in _TYPES
    ]
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": name,
        "description": headline(curation.report),
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": file,
                "name": file,
                "contentUrl": file,
                "encodingFormat": encoding,
                "sha256": digest,
            }
            for file, encoding, digest in files
        ],
        "recordSet": [{"@type": "cr:RecordSet", "@id": "samples", "name": "samples", "field": fields}],
    }


def _glob(shards: Sequence[str]) -> str:
    """What names the shards and nothing else, as `shard-*.tar`."""
    number = re.search(r"\d+(?=\D*$)", shards[0])
    assert number is not None, "every pattern of shards has one"
    return f"{shards[0][: number.start()]}*{shards[0][number.end() :]}"


def _size_category(n: int) -> str:
    """The Hub's name for a number of samples."""
    letters = ("1K", "10K", "100K", "1M", "10M", "100M", "1B")
    above = next((place for place, size in enumerate(_SIZES) if n < size), len(_SIZES))
    if above == 0:
        return "n<1K"
    return "n>1B" if above == len(_SIZES) else f"{letters[above - 1]}<n<{letters[above]}"
