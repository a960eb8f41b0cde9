"""Small files that a user gives: pipes, loops of links and values of a wrong kind are one error, at once."""

import os
import re

import pytest

from curated_data import ShardPool, curate
from curated_data.cli import main
from curated_data.config import read_yaml
from curated_data.errors import ConfigError, CuratedDataError, PoolError
from curated_data.pipeline.inspect import inspect_cache, verify_cache
from curated_data.report.page import class_names_beside
from curated_data.selection.names import read_classes, read_wordnet


def pipe(path):
    os.mkfifo(path)


def loop(path):
    path.symlink_to(path)


def folder(path):
    path.mkdir()


@pytest.mark.parametrize("odd", [pipe, loop, folder])
@pytest.mark.parametrize("read", [read_yaml, read_classes, read_wordnet])
def test_what_is_no_file_is_one_error_and_never_waited_for(tmp_path, read, odd):
    path = tmp_path / "given"
    odd(path)
    with pytest.raises(ConfigError, match=str(path)):
        read(path)


def test_class_names_that_are_no_file_end_the_command(tmp_path, write_pool, capsys):
    pipe(tmp_path / "names")
    shards = write_pool([4])
    options = ["--embedder", "pixels:2", "--cache-dir", str(tmp_path / "cache"), "--target-size", "2"]
    options += ["--out", str(tmp_path / "page.html"), "--class-names", str(tmp_path / "names")]
    assert main(["report", *shards, *options]) == 2
    assert str(tmp_path / "names") in capsys.readouterr().err
    (tmp_path / "names").unlink()
    (tmp_path / "names").write_text("[" * 100_000)
    assert main(["report", *shards, *options]) == 2
    assert str(tmp_path / "names") in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[" * 100_000, "3", "null", '{"a": 1}', '"x"', "", "\ud800"])
def test_class_names_beside_shards_are_a_list_or_one_error(tmp_path, write_pool, text):
    pool = ShardPool(write_pool([2]))
    (tmp_path / "classes.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(PoolError, match=re.escape("classes.json")) as caught:
        class_names_beside(pool)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "{}", "[3]", '[{"id": 1, "names": 5}]', '[{"id": 1, "names": {"a": 1}}]', "[[]]", "NaN"],
)
def test_classes_of_captions_are_objects_or_one_error(tmp_path, text):
    (tmp_path / "entries.json").write_text(text)
    with pytest.raises(ConfigError, match=r"entries\.json") as caught:
        read_classes(tmp_path / "entries.json")
    assert len(str(caught.value)) < 500


def test_inspect_lists_a_cache_with_loops_of_links(tmp_path, write_pool):
    cache = tmp_path / "cache"
    config = {"target_size": 4, "levels": [{"n_clusters": 2}], "embedding": {"num_workers": 0}}
    folders = curate(write_pool([9]), config, embedder="pixels:2", cache_dir=cache).folders
    (folders["tree"] / "shards.npy").unlink()
    loop(folders["tree"] / "shards.npy")
    (folders["selection"] / "manifest.json").unlink()
    loop(folders["selection"] / "manifest.json")
    found = {artifact.stage: artifact for artifact in inspect_cache(cache)}
    assert found["tree"].complete
    assert not found["selection"].complete
    assert any("shards.npy" in problem for problem in verify_cache(cache))
    with pytest.raises(CuratedDataError, match=folders["tree"].name):
        curate(write_pool([9]), config, embedder="pixels:2", cache_dir=cache)
