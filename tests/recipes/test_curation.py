"""Curation from YAML, and re-curation with its table, as recipes: on real images, made small."""

import io
import json
import re
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from PIL import Image

from curated_data import ShardPool, ShardWriter
from curated_data.config import load_config
from curated_data.errors import ConfigError, CuratedDataError
from curated_data.selection.metrics import class_balance
from lightning_modules import SimCLR, TSimCNE
from recipes import curate, recurate, visualise

ROOT = Path(__file__).parents[2]
CURATIONS = sorted((ROOT / "configs" / "curation").glob("*.yaml"))
BASE = ROOT / "configs" / "curation" / "base.yaml"
FASHION = ROOT / "configs" / "curation" / "fashion.yaml"
SMALL = ["embedder=pixels:8", "curation.target_size=200", "curation.embedding.num_workers=0"]


@pytest.mark.parametrize("path", CURATIONS, ids=lambda path: path.stem)
def test_every_curation_config_is_valid(path):
    delta = [FASHION] if path.stem == "fashion_export" else []
    needed = (
        ["pool=pool.tar", "embedder=pixels:8", "curation.target_size=1"] if path == BASE else ["pool=a.tar"]
    )
    settings = curate.read_settings([BASE, *delta, path], needed)
    config = load_config(settings.curation)
    assert config.strategy == "random"
    if path.stem == "web_paper":  # arXiv 2405.15613: 10M, 500k, 50k and 10k clusters
        totals = [level.n_clusters * level.n_splits for level in config.levels]
        assert totals == [10_000_000, 500_000, 50_000, 10_000]


def test_a_curation_config_runs(tmp_path, fashion_train, fashion_test, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    configs = [
        item
        for path in (BASE, FASHION, FASHION.with_name("fashion_export.yaml"))
        for item in ("--config", path)
    ]
    near = f"curation.near_duplicates.held_out=[{fashion_test[0]}]"
    arguments = [*map(str, configs), f"pool={fashion_train[0]}", near, *SMALL]
    assert curate.main(arguments) == 0
    shown = capsys.readouterr().out
    pool = ShardPool(fashion_train[0])
    labels = pool.labels(np.arange(len(pool)))
    ids = np.load(re.search(r"ids: (\S+)", shown)[1])
    row = re.search(r"curated +│ +200 │ +\d+ │ +([\d.]+)", shown)
    assert float(row[1]) == pytest.approx(class_balance(labels, ids).entropy_after, abs=5e-4)
    exported = np.load(tmp_path / "runs" / "curate" / "selected" / "ids.npy")
    assert sorted(exported) == sorted(ids)
    assert "</html>" in (tmp_path / "runs" / "curate" / "fashion.html").read_text()
    assert curate.main([*arguments, "curation.target_size=201"]) == 0  # the selection alone is made again
    assert len(list((tmp_path / "runs" / "cache" / "tree").glob("*/manifest.json"))) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["curation.target_sise=5"], "target_sise: .*'target_size'"),
        (["embeder=pixels:8"], "embeder: .*'embedder'"),
        (["curation.metric=12"], "metric: .*'12'.*'l2'"),
        (["cache_dir=${nowhere}"], r"nowhere"),
        (["target_size"], "target_size: .*FIELD=VALUE"),
    ],
)
def test_errors_in_settings_are_named_before_anything_starts(overrides, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        curate.run(curate.read_settings([BASE, FASHION], overrides))
    assert curate.main(["--config", str(BASE), "--config", str(FASHION), *overrides]) == 2
    assert not list(tmp_path.iterdir())


def test_a_file_of_settings_that_is_a_list_is_named(tmp_path, capsys):
    (tmp_path / "list.yaml").write_text("- pool: x")
    assert curate.main(["--config", str(tmp_path / "list.yaml")]) == 2
    assert "list.yaml: expected fields and values, found a list" in capsys.readouterr().err


def test_a_missing_pool_is_named(capsys):
    assert curate.main(["--config", str(FASHION.with_name("web_paper.yaml"))]) == 2
    assert "pool: missing" in capsys.readouterr().err


def test_recuration_prints_what_it_changed(tmp_path, fashion_train, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {
        "data.pool": fashion_train[0],
        "data.curation.target_size": 128,
        "data.curation.embedding.num_workers": 0,
        "data.embedder": "pixels:4",
        "data.loader.num_workers": 0,
        "model.backbone_options": '{"width": 4}',
        "trainer.max_epochs": 3,
        "trainer.accelerator": "cpu",
        "trainer.enable_checkpointing": "false",
        "trainer.logger": "false",
        "recuration.every_n_epochs": 1,
        "recuration.most": 1,
    }
    configs = [
        "--config",
        ROOT / "configs" / "base.yaml",
        "--config",
        ROOT / "configs/pretrain/simclr_fashion.yaml",
    ]
    given = [
        str(item) for pair in ((f"--{name}", value) for name, value in settings.items()) for item in pair
    ]
    table = recurate.main(["fit", *map(str, configs), *given])
    rows = list(zip(*(column.cells for column in table.columns)))
    assert [row[0] for row in rows] == ["0", "1"]  # one re-curation, after the first epoch
    folders = (tmp_path / "runs" / "cache" / "selection").glob("*/manifest.json")
    first, second = (
        np.load(path.parent / "ids.npy")
        for path in sorted(folders, key=lambda path: json.loads(path.read_text())["settings"]["seed"])
    )
    shared = len(np.intersect1d(first, second))
    assert rows[1][2] == f"{1 - shared / 128:.1%}"
    assert rows[1][3] == f"{shared / (256 - shared):.3f}"
    labels = ShardPool(fashion_train[0]).labels(np.arange(1100))
    counts = np.bincount(labels[second])
    shares = counts[counts > 0] / 128
    assert float(rows[1][5]) == pytest.approx(-(shares * np.log(shares)).sum(), abs=5e-4)


def test_recuration_settings_are_checked(monkeypatch):
    monkeypatch.chdir(ROOT)
    configs = ["--config", "configs/base.yaml", "--config", "configs/pretrain/simclr_fashion.yaml"]
    with pytest.raises(CuratedDataError, match=r"every_n_epochs: .* 0"):
        recurate.main(["fit", *configs, "--recuration.every_n_epochs", "0"])
    twice = [
        *configs,
        "--config",
        "configs/pretrain/simclr_fashion_recurated.yaml",
        "--data.pool",
        "pool.tar",
    ]
    with pytest.raises(ConfigError, match=r"trainer\.callbacks: .*curated_data\.RecurationCallback"):
        recurate.main(["fit", *twice])


@pytest.mark.long
def test_maps_of_embeddings_and_of_a_trained_module(tmp_path, fashion_train, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [fashion_train[0], "--target-size", "100", "--embedder", "pixels:8", "--epochs", "3"]
    assert visualise.main([*arguments, "--out", "embedded"]) == 0
    module = TSimCNE("resnet10", image_size=28, small_images=True, backbone_options={"width": 4})
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint("module.ckpt")
    assert visualise.main([*arguments, "--out", "trained", "--module", "module.ckpt"]) == 0
    capsys.readouterr()
    pool = ShardPool(fashion_train[0])
    opened = [Image.open(io.BytesIO(sample["png"])).convert("RGB") for sample in pool.read(np.arange(3))]
    images = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in opened]
    transform = module.eval_transform()
    with torch.inference_mode():
        expected = module.eval().coordinates(torch.stack([transform(image) for image in images]))
    table = np.loadtxt("trained/map.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(table[:3, 1:3], expected, rtol=1e-3, atol=1e-3)
    for out in ("embedded", "trained"):
        quality = json.loads(Path(out, "quality.json").read_text())
        assert (
            quality["n_samples"] == len(pool) == len(np.loadtxt(f"{out}/map.csv", delimiter=",", skiprows=1))
        )
        assert 0.1 < quality["knn"] <= 1
        assert {"map.png", "report.html"} <= {path.name for path in Path(out).iterdir()}
    other = SimCLR("resnet10", image_size=28, small_images=True, backbone_options={"width": 4})
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False)
    trainer.strategy.connect(other)
    trainer.save_checkpoint("other.ckpt")
    assert visualise.main([*arguments, "--out", "other", "--module", "other.ckpt"]) != 0
    assert "only TSimCNE has a map" in capsys.readouterr().err


def test_classes_that_are_no_integers_leave_out_the_figures_about_them(
    tmp_path, fashion_train, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    source = ShardPool(fashion_train[0])
    with ShardWriter("words-%d.tar") as writer:
        for sample in source.read(np.arange(60)):
            writer.write({"__key__": sample["__key__"], "png": sample["png"], "cls": b"shoe"})
    assert (
        curate.main(["--config", str(BASE), "pool=words-0.tar", *SMALL[:1], "curation.target_size=20"]) == 0
    )
    shown = capsys.readouterr()
    assert "cluster perplexity" in shown.out
    assert "entropy" not in shown.out
    assert (
        visualise.main(["words-0.tar", "--embedder", "pixels:8", "--target-size", "20", "--epochs", "1"]) == 0
    )
    assert not Path("runs/map/quality.json").exists()
