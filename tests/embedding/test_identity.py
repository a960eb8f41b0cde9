"""What changes an embedder's output changes its fingerprint, wherever in its code or objects it stands."""

import functools
import importlib.util
import io
import logging
import math
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from curated_data.embedding.identity import module_fingerprint
from curated_data.embedding.resolve import resolve_embedder
from curated_data.errors import EmbedderError
from tests.support.users_network import NETWORK, load


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
        with pytest.raises(EmbedderError, match="meta device"):
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


def test_the_embedding_of_a_module_counts_through_the_code_of_this_package():
    """Which names nothing of the module that it wraps."""

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
    class Several(nn.Module):
        dimension = 3

        def forward(self, x):
            return output

    embedder = resolve_embedder(Several())
    with pytest.raises(EmbedderError, match=rf"Several: .* {type(output).__name__}\b"):
        embedder(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("held", [io.BytesIO(b"a"), io.StringIO("a"), torch.Generator(), iter(())])
def test_what_an_object_of_c_code_holds_is_not_taken_for_its_attributes(held):
    """Since Python 3.12 the classes of some look like those of Python."""
    with pytest.raises(EmbedderError, match=rf"{type(held).__name__}.*`fingerprint`"):
        module_fingerprint(lambda images: (images, held))


def test_code_without_a_source_is_said_to_hold_for_one_version(caplog):
    space = {"__name__": "typed"}
    exec("def f(x):\n    return x * 2\ndef g(x):\n    return x * 3", space)
    assert module_fingerprint(space["f"]) != module_fingerprint(space["g"])
    assert "give the embedder an attribute `fingerprint`" in caplog.text
    caplog.clear()
    space["f"].fingerprint = "doubled"
    module_fingerprint(space["f"])
    assert not caplog.text


HELD = """
import enum
import functools
import pathlib
import re
import torch
from torch import nn

class Mode(enum.Enum):
    MEAN = "mean"
    MAX = "max"

class Part:
    factor = 2

    def __call__(self, x):
        return x * self.factor

TABLE = {"a": 1}
PATTERN = re.compile("a+")
FOLDER = pathlib.PurePath("a/b")
look_up = TABLE.get

def decorated(function):
    @functools.wraps(function)
    def inner(x):
        return function(x) + 1
    return inner

@torch.no_grad()
def in_no_grad(x):
    return x - 5

@decorated
def network(x):
    values = [Mode.MEAN, PATTERN.pattern, str(FOLDER), look_up("a"), Part()(x)]
    return in_no_grad(x)
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Mode.MEAN, ", "Mode.MAX, "),
        ('"mean"', '"average"'),
        ('"a+"', '"b+"'),
        ('"a/b"', '"a/c"'),
        ('{"a": 1}', '{"a": 2}'),
        ("factor = 2", "factor = 3"),
        ("x * self.factor", "x + self.factor"),
        ("+ 1", "+ 2"),
        ("x - 5", "x - 6"),
    ],
)
def test_whatever_a_function_reaches_counts(old, new):
    assert HELD.count(old) == 1
    before = module_fingerprint(load(HELD).network)
    assert module_fingerprint(load(HELD).network) == before
    assert module_fingerprint(load(HELD.replace(old, new)).network) != before


def test_a_setting_in_the_class_counts():
    source = NETWORK.replace("return x.mean((2, 3))", "return x.mean((2, 3)) ** self.power")
    prints = [module_fingerprint(load(s).Mine()) for s in (source, source.replace("power = 2", "power = 3"))]
    assert prints[0] != prints[1]


def test_private_settings_count():
    source = NETWORK.replace("self.scale + 1", "self.__secret()").replace(
        "def training_step", "def __secret(self):\n        return self.__hidden\n\n    def training_step"
    ).replace("self.scale, self.unused", "self.__hidden, self.scale, self.unused").replace(
        "= scale, object()", "= 3, scale, object()")  # fmt: skip
    prints = [
        module_fingerprint(load(s).Mine()) for s in (source, source.replace("= 3, scale", "= 4, scale"))
    ]
    assert prints[0] != prints[1]


def test_settings_that_a_librarys_function_encloses_count():
    import torch.optim.swa_utils as of_a_library

    averages = [of_a_library.get_ema_multi_avg_fn(decay) for decay in (0.9, 0.99, 0.9)]
    prints = [module_fingerprint(function) for function in averages]
    assert prints[0] == prints[2] != prints[1]
