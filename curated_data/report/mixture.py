"""A page about a mixture: what each component holds, gives and shares, with a page per curated component."""

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curated_data.components import Source, mixture_rows, overlaps
from curated_data.errors import ConfigError
from curated_data.pool.out import write_file
from curated_data.report.page import write_report

if TYPE_CHECKING:
    from curated_data.datamodule import CuratedDataModule

_TEMPLATE = Path(__file__).with_name("mixture.html")


def write_mixture_report(
    data: "CuratedDataModule", folder: str | Path, *, title: str = "Mixture report", **options: Any
) -> Path:
    """Write `index.html`, an overview of a mixture, and a report page for each component with a curation.

    The overview has for each component its samples, its share of the stream, how often an epoch goes through
    it, and how many of its samples other components hold too, in all and pair by pair.

    Args:
        data: a data module with a mixture, after `setup("fit")`.
        folder: is made if it does not exist.
        title: of the overview.
        options: for `write_report` of the components.

    Returns:
        The path of the overview.

    Raises:
        ConfigError: no mixture, or one that is not set up.
        CacheError: a page cannot be written.

    Example:
        >>> from curated_data import Component, CuratedDataModule, Mixture
        >>> from curated_data.report.mixture import write_mixture_report
        >>> halves = [Component("a", "pool-000000.tar", 0.5), Component("b", "pool-000001.tar", 0.5)]
        >>> data = CuratedDataModule(mixture=Mixture(halves), batch_size=4, image_size=8)
        >>> data.setup("fit")
        >>> write_mixture_report(data, "report").name
        'index.html'
    """
    if data.mixture is None:
        raise ConfigError("write_mixture_report: the data module has no mixture; use write_report")
    if not data.is_set_up:
        raise ConfigError('write_mixture_report: the data module is not set up; call setup("fit") first')
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    pages: dict[str, str] = {}
    for number, source in enumerate(data.sources):
        if source.curation is not None:
            pages[source.name] = f"component-{number}.html"
            name = f"{title}: {source.name}"
            write_report(source.curation, source.pool, folder / pages[source.name], title=name, **options)
    body = _overview(data, pages) + _overlap(data.sources)
    page = _TEMPLATE.read_text(encoding="utf-8").replace("{{title}}", html.escape(title))
    path = folder / "index.html"
    write_file(path, page.replace("{{body}}", body).encode("utf-8"), None)
    return path


def _overview(data: "CuratedDataModule", pages: dict[str, str]) -> str:
    assert data.mixture is not None, "checked before"
    rows = mixture_rows(data.mixture, data.sources)
    an_epoch = data.mixture.epoch_size or sum(row.size for row in rows)
    head = (
        "component",
        "pool",
        "samples",
        "share of the stream",
        "",
        "batches",
        "passes per epoch",
        "in others too",
    )
    lines = []
    for source, row in zip(data.sources, rows, strict=True):
        name = html.escape(row.name)
        if row.name in pages:
            name = f'<a href="{pages[row.name]}">{name}</a>'
        shards = source.pool.urls
        pool = html.escape(Path(shards[0]).name) + (
            f" and {len(shards) - 1:,} more" if len(shards) > 1 else ""
        )
        bar = f'<span class="bar"><i style="width:{100 * row.share:.1f}%"></i></span>'
        shared = f"{row.shared:,} ({row.shared / row.distinct:.1%})"
        cells = (
            name, pool, f"{row.size:,}", f"{row.share:.2%}", bar, source.batches,
            f"{row.share * an_epoch / row.size:.2f}", shared,
        )  # fmt: skip
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = "".join(f"<th>{text}</th>" for text in head)
    return (
        f"<p>{len(rows)} components; an epoch has {an_epoch:,} samples. Shares are those at the beginning of "
        "training.</p>"
        f'<div class="scroll"><table><tr>{heads}</tr>{"".join(lines)}</table></div>'
    )


def _overlap(sources: list[Source]) -> str:
    """A table of how many samples of the row's component the column's holds too."""
    shared = overlaps(sources)
    if not np.any(shared - np.diag(np.diag(shared))):
        return "<p>No sample is in two components.</p>"
    heads = "".join(f"<th>{html.escape(source.name)}</th>" for source in sources)
    lines = "".join(
        f"<tr><td>{html.escape(source.name)}</td>" + "".join(f"<td>{n:,}</td>" for n in row) + "</tr>"
        for source, row in zip(sources, shared.tolist(), strict=True)
    )
    return (
        "<h2>Samples in common</h2><p>Different samples that the components of row and column both hold; on "
        "the diagonal, that a component holds.</p>"
        f'<div class="scroll"><table><tr><th></th>{heads}</tr>{lines}'
        "</table></div>"
    )
