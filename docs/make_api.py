"""Write docs/api.md from the packages: `python docs/make_api.py`; a test compares the two.

A name is public if its module lists it in `__all__`, if it is the function that an evaluation's file is named
after, or if it is listed here.
"""

import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning_modules.evaluation

PAGE = Path(__file__).parent / "api.md"
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
        "curated_data.selection.captions": ["label_captions", "label_pool", "export_labelled"],
        "curated_data.streaming": None,
        "curated_data.export": ["export"],
        "curated_data.extend": ["extend"],
        "curated_data.inspect": ["inspect_cache"],
    },
    "Reports": {
        "curated_data.report.page": ["write_report"],
        "curated_data.report.metrics": [
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
    "Evaluation": {
        "lightning_modules.evaluation.online": ["OnlineKNN"],
    },
}  # fmt: skip


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


def page() -> str:
    """The page's text."""
    parts = [HEAD]
    seen: set[int] = set()
    for heading, modules in sections().items():
        parts.append(f"## {heading}\n")
        for module, names in modules.items():
            loaded = importlib.import_module(module)
            for name in names if names is not None else sorted(loaded.__all__, key=str.lower):
                value = getattr(loaded, name)
                if id(value) not in seen:  # listed under the shortest way to import it
                    parts.extend(entry(module, name, value))
                    seen.add(id(value))
    return "\n".join(parts)


def sections() -> dict[str, dict[str, list[str] | None]]:
    """`SECTIONS`, with every evaluation whose function has its file's name."""
    found = dict(SECTIONS)
    evaluation = lightning_modules.evaluation
    for module in pkgutil.iter_modules(evaluation.__path__):
        name = f"{evaluation.__name__}.{module.name}"
        if hasattr(importlib.import_module(name), module.name):
            found["Evaluation"] = {**found["Evaluation"], name: [module.name]}
    return found


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
