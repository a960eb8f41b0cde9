"""What an export leaves for others, read by their tools: datasets, mlcroissant, the Hub's reader of cards.

The library datasets holds fsspec back, so it is not among those for development:

    uv run --with datasets pytest -m long tests/stages/test_export_card.py
"""

import hashlib
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard

from curated_data import ShardPool, curate
from curated_data.errors import PoolError
from curated_data.pipeline.export import export
from tests.support.images import noise, write_samples


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    samples = ({"png": png, "cls": i % 3, "txt": f"number {i}"} for i, png in enumerate(noise(90)))
    pool = ShardPool(write_samples(folder / "pool-%06d.tar", samples, max_samples=50))
    curation = curate(pool, {"target_size": 30}, embedder="pixels:8", cache_dir=folder / "cache")
    shards = export(pool, curation.ids, folder / "out", curation=curation, max_samples=12)
    return pool, curation, folder / "out", shards


def test_the_card_has_a_header_that_the_hub_reads(made):
    _, curation, out, shards = made
    card = DatasetCard.load(out / "README.md")
    assert card.data.size_categories == ["n<1K"]
    assert card.data.configs[0]["data_files"] == "shard-*.tar"
    assert sorted(out.glob("shard-*.tar")) == shards
    assert "license" not in card.data.to_dict()
    assert "30 of 90 samples selected" in card.text
    assert f"target_size: {curation.config.target_size}" in card.text
    assert (out / "curation.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_is_of_the_selected_samples(made):
    pool, curation, out, _ = made
    table = pq.read_table(out / "curation.parquet")
    assert table["id"].to_pylist() == curation.ids.tolist()
    assert table["key"].to_pylist() == pool.keys(curation.ids)
    assert (np.load(out / "clusters.npy")[:, 0] == curation.tree.parent[1][np.load(out / "ids.npy")]).all()


def test_digests_are_of_the_files(made):
    _, _, out, shards = made
    files = json.loads((out / "croissant.json").read_text())["distribution"]
    assert {file["name"] for file in files} == {"curation.parquet", *(path.name for path in shards)}
    for file in files:
        assert file["sha256"] == hashlib.sha256((out / file["contentUrl"]).read_bytes()).hexdigest()


@pytest.mark.long
def test_mlcroissant_reads_it(made):
    mlcroissant = pytest.importorskip("mlcroissant")
    _, curation, out, _ = made
    dataset = mlcroissant.Dataset(str(out / "croissant.json"))
    assert not dataset.metadata.ctx.issues.errors
    rows = list(dataset.records("samples"))
    assert [row["samples/id"] for row in rows] == curation.ids.tolist()
    assert rows[0]["samples/reason"] == b"selected"


@pytest.mark.long
def test_datasets_reads_the_shards(made, tmp_path):
    datasets = pytest.importorskip("datasets")
    pool, _, out, _ = made
    for place, options in (("webdataset", {"data_files": str(out / "shard-*.tar")}), (str(out), {})):
        found = datasets.load_dataset(place, split="train", cache_dir=str(tmp_path), **options)
        assert found.num_rows == 30
        assert found["__key__"][:] == pool.keys(np.load(out / "ids.npy"))
        first = int(np.load(out / "ids.npy")[0])
        assert found[0]["cls"] == first % 3
        assert found[0]["png"].size == (8, 8)


def test_an_own_card_is_not_replaced(made, tmp_path):
    pool, curation, _, _ = made
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(PoolError, match=r"README\.md"):
        export(pool, curation.ids, tmp_path, curation=curation)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_edited_card_stays_when_the_shards_are_replaced(made, tmp_path, caplog):
    pool, curation, _, _ = made
    out = tmp_path / "out"
    export(pool, curation.ids, out, curation=curation)
    export(pool, curation.ids[:5], out, curation=curation, overwrite=True)  # nobody has edited the card
    assert len(ShardPool(str(out / "shard-*.tar"))) == 5
    edited = (out / "README.md").read_text().replace("# license: to be filled in, such as", "license:")
    (out / "README.md").write_text(edited)
    export(pool, curation.ids, out, curation=curation, overwrite=True)
    assert "README.md" in caplog.text
    export(pool, curation.ids, out, overwrite=True)
    assert (out / "README.md").read_text() == edited
    assert not (out / "curation.parquet").exists()  # of an export that is no longer there


@pytest.mark.parametrize("manifest", [b"", b"\0" * 40, b"[" * 100_000, b'{"card": 3}', b"null", None])
def test_what_an_export_cannot_tell_for_its_own_stays_and_is_named(made, tmp_path, caplog, manifest):
    pool, curation, _, _ = made
    out = tmp_path / "out"
    export(pool, curation.ids, out, curation=curation)
    (out / "manifest.json").unlink()
    if manifest is not None:
        (out / "manifest.json").write_bytes(manifest)
    caplog.clear()
    export(pool, curation.ids[:5], out, overwrite=True)
    assert len(ShardPool(str(out / "shard-*.tar"))) == 5
    others = {path.name for path in out.iterdir()} - {"ids.npy", "clusters.npy", "manifest.json"}
    stays = {name for name in others if not name.endswith(".tar")}
    assert "README.md" in stays
    assert all(name in caplog.text for name in stays)


def test_a_folder_in_place_of_a_manifest_is_named(made, tmp_path):
    pool, curation, _, _ = made
    out = tmp_path / "out"
    export(pool, curation.ids, out, curation=curation)
    (out / "manifest.json").unlink()
    (out / "manifest.json" / "inner").mkdir(parents=True)
    with pytest.raises(PoolError, match=r"manifest\.json"):
        export(pool, curation.ids, out, curation=curation, overwrite=True)


@pytest.mark.parametrize("how", ["folder", "loop"])
def test_a_card_that_is_not_a_file_stays_and_is_named(made, tmp_path, caplog, how):
    pool, curation, _, _ = made
    out = tmp_path / "out"
    export(pool, curation.ids, out)
    if how == "folder":
        (out / "README.md").mkdir()
    else:
        (out / "README.md").symlink_to(out / "README.md")
    export(pool, curation.ids[:5], out, overwrite=True)
    assert "README.md" in caplog.text


def test_an_export_is_the_same_twice(made, tmp_path):
    pool, curation, out, _ = made
    export(pool, curation.ids, tmp_path / "out", curation=curation, max_samples=12)
    for path in sorted(out.iterdir()):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
