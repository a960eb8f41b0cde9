"""What evaluations read from inside a network: patch tokens, feature maps, last blocks."""

import pytest
import torch

from curated_data.embedding import ModuleEmbedder, resolve_embedder
from curated_data.errors import EmbedderError
from lightning_modules import SimCLR
from lightning_modules.backbones import build_backbone
from recipes.features import TokenEmbedder, block_embedder


def test_a_transformers_tokens_and_blocks():
    torch.manual_seed(0)
    backbone = build_backbone("timm:vit_tiny_patch16_224", image_size=32, patch_size=8).eval()
    embedder = ModuleEmbedder(backbone.net, SimCLR("resnet10", image_size=32).eval_transform(), name="vit")
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    batch = embedder.preprocess(image)[None]
    expected = backbone.tokens(batch, n_last_blocks=4)
    tokens = TokenEmbedder(embedder)
    assert tokens.grid == (4, 4, 192)
    torch.testing.assert_close(tokens(tokens.preprocess(image)[None]).view(1, 16, 192), expected[-1][1])
    blocks = block_embedder(embedder)
    kinds = blocks.kinds(blocks(batch))
    torch.testing.assert_close(kinds["class token"], expected[-1][0])
    torch.testing.assert_close(kinds["4 blocks"], torch.cat([token for token, _ in expected], 1))
    average = torch.cat([expected[-1][0], expected[-1][1].mean(1)], 1)
    torch.testing.assert_close(kinds["class token, average"], average)
    assert kinds["4 blocks, average"].shape == (1, 5 * 192)
    assert len({embedder.fingerprint, tokens.fingerprint, blocks.fingerprint}) == 3


def test_a_convolutional_networks_last_map():
    module = SimCLR("resnet10", image_size=64, backbone_options={"width": 4})
    embedder = resolve_embedder(module)
    tokens = TokenEmbedder(embedder)
    assert tokens.grid == (2, 2, 32)
    image = torch.randint(0, 256, (3, 90, 60), dtype=torch.uint8)  # the whole of it, squeezed
    batch = tokens.preprocess(image)[None]
    assert batch.shape == (1, 3, 64, 64)
    # The embedding is the average of the last map.
    torch.testing.assert_close(tokens(batch).view(1, 4, 32).mean(1), embedder(batch))
    assert block_embedder(embedder) is None
    with pytest.raises(EmbedderError, match="no network in it"):
        TokenEmbedder(ModuleEmbedder(lambda x: x.flatten(1), embedder.preprocess, dimension=3))
