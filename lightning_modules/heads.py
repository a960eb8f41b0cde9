"""Projection heads: small networks between the features and a loss, thrown away after training."""

import itertools

import torch.nn.functional as F
from torch import Tensor, nn


def mlp(
    dimensions: list[int], *, batch_norm: bool = False, activation: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Linear layers with an activation between them: `mlp([512, 512, 128])` has one hidden layer.

    Args:
        dimensions: input, hidden..., output.
        batch_norm: after every linear layer but the last, which then needs no bias of the others.
    """
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(dimensions)):
        last = i == len(dimensions) - 2
        layers.append(nn.Linear(inputs, outputs, bias=last or not batch_norm))
        if not last:
            if batch_norm:
                layers.append(nn.BatchNorm1d(outputs))
            layers.append(activation())
    return nn.Sequential(*layers)


class PrototypeHead(nn.Module):
    """DINO's head: an MLP with GELU to a bottleneck, normalised, then the cosine to K prototypes.

    Args:
        dimension: of the features.
        n_prototypes: K.
        hidden, bottleneck: widths of the MLP.
        n_layers: linear layers of the MLP.
    """

    def __init__(
        self,
        dimension: int,
        n_prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        n_layers: int = 3,
    ) -> None:
        super().__init__()
        self.mlp = mlp([dimension, *[hidden] * (n_layers - 1), bottleneck], activation=nn.GELU)
        self.prototypes = nn.Linear(bottleneck, n_prototypes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # The original's 0.02 at its width of 2048; kept fixed in a narrow head it would make the
                # bottleneck so small that its normalisation blows gradients up a thousandfold.
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> Tensor:
        x = F.normalize(self.mlp(features), dim=-1, eps=1e-6)
        return F.linear(x, F.normalize(self.prototypes.weight, dim=-1))
