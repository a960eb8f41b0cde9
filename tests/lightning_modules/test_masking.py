"""Masks: exact counts, the same for a sample wherever it lands; MAE's shuffle and patches put back."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curated_data.randomness import seeded
from lightning_modules import MAE
from lightning_modules.masking import block_mask, random_mask
from lightning_modules.pretraining.mae import patchify, reconstruction_loss, sine_cosine_positions
from lightning_modules.randomness import mix, sample_noise


def test_noise_is_uniform_and_belongs_to_the_sample():
    ids = torch.arange(2000)
    noise = sample_noise(ids, 50, seed=0, draw=0)
    counts = torch.histc(noise, 20, 0, 1)
    expected = noise.numel() / 20
    assert float(((counts - expected) ** 2 / expected).sum()) < 60  # chi-squared, 19 degrees: p about 4e-6
    assert float(torch.corrcoef(noise.T).fill_diagonal_(0).abs().max()) < 0.12
    assert torch.equal(sample_noise(ids[[7, 3]], 50, seed=0, draw=0), noise[[7, 3]])
    for other in (sample_noise(ids, 50, seed=1, draw=0), sample_noise(ids, 50, seed=0, draw=1)):
        assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1])) < 0.02


def test_seeded_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(mix(1, 2, 3), torch.device("cpu")):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(mix(1, 2, 3), torch.device("cpu")):
        assert torch.equal(torch.rand(3), inside)


@given(
    n=st.integers(2, 40),
    keep=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    ids=st.lists(st.integers(0), max_size=5),
)
@settings(max_examples=50, deadline=None)
def test_random_masks_restore(n, keep, seed, ids):
    keep = min(keep, n)
    ids = torch.tensor([i % 2**62 for i in ids] or [0])
    kept, restore = random_mask(ids, n, keep, seed=seed, draw=3)
    tokens = torch.arange(len(ids) * n).view(len(ids), n)
    order = restore.argsort(1)
    assert torch.equal(order[:, :keep], kept)
    assert torch.equal(tokens.gather(1, order).gather(1, restore), tokens)
    assert torch.equal((restore >= keep).sum(1), torch.full((len(ids),), n - keep))


def test_block_masks_have_exact_counts_and_are_blocks():
    ids = torch.arange(400)
    mask = block_mask(ids, (14, 14), seed=0, draw=5)
    counts = mask.sum(1)
    masked = counts[counts > 0]
    assert 0.4 < len(masked) / 400 < 0.6
    assert masked.min() >= round(0.1 * 196) - 1
    assert masked.max() <= round(0.5 * 196) + 1
    assert abs(float(masked.float().mean()) / 196 - 0.3) < 0.03
    # Neighbours of a masked patch are masked far more often than under single random patches.
    grid = mask[counts > 0].view(-1, 14, 14)
    together = (grid[:, :, 1:] & grid[:, :, :-1]).sum() / grid[:, :, 1:].sum()
    assert float(together) > 0.6
    assert torch.equal(block_mask(ids[[5, 9]], (14, 14), seed=0, draw=5), mask[[5, 9]])
    assert not block_mask(ids, (14, 14), seed=0, draw=5, probability=0.0).any()


def test_patches_are_in_reading_order():
    images = torch.randn(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    expected = torch.nn.functional.unfold(images, 4, stride=4).view(2, 3, 16, 6).permute(0, 3, 2, 1)
    torch.testing.assert_close(patches, expected.reshape(2, 6, 48))


def test_mae_starts_by_xaviers_rule():
    options = {"patch_size": 4, "depth": 1, "embed_dim": 96, "num_heads": 3}
    module = MAE("timm:vit_tiny_patch16_224", image_size=16, backbone_options=options, decoder_dimension=64,
                 decoder_depth=1, decoder_heads=2)  # fmt: skip
    for block in (module.backbone.net.blocks[0], module.decoder.blocks[0]):
        for weight in (block.mlp.fc1.weight, block.attn.qkv.weight):
            bound = (6 / sum(weight.shape)) ** 0.5
            assert 0.95 * bound < weight.abs().max() <= bound
        assert not block.attn.qkv.bias.any()


def test_reconstruction_loss_is_the_loop():
    pixels, predicted = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    masked = torch.rand(2, 5) < 0.5
    masked[0, 0] = True
    terms = []
    for b, i in masked.nonzero().tolist():
        target = (pixels[b, i] - pixels[b, i].mean()) / (pixels[b, i].var() + 1e-6).sqrt()
        terms.append((predicted[b, i] - target).square().mean())
    torch.testing.assert_close(
        reconstruction_loss(predicted, pixels, masked=masked), torch.stack(terms).mean()
    )
    perfect = reconstruction_loss(pixels, pixels, masked=masked, normalize=False)
    assert float(perfect) == 0.0


def test_positions_differ_and_are_bounded():
    positions = sine_cosine_positions(4, 5, 16)
    assert positions.shape == (20, 16)
    assert float(torch.pdist(positions).min()) > 0.1
    assert float(positions.abs().max()) <= 1.0
