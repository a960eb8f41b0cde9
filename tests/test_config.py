"""Settings: what is accepted, and one clear error for what is not."""

import dataclasses

import numpy as np
import pytest
from omegaconf import OmegaConf

from curated_data.config import CurationConfig, load_config
from curated_data.errors import ConfigError
from curated_data.levels import Level

GOOD = {
    "target_size": 100,
    "levels": [{"n_clusters": 20, "n_resamples": 3, "sample_size": 2}, {"n_clusters": 5}],
}


def test_every_form_of_the_same_settings_agrees(tmp_path):
    (tmp_path / "a.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(GOOD)))
    levels = [Level(n_clusters=20, n_resamples=3, sample_size=2), Level(n_clusters=5)]
    forms = [
        GOOD,
        OmegaConf.create(GOOD),
        str(tmp_path / "a.yaml"),
        tmp_path / "a.yaml",
        CurationConfig(target_size=100, levels=levels),
        CurationConfig(target_size=np.int64(100), levels=levels),
        {**GOOD, "levels": levels},
    ]
    loaded = [load_config(form) for form in forms]
    assert all(config == loaded[0] for config in loaded)
    assert loaded[0].levels == levels
    assert load_config(loaded[0]) == loaded[0]


def test_auto_levels():
    assert load_config({"target_size": 5, "levels": "auto"}).levels is None
    assert CurationConfig(target_size=5, levels="auto").levels is None
    with pytest.raises(ConfigError, match="'many'"):
        CurationConfig(target_size=5, levels="many")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_sise": 5}, "target_sise.*'target_size'"),
        ({"embedding": {"batchsize": 3}}, r"embedding\.batchsize.*'batch_size'"),
        ({"levels": [{"n_cluster": 3}]}, "n_cluster.*Level.*'n_clusters'"),
        ({"target_size": "x"}, "target_size.*'x'"),
        ({"target_size": 0}, "target_size: .* 0"),
        ({"seed": -1}, "seed"),
        ({"strategy": "closet"}, "strategy.*'closet'.*'closest'"),
        ({"metric": "manhattan"}, "metric: .*'manhattan'"),
        ({"levels": []}, "levels: "),
        ({"levels": [{"n_clusters": 3}, {"n_clusters": 4}]}, r"levels\[1\].n_clusters: 4 .* 3"),
        ({"levels": [{"n_clusters": 3, "n_splits": 2, "n_resamples": 3}]}, "n_splits|splits or resampling"),
        ({"near_duplicates": {"threshold": 1.5}}, "threshold: .* 1.5"),
        ({"near_duplicates": {"threshold": -1}}, r"near_duplicates\.threshold: .*-1"),
        ({"target_size": "${nowhere}"}, "nowhere"),
        ({"tol": float("nan")}, "tol"),
        ({"max_memory_gb": 0}, "max_memory_gb: .*0.001"),
        ({"embedding": 3}, "embedding: .* 3"),
        ({"near_duplicates": [1]}, r"near_duplicates: .*\[1\]"),
        ({"levels": {"n_clusters": 3}}, "levels: .*list"),
        ({"near_duplicates": {"held_out": "a.tar"}}, r"held_out: .*\[a\.tar\]"),
        ({"near_duplicates": {"held_out": {"a": 1}}}, r"near_duplicates\.held_out: "),
        ({"nested_sizes": [100]}, "nested_sizes: .*target_size, 100.* 100"),
        ({"nested_sizes": [0]}, "nested_sizes: .* 0"),
        ({"quotas": {"temperature": -1}}, "quotas.temperature: .*-1"),
        ({"quotas": {"temprature": 1}}, "temprature.*'temperature'"),
        ({"quotas": {"cap": 0}}, "quotas.cap: .* 0"),
        ({"quotas": {"cap": 1.5}}, "quotas.cap: .* 1.5"),
        ({"quotas": {"level": 0}}, "quotas.level: .* 0"),
        ({"quotas": {"weights": {"a": 1}}}, "quotas.weights: .*'a'"),
        ({"quotas": {"weights": {3: -1}}}, "quotas.weights: .*-1"),
        ({"quotas": {"weights": [1, "b"]}}, "quotas.weights: .*'b'"),
        ({"quotas": {"weights": "weights.txt"}}, "quotas.weights: .*'weights.txt'"),
        ({"retrieval": {"method": "nearst"}}, "retrieval.method.*'nearest'"),
        ({"retrieval": {"seeds": "a.tar"}}, r"retrieval\.seeds: .*'a.tar'"),
        ({"retrieval": {"seeds": {"a": 3}}}, r"retrieval\.seeds\.a: .* 3"),
        ({"retrieval": {"seeds": {"a": "a.npy"}, "limit": {"b": 1}}}, "limit: .*'b'"),
        ({"retrieval": {"seeds": {"a": "a.npy"}, "limit": 1.5}}, "limit: .* 1.5"),
        ({"retrieval": {"least": 2}}, "retrieval.least: .* 2"),
        ({"retrieval": {"n": 0}}, "retrieval.n: .* 0"),
        ({"retrieval": {"seeds": {"a": "a.npy"}, "method": "weights"}}, "retrieval.method: 'weights'"),
        ({"quotas": 3}, "quotas: .* 3"),
        ({"target_size": {"a": 1}}, "target_size: "),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        load_config({**GOOD, **change})


@pytest.mark.parametrize("field", dataclasses.fields(CurationConfig), ids=lambda field: field.name)
def test_a_value_of_another_kind_is_named_by_its_field(field):
    """Of each field: a list, a mapping, a word, a fraction or a truth value, where it takes another kind."""
    for value in ([1], {"a": 1}, "many", 1.5, True, -1):
        if field.name in ("tol", "max_memory_gb") and value == 1.5:
            continue
        if (field.name, value) in (
            ("where", "many"),
            ("exclude", [1]),
            ("include", [1]),
            ("nested_sizes", [1]),
        ):
            continue
        with pytest.raises(ConfigError, match=rf"^{field.name}\b"):
            load_config({**GOOD, field.name: value})


def test_what_is_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="target_size: "):
        load_config({"seed": 3})
    with pytest.raises(ConfigError, match=r"^curation: .* int\b"):
        load_config(3)
    with pytest.raises(ConfigError, match=r"none\.yaml: "):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match=r"bad\.yaml: .*YAML"):
        load_config(tmp_path / "bad.yaml")


def test_every_numeric_and_named_field_is_checked():
    """A new field must be given its range or its choices: every number and every word has one."""
    from curated_data import config as module

    checked = set(module._CHOICES) | set(module._LEAST)
    for schema, prefix in (
        (CurationConfig, ""),
        (module.EmbeddingConfig, "embedding."),
        (module.NearDuplicateConfig, "near_duplicates."),
        (module.RetrievalConfig, "retrieval."),
    ):
        for item in dataclasses.fields(schema):
            if item.type in (int, float, str):
                assert prefix + item.name in checked
