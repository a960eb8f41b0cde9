"""A page about a mixture: what each component holds, gives and shares, with a page per curated component."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curated_data.errors import ConfigError
from curated_data.pool.out import open_out, writing
from curated_data.report.page import write_report
from curated_data.report.plain import plain_page, table
from curated_data.training.components import Source, mixture_rows, overlaps
from curated_data.training.mixture import Mixture

if TYPE_CHECKING:
    from curated_data.training.datamodule import CuratedDataModule


def write_mixture_report(
    data: "CuratedDataModule",
    folder: str | Path,
    *,
    title: str = "Mixture report",
    storage_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path | str:
    """Write `index.html`, an overview of a mixture, and a report page for each component with a curation.

    The overview has for each component its samples, its share of the stream, how often an epoch goes through
    it, and how many of its samples other components hold too, in all and pair by pair; after or during a
    training (`trainer.datamodule`), how often it has been gone through so far.

    Args:
        data: a data module with a mixture, after `setup("fit")`.
        folder: of this machine, made if it does not exist, or the URL of one in a store.
        title: of the overview.
        storage_options: for fsspec, to write to a store.
        options: for `write_report` of the components.

    Returns:
        The path, or the URL, of the overview.

    Raises:
        ConfigError: no mixture, or one that is not set up.
        CacheError: a page cannot be written.

    Examples:
        >>> from curated_data import Component, CuratedDataModule, Mixture
        >>> from curated_data.training.mixture_report import write_mixture_report
        >>> halves = [Component("a", "pool-000000.tar", 0.5), Component("b", "pool-000001.tar", 0.5)]
        >>> data = CuratedDataModule(mixture=Mixture(halves), batch_size=4, image_size=8)
        >>> data.setup("fit")
        >>> print(write_mixture_report(data, "report"))
        report/index.html
    """
    if data.mixture is None:
        raise ConfigError("write_mixture_report: the data module has no mixture; use write_report")
    if not data.is_set_up:
        raise ConfigError('write_mixture_report: the data module is not set up; call setup("fit") first')
    out = open_out(folder, storage_options)
    pages: dict[str, str] = {}
    for number, source in enumerate(data.sources):
        if source.curation is not None:
            pages[source.name] = f"component-{number}.html"
            write_report(
                source.curation,
                source.pool,
                out.place(pages[source.name]),
                title=f"{title}: {source.name}",
                storage_options=storage_options,
                **options,
            )
    body = _overview(data, pages) + _weights(data.mixture) + _overlap(data.sources)
    with out.create("index.html") as file, writing(out.place("index.html")):
        file.write(plain_page(title, body).encode("utf-8"))
    return out.place("index.html")


def _overview(data: "CuratedDataModule", pages: Mapping[str, str]) -> str:
    assert data.mixture is not None, "checked before"
    rows = mixture_rows(data.mixture, data.sources)
    an_epoch = data.mixture.epoch_size or sum(row.size for row in rows)
    passes = list(data.component_passes().values())
    begun = any(passes)
    head = ["component", "pool", "samples", "share of the stream", "batches", "passes per epoch"]
    head += ["in others too", *(["passes so far"] if begun else [])]
    lines = []
    for source, row, times in zip(data.sources, rows, passes, strict=True):
        name = html.escape(row.name)
        if row.name in pages:
            name = f'<a href="{pages[row.name]}">{name}</a>'
        shards = source.pool.urls
        pool = html.escape(Path(shards[0]).name) + (
            f" and {len(shards) - 1:,} more" if len(shards) > 1 else ""
        )
        bar = f'<span class="share"><i style="width:{100 * row.share:.1f}%"></i></span>'
        shared = f"{row.shared:,} ({row.shared / row.distinct:.1%})"
        cells = [name, pool, f"{row.size:,}", f"{row.share:.2%}{bar}", source.batches]
        cells += [f"{row.share * an_epoch / row.size:.2f}", shared, *([f"{times:.2f}"] if begun else [])]
        lines.append(cells)
    return (
        f"<p>{len(rows)} components; an epoch has {an_epoch:,} samples. Shares and samples are those at the "
        f"beginning of training.</p><section>{table(head, lines, 'wraps')}</section>"
    )


def _weights(mixture: Mixture) -> str:
    """A table of shares that change; nothing for those that do not."""
    if len(mixture.schedule) == 1:
        return ""
    lines = [
        [f"{batch:,}", *(f"{share:.2%}" for share in shares)] for batch, shares in mixture.schedule.items()
    ]
    head = ["from global batch", *map(html.escape, mixture.names)]
    return (
        "<section><h2>Shares that change</h2><p>In between they change linearly; after the last they stay."
        f"</p>{table(head, lines, 'wraps')}</section>"
    )


def _overlap(sources: list[Source]) -> str:
    """A table of how many samples of the row's component the column's holds too."""
    shared = overlaps(sources)
    if not np.any(shared - np.diag(np.diag(shared))):
        return "<p>No sample is in two components.</p>"
    head = ["", *(html.escape(source.name) for source in sources)]
    lines = [
        [html.escape(source.name), *(f"{n:,}" for n in row)]
        for source, row in zip(sources, shared.tolist(), strict=True)
    ]
    return (
        "<section><h2>Samples in common</h2><p>Different samples that the components of row and column both "
        f"hold; on the diagonal, that a component holds.</p>{table(head, lines, 'wraps')}</section>"
    )
