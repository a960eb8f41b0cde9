"""What evaluations read from inside a network: patch tokens, feature maps, last blocks."""

import pytest
import torch
from torch import nn

from curated_data.embedding import ModuleEmbedder, resolve_embedder
from curated_data.embedding.tokens import TokenEmbedder, block_embedder
from curated_data.errors import EmbedderError
from lightning_modules import SimCLR
from lightning_modules.backbones import build_backbone


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
    with pytest.raises(EmbedderError, match=r"custom: .*network"):
        TokenEmbedder(ModuleEmbedder(lambda x: x.flatten(1), embedder.preprocess, dimension=3))


class HubTransformer(nn.Module):
    """A transformer with the methods of DINOv2's hub entries, around timm's."""

    def __init__(self, net):
        super().__init__()
        self.timm, self.cls_token, self.blocks, self.embed_dim = net, net.cls_token, net.blocks, net.embed_dim

    def forward(self, images):
        return self.timm(images)

    def get_intermediate_layers(self, x, n=1, reshape=False, return_class_token=False, norm=True):
        outputs = self.timm.get_intermediate_layers(x, n=n, return_prefix_tokens=True, norm=norm)
        patches, tokens = zip(*((patches, prefix[:, 0]) for patches, prefix in outputs))
        return tuple(zip(patches, tokens)) if return_class_token else patches


@pytest.mark.parametrize("depth", [2, 5])  # of fewer than four blocks all are taken
def test_transformers_of_dinov2s_hub_give_what_timms_do(depth):
    torch.manual_seed(0)
    net = build_backbone("timm:vit_tiny_patch16_224", image_size=32, patch_size=8, depth=depth).eval().net
    preprocess = SimCLR("resnet10", image_size=32).eval_transform()
    ours, theirs = (ModuleEmbedder(network, preprocess) for network in (net, HubTransformer(net)))
    batch = preprocess(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8))[None]
    torch.testing.assert_close(TokenEmbedder(ours)(batch), TokenEmbedder(theirs)(batch))
    kinds, expected = (b.kinds(b(batch)) for b in map(block_embedder, (theirs, ours)))
    assert list(kinds)[2] == f"{min(depth, 4)} blocks"
    for name in expected:
        torch.testing.assert_close(kinds[name], expected[name])

    class Older(HubTransformer):  # DINO's own, which gives no class tokens apart
        def get_intermediate_layers(self, x, n=1):
            raise AssertionError

    assert block_embedder(ModuleEmbedder(Older(net), preprocess)) is None
