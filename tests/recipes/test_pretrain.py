"""The command line of recipes/pretrain.py: exact names, and the last checkpoint."""

import os
import re
from pathlib import Path

import pytest
import torch

from curated_data.errors import ConfigError
from curated_data.lightning_cli import last_checkpoint
from recipes import pretrain
from tests.recipes.test_starts import SETTINGS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arguments(tmp_path, monkeypatch, fashion_train) -> list[str]:
    (tmp_path / "small.yaml").write_text(SETTINGS % fashion_train[0])
    monkeypatch.chdir(tmp_path)
    return ["fit", "--config", str(ROOT / "configs" / "base.yaml"), "--config", "small.yaml"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--trainer.max_epoch", "--trainer.max_epochs"),
        ("--data.batch_siz", "--data.batch_size"),
        ("--trainer.max_epohcs", "--trainer.max_epochs"),
        ("--ckpt_pat", "--ckpt_path"),
    ],
)
@pytest.mark.parametrize("joined", [True, False])
def test_misspelt_and_shortened_options_are_one_error(arguments, capsys, given, meant, joined):
    with pytest.raises(SystemExit) as ended:
        pretrain.main([*arguments, *([f"{given}=1"] if joined else [given, "1"])])
    assert ended.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert re.search(rf"{re.escape(given)}\b.*{re.escape(meant)}\?", errors[0])


@pytest.mark.filterwarnings("ignore")
def test_last_is_the_newest_run_that_saved_one_or_an_error(arguments):
    short = [*arguments, "--data.batch_size", "64"]
    with pytest.raises(ConfigError, match=r"ckpt_path.*runs/pretrain"):
        pretrain.main([*short, "--trainer.max_epochs", "1", "--ckpt_path", "last"])
    pretrain.main([*short, "--trainer.max_epochs", "1"])
    (last,) = Path("runs/pretrain").glob("version_*/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 2
    cli = pretrain.main([*short, "--trainer.max_epochs", "3", "--ckpt_path", "last"])
    assert cli.trainer.global_step == 6
    found = sorted(Path("runs/pretrain").glob("version_*/checkpoints/last.ckpt"), key=os.path.getmtime)
    assert [torch.load(path, weights_only=True)["global_step"] for path in found] == [2, 6]
    assert last_checkpoint(cli.trainer).resolve() == found[-1].resolve()


def test_a_reference_that_leads_nowhere_is_one_line(arguments):
    with pytest.raises(ConfigError, match=r"data\.batch_size.*nope"):
        pretrain.main([*arguments, "--data.batch_size=${nope}"])
