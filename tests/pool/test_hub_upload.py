"""Exports on the Hub: the real client against a local server."""

import os
import subprocess
import sys

import pytest

from curated_data.cli import main
from curated_data.errors import ConfigError
from curated_data.pool.hub_upload import HubPlace, hub_place
from tests.support.hub_commits import Hub

pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.close()


def run(arguments, hub):
    """A command in a process of its own: the client reads the environment once, when it is imported."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_of_a_test"}
    program = [sys.executable, "-m", "curated_data.cli", *arguments]
    return subprocess.run(program, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture
def command(write_pool, tmp_path):
    return [
        "export", *write_pool([30]), "--cache-dir", str(tmp_path / "cache"), "--embedder", "pixels:4",
        "--target-size", "12", "--max-samples", "5", "--out", str(tmp_path / "out"),
    ]  # fmt: skip


@pytest.mark.long
def test_an_export_is_one_commit(hub, command, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*command, "--to", "hf://datasets/me/birds@v1/train", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    names = sorted(path.name for path in out.iterdir())
    assert {"README.md", "croissant.json", "curation.parquet", "manifest.json", "ids.npy"} < set(names)
    assert sum(name.endswith(".tar") for name in names) == 3
    for name in names:
        assert f"{(out / name).stat().st_size:,} bytes  train/{name}\n" in printed
    assert f"nothing was uploaded; without --dry-run: {len(names)} files" in printed
    assert (hub.files, hub.private) == ({}, {})

    ended = run([*command, "--overwrite", "--to", "hf://datasets/me/birds@v1/train"], hub)
    assert ended.returncode == 0, ended.stderr
    assert f"uploaded: {hub.url}/datasets/me/birds/commit/" in ended.stdout
    uploaded = {path: content for (_, _, path), content in hub.files.items()}
    assert uploaded == {f"train/{name}": (out / name).read_bytes() for name in names}
    assert {place[:2] for place in hub.files} == {("me/birds", "v1")}
    assert hub.private == {"me/birds": True}
    assert len(hub.messages) == 1


@pytest.mark.long
def test_a_card_that_is_there_stays(hub, command):
    hub.files["me/birds", "main", "README.md"] = b"mine"
    hub.private["me/birds"] = False
    ended = run([*command, "--to", "hf://datasets/me/birds"], hub)
    assert ended.returncode == 0, ended.stderr
    assert hub.files["me/birds", "main", "README.md"] == b"mine"
    assert ("me/birds", "main", "manifest.json") in hub.files
    assert "README.md, which stays" in ended.stderr
    assert hub.private == {"me/birds": False}


@pytest.mark.long
def test_what_the_hub_refuses_is_one_line(hub, command):
    hub.refuses = True
    ended = run([*command, "--to", "hf://datasets/me/birds"], hub)
    assert ended.returncode == 2
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("curated-data export:")]
    assert "hf://datasets/me/birds: cannot be written" in line
    assert "HF_TOKEN" in line
    assert hub.files == {}


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["--to", "hf://models/me/net"], "hf://models/me/net: "),
        (["--to", "s3://bucket"], "s3://bucket: "),
        (["--dry-run"], "--dry-run"),
        (["--to", "hf://datasets/me/birds", "--out", "memory://there"], "memory://there"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(command, extra, told, tmp_path, capsys):
    assert main([*command, *extra]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "url", ["hf://datasets/me", "hf://datasets/me/a/../b", "hf://datasets/me/a b", "me/a"]
)
def test_places_that_are_none(url):
    with pytest.raises(ConfigError, match=f"^{url}: "):
        hub_place(url)


def test_places_are_named_by_their_urls():
    for url in ("hf://datasets/me/a", "hf://datasets/me/a@v1", "hf://datasets/me/a@v1/b/c"):
        assert hub_place(url).url == url
    assert hub_place("hf://datasets/me/a/") == HubPlace("me/a", "main", "")
