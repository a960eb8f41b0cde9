"""Code of a user's, in as many forms as Python 3.11 has: `test_source.py` knows the digest of each."""
# ruff: noqa
# fmt: off

from __future__ import annotations
import functools
from dataclasses import dataclass
GAIN = 3
other: int = 4
def deco(f):
    @functools.wraps(f)
    def inner(*a, **k):
        return f(*a, **k) + GAIN
    return inner

@deco
@functools.lru_cache(maxsize=None)
def decorated(x: int, *, k: float = 1.5, **rest) -> int:
    """doc"""
    # comment
    y: Undefined = x
    if __debug__:
        assert helper(x), f"no {x!r:>{GAIN}} 'a' {'b'}"
    é = [GAIN * i for i in range(3) if (lambda z: z + other)(i)]
    return (f"a{x}"
            "b" 'c' + str(rb"x"[0:1])) if x != 1 else {GAIN: é, **rest}

def helper(x):
    try:
        return x[1:2, ...] @ GAIN  # c
    except* ValueError as e:
        raise RuntimeError from e
    while (n := x): x -= 1
pair = (lambda x: x + 1, lambda x: x + 2, lambda x: lambda x: GAIN)
ünïcode = "é" and (lambda q: "é" + q)
class Base: pass
class Net(Base):
    scale = 2
    table: dict[str, Missing] = {"a": GAIN}
    def forward(self, x):
        def local(v): return v * self.scale + GAIN
        match x:
            case {"a": [1, *rest]}: return local(rest)
            case _: return local(super().forward(x))
    @property
    def p(self): return GAIN
@dataclass
class Data:
    a: int
    b: Missing = 3
def make(n):
    def inner(x): return x * n + other
    return inner
made = make(3)
async def co(x):
    async for y in x: yield await y
