"""Weights that people have: files without a network's name, wrapped state dicts, folders of transformers."""

import re

import numpy as np
import pytest
import torch

from curated_data.embedding.resolve import resolve_embedder
from curated_data.errors import EmbedderError


@pytest.mark.parametrize("name", ["resnet18.pth", "dir/model.safetensors", "last.ckpt"])
def test_a_file_says_which_prefix_to_write(name):
    with pytest.raises(EmbedderError, match=re.escape(f"timm:NAME@{name}")):
        resolve_embedder(name)


def test_wrapped_state_dicts_are_opened(tmp_path):
    plain = resolve_embedder("torchvision:resnet18@random")
    state = {name.removeprefix("network."): value for name, value in plain.state_dict().items()}
    state = {name: value + 1 for name, value in state.items()}
    wraps = {
        "plain": state,
        "lightning": {"state_dict": state, "epoch": 3},
        "dino": {"teacher": {f"backbone.{n}": v for n, v in state.items()} | {"head.last": torch.ones(2)}},
        "ddp": {"model": {f"module.{n}": v for n, v in state.items()}},
    }
    expected = None
    for name, content in wraps.items():
        torch.save(content, tmp_path / f"{name}.pth")
        found = resolve_embedder(f"torchvision:resnet18@{tmp_path}/{name}.pth")
        expected = found.fingerprint if expected is None else expected
        assert found.fingerprint == expected != plain.fingerprint
    torch.save({"model": {"other": torch.ones(2)}}, tmp_path / "other.pth")
    with pytest.raises(EmbedderError, match=r"other\.pth"):
        resolve_embedder(f"torchvision:resnet18@{tmp_path}/other.pth")


@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "siglip"])
def test_towers_of_transformers_with_their_own_processor(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "dinov2":
        config = transformers.Dinov2Config(**small, image_size=28, patch_size=14, mlp_ratio=1)
        network = transformers.Dinov2Model(config)
        processor = transformers.BitImageProcessorFast(size={"shortest_edge": 28}, crop_size=28)
    elif kind == "dinov3":
        if not hasattr(transformers, "DINOv3ViTModel"):
            pytest.skip("this transformers is older than DINOv3")
        config = transformers.DINOv3ViTConfig(**small, image_size=28, patch_size=14, num_register_tokens=1)
        network = transformers.DINOv3ViTModel(config)
        processor = transformers.DINOv3ViTImageProcessorFast(size={"height": 28, "width": 28})
    else:
        vision = small | {"image_size": 28, "patch_size": 14}
        config = transformers.SiglipConfig(vision_config=vision, text_config=small | {"vocab_size": 20})
        network = transformers.SiglipModel(config)
        processor = transformers.SiglipImageProcessorFast(size={"height": 28, "width": 28})
    network.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    found = resolve_embedder(f"transformers:{tmp_path}")
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    batch = found.preprocess(image)[None]
    assert batch.shape == (1, 3, 28, 28)
    with torch.inference_mode():
        own = processor(images=image, return_tensors="pt")["pixel_values"]
        network.eval()
        expected = (network.vision_model if kind == "siglip" else network)(pixel_values=own).pooler_output
        np.testing.assert_allclose(found(batch), expected, atol=1e-5)
    assert found.dimension == 16
    assert found.fingerprint == resolve_embedder(f"transformers:{tmp_path}").fingerprint


def test_a_name_that_cannot_be_found_is_one_error(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EmbedderError, match=re.escape(str(tmp_path))):
        resolve_embedder(f"transformers:{tmp_path}")
