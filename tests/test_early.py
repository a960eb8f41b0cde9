"""Keys of YAML files are checked by what is read of the sources; `inspect` says what classes really take."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import lightning
import pytest

import lightning_modules
from curated_data.early import check_keys, parameters
from curated_data.errors import ConfigError
from curated_data.training.options import OldArguments

ROOT = Path(__file__).parents[1]
CLASSES = [
    "curated_data.CuratedDataModule",
    "curated_data.training.datamodule.CuratedDataModule",
    "lightning.pytorch.trainer.trainer.Trainer",
    *(
        f"lightning_modules.{name}"
        for name in lightning_modules.__all__
        if inspect.isclass(getattr(lightning_modules, name))
        and issubclass(getattr(lightning_modules, name), lightning.LightningModule)
    ),
]


@pytest.mark.parametrize("name", CLASSES)
def test_parameters_are_those_that_inspect_finds(name):
    module, _, class_name = name.rpartition(".")
    found = inspect.signature(getattr(importlib.import_module(module), class_name)).parameters
    old = OldArguments.__annotations__ if "old" in found else {}
    assert set(parameters(name)) == {key for key in found if key not in ("kwargs", "old")} | set(old)


@pytest.mark.parametrize("name", ["collections.OrderedDict", "nowhere.Thing", "torch.nn.Module", "Thing", ""])
def test_what_cannot_be_told_is_left_to_the_parser(name):
    assert parameters(name) in ((), ("args",))


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "pretrain").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_settings_pass(path):
    check_keys(["fit", "--config", str(path), f"--config={ROOT / 'configs' / 'base.yaml'}"])


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ("trainr: {}\n", "trainr", "trainer"),
        ("trainer: {max_epohcs: 1}\n", "trainer.max_epohcs", "max_epochs"),
        ("data: {batch_siz: 1}\n", "data.batch_siz", "batch_size"),
        ("data: {curation: {target_sise: 1}}\n", "data.curation.target_sise", "target_size"),
        (
            "model: {class_path: lightning_modules.SimCLR, init_args: {temprature: 1}}\n",
            "model.init_args.temprature",
            "temperature",
        ),
    ],
)
def test_a_misspelt_key_is_named_with_its_file_and_the_nearest(tmp_path, text, key, near):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as found:
        check_keys(["fit", "-c", str(path)])
    assert str(path) in str(found.value)
    assert f"{key}:" in str(found.value)
    assert f"'{near}'" in str(found.value)


@pytest.mark.parametrize("recipe", ["pretrain", "recurate"])
def test_recipes_name_it_before_they_import_lightning(tmp_path, recipe):
    """Seen by what Python says that it imports."""
    (tmp_path / "own.yaml").write_text("trainer: {max_epohcs: 1}\n")
    program = ROOT / "recipes" / f"{recipe}.py"
    command = [sys.executable, "-X", "importtime", str(program), "fit", "--config", "own.yaml"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1
    imported = {
        line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if "import time:" in line
    }
    assert "curated_data.early" in imported
    assert not imported & {"torch", "lightning"}
    assert f"{recipe}: own.yaml: trainer.max_epohcs" in ended.stderr


def test_settings_and_their_mistakes_need_no_torch():
    code = "import sys, curated_data.early; assert not {'torch', 'lightning'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
