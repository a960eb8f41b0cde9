"""Write docs/api.md and docs/settings.md from the code: `python docs/make_api.py`; a test compares them.

A name is public if its module lists it in `__all__`, or if it is listed here.
"""

import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from curated_data.config import (
    CurationConfig,
    EmbeddingConfig,
    NearDuplicateConfig,
    QuotaConfig,
    RetrievalConfig,
)
from curated_data.levels import Level

PAGE = Path(__file__).parent / "api.md"
SETTINGS_PAGE = Path(__file__).parent / "settings.md"
HEAD = """# Public names

Written by `python docs/make_api.py`; do not edit. Each name's docstring says more: arguments with shapes and
units, what it raises, and its source.
"""
# Section heading: the modules, each with its names; None takes all that `__all__` lists.
SECTIONS: dict[str, dict[str, list[str] | None]] = {
    "The package `curated_data`": {"curated_data": None},
    "The stages by themselves": {
        "curated_data.pool": None,
        "curated_data.embedding": None,
        "curated_data.clustering": None,
        "curated_data.selection": None,
        "curated_data.selection.near_duplicates": ["near_duplicates", "match_held_out"],
        "curated_data.selection.quotas": ["Quotas", "water_fill"],
        "curated_data.selection.nested": ["nested_sample"],
        "curated_data.selection.greedy": ["greedy_order"],
        "curated_data.selection.retrieval": ["Retrieved", "retrieve_clusters", "target_weights"],
        "curated_data.selection.captions": ["label_captions", "label_pool", "export_labelled"],
        "curated_data.streaming": None,
        "curated_data.pipeline.export": ["export"],
        "curated_data.pipeline.extend": ["extend"],
        "curated_data.pipeline.inspect": ["inspect_cache"],
        "curated_data.pipeline.search": ["search", "embed_queries", "contact_sheet"],
        "curated_data.report.table": ["CurationTable"],
    },
    "Reports": {
        "curated_data.report.page": ["write_report"],
        "curated_data.training.mixture_report": ["write_mixture_report"],
        "curated_data.selection.metrics": [
            "class_balance", "cluster_balance", "coverage_distance", "entropy", "gini", "head_to_tail",
            "kl_to_uniform", "perplexity",
        ],
        "curated_data.report.figures": ["class_balance", "contact_sheet", "selection_map", "size_curves"],
    },
    "Pretraining: `lightning_modules`": {
        "lightning_modules": None,
        "lightning_modules.backbones": ["build_backbone"],
        "lightning_modules.maps": None,
        "lightning_modules.transport": ["p2ot", "sp2ot"],
        "lightning_modules.transport_clustering": ["cluster_embeddings"],
    },
    "Evaluation": {"lightning_modules.evaluation": None},
}  # fmt: skip


def main() -> None:
    """Write the pages."""
    PAGE.write_text(page())
    SETTINGS_PAGE.write_text(settings_page())


def page() -> str:
    """The page's text."""
    parts = [HEAD]
    seen: set[int] = set()
    for heading, modules in SECTIONS.items():
        parts.append(f"## {heading}\n")
        for module, names in modules.items():
            loaded = importlib.import_module(module)
            for name in names if names is not None else sorted(loaded.__all__, key=str.lower):
                value = getattr(loaded, name)
                if id(value) not in seen:  # listed under the shortest way to import it
                    parts.extend(entry(module, name, value))
                    seen.add(id(value))
    return "\n".join(parts)


SETTINGS_HEAD = """# All settings of a curation

Written by `python docs/make_api.py` from the docstrings; do not edit. They are the fields of
`curated_data.CurationConfig`, the same in Python, in YAML below `curation:` (`recipes/curate.py`) or below
`data: curation:` (`recipes/pretrain.py`), and after `--set` on the command line. Only `target_size` has no
default. [How it works](how_it_works.md) says how to choose those that matter: the embedder (not among them),
`metric`, `levels`.

What is left out means, by what is given:

| | `sampling` | `metric` | `levels` |
|---|---|---|---|
| nothing else | `sparse` | `cosine` | one, of n / 300 clusters, no resampling |
| `sampling: greedy` | `greedy` | `cosine` | as by nothing else |
| other `sampling`, or a `strategy` | that, or `hierarchical` | `l2` | n / 20, a tenth of that, …, resampled |
| `levels` | `hierarchical` | `l2` | as given |
| `preset: paper` | `hierarchical` | `l2` | n / 20, a tenth of that, …, resampled ten times each |

`sparse` needs no quotas of clusters: a sample weighs more the farther its nearest neighbour is (log of the
distance, counted twice), the fewer others have it among their 16 nearest, and the fewer of its own 16
nearest return that. Each is in standard deviations of the pool; weights lie between 1/20 and 55 times the
median. Clusters bound the neighbourhoods: those that lie together, up to 2,048 samples.

`greedy` has the metric and the levels of `sparse`. It takes, one after the other, the sample that adds most
to the sum over all samples of the cosine to the nearest selected one of their cell (facility location). Only
the clusters are random in it. It is for choosing what to label or to search in, not for balance
([figures](how_it_works.md#choosing-settings)).
"""
SETTINGS = {
    "": ("CurationConfig", CurationConfig),
    "levels[]": ("Each of `levels`", Level),
    "embedding": ("Below `embedding:`", EmbeddingConfig),
    "quotas": ("Below `quotas:`", QuotaConfig),
    "retrieval": ("Below `retrieval:`", RetrievalConfig),
    "near_duplicates": ("Below `near_duplicates:`", NearDuplicateConfig),
}


def settings_page() -> str:
    """A table of each dataclass: field, default, and what its docstring says."""
    parts = [SETTINGS_HEAD]
    for heading, schema in SETTINGS.values():
        parts.append(f"## {heading}\n\n| field | default | what |\n|---|---|---|")
        words = attributes(schema)
        for item in dataclasses.fields(schema):
            if item.default is not dataclasses.MISSING:
                default = f"`{item.default}`".replace("`None`", "derived").replace("``", "empty")
            elif item.default_factory is not dataclasses.MISSING:
                default = "none" if item.default_factory is list else "see below"
            else:
                default = "must be given"
            parts.append(f"| `{item.name}` | {default} | {words[item.name]} |")
        parts.append("")
    return "\n".join(parts)


def attributes(schema: type) -> dict[str, str]:
    """What a docstring's `Attributes:` say of each field."""
    text = inspect.getdoc(schema).split("Attributes:\n")[1].split("\nExample")[0] + "\n"
    found = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", text, re.DOTALL | re.MULTILINE)
    return {name: " ".join(words.split()).replace("|", "\\|") for name, words in found}


def entry(module: str, name: str, value: Any) -> Iterator[str]:
    """A name: how to import it, its signature where it has one, and its docstring's first paragraph."""
    summary = " ".join(inspect.getdoc(value).split("\n\n")[0].split()) if callable(value) else ""
    yield f"### `{module}.{name}`\n"
    if inspect.isfunction(value) or inspect.isclass(value):
        yield f"```python\n{signature(name, value)}\n```\n"
    elif not callable(value):
        yield f"`{value!r}`\n"
    if summary:
        yield f"{summary}\n"


def signature(name: str, value: Any) -> str:
    """Names and defaults; types are in the code and would fill the page."""
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:  # a class of another language's making
        parameters = []
    shown = [item.replace(annotation=inspect.Parameter.empty) for item in parameters]
    text = f"{name}{inspect.Signature(shown)}"
    return textwrap.fill(text, 100, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    main()
