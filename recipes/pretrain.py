"""Pretrain any module on a curated pool, from YAML (LightningCLI).

    uv run recipes/pretrain.py fit --config configs/pretrain/simclr_fashion.yaml
    uv run recipes/pretrain.py fit --config configs/pretrain/simclr_fashion.yaml --trainer.max_epochs 5
    torchrun --nproc-per-node 8 recipes/pretrain.py fit --config … --trainer.devices 8 --trainer.strategy ddp
    fabric run --devices 8 recipes/pretrain.py fit --config … --trainer.devices 8 --trainer.strategy ddp

`--config` may be given several times, later ones over earlier ones. `--print_config` shows the result;
`fit --model.help lightning_modules.SimCLR` and `fit --help` list every setting. `${…}` refers to other
values.
"""

import sys
from typing import Any

import lightning
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningCLI

from curated_data import CuratedDataModule
from curated_data.errors import CuratedDataError


def main(
    arguments: list[str] | None = None, cli: type[LightningCLI] = LightningCLI, **options: Any
) -> LightningCLI:
    """Parse the command line, or the arguments given, and run; `cli` and `options` are for other recipes."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    return cli(
        lightning.LightningModule,
        CuratedDataModule,
        subclass_mode_model=True,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"parser_mode": "omegaconf+"},
        seed_everything_default=0,
        args=arguments,
        **options,
    )


if __name__ == "__main__":
    try:
        main()
    except CuratedDataError as error:
        sys.exit(f"pretrain: {error}")
