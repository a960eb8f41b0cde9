"""Pools in the forms that people have them: parquet of the Hub, lists of archives, bare folders."""

import contextlib
import io
import json
import multiprocessing
import os
import re
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from curated_data import ShardPool, curate
from curated_data.cli import main
from curated_data.errors import ConfigError, PoolError
from curated_data.pool.claim import Claim
from curated_data.pool.out import LocalFolder
from curated_data.pool.tables import import_tables
from curated_data.pool.writer import ShardWriter


def encoded(rng, kind) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def tables(tmp_path) -> tuple[str, list[bytes]]:
    """A data set as the Hub stores it: two parquet files; one row lacks its image."""
    rng = np.random.default_rng(0)
    data = [encoded(rng, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF") for _ in range(3)]
    (tmp_path / "hub").mkdir()
    for number, part in enumerate((range(7), range(7, 12))):
        images = [{"bytes": None if i == 5 else data[i], "path": f"{i}.x"} for i in part]
        table = {"image": images, "label": [i % 3 for i in part], "caption": [f"no. {i}" for i in part],
                 "score": [i / 2 for i in part]}  # fmt: skip
        pq.write_table(pa.table(table), tmp_path / "hub" / f"train-{number:05d}-of-00002.parquet")
    return str(tmp_path / "hub"), data


def test_parquet_of_the_hub_becomes_shards(tables, tmp_path):
    folder, data = tables
    assert main(["-q", "import", folder, str(tmp_path / "out")]) == 0
    samples = list(webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False))
    rows = [i for i in range(12) if i != 5]
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in rows]
    for i, sample in zip(rows, samples, strict=True):
        kind = ("png", "jpg", "webp", "gif")[i // 3]
        assert sample[kind] == data[i]
        assert sample["cls"] == str(i % 3).encode()
        assert sample["txt"] == f"no. {i}".encode()
        assert json.loads(sample["json"]) == {"score": i / 2, "path": f"{i}.x"}


@settings(max_examples=40, deadline=None)
@given(
    has_image=st.lists(st.booleans(), min_size=2, max_size=30).filter(any),
    cut=st.integers(0, 30),
    group=st.integers(1, 9),
    max_samples=st.integers(1, 8),
    stops=st.lists(st.integers(0, 12), max_size=3),
    store=st.booleans(),
)
def test_a_stopped_import_of_tables_ends_as_if_alone(
    has_image, cut, group, max_samples, stops, store, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("stopped")
    kind = pa.schema([("image", pa.struct([("bytes", pa.binary())])), ("label", pa.int64())])
    images = [{"bytes": b"\x89PNG%d" % i if has else None} for i, has in enumerate(has_image)]
    (folder / "in").mkdir()
    for number, part in enumerate((slice(cut), slice(cut, None))):
        table = pa.table({"image": images[part], "label": list(range(len(images)))[part]}, kind)
        pq.write_table(table, folder / "in" / f"{number}.parquet", row_group_size=group)
    out = f"memory://{folder.name}" if store else str(folder / "out")
    write = ShardWriter.write
    for stop in stops:
        left = [stop]

        def stopping(self, sample, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            write(self, sample)

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt, PoolError):
            patch.setattr(ShardWriter, "write", stopping)
            import_tables(folder / "in", out, max_samples=max_samples)
    with contextlib.suppress(PoolError):  # it is there already, where no stop came in between
        import_tables(folder / "in", out, max_samples=max_samples)
    import_tables(folder / "in", folder / "whole", max_samples=max_samples)
    system, place = fsspec.core.url_to_fs(out)
    found = {Path(name).name: system.cat_file(name) for name in system.ls(place, detail=False)}
    assert found == {path.name: path.read_bytes() for path in (folder / "whole").iterdir()}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    at=st.one_of(st.integers(0, 200), st.integers(20, 40).map(lambda n: n - 1000)),
    bit=st.integers(0, 7),
    cut=st.booleans(),
)
def test_a_damaged_marker_never_changes_what_is_imported(at, bit, cut, stopped, tmp_path_factory):
    folder, out, whole = stopped
    out = shutil.copytree(out, tmp_path_factory.mktemp("damaged") / "out")
    marker = out / ".shard-#.tar.unfinished"
    content = bytearray(marker.read_bytes())
    # Often in the numbers of the last line on progress, which begins with a slash.
    at = at % len(content) if at >= 0 else content.rindex(b"/") + at + 1000
    if cut:
        del content[at:]
    else:
        content[at] ^= 1 << bit
    marker.write_bytes(content)
    try:
        import_tables(folder, out, max_samples=3)
    except PoolError:  # a name in it was lost, so that a shard is nobody's
        import_tables(folder, out, max_samples=3, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


@pytest.fixture
def stopped(tables, tmp_path, monkeypatch):
    """Tables, the folder in which an import of them was stopped in its third shard, and the whole result."""
    folder, _ = tables
    import_tables(folder, tmp_path / "whole", max_samples=3)
    write = ShardWriter.write

    def stopping(self, sample):
        if self.n_samples == 8:
            raise KeyboardInterrupt
        write(self, sample)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            import_tables(folder, tmp_path / "stopped", max_samples=3)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    return folder, tmp_path / "stopped", whole


def _killed_at(step: int, *arguments) -> None:
    """Import tables, and die without a word at the given step towards the disk."""
    left = [step]

    def dying(call):
        def step_or_die(*given, **named):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return call(*given, **named)

        return step_or_die

    for owner, name in ((os, "fsync"), (os, "replace"), (LocalFolder, "remove"), (Claim, "_append")):
        setattr(owner, name, dying(getattr(owner, name)))
    import_tables(*arguments, max_samples=3)


@pytest.mark.long
def test_an_import_that_is_killed_at_any_step_goes_on(tables, tmp_path):
    folder, _ = tables
    import_tables(folder, tmp_path / "whole", max_samples=3)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    fork = multiprocessing.get_context("fork")
    for first in range(100):
        codes = []
        for again in (first, first % 7):  # the next run is killed, too
            run = fork.Process(target=_killed_at, args=(again, folder, tmp_path / f"{first}"))
            run.start()
            run.join()
            codes.append(run.exitcode)
        if codes[0] == 0:
            break
        if codes[1] == 9:
            import_tables(folder, tmp_path / f"{first}", max_samples=3)
        found = {path.name: path.read_bytes() for path in (tmp_path / f"{first}").iterdir()}
        assert found == whole, first
    assert 20 < first < 100  # it came to its end at last


def stopped_writer(out):
    with ShardWriter(out, max_samples=3) as writer:
        for number in range(8):
            writer.write({"__key__": f"{number}", "txt": "other"})
        raise KeyboardInterrupt


@pytest.mark.parametrize("change", ["rows", "settings", "overwrite", "another writer", "shard gone"])
def test_a_stopped_import_starts_over_if_something_has_changed(change, stopped, tmp_path, caplog):
    folder, out, _ = stopped
    how = {"max_samples": 3}
    if change == "rows":
        path = next(Path(folder).iterdir())
        pq.write_table(pq.read_table(path).slice(1), path)
    elif change == "settings":
        how = {"max_samples": 2}
    elif change == "overwrite":
        how |= {"overwrite": True}
    elif change == "another writer":  # stopped too
        with pytest.raises(KeyboardInterrupt):
            stopped_writer(out)
    else:
        (out / "shard-000000.tar").unlink()
    with caplog.at_level("INFO"):
        import_tables(folder, out, **how)
    assert "goes on" not in caplog.text
    import_tables(folder, tmp_path / "expected", **how)
    found, whole = (
        {path.name: path.read_bytes() for path in place.iterdir()} for place in (out, tmp_path / "expected")
    )
    assert found == whole


def test_tables_without_images_are_one_error(tmp_path):
    rows = {"plain": {"a": [1]}, "two": {"a": [b"x"], "b": [b"y"]}, "empty": {"image": [None, None]}}
    for name, columns in rows.items():
        kinds = {"empty": pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])}
        pq.write_table(pa.table(columns, kinds.get(name)), tmp_path / f"{name}.parquet")
    (tmp_path / "text.parquet").write_text("none")
    (tmp_path / "nothing").mkdir()
    for name, kind, named in (
        ("plain.parquet", ConfigError, "'a'"),
        ("two.parquet", ConfigError, "'a', 'b'"),
        ("empty.parquet", PoolError, "none of 2 rows"),
        ("text.parquet", PoolError, "text.parquet"),
        ("nothing", PoolError, "nothing"),
    ):
        with pytest.raises(kind, match=re.escape(named)):
            import_tables(tmp_path / name, tmp_path / "out")
    with pytest.raises(ConfigError, match="'c'"):
        import_tables(tmp_path / "two.parquet", tmp_path / "out", image="c")


def test_archives_that_a_file_lists(write_pool, tmp_path):
    shards = write_pool([4, 3])
    (tmp_path / "urls.txt").write_text("# two shards\n" + "\n".join(shards) + "\n")
    wids = {"wids_version": 1, "shardlist": [{"url": "pool-000.tar", "nsamples": 4}, {"url": "pool-001.tar"}]}
    (tmp_path / "index.json").write_text(json.dumps(wids))
    for name in ("urls.txt", "index.json"):
        assert main(["-q", "import", str(tmp_path / name), str(tmp_path / f"out-{name}")]) == 0
        found = ShardPool(str(tmp_path / f"out-{name}" / "*.tar"))
        assert found.keys(range(7)) == ShardPool(shards).keys(range(7))
    for name, content in (("bad.json", "{}"), ("empty.txt", "\n"), ("broken.json", "{")):
        (tmp_path / name).write_text(content)
        assert main(["-q", "import", str(tmp_path / name), str(tmp_path / "x")]) == 2


def test_a_folder_of_images_says_how_to_import_it_or_is_imported(tmp_path, caplog):
    rng = np.random.default_rng(0)
    for number in range(20):
        place = tmp_path / "images" / f"class {number % 2}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded(rng, "PNG"))
    folder = str(tmp_path / "images")
    with pytest.raises(PoolError) as caught:
        ShardPool(folder)
    assert "curated-data import" in str(caught.value)
    assert f"folder:{folder}" in str(caught.value)
    with pytest.raises(PoolError) as caught:
        ShardPool(f"folder:{folder}")
    assert "cache_dir" in str(caught.value)
    with pytest.raises(PoolError) as caught:
        ShardPool(f"folder:{folder}/none", cache_dir=tmp_path / "cache")
    assert "not a folder" in str(caught.value)
    config = {"target_size": 5, "levels": [{"n_clusters": 3}]}
    found = curate(f"folder:{folder}", config, embedder="pixels:4", cache_dir=tmp_path / "cache")
    assert found.report["samples"] == 20
    again = ShardPool(f"folder:{folder}", cache_dir=tmp_path / "cache")
    assert sorted(again.labels(range(20)).tolist()) == [0] * 10 + [1] * 10
    shutil.rmtree(tmp_path / "images" / "class 0")
    assert len(ShardPool([f"folder:{folder}"], cache_dir=tmp_path / "cache")) == 10
