"""Every shipped setting is accepted by the recipe that it names, and a small one trains."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from curated_data import Mixture
from curated_data.datasets import load_suite
from curated_data.embedding import resolve_embedder
from curated_data.errors import ConfigError, CuratedDataError
from lightning_modules import DINOv2, SimCLR
from lightning_modules.evaluation.suite import EVALUATIONS
from recipes import evaluate, pretrain

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "pretrain").glob("*.yaml"))
DELTAS = {  # and what each is given after
    "simclr_fashion_recurated": "simclr_fashion",
    "dinov2_mixture_fashion": "dinov2_fashion",
    "dinov2_web_mixture": "dinov2_web_paper",
}
BASE = ["--config", str(ROOT / "configs" / "base.yaml")]


@pytest.mark.long
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_pretraining_config_is_valid(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ["fit", *BASE]
    if path.stem in DELTAS:
        arguments += ["--config", str(path.with_name(f"{DELTAS[path.stem]}.yaml"))]
    arguments += ["--config", str(path), "--data.pool", "pool.tar", "--print_config"]
    with pytest.raises(SystemExit) as ended:
        pretrain.main(arguments)
    assert ended.value.code == 0
    assert "class_path: lightning_modules." in capsys.readouterr().out


def test_head_lines_say_command_hardware_time_and_what_to_expect():
    for path in [*CONFIGS, *sorted((ROOT / "configs" / "curation").glob("*.yaml"))]:
        lines = path.read_text().splitlines()
        head = " ".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
        name = "NAME.yaml" if path.stem == "base" else path.name
        for word in (name, "recipes/", "Hardware", "ime: ", "Expect: "):
            assert word in head, f"{path}: no {word!r} in its first lines"


def test_a_misspelt_field_is_named_before_anything_starts(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = str(ROOT / "configs" / "pretrain" / "simclr_fashion.yaml")
    with pytest.raises(CuratedDataError, match=r"target_sise.*'target_size'"):
        pretrain.main(["fit", *BASE, "--config", config, "--data.curation.target_sise", "3"])


def test_what_a_module_does_not_take_is_said_in_one_line(monkeypatch, tmp_path, write_pool):
    write_pool([4])
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "pretrain" / "simclr_fashion.yaml")
    arguments = ["fit", *BASE, "--config", config, "--data.pool", str(tmp_path / "pool-*.tar")]
    for name, value, message in (
        ("temperature", "-1", r"^temperature .*-1\.0$"),
        ("backbone", "rsnet18", "'rsnet18'.*'resnet18'"),
        ("augmentation", "{colour: 1}", "'colour'"),
    ):
        with pytest.raises(CuratedDataError, match=message):
            pretrain.main([*arguments, f"--model.init_args.{name}", value])


def test_a_config_trains(monkeypatch, tmp_path, write_pool):
    shards = write_pool([40, 24])
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "pretrain" / "simclr_fashion.yaml")
    small = {
        "data.pool": str(tmp_path / "pool-*.tar"),
        "data.curation.target_size": 32,
        "data.embedder": "pixels:4",
        "data.batch_size": 8,
        "data.loader.num_workers": 0,
        "trainer.max_epochs": 1,
        "trainer.accelerator": "cpu",
    }
    overrides = [item for name, value in small.items() for item in (f"--{name}", str(value))]
    cli = pretrain.main(["fit", *BASE, "--config", config, *overrides])
    assert len(shards) == 2
    assert cli.trainer.global_step == 4
    assert len(cli.datamodule.selection) == 32
    # The checkpoint that it leaves is an embedder, and loads by itself.
    path = next((tmp_path / "runs" / "pretrain").rglob("*.ckpt"))
    images = torch.randn(2, 3, 28, 28)
    expected = cli.model.eval().embed(images)
    torch.testing.assert_close(resolve_embedder(f"checkpoint:{path}")(images), expected)
    torch.testing.assert_close(SimCLR.load_from_checkpoint(path).eval().embed(images), expected)
    # It predicts the features of the whole pool, in its order.
    found = cli.trainer.predict(cli.model, cli.datamodule)
    assert torch.cat([part["sample_id"] for part in found]).tolist() == list(range(64))
    assert torch.cat([part["label"] for part in found]).tolist() == [i % 3 for i in [*range(40), *range(24)]]
    features = torch.cat([part["embedding"] for part in found])
    images = torch.stack([batch for part in cli.datamodule.predict_dataloader() for batch in part["image"]])
    torch.testing.assert_close(features, cli.model.eval().embed(images))


@pytest.mark.long
def test_the_mixture_trains_with_a_tenth_of_the_batches_of_one_component(monkeypatch, tmp_path, caplog):
    monkeypatch.chdir(ROOT)
    folder = ROOT / "configs" / "pretrain"
    small = {
        "data.embedder": "pixels:4",
        "data.batch_size": 8,
        "data.loader.num_workers": 0,
        "data.cache_dir": str(tmp_path / "cache"),
        "trainer.max_steps": 10,
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "trainer.default_root_dir": str(tmp_path),
    }
    overrides = [item for name, value in small.items() for item in (f"--{name}", str(value))]
    files = ["dinov2_fashion.yaml", "dinov2_mixture_fashion.yaml"]
    configs = [item for name in files for item in ("--config", str(folder / name))]
    cli = pretrain.main(["fit", *BASE, *configs, *overrides])
    assert cli.trainer.global_step == 10
    assert cli.datamodule.statistics.of_component == {"curated": 56, "raw": 16, "balanced": 8}
    assert [len(component.selection or ()) for component in cli.datamodule.components[1:]] == [0, 0]
    assert len(cli.datamodule.component("curated").selection) == 1000


def test_a_misspelt_field_of_a_component_is_named(monkeypatch, tmp_path):
    config = tmp_path / "mixture.yaml"
    config.write_text("data: {mixture: {components: [{name: web, pool: a.tar, batchs: own}]}}")
    fashion = str(ROOT / "configs" / "pretrain" / "simclr_fashion.yaml")
    monkeypatch.chdir(ROOT)
    with pytest.raises(CuratedDataError, match=r"'web', batchs.*'batches'"):
        pretrain.main(["fit", *BASE, "--config", fashion, "--config", str(config)])


def test_commands_that_cannot_work_are_refused(monkeypatch, tmp_path, write_pool, capsys):
    write_pool([16])
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "pretrain" / "simclr_fashion.yaml")
    arguments = [*BASE, "--config", config, "--data.pool", str(tmp_path / "pool-*.tar")]
    with pytest.raises(ConfigError, match=r"^validate: SimCLR .*validation_step"):
        pretrain.main(["validate", *arguments, "--trainer.accelerator", "cpu"])
    with pytest.raises(SystemExit, match="2"):
        pretrain.main(["test", *arguments])
    assert "test" in capsys.readouterr().err


def test_a_batch_without_one_image_a_sample_is_not_predicted():
    module = SimCLR(backbone_options={"width": 4}, image_size=8).eval()
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(module.predict_step(images, 0), module.embed(images))
    assert list(module.predict_step({"image": images}, 0)) == ["embedding"]
    with pytest.raises(TypeError, match=r"'image'.*\['sample_id', 'views'\]"):
        module.predict_step({"views": [images, images], "sample_id": torch.arange(2)}, 0)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "suites").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_suite_is_valid(path):
    assert load_suite(path, EVALUATIONS)


def test_suites_with_errors_are_named(tmp_path):
    path = tmp_path / "suite.yaml"
    for text, message in (
        ("datasets: {a: {layout: folder, train: x, test: y, evaluation: [knn]}}", "'evaluations'"),
        ("datasets: {a: {layout: files, train: x, test: y}}", r"a\.layout: .*folder"),
        ("datasets: {a: {layout: folder, train: x, test: y, evaluations: [nn]}}", r"a\.evaluations: .*knn"),
        ("datasets: {}", r"suite\.yaml: .*datasets"),
    ):
        path.write_text(text)
        with pytest.raises(CuratedDataError, match=message):
            load_suite(path, EVALUATIONS)


def test_a_suite_runs_and_names_what_is_missing(tmp_path, write_pool, monkeypatch, capsys):
    write_pool([40], name="train")
    write_pool([20], name="test", seed=1)
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "datasets:\n"
        "  here:\n"
        "    {layout: shards, train: train-000.tar, test: test-000.tar, evaluations: [knn, health]}\n"
        "  gone: {layout: folder, train: nowhere/train, test: nowhere/test}\n"
    )
    out = tmp_path / "out"
    arguments = ["pixels:2", "pixels:4", "--suite", str(suite), "--root", str(tmp_path), "--workers", "0"]
    monkeypatch.setattr(
        "sys.argv", ["evaluate", *arguments, "--cache-dir", str(tmp_path / "c"), "--out", str(out)]
    )
    assert evaluate.main() == 1
    shown = capsys.readouterr()
    assert "not evaluated, gone: " in shown.err
    assert "nowhere" in shown.err
    table = (out / "table.md").read_text()
    assert "| here | k-NN, k = 10 |" in table
    assert "pixels:4 − pixels:2" in table
    assert (out / "results.json").exists()
    assert (out / "results.png").stat().st_size > 10_000


def test_the_web_scale_config_is_dinov2s_published_setting():
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "pretrain" / "dinov2_web_paper.yaml"))
    data, trainer = config["data"], config["trainer"]
    devices = trainer["devices"] * trainer["num_nodes"]
    assert data["batch_size"] * devices == 2048
    assert trainer["strategy"]["init_args"] == {"data_parallel_size": devices, "tensor_parallel_size": 1}
    with torch.device("meta"):  # a ViT-L, its teacher and heads without their gigabytes
        module = DINOv2(**config["model"]["init_args"])
    assert round(sum(p.numel() for p in module.backbone.parameters()) / 1e6) == 303
    assert module.backbone.net.num_prefix_tokens == 5
    module.global_batch_size = 2048
    module._trainer = SimpleNamespace(
        num_training_batches=data["curation"]["target_size"] // 2048,
        accumulate_grad_batches=1,
        estimated_stepping_batches=trainer["max_steps"],
    )
    assert module.peak_learning_rate == pytest.approx(2e-4 * 2**0.5)
    steps = [
        module.epochs_to_steps(module.hparams[f"{name}_epochs"])
        for name in ("warmup", "teacher_temperature_warmup", "freeze_last_layer")
    ]
    assert steps == pytest.approx([80 * 1250, 30 * 1250, 1250], rel=0.003)
    assert module.warmup_steps == steps[0]


def test_the_mixture_at_web_scale_is_dinov3s():
    """Its levels, a tenth of homogeneous batches, and steps (arXiv 2508.10104, sections 3.1 and 3.2)."""
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "pretrain" / "dinov2_web_mixture.yaml"))
    mixture = Mixture(**config["data"]["mixture"])
    levels = mixture.components[0].curation.levels
    assert [level.n_clusters * level.n_splits for level in levels] == [
        200_000_000, 8_000_000, 800_000, 100_000, 25_000,
    ]  # fmt: skip
    assert mixture.components[0].curation.target_size == 1_689_000_000
    assert dict(zip(mixture.names, mixture.shares, strict=True))["imagenet"] == pytest.approx(0.1)
    assert [component.batches for component in mixture.components] == ["mixed", "mixed", "own"]
    assert config["trainer"]["max_steps"] == 200_000
