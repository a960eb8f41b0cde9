"""The command line, on real shards: each command does what it says, and bad input ends in one line."""

import json
import re
import signal

import fsspec
import numpy as np
import pytest
from PIL import Image

from curated_data import ShardPool
from curated_data.cache.artifacts import open_cache
from curated_data.cli import main
from tests.support.programs import run_python

CURATION = [
    "--embedder",
    "pixels:4",
    "--target-size",
    "15",
    "--set",
    "levels=[{n_clusters: 8},{n_clusters: 3}]",
]


def test_the_walk_by_commands(write_pool, tmp_path, capsys, monkeypatch):
    shards, cache = write_pool([30, 25]), str(tmp_path / "cache")
    place = ["--cache-dir", cache]
    assert main(["index", *shards, *place]) == 0
    assert "55 samples in 2 shards" in capsys.readouterr().out
    assert main(["embed", *shards, *place, "--embedder", "pixels:4"]) == 0
    assert "55 embeddings of length 48" in capsys.readouterr().out
    assert main(["curate", *shards, *place, *CURATION, "--dry-run"]) == 0
    assert "would select 15" in capsys.readouterr().out
    assert main(["curate", *shards, *place, *CURATION, "--ids", str(tmp_path / "ids.npy")]) == 0
    out = capsys.readouterr().out
    assert "15 of 55 samples selected" in out
    ids = np.load(tmp_path / "ids.npy")
    assert len(ids) == 15

    why = ["inspect", cache, "--sample"]
    changed = (tmp_path / "cache").stat().st_mtime_ns  # nothing is written to look: it may be another's
    for sample in (int(ids[0]), int(np.setdiff1d(np.arange(55), ids)[0])):
        assert main([*why, str(sample)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in lines[1:3]] == ["Level 2", "Level 1"]
        assert lines[3].startswith(f"Sample {sample} was {'' if sample in ids else 'not '}selected")
    assert (tmp_path / "cache").stat().st_mtime_ns == changed
    assert main([*why, "55"]) == 2
    assert "the pool has ids 0 to 54" in capsys.readouterr().err
    assert main([*why, "1", "--selection", "abc"]) == 2
    assert "no selection 'abc'; there are, newest first:" in capsys.readouterr().err

    assert main(["export", *shards, *place, *CURATION, "--out", str(tmp_path / "selected")]) == 0
    assert "15 samples in 1 shards" in capsys.readouterr().out
    exported = ShardPool(str(tmp_path / "selected" / "*.tar"))
    keys = exported.keys(np.arange(len(exported)))
    assert sorted(keys) == sorted(ShardPool(shards).keys(ids))

    page = tmp_path / "report.html"
    np.save(tmp_path / "xy.npy", np.random.default_rng(0).normal(size=(55, 2)))
    np.save(tmp_path / "labels.npy", np.arange(55) % 2)
    (tmp_path / "names.txt").write_text("even\nodd\n")
    given = {"coordinates": "xy.npy", "labels": "labels.npy", "class-names": "names.txt", "out": page.name}
    options = [item for name, file in given.items() for item in (f"--{name}", str(tmp_path / file))]
    assert main(["report", *shards, *place, *CURATION, *options]) == 0
    text = page.read_text()
    assert '"names":["even","odd"]' in text
    assert '"before":[28,27]' in text
    assert '"made_by":"t-SimCNE"' in text
    assert '"embedder":"pixels:4"' in text
    assert main(["report", *shards, *place, *CURATION, "--labels", str(tmp_path / "names.txt")]) == 2
    assert "cannot be read as a .npy file" in capsys.readouterr().err
    # Arrays of another pool are refused before anything long, such as another embedding, begins.
    np.save(tmp_path / "labels.npy", np.arange(54))
    before = set((tmp_path / "cache" / "embeddings").iterdir())
    other = ["--embedder", "pixels:2", "--target-size", "15", "--labels", str(tmp_path / "labels.npy")]
    assert main(["report", *shards, *place, *other]) == 2
    assert "labels need shape (55,), got (54,)" in capsys.readouterr().err
    assert set((tmp_path / "cache" / "embeddings").iterdir()) == before

    assert main(["inspect", cache]) == 0
    shown = capsys.readouterr().out
    for stage in ("index", "embeddings", "tree", "selection", "pixels:4"):
        assert stage in shown
    monkeypatch.setattr("curated_data.cli.inspect._FEW", 1)
    assert main(["inspect", cache]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"2 shards .* 55 samples; --json lists each", shown)
    assert not any(name in shown for name in ShardPool(shards).shard_fingerprints)
    assert main(["inspect", cache, "--json"]) == 0
    artifacts = json.loads(capsys.readouterr().out)
    selection = next(artifact for artifact in artifacts if artifact["stage"] == "selection")
    assert selection["details"]["size"] == 15
    assert selection["details"]["settings"]["target_size"] == 15


def test_the_report_of_a_mixture_is_written_from_the_yaml_of_a_training(write_pool, tmp_path, capsys):
    shards, yaml, out = write_pool([30, 25]), tmp_path / "train.yaml", tmp_path / "pages"
    yaml.write_text(
        "data:\n  batch_size: 4\n  mixture:\n    components:\n"
        f"    - {{name: chosen, pool: {shards[0]}, weight: 3, curation: {{target_size: 12}}}}\n"
        f"    - {{name: whole, pool: {shards[1]}, weight: 1}}\n"
    )
    given = ["report", str(yaml), "--cache-dir", str(tmp_path / "cache"), "--embedder", "pixels:4"]
    assert main([*given, "--out", str(out), "--title", "Ours"]) == 0
    assert capsys.readouterr().out.split() == [str(out / "index.html")]
    page = (out / "index.html").read_text()
    assert "<title>Ours</title>" in page
    rows = [re.findall("<td[^>]*>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", page)]
    assert [(row[2], row[3].split("<")[0]) for row in rows if len(row) == 7] == [
        ("12", "75.00%"),
        ("25", "25.00%"),
    ]
    assert "Ours: chosen" in (out / "component-0.html").read_text()
    assert main([*given, "--target-size", "5"]) == 2
    assert "--target-size: of one curation" in capsys.readouterr().err
    assert main([*given, "--out", str(yaml / "pages")]) == 2
    assert f"{yaml}: is not a folder" in capsys.readouterr().err
    yaml.write_text("data: {pool: a.tar}")
    assert main([*given, "--out", str(out)]) == 2
    assert "no `mixture`" in capsys.readouterr().err


def test_import_then_index(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, count in (("cat", 3), ("dog", 2)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(count):
            image = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
            image.save(tmp_path / "images" / name / f"{number}.png")
    assert main(["import", str(tmp_path / "images"), str(tmp_path / "shards")]) == 0
    pool = ShardPool(str(tmp_path / "shards" / "*.tar"))
    assert sorted(pool.labels(np.arange(5)).tolist()) == [0, 0, 0, 1, 1]
    assert sorted(pool.keys(np.arange(5))) == ["cat/0", "cat/1", "cat/2", "dog/0", "dog/1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "nowhere-{0..3}.tar"], "nowhere-0.tar"),
        (["curate", "SHARD", "--embedder", "pixels:4"], "target_size: "),
        (["curate", "SHARD", *CURATION, "--set", "stratgy=closest"], "'strategy'"),
        (["curate", "SHARD", "--embedder", "resnet", "--target-size", "3"], "'resnet'"),
        (["curate", "SHARD", "--config", "none.yaml"], "none.yaml: "),
        (["curate", "SHARD", "--config", "list.yaml"], "list.yaml: "),
        (
            ["curate", "SHARD", *CURATION, "--set", "levels=[{n_clusters: 5}"],
            "--set levels=[{n_clusters: 5}: ",
        ),
        (["curate", "SHARD", *CURATION, "--set", "levels=5"], "levels: "),
        (["inspect", "nothing"], "nothing: "),
        (["import", "nothing", "out"], "nothing"),
    ],
)
def test_bad_input_is_one_line(arguments, message, write_pool, tmp_path, capsys, monkeypatch):
    shard = write_pool([12])[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.yaml").write_text("- target_size\n")
    assert main([shard if item == "SHARD" else item for item in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"curated-data {arguments[0]}: ")
    assert message in error


def test_help_and_a_look_at_a_cache_import_no_torch(tmp_path):
    """Which takes seconds."""
    open_cache(tmp_path)
    code = """
import sys
import uuid
from curated_data.cli import main
assert main(["inspect", sys.argv[1]]) == 0
try:
    main(["--help"])
finally:
    assert "torch" not in sys.modules
"""
    run_python("-c", code, tmp_path)


def test_help_of_every_command(capsys):
    for command in ("import", "index", "embed", "curate", "extend", "export", "report", "inspect"):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        assert f"curated-data {command}" in capsys.readouterr().out


def test_ctrl_c_is_one_line_and_status_130(monkeypatch, capsys):
    def stopped(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("curated_data.pipeline.inspect.inspect_cache", stopped)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["inspect", "cache"]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "curated-data inspect: stopped; run it again to continue\n"


def test_verify_names_what_is_damaged(fashion_test, tmp_path, capsys):
    cache = tmp_path / "cache"
    assert main(["-q", "index", *fashion_test, "--cache-dir", str(cache)]) == 0
    assert main(["inspect", str(cache), "--verify"]) == 0
    assert "everything is as it was written" in capsys.readouterr().out
    (path,) = cache.glob("pool/*/key_bytes.npy")
    assert main(["inspect", str(cache), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"damaged": []}
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert main(["inspect", str(cache), "--verify", "--json"]) == 2
    assert len(json.loads(capsys.readouterr().out)["damaged"]) == 1
    assert main(["inspect", str(cache), "--verify"]) == 2
    assert f"{path}: damaged (its checksum differs); remove {path.parent}" in capsys.readouterr().err


def test_places_for_outputs_are_checked_before_any_work(write_pool, tmp_path, capsys):
    shards, cache = write_pool([12]), tmp_path / "cache"
    (tmp_path / "file").touch()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "shard-000000.tar").touch()
    cases = (
        (
            ["export", "--out", str(tmp_path / "used")],
            "are there already; .* pass overwrite=True \\(--overwrite\\)",
        ),
        (["export", "--out", str(tmp_path / "file")], "file: is not a folder"),
        (["export", "--out", str(tmp_path / "new"), "--max-samples", "0"], "max_samples=0"),
        (["export", "--out", ""], "the place for the shards is empty; give a folder"),
        (["export", "--out", str(tmp_path / "pool-%03d.tar"), "--overwrite"], "is a shard of the pool"),
        (["report", "--out", str(tmp_path)], "is a folder"),
        (["curate", "--ids", str(tmp_path)], "is a folder"),
        (["curate", "--ids", str(tmp_path / "file" / "ids.npy")], "file: is not a folder"),
    )
    for (command, *options), message in cases:
        assert main([command, *shards, "--cache-dir", str(cache), *CURATION, *options]) == 2
        assert re.search(message, capsys.readouterr().err), options
    assert not (cache / "embeddings").exists()
    arguments = ["--cache-dir", str(cache), *CURATION, "--out", str(tmp_path / "used"), "--overwrite"]
    assert main(["export", *shards, *arguments]) == 0
    assert len(ShardPool(str(tmp_path / "used" / "*.tar"))) == 12


def test_errors_of_the_system_are_one_line(monkeypatch, capsys):
    def refused(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("curated_data.pipeline.inspect.inspect_cache", refused)
    assert main(["inspect", "cache"]) == 2
    assert capsys.readouterr().err == "curated-data inspect: [Errno 13] Permission denied: 'cache'\n"


def test_class_names_in_a_json_object_are_refused(write_pool, tmp_path, capsys):
    (tmp_path / "names.json").write_text('{"0": "cat"}')
    arguments = ["--cache-dir", str(tmp_path / "cache"), "--class-names", str(tmp_path / "names.json")]
    assert main(["report", *write_pool([12]), *CURATION, *arguments, "--out", str(tmp_path / "r.html")]) == 2
    assert "names.json: holds a JSON object; give a list" in capsys.readouterr().err


def test_settings_of_the_pool(write_pool, tmp_path, capsys):
    """A cut shard is a warning or, if strict, an error; how images are decoded names the embeddings."""
    (shard,) = write_pool([4])
    place = ["--cache-dir", str(tmp_path / "cache")]
    with open(shard, "ab") as file:
        file.write(b"something")
    assert main(["index", shard, *place]) == 0
    assert main(["index", shard, *place, "--strict"]) == 2
    assert "strict" in capsys.readouterr().err
    for options in ([], ["--background", "255"], ["--background", "1,2,3"], ["--ignore-exif"]):
        assert main(["embed", shard, *place, "--embedder", "pixels:2", *options]) == 0
    assert len(list((tmp_path / "cache" / "embeddings").iterdir())) == 4
    assert main(["index", shard, *place, "--background", "300"]) == 2
    assert "background" in capsys.readouterr().err


class TestRepeatedOptions:
    """Options that take several values leave the shards to the command."""

    @pytest.mark.long
    @pytest.mark.parametrize(
        "arguments",
        [
            ["--set", "strategy=closest", "POOL"],
            ["--set", "strategy=closest", "seed=3", "POOL"],
            ["--set", "seed=3", "--set", "strategy=closest", "POOL"],
            ["POOL", "--set", "strategy=closest", "seed=3"],
            ["--set=strategy=closest", "POOL", "--set", "seed=3"],
            ["--set", "strategy=closest", "--", "POOL"],
            ["--storage-options", "anon=true", "--set", "strategy=closest", "POOL"],
            ["--storage-options", '{"a": {"b": 1}}', "c=2", "POOL", "--set", "strategy=closest"],
        ],
    )
    def test_in_any_order(self, arguments, write_pool, tmp_path, capsys):
        shards = write_pool([12])
        spread = [item for argument in arguments for item in (shards if argument == "POOL" else [argument])]
        options = ["--embedder", "pixels:4", "--target-size", "3", "--cache-dir", str(tmp_path / "cache")]
        assert main(["-q", "curate", *options, *spread]) == 0
        (manifest,) = (tmp_path / "cache" / "selection").glob("*/manifest.json")
        assert json.loads(manifest.read_text())["settings"]["strategy"] == "closest"

    def test_several_shards_after_a_setting(self, write_pool, tmp_path, capsys):
        shards = write_pool([7, 5])
        place = ["--cache-dir", str(tmp_path / "cache"), "--embedder", "pixels:4", "--target-size", "3"]
        assert main(["-q", "curate", *place, "--set", "seed=1", *shards]) == 0
        assert "3 of 12 samples" in capsys.readouterr().out

    def test_a_setting_without_a_value_is_named(self, write_pool, capsys):
        assert main(["curate", *write_pool([3]), "--set", "strategy", "--target-size", "2"]) == 2
        assert "--set strategy: expected FIELD=VALUE" in capsys.readouterr().err


class TestStorageOptions:
    @pytest.fixture
    def shards(self, s3, write_pool):
        """In a store that cannot be reached without options."""
        options, url = s3
        fsspec.filesystem("s3", **options).put(write_pool([12])[0], f"{url}/p-0.tar")
        return s3

    def test_by_keys_json_and_yaml(self, shards, tmp_path, capsys):
        cache, (options, url) = tmp_path / "cache", shards
        endpoint = options["client_kwargs"]["endpoint_url"]
        (tmp_path / "c.yaml").write_text(json.dumps({"target_size": 3, "storage_options": options}))
        keys = ["key=k", "secret=s3cr3t", f"client_kwargs.endpoint_url={endpoint}"]
        pool = [f"{url}/p-*.tar", "--cache-dir", str(cache)]
        assert main(["-q", "index", *pool, "--storage-options", *keys]) == 0
        assert main(["-q", "index", "--storage-options", json.dumps(options), *pool]) == 0
        assert capsys.readouterr().out.count("12 samples in 1 shards") == 2
        run = ["--config", str(tmp_path / "c.yaml"), "--embedder", "pixels:4"]
        assert main(["-q", "curate", *pool, *run]) == 0
        assert main(["-q", "export", *pool, *run, "--out", f"{url}/out"]) == 0
        assert main(["-q", "report", *pool, *run, "--out", str(tmp_path / "report.html")]) == 0
        mixed = ["--storage-options", "secret=s3cr3t", "--config", str(tmp_path / "c.yaml")]
        assert main(["-q", "curate", *pool, "--embedder", "pixels:4", *mixed]) == 0
        files = [tmp_path / "report.html", *(path for path in cache.rglob("*") if path.is_file())]
        assert not [path for path in files if b"s3cr3t" in path.read_bytes()]

    @pytest.mark.parametrize("value", ["nothing", "{broken", "[1]"])
    def test_what_is_no_option_is_named(self, value, write_pool, capsys):
        assert main(["index", *write_pool([3]), "--storage-options", value]) == 2
        assert "--storage-options" in capsys.readouterr().err

    def test_the_recipe_and_the_data_module_take_them(self, shards, tmp_path):
        from curated_data import CuratedDataModule
        from recipes.curate import read_settings, run

        options, pool = shards[0], f"{shards[1]}/p-*.tar"
        settings = {"pool": pool, "embedder": "pixels:4", "curation": {"target_size": 3}}
        settings |= {"cache_dir": str(tmp_path / "cache"), "storage_options": options}
        (tmp_path / "c.yaml").write_text(json.dumps(settings))
        run(read_settings([str(tmp_path / "c.yaml")]))
        assert (tmp_path / "cache" / "selection").is_dir()
        data = CuratedDataModule(pool, loader={"storage_options": options})
        assert len(data.pool) == 12
