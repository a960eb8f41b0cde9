"""What masked methods need of a timm vision transformer: its tokens, some masked or left out."""

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn, where

from lightning_modules.backbones import Backbone


def require_vision_transformer(backbone: Backbone) -> VisionTransformer:
    """The backbone's network, if it is a timm `VisionTransformer` with a class token.

    Raises:
        ValueError: it is not.
    """
    net = backbone.net
    if not isinstance(net, VisionTransformer) or net.cls_token is None:
        raise ValueError(
            f"backbone {backbone.name!r}: this method needs a timm vision transformer with a class token, "
            "for example 'timm:vit_small_patch16_224'"
        )
    return net


def image_tokens(
    net: VisionTransformer,
    images: Tensor,
    *,
    mask: Tensor | None = None,
    mask_token: nn.Parameter | None = None,
) -> Tensor:
    """Input tokens (B, prefix + N, d) with positions: class token, registers, patches.

    Args:
        images: (B, 3, H, W).
        mask: (B, N) boolean; where True, `mask_token` (d,) stands for the patch.
    """
    patches = net.patch_embed(images)  # (B, N, d), or (B, h, w, d) where the net takes several image sizes
    if mask is not None and mask_token is not None:
        patches = where(mask.view(*patches.shape[:-1], 1), mask_token.to(patches.dtype), patches)
    return net._pos_embed(patches)


def transform(net: VisionTransformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Class token (B, d) and patch tokens (B, N, d) after all blocks and the final norm."""
    x = net.norm(net.blocks(net.norm_pre(tokens)))
    return x[:, 0], x[:, net.num_prefix_tokens :]
