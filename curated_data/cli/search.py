"""The command `curated-data search`: the samples of a pool nearest to an image, a text or a vector."""

import argparse
import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from curated_data.cli.common import (
    add_embedder,
    add_pool_command,
    check_output,
    embeddings_of,
    load_array,
    pool_of,
    print_table,
    storage_of,
)
from curated_data.errors import ConfigError

if TYPE_CHECKING:
    from curated_data.pipeline.search import Found


def add(commands: Any) -> None:
    """Add the command."""
    command = add_pool_command(
        commands, "search", "find the samples nearest to an image, a text or a vector", _search
    )
    add_embedder(command)
    command.add_argument(
        "--text",
        action="append",
        default=[],
        help="look for this, by an embedder with a text tower: transformers:openai/clip-vit-base-patch32, or "
        "minilm for pools of text",
    )
    command.add_argument("--image", action="append", default=[], metavar="FILE", help="look for this image")
    command.add_argument(
        "--vectors", metavar="FILE.npy", help="look for these embeddings, (m, d), such as of a text tower"
    )
    command.add_argument("-n", type=int, default=24, help="samples for each query (default: %(default)s)")
    command.add_argument("--least", type=float, metavar="COSINE", help="that a sample needs at least")
    command.add_argument(
        "--same", type=float, default=0.98, metavar="COSINE",
        help="from which a sample counts as the same image (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--out", metavar="SHEET.png|PAGE.html", help="write a contact sheet of what was found"
    )
    command.add_argument("--ids", metavar="FILE.npy", help="write the ids, to include, exclude or start from")
    command.add_argument("--table", metavar="FILE.csv", help="write what is printed")


def _search(parsed: argparse.Namespace) -> None:
    import numpy as np  # here, as all that takes long to import

    from curated_data.embedding import Precomputed
    from curated_data.pipeline.search import (
        contact_page,
        contact_sheet,
        embed_queries,
        newest_curation,
        rows_of,
        search,
    )
    from curated_data.pool.encode import encode_member
    from curated_data.pool.out import write_file

    for place in filter(None, (parsed.out, parsed.ids, parsed.table)):
        check_output(place, parsed)
    vectors, options = load_array(parsed.vectors, "vectors"), storage_of(parsed)
    pool = pool_of(parsed)
    if not (parsed.text or parsed.image or vectors is not None):
        raise ConfigError("search: nothing to look for; give --text, --image FILE or --vectors FILE.npy")
    stage = embeddings_of(parsed, pool)
    queries = [] if vectors is None else [np.atleast_2d(vectors)]
    if parsed.image or parsed.text:
        if isinstance(stage.embedder, Precomputed):
            raise ConfigError(f"search: {parsed.embedder} embeds no images or texts; give --vectors FILE.npy")
        queries.insert(0, embed_queries(pool, stage.embedder, parsed.image, parsed.text))
    store = stage.build(parsed.device)
    if vectors is not None and queries[-1].shape[1] != store.shape[1]:
        raise ConfigError(
            f"--vectors: have length {queries[-1].shape[1]}, the pool's embeddings {store.shape[1]}; give "
            "embeddings by the same network"
        )
    curation = newest_curation(parsed.cache_dir, store)
    found = search(
        store, np.concatenate(queries), parsed.n, least=parsed.least, valid=store.valid, curation=curation
    )
    rows = rows_of(found, pool)
    table = Table(title=f"{len(rows):,} of {len(store):,} samples")
    names = list(rows[0]) if rows else ["id"]
    for name in names:
        table.add_column(name, overflow="fold", justify="left" if name in ("shard", "key") else "right")
    for row in rows:
        table.add_row(*(_shown(name, value) for name, value in row.items()))
    print_table(table)
    for line in _same(found, [*parsed.image, *parsed.text], parsed.same):
        print(line)
    if parsed.out is not None:
        is_page = parsed.out.lower().endswith((".html", ".htm"))
        names_of = [*parsed.image, *parsed.text]
        content = contact_page(found, pool, names_of) if is_page else contact_sheet(found, pool)
        print(f"images: {write_file(parsed.out, content, options)}")
    if parsed.ids is not None:
        print(f"ids: {write_file(parsed.ids, encode_member(np.sort(found.ids)), options)}")
    if parsed.table is not None:
        print(f"table: {write_file(parsed.table, _csv(names, rows), options)}")


def _same(found: "Found", queries: list[str], least: float) -> list[str]:
    """For each query, whether the pool holds it, and what was selected of its near-duplicates."""
    lines = []
    for number, query in enumerate(queries):
        (same,) = ((found.query == number) & (found.cosine >= least)).nonzero()
        if not len(same):
            lines.append(f"{query}: not in the pool (no sample at a cosine of {least:g} or more)")
            continue
        line = f"{query}: in the pool, as sample {found.ids[same[0]]}"
        if len(same) > 1:
            line += f", with {len(same) - 1} near-duplicate{'s' if len(same) > 2 else ''}"
        n_selected = int((found.times[same] > 0).sum())
        if found.times[same[0]] >= 0 and len(same) > 1:
            line += f"; {n_selected} of the {len(same)} {'is' if n_selected == 1 else 'are'} selected"
        elif found.times[same[0]] >= 0:
            line += ", which is selected" if n_selected else ", which is not selected"
        lines.append(line)
    return lines


def _shown(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name == "shard":
        return escape(Path(value).name)
    return f"{value:.4f}" if name == "cosine" else escape(str(value))


def _csv(names: list[str], rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")
