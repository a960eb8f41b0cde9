"""Pretrain any module on a curated pool, from YAML (LightningCLI).

    uv run recipes/pretrain.py fit --config configs/pretrain/simclr_fashion.yaml
    uv run recipes/pretrain.py fit --config configs/pretrain/simclr_fashion.yaml --trainer.max_epochs 5
    torchrun --nproc-per-node 8 recipes/pretrain.py fit --config … --trainer.devices 8 --trainer.strategy ddp
    fabric run --devices 8 recipes/pretrain.py fit --config … --trainer.devices 8 --trainer.strategy ddp

    uv run recipes/pretrain.py fit --config configs/pretrain/simclr_fashion.yaml --dry-run

`--dry-run` prints what the run would do and need, with times estimated by a probe of embedder, k-means and a
few training steps on this machine. `--config` may be given several times; later files override earlier ones.
`--print_config` shows the result. `fit --help` and `fit --model.help lightning_modules.SimCLR` list every
setting. `${…}` refers to other values. `--ckpt_path last` continues from the newest `last.ckpt` of the runs
of this logger, or of the ModelCheckpoint's `dirpath`.
"""

if __name__ == "__main__":  # before Lightning and torch are imported, which takes some fifteen seconds
    import sys

    from curated_data.early import check_keys
    from curated_data.errors import ConfigError

    try:
        check_keys(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"pretrain: {error}")

import sys

from lightning.pytorch.cli import LightningCLI

from curated_data.errors import CuratedDataError
from curated_data.lightning_cli import run_cli


def main(arguments: list[str] | None = None) -> LightningCLI:
    """Parse the command line, or `arguments`, and run."""
    description = "Pretrain any module on a curated pool, from YAML. `fit --help` lists every setting."
    return run_cli(arguments, description=description)


if __name__ == "__main__":
    try:
        main()
    except CuratedDataError as error:
        sys.exit(f"pretrain: {error}")
