"""A network of a user's with fixed weights: `test_known_fingerprints.py` knows its fingerprint."""

import torch
from torch import nn

GAIN = 3


class Network(nn.Module):
    """Fixed weights, and a setting that only its code reads."""

    power = 2

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        with torch.no_grad():
            self.layer.weight.copy_(torch.arange(6.0).view(2, 3))
            self.layer.bias.zero_()
        self.__gain = 0.5

    @torch.no_grad()
    def forward(self, x):
        return scaled(self.layer(x.mean((2, 3)))) ** self.power * self.__gain


def scaled(x):
    return x * GAIN
