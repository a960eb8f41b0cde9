"""Fingerprints of embedders stay as they are: in any Python, installed or not, wherever the code stands."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torchvision.transforms import v2

from curated_data.embedding import identity
from curated_data.embedding.embedders import ImagePreprocess, ModuleEmbedder
from curated_data.embedding.identity import module_fingerprint
from curated_data.embedding.resolve import resolve_embedder
from tests.embedding import fixed_network
from tests.support.users_network import NETWORK

FINGERPRINTS = {
    "a network": "aa2ea46b5c76ecdb2478",
    "a function": "c8c8ac56956a136c6289",
    "pixels": "d6acfd8c08c61b831473",
    "a pretraining module": "32937df58fca902734f8",
}


def fixed_embedders():
    """Embedders whose fingerprints are known: of a user's code, of this package's, and of libraries'."""
    network = fixed_network.Network()
    return {
        "a network": ModuleEmbedder(network, ImagePreprocess(8), dimension=2),
        "a function": ModuleEmbedder(fixed_network.scaled, v2.CenterCrop(8), dimension=3),
        "pixels": resolve_embedder("pixels:4"),
        "a pretraining module": resolve_embedder(trained_module()),
    }


def trained_module():
    from lightning_modules import SimCLR

    module = SimCLR(image_size=32, small_images=True)
    with torch.no_grad():
        for number, tensor in enumerate(module.state_dict().values()):
            tensor.fill_(number)
    return module


@pytest.mark.skipif(
    "bias=True" not in repr(torch.nn.BatchNorm2d(1)),
    reason="an older torch prints layers otherwise, which counts",
)
def test_known_fingerprints():
    """In any version of Python, from anywhere: what changes one embeds the pools of all users again.

    Bump a constant of `CODE_VERSIONS` if that is meant.
    """
    assert {name: e.fingerprint for name, e in fixed_embedders().items()} == FINGERPRINTS


PRINT = """
import sys, json
from pathlib import Path
sys.path.append(sys.argv[1])
import tests.embedding.test_known_fingerprints as here
import curated_data, lightning_modules
print(json.dumps({"at": [curated_data.__file__, lightning_modules.__file__],
                  "found": {name: e.fingerprint for name, e in here.fixed_embedders().items()}}))
"""


def installed(folder, repository):
    """As by a wheel's installation, without building one."""
    for package in ("curated_data", "lightning_modules"):
        shutil.copytree(
            repository / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "data")
        )


def installed_wheel(folder, repository):
    tool = shutil.which("uv")
    if tool is None:
        pytest.skip("no uv to build a wheel with")
    built = folder.parent / "built"
    subprocess.run([tool, "build", "--wheel", "-q", "-o", built, repository], check=True)
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)


@pytest.mark.long
@pytest.mark.parametrize("install", [installed, pytest.param(installed_wheel, marks=pytest.mark.slow)])
def test_a_wheel_gives_the_fingerprints_of_a_checkout(tmp_path, install):
    repository, folder = Path(__file__).parents[2], tmp_path / "lib" / "site-packages"
    folder.mkdir(parents=True)
    install(folder, repository)
    shutil.copytree(repository / "tests", tmp_path / "users" / "tests")
    run = subprocess.run(
        [sys.executable, "-c", PRINT, str(tmp_path / "users")],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    shown = json.loads(run.stdout.splitlines()[-1])
    assert all(Path(path).is_relative_to(folder) for path in shown["at"])
    assert shown["found"] == {name: e.fingerprint for name, e in fixed_embedders().items()}


def test_no_bytecode_line_or_path_counts(tmp_path, monkeypatch):
    """Of code whose source is at hand."""
    monkeypatch.setattr(identity, "_code", None)
    prints = set()
    for number, above in enumerate(
        ("", "import os\n\n\n", "# comment\nclass Other:\n    def f(self):\n        pass\n")
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / f"file{number}.py").write_text(above + NETWORK)
        spec = importlib.util.spec_from_file_location(f"module{number}", folder / f"file{number}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        prints.add(module_fingerprint(module.Mine(), module.scaled, lambda x: x))
    assert len(prints) == 1


@pytest.mark.long
def test_a_script_and_the_module_that_it_is_count_the_same(tmp_path):
    (tmp_path / "script.py").write_text(
        NETWORK + "\nif __name__ == '__main__':\n"
        "    from curated_data.embedding.identity import module_fingerprint\n"
        "    import script\n"
        "    print(module_fingerprint(Mine(), Mine), module_fingerprint(script.Mine(), script.Mine))\n"
    )
    run = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert len(set(run.stdout.split())) == 1
