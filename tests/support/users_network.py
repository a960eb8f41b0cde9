"""A network of a user's, as source."""

import itertools
import linecache
import types

NETWORK = """
import functools
import logging
import torch
from torch import nn

log = logging.getLogger(__name__)

class Base(nn.Module):
    def pooled(self, x):
        return x.mean((2, 3))

class Mine(Base):
    power = 2

    def __init__(self, scale=1.0, scorer=None):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        nn.init.ones_(self.layer.weight), nn.init.zeros_(self.layer.bias)
        self.scale, self.unused = scale, object()
        self.scorer = scorer
        self.register_buffer("shift", torch.zeros(4), persistent=False)

    @property
    def factor(self):
        return self.scale + 1

    def forward(self, x):
        log.debug("a batch")
        return scaled(self.pooled(self.layer(x)) * self.factor + self.shift)

    def training_step(self, batch):
        return undefined_here(batch)

def scaled(x):
    return x * gain(x)

def gain(x):
    return 3 if x.ndim else scaled(x)
"""


COUNT = itertools.count()


def load(source: str, name: str = "users_module") -> types.ModuleType:
    """A module of the user's, whose source is at hand as that of a notebook's cell is."""
    file = f"/cells/{next(COUNT)}.py"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = types.ModuleType(name)
    exec(compile(source, file, "exec", dont_inherit=True), vars(module))
    return module
