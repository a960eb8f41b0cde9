"""What masked methods need of a timm vision transformer: its tokens, some masked or left out."""

from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, cat, where


def encode(
    net: VisionTransformer,
    images: Tensor,
    *,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Class token (B, d) and patch tokens (B, N, d) after all blocks and the final norm.

    Args:
        images: (B, 3, H, W).
        mask: (B, N) boolean; where True, `mask_token` (d,) stands for the patch.
        keep: (B, n) indices of patches; the others are left out, and the output has n patch tokens.
    """
    patches = net.patch_embed(images)  # (B, N, d), or (B, h, w, d) where the net takes several image sizes
    if mask is not None:
        assert mask_token is not None, "a mask needs the token that stands for what it hides"
        patches = where(mask.view(*patches.shape[:-1], 1), mask_token.to(patches.dtype), patches)
    tokens = net._pos_embed(patches)
    n_prefix = net.num_prefix_tokens
    if keep is not None:
        seen = tokens[:, n_prefix:].gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))
        tokens = cat([tokens[:, :n_prefix], seen], dim=1)
    tokens = net.norm_pre(tokens)
    # After `net.set_grad_checkpointing()` blocks are computed once more for their gradients, to save memory.
    tokens = checkpoint_seq(net.blocks, tokens) if net.grad_checkpointing else net.blocks(tokens)
    tokens = net.norm(tokens)
    return tokens[:, 0], tokens[:, n_prefix:]
