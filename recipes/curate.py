r"""Curate a pool from YAML settings: index, embed, cluster, select; then export the selection and report on
it.

    uv run recipes/curate.py --config configs/curation/base.yaml --config configs/curation/fashion.yaml
    torchrun --nproc-per-node 8 recipes/curate.py --config configs/curation/base.yaml \
        --config configs/curation/web_paper.yaml 'pool=s3://bucket/pool-{000000..074299}.tar'

Later --config files override earlier ones, FIELD=VALUE overrides both, ${...} refers to other values. Fields:

    pool         shards: a path or URL with braces or a glob, or a list of these
    embedder     torchvision:MODEL, timm:MODEL, hub:ENTRY, checkpoint:FILE, ...
    curation     fields of CurationConfig: target_size, levels, metric, strategy, near_duplicates, seed, ...
    cache_dir    for the results of all stages; a second run only reads them     (default: runs/cache)
    device       cpu, cuda, cuda:1, ...                                          (default: auto)
    export       folder to write the selection to as shards                      (default: none)
    report       HTML file with a report on the curation                         (default: none)

Prints the balance of the pool, of a random selection and of the curated one, over clusters and, if there are
labels, over classes. The command line tool `curated-data` does the same stage by stage.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from curated_data import ShardPool
from curated_data.config import load_config, read_yaml, structured
from curated_data.errors import ConfigError, first_line
from curated_data.parallel import rank
from curated_data.programs import described_parser, print_comparison, process_group, report_errors, walk


@dataclass
class Settings:
    """The merged content of the YAML files."""

    pool: Any = MISSING
    embedder: str = MISSING
    curation: dict[str, Any] = field(default_factory=dict)
    cache_dir: str = "runs/cache"
    device: str = "auto"
    export: str | None = None
    report: str | None = None
    storage_options: dict[str, Any] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the settings, curate, print; returns the exit status."""
    parser = described_parser(__doc__)
    parser.add_argument("--config", action="append", default=[], metavar="YAML", help="may be given again")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="as curation.target_size=5000")
    options = parser.parse_args(arguments)
    return report_errors("curate", lambda: run(read_settings(options.config, options.overrides)))


def read_settings(paths: Sequence[str], overrides: Sequence[str] = ()) -> Settings:
    """The settings from YAML files, later ones overriding earlier ones, and from `FIELD=VALUE` items.

    Raises:
        ConfigError: an unreadable file, an unknown or missing field, or an unresolved reference.
    """
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"{item}: expected FIELD=VALUE")
    try:
        parts = [read_yaml(Path(path)) for path in paths]
        merged = OmegaConf.merge(*parts, OmegaConf.from_dotlist(list(overrides)))
        content: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {first_line(error)}") from error
    return structured(Settings, content)


def run(settings: Settings) -> None:
    """Curate by the settings, and print the table."""
    config = load_config(settings.curation)
    pool = ShardPool(settings.pool, cache_dir=settings.cache_dir, storage_options=settings.storage_options)
    with process_group():
        rows = walk(
            pool,
            settings.embedder,
            config,
            cache_dir=settings.cache_dir,
            device=settings.device,
            export_to=settings.export,
            report_to=settings.report,
        )
        if rank() == 0:
            print_comparison(rows)


if __name__ == "__main__":
    sys.exit(main())
