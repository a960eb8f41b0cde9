"""What changes an embedder's output changes its fingerprint, wherever in its code or objects it stands."""

import functools
import importlib.util
import io
import logging
import math
import threading
import types

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from curated_data.embedding import identity
from curated_data.embedding.embedders import resolve_embedder
from curated_data.embedding.identity import module_fingerprint
from curated_data.errors import EmbedderError

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


def load(source: str, name: str = "users_module") -> types.ModuleType:
    module = types.ModuleType(name)
    exec(compile(source, name, "exec"), vars(module))
    return module


def of(*changes: tuple[str, str], **settings) -> str:
    source = NETWORK
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    return module_fingerprint(load(source).Mine(**settings))


def test_code_and_settings_of_a_users_network_count():
    same = of()
    assert of() == same
    changed = {
        "a setting": of(scale=2.0),
        "a method": of(("x.mean((2, 3))", "x.amax((2, 3))")),
        "a property": of(("self.scale + 1", "self.scale - 1")),
        "a helper of a helper": of(("return 3 if", "return 4 if")),
        "forward": of(("+ self.shift", "- self.shift")),
        "a buffer that is not saved": of(("torch.zeros(4)", "torch.ones(4)")),
        "weights": of(("init.ones_", "init.zeros_")),
    }
    assert same not in changed.values()
    assert len(set(changed.values())) == len(changed), changed
    # What `forward` does not reach may change, and hold what has no identity.
    assert of(("undefined_here(batch)", "1")) == same
    assert of(("self.unused = scale, object()", "self.unused = scale, open('/dev/null')")) == same


def test_hooks_count():
    network = nn.Sequential(nn.Linear(2, 2))
    before = module_fingerprint(network)
    handle = network[0].register_forward_hook(lambda module, inputs, output: output * 2)
    doubled = module_fingerprint(network)
    handle.remove()
    assert module_fingerprint(network) == before
    network[0].register_forward_hook(lambda module, inputs, output: output * 3)
    assert len({before, doubled, module_fingerprint(network)}) == 3


def test_traced_and_scripted_networks_count_by_their_own_code():
    class Doubles(nn.Module):
        def forward(self, x):
            return x * 2

    class Triples(nn.Module):
        def forward(self, x):
            return x * 3

    prints = [module_fingerprint(torch.fx.symbolic_trace(kind())) for kind in (Doubles, Triples, Doubles)]
    assert prints[0] == prints[2] != prints[1]
    example = torch.ones(1, 2)
    traced = [module_fingerprint(torch.jit.trace(kind(), example)) for kind in (Doubles, Triples, Doubles)]
    assert traced[0] == traced[2] != traced[1]


def test_objects_count_by_what_they_hold_and_do():
    class Scale:
        def __init__(self, by):
            self.by = by

        def __call__(self, x):
            return self.times(x)

        def times(self, x):
            return x * self.by

    class Other(Scale):
        def times(self, x):
            return x / self.by

    prints = [module_fingerprint(value) for value in (Scale(2), Scale(3), Other(2), Scale(2).times, Scale(2))]
    assert len(set(prints)) == 4
    assert prints[0] == prints[4]


def test_arrays_tensors_and_library_functions_that_a_function_holds():
    shift, array, log = torch.ones(2), np.arange(3), logging.getLogger("x")
    functions = {
        "tensor": lambda x: x + shift,
        "array": lambda x: x + array,
        "ufunc": lambda x: np.exp(x),
        "dispatched": lambda x: np.mean(x),
        "builtin": lambda x: math.sqrt(x),
        "partial": functools.partial(torch.mul, other=2),
        "another partial": functools.partial(torch.mul, other=3),
        "logger": lambda x: log.info(x),
    }
    prints = {name: module_fingerprint(function) for name, function in functions.items()}
    assert len(set(prints.values())) == len(functions)
    assert {name: module_fingerprint(function) for name, function in functions.items()} == prints
    shift += 1
    assert module_fingerprint(functions["tensor"]) != prints["tensor"]


def test_weights_without_values_are_named():
    for held in (nn.Linear(2, 3, device="meta"), torch.zeros(2, device="meta")):
        with pytest.raises(EmbedderError, match="weights on the meta device"):
            module_fingerprint(held)


def test_a_web_of_functions_ends():
    count = 40
    calls = " + ".join(f"f{number}(x)" for number in range(count))
    source = "\n".join(f"def f{number}(x):\n    return {number} + {calls}" for number in range(count))
    assert module_fingerprint(load(source).f0) == module_fingerprint(load(source).f0)
    assert module_fingerprint(load(source).f0) != module_fingerprint(load(source.replace("39 +", "38 +")).f0)


def test_helpers_in_a_users_module_count(tmp_path):
    def loaded(body: str):
        (tmp_path / "helpers_of_mine.py").write_text(f"def twice(x):\n    return {body}\n")
        spec = importlib.util.spec_from_file_location("helpers_of_mine", tmp_path / "helpers_of_mine.py")
        helpers = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(helpers)
        return load("import torch\n\ndef network(x):\n    return helpers.twice(x)"), helpers

    prints = []
    for body in ("x * 2", "x + x", "x * 2"):
        module, module.helpers = loaded(body)
        prints.append(module_fingerprint(module.network))
    assert prints[0] == prints[2] != prints[1]


OVERRIDING = """
from torch import nn
from torchvision.transforms import v2

class Scaled(v2.Transform):
    def transform(self, image, params):
        return image * 2

    def __repr__(self):
        return "Scaled()"

def faded(x):
    return x / 3

class Layer(nn.TransformerEncoderLayer):
    def __init__(self, *sizes):
        super().__init__(*sizes, activation=faded)

    def _ff_block(self, x):
        return x + 1

    def train(self, mode=True):
        return super().train(mode)
"""


@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [
        ("image * 2", "image * 3", "preprocess"),
        ("x + 1", "x + 2", "network"),
        ("super().train(mode)", "super().train(False)", None),
        ("activation=faded", "activation=lambda x: x / 4", "network"),
    ],
)
def test_methods_that_a_librarys_call_count(old, new, counts):
    """Nothing of the user's names them: a method of the library's base class calls them."""

    def fingerprints(source):
        users = load(source)
        torch.manual_seed(0)
        with_transform = v2.Compose([v2.Identity(), v2.Compose([users.Scaled()])])
        return {
            "preprocess": module_fingerprint(nn.Identity(), with_transform),
            "network": module_fingerprint(nn.Sequential(users.Layer(4, 1)), with_transform.transforms[0]),
        }

    before, after = fingerprints(OVERRIDING), fingerprints(OVERRIDING.replace(old, new))
    assert {name for name in before if before[name] != after[name]} == ({counts} if counts else set())
    assert fingerprints(OVERRIDING) == before


def test_the_embedding_of_a_module_counts_where_this_package_is_installed(monkeypatch):
    """Its own code then counts by its name, and names nothing of the module that it wraps."""
    monkeypatch.setattr(
        identity,
        "_is_library",
        lambda module, rest=identity._is_library: module.startswith("curated_data") or rest(module),
    )

    def fingerprint(source):
        return resolve_embedder(load(source).Trained()).fingerprint

    assert fingerprint(TRAINED) == fingerprint(TRAINED)
    assert fingerprint(TRAINED) != fingerprint(TRAINED.replace("x.mean((2, 3))", "x.amax((2, 3))"))


TRAINED = """
from torch import nn

class Trained(nn.Module):
    embedding_dimension = 3

    def embed(self, images):
        return self.pooled(images)

    def pooled(self, x):
        return x.mean((2, 3))

    def eval_transform(self):
        return nn.Identity()
"""


def test_printed_addresses_do_not_count():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.activation = threading.Lock()

        def extra_repr(self):
            return f"activation={self.activation!r}"

        def forward(self, x):
            return x

    assert module_fingerprint(Named()) == module_fingerprint(Named())


@pytest.mark.parametrize("output", [{"features": 1}, (1, 2)])
def test_networks_that_give_no_tensor_are_named(output):
    from curated_data.errors import EmbedderError

    class Several(nn.Module):
        dimension = 3

        def forward(self, x):
            return output

    embedder = resolve_embedder(Several())
    with pytest.raises(EmbedderError, match=rf"gave a {type(output).__name__}, expected a tensor"):
        embedder(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("held", [io.BytesIO(b"a"), io.StringIO("a"), torch.Generator()])
def test_what_an_object_of_c_code_holds_is_not_taken_for_its_attributes(held):
    """Since Python 3.12 the classes of some look like those of Python."""
    with pytest.raises(EmbedderError, match="identity cannot be determined"):
        module_fingerprint(lambda images: (images, held))
