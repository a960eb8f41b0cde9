"""Data sets of the Hub, from a server that speaks what its client asks."""

import io
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from curated_data.errors import ConfigError, PoolError
from curated_data.pool.hub import remote_tables
from curated_data.pool.tables import import_tables
from curated_data.pool.writer import ShardWriter
from tests.support.hub import Hub


@pytest.fixture
def hub(tmp_path):
    """Two data sets: `them/pets`, of one split in two files, and `them/both`, of two splits."""
    rng = np.random.default_rng(0)

    def write(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        images = []
        for _ in rows:
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": "a.png"})
        table = pa.table({"image": images, "label": list(rows), "caption": [f"no. {i}" for i in rows]})
        pq.write_table(table, path, row_group_size=4)

    root = tmp_path / "hub" / "them"
    for number, rows in enumerate((range(10), range(10, 17))):
        write(root / "pets" / "data" / f"train-{number:05d}-of-00002.parquet", rows)
    (root / "pets" / "README.md").write_text("# Pets")
    for split in ("train", "test"):
        write(root / "both" / "data" / f"{split}-00000-of-00001.parquet", range(3))
    (root / "texts").mkdir()
    (root / "texts" / "all.csv").write_text("a,b")
    server = Hub(tmp_path / "hub")
    yield server
    server.close()


def options(hub):
    return {"endpoint": hub.url, "token": False}


def test_a_data_set_becomes_shards(hub, tmp_path):
    shards = import_tables("hf://datasets/them/pets", tmp_path / "out", storage_options=options(hub))
    samples = list(webdataset.WebDataset(list(map(str, shards)), shardshuffle=False))
    assert [sample["cls"] for sample in samples] == [str(i).encode() for i in range(17)]
    assert [sample["txt"] for sample in samples] == [f"no. {i}".encode() for i in range(17)]
    expected = [
        row["image"]["bytes"]
        for path in sorted((hub.folder / "them/pets/data").iterdir())
        for row in pq.read_table(path).to_pylist()
    ]
    assert [sample["png"] for sample in samples] == expected


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("both/data/test-*.parquet", ["both/data/test-00000-of-00001.parquet"]),
        ("both@main/data/test-*", ["both@main/data/test-00000-of-00001.parquet"]),
        ("both/data/train-00000-of-00001.parquet", ["both/data/train-00000-of-00001.parquet"]),
        ("pets/data", [f"pets/data/train-{i:05d}-of-00002.parquet" for i in range(2)]),
    ],
)
def test_a_part_of_a_data_set_is_named(hub, path, names):
    found = remote_tables(f"hf://datasets/them/{path}", options(hub))
    assert list(found) == [f"hf://datasets/them/{name}" for name in names]


@pytest.mark.parametrize(
    ("url", "kind", "named"),
    [
        ("hf://datasets/them/cars", PoolError, "them/cars"),
        ("hf://datasets/them/pets@old", PoolError, "pets@old"),
        ("hf://datasets/them/pets/data/valid-*.parquet", PoolError, "valid"),
        ("hf://datasets/them/both", ConfigError, "hf://datasets/them/both/data/test*.parquet"),
        ("hf://datasets/them/texts", PoolError, ".csv"),
        ("nothing://datasets/them/pets/a.parquet", PoolError, "nothing"),
    ],
)
def test_what_is_not_there_is_one_error(hub, url, kind, named, tmp_path):
    with pytest.raises(kind, match=re.escape(named)):
        import_tables(url, tmp_path / "out", storage_options=options(hub))
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_named(hub, tmp_path):
    path = sorted((hub.folder / "them/pets/data").iterdir())[1]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(PoolError, match=path.name):
        import_tables("hf://datasets/them/pets", tmp_path / "out", storage_options=options(hub))


def test_a_few_rows_are_in_memory_at_a_time(hub, tmp_path):
    rng = np.random.default_rng(0)
    image = [{"bytes": b"\xff\xd8\xff" + rng.bytes(1 << 17), "path": None} for _ in range(400)]
    path = hub.folder / "them" / "large" / "all.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"image": image}), path, compression="none", row_group_size=50)
    import_tables("hf://datasets/them/large", tmp_path / "out", storage_options=options(hub))
    assert hub.largest < 20 << 20  # of 50 MB in all
    assert hub.bytes_sent < 2 * path.stat().st_size


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_stopped_import_does_not_fetch_again_what_it_has(hub, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    folder = hub.folder / "them" / "large" / "data"
    folder.mkdir(parents=True)
    for number in range(3):
        image = [{"bytes": b"\xff\xd8\xff" + rng.bytes(1 << 17), "path": None} for _ in range(100)]
        pq.write_table(pa.table({"image": image}), folder / f"train-{number}.parquet", row_group_size=10)
    how = {"storage_options": options(hub), "max_samples": 40}
    import_tables("hf://datasets/them/large", tmp_path / "whole", **how)
    with monkeypatch.context() as patch:
        stop_at(patch, 250)
        with pytest.raises(KeyboardInterrupt):
            import_tables("hf://datasets/them/large", tmp_path / "out", **how)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 6
    hub.bytes_sent = 0
    import_tables("hf://datasets/them/large", tmp_path / "out", **how)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert hub.bytes_sent < 100 << 17  # the last 60 rows, what is read ahead, and footers


def stop_at(patch, n: int) -> None:
    """Stop a writer at its nth sample."""
    write, seen = ShardWriter.write, [0]

    def stopping(self, sample):
        seen[0] += 1
        if seen[0] > n:
            raise KeyboardInterrupt
        write(self, sample)

    patch.setattr(ShardWriter, "write", stopping)


def test_what_reads_the_hub_may_be_missing(hub, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "hf", raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"curated-data\[hub\]"):
        import_tables("hf://datasets/them/pets", tmp_path / "out")


@pytest.mark.long
def test_from_the_shell(hub, tmp_path):
    hub.fail_next = 1  # which the client asks for again
    command = [sys.executable, "-m", "curated_data.cli", "-q", "import", "hf://datasets/them/pets"]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    subprocess.run([*command, str(tmp_path / "out")], check=True, env=environment, timeout=300)
    (shard,) = (tmp_path / "out").glob("*.tar")
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert json.loads(samples[3]["json"]) == {"path": "a.png"}
    assert len(samples) == 17


KILLED = """
import os, signal, sys
from curated_data.cli import main
from curated_data.pool.writer import ShardWriter
write, left = ShardWriter.write, [int(sys.argv[1])]
def killing(self, sample):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, sample)
ShardWriter.write = killing
main(sys.argv[2:])
"""


@pytest.mark.long
def test_a_killed_import_goes_on(hub, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}

    def run(out, samples):
        what = ["import", "hf://datasets/them/pets", str(tmp_path / out), "--max-samples", "3"]
        command = [sys.executable, "-c", KILLED, str(samples), *what]
        return subprocess.run(command, env=environment, timeout=300, capture_output=True, text=True)

    assert run("whole", 100).returncode == 0
    for samples in (4, 5, 7):  # of each the samples of whole shards are kept
        assert run("out", samples).returncode == -signal.SIGKILL
    last = run("out", 100)
    assert "goes on after 4 shards" in last.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
