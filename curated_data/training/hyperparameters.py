"""What a training's loggers note of its data: the settings of each curation, and what it selected."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from curated_data.training.components import Source
from curated_data.training.mixture import Mixture

KEY = "curated_data"
"""Under which they stand, beside the module's own hyperparameters."""

_LONGEST = 20  # lists, such as ids to include, are counted if they are longer
_NOT_FIGURES = ("levels", "cached", "seconds", "shards", "samples", "target_size", "filters")
_OF_LEVELS = ("n_clusters", "covered", "perplexity", "selected_perplexity")


def hyperparameters(mixture: Mixture | None, sources: Sequence[Source]) -> dict[str, Any]:
    """Mappings, lists, strings and numbers, so that every logger can write them.

    Args:
        mixture: of the sources, or None.
        sources: set up.
    """
    if mixture is None:
        return _source(sources[0])
    schedule = {f"batch_{batch}": shares for batch, shares in mixture.schedule.items()}
    return {
        "mixture": {"epoch_size": mixture.epoch_size, "shares": schedule},
        "components": {source.name: {**_source(source), "batches": source.batches} for source in sources},
    }


def _source(source: Source) -> dict[str, Any]:
    urls = list(dict.fromkeys([source.pool.urls[0], source.pool.urls[-1]]))
    size = len(source.pool)
    found: dict[str, Any] = {
        "pool": {"first": _place(urls[0]), "last": _place(urls[-1])},
        "shards": len(source.pool.urls),
        "samples": size,
    }
    curation = source.base_curation
    if curation is None:
        return found | {"selection": {"selected": source.n_first, "share": source.n_first / size}}
    figures = {name: value for name, value in curation.report.items() if name not in _NOT_FIGURES}
    if "filters" in curation.report:
        figures["filtered"] = curation.report["filters"]["dropped"]
    figures["share"] = figures["distinct"] / size
    for level in curation.report["levels"]:
        figures[f"level_{level['level']}"] = {name: level[name] for name in _OF_LEVELS}
    return found | {
        "embedder": curation.embeddings.embedder,
        "curation": _brief(dataclasses.asdict(curation.config)),
        "selection": figures,
    }


def _place(url: str) -> str:
    """Without the names, passwords and signatures that some URLs contain: logs travel further than they."""
    parts = urlsplit(url)
    if not parts.netloc:
        return url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _brief(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _brief(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return f"{len(value):,} values" if len(value) > _LONGEST else [_brief(item) for item in value]
    return value
