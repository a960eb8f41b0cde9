"""What mixtures take as single selections do: given labels, decoding on the device, a logger, a report."""

import csv
import re

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from curated_data import (
    Component,
    CuratedDataModule,
    CurationLogger,
    DecodingOptions,
    DeviceOptions,
    LoaderOptions,
    Mixture,
    ShardPool,
    ShardWriter,
)
from curated_data.errors import ConfigError
from curated_data.streaming.device import ResizedCrops
from curated_data.training.mixture_file import open_mixture
from curated_data.training.mixture_report import write_mixture_report
from tests.support.trainer_runs import trainer
from tests.training.test_datamodule_options import trained
from tests.training.test_decode_on_device import VARIETY, encoded, without_tables, write  # noqa: F401
from tests.training.test_mixture import batches, curation
from tests.training.test_recuration import TinyModule, to_float

ALONE = LoaderOptions(num_workers=0)


def test_labels_are_given_per_component(write_pool, tmp_path):
    paths = write_pool([10, 8])
    ids, labels = np.array([1, 4, 7, 9]), np.array([50, 51, 50, 52])
    components = [
        Component("some", paths[0], 1, selection=ids, labels=labels),
        Component("all", paths[0], 1, labels=np.arange(100, 110)),
        Component("pools", paths[1], 1),
    ]
    data = CuratedDataModule(
        mixture=Mixture(components, epoch_size=48), batch_size=6, image_size=8, loader=ALONE
    )
    found = batches(data)
    own = {0: dict(zip(ids.tolist(), labels.tolist(), strict=True)), 1: {i: 100 + i for i in range(10)}}
    own[2] = dict(enumerate(data.sources[2].pool.labels(np.arange(8)).tolist()))
    seen = set()
    for batch in found:
        placed = data.component_of(batch["sample_id"], batch["source"])
        for source, (_, sample), label in zip(
            batch["source"].tolist(), placed, batch["label"].tolist(), strict=True
        ):
            assert label == own[source][sample]
            seen.add(source)
    assert seen == {0, 1, 2}
    for wrong, told in (
        ({"labels": np.arange(3)}, "'some', labels: 3 "),
        ({"labels": np.arange(9), "curation": curation(4)}, "'some', labels"),
    ):
        with pytest.raises(ConfigError, match=told):
            batches(
                CuratedDataModule(
                    mixture=Mixture([Component("some", paths[0], 1, **wrong), components[2]]),
                    batch_size=2,
                    image_size=8,
                    loader=ALONE,
                    embedder="pixels:8",
                    cache_dir=tmp_path,
                )
            )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_jpegs_are_decoded_on_the_device_as_in_workers(write_pool, write, num_workers):  # noqa: F811
    """Also those that cannot be, whose spares come from their own component."""
    broken = without_tables(encoded(21))
    jpegs = write([*VARIETY, broken, *(encoded(seed) for seed in range(30, 36))])
    mixed = Mixture([Component("png", write_pool([12]), 1), Component("jpeg", jpegs, 2)], epoch_size=90)
    found = []
    for decode in (False, True):
        data = CuratedDataModule(
            mixture=mixed, batch_size=6, image_size=12, seed=3,
            loader=LoaderOptions(num_workers=num_workers),
            decoding=DecodingOptions(on_error="skip", max_skipped=1.0),
            device=DeviceOptions(views=ResizedCrops(8), decode=decode),
        )  # fmt: skip
        found.append((trained(data), data.statistics))
    (expected, counted), (decoded, statistics) = found
    assert len(decoded) == 15
    for batch, other in zip(decoded, expected, strict=True):
        assert batch.keys() == other.keys()
        for name in ("sample_id", "source", "label"):
            assert torch.equal(batch[name], other[name])
        for view, wanted in zip(batch["views"], other["views"], strict=True):
            assert torch.equal(view, wanted)
    assert 12 + 9 not in torch.cat([batch["sample_id"] for batch in decoded])
    assert statistics.n_skipped == counted.n_skipped >= 2
    with pytest.raises(ConfigError, match="'jpeg', views"):
        CuratedDataModule(
            mixture=Mixture([Component("jpeg", jpegs, views=to_float)]),
            device=DeviceOptions(views=ResizedCrops(8), decode=True),
        )


def test_strata_repeats_and_blocks_of_shards_hold_within_their_component(write_pool, tmp_path):
    """With batches of both kinds, and padded epochs, which a mixture rounds up."""
    shards, repeated = write_pool([4] * 10), np.array([0, 0, 0, 1, 5, 5])
    chosen = {**curation(24), "near_duplicates": {"enabled": False}}
    components = [
        Component("strata", shards, 3, curation=chosen, stratify_level=1),
        Component("repeats", shards, 1, selection=repeated),
        Component("blocks", shards, 2, shuffle="block", batches="own"),
    ]
    data = CuratedDataModule(
        mixture=Mixture(components, epoch_size=100), embedder="pixels:8", views=to_float, batch_size=8,
        cache_dir=tmp_path / "cache", loader=ALONE, last_batch="pad",
    )  # fmt: skip
    found = [*batches(data), *batches(data)]
    assert len(found) == 2 * 13
    assert not any(batch["padding"].any() for batch in found if "padding" in batch)
    sources, ids = (torch.cat([batch[name] for batch in found]).numpy() for name in ("source", "sample_id"))
    strata, repeats, blocks = (ids[sources == number] for number in range(3))

    curation_of = data.component("strata").curation
    leaf = curation_of.tree.parent[1]
    sizes = np.bincount(leaf[curation_of.ids])
    for start in range(0, len(strata) - 24, 24):  # a pass over the selection
        one_pass = strata[start : start + 24]
        assert sorted(one_pass) == sorted(curation_of.ids)
        for size in (6, 12):
            counts = np.bincount(leaf[one_pass[:size]], minlength=len(sizes))
            assert (np.abs(counts - size * sizes / 24) <= 2 + len(sizes) * sizes / 24).all()
    for start in range(0, len(repeats) - 6, 6):
        assert sorted(repeats[start : start + 6]) == repeated.tolist()
    assert len(blocks) >= 40
    first, second = (set((part // 4).tolist()) for part in (blocks[:32], blocks[32:40]))
    assert (len(first), len(second), len(first & second)) == (8, 2, 0)  # windows of eight shards


def test_components_of_other_fields_share_no_batch(write_pool, tmp_path):
    with ShardWriter(tmp_path / "depth-%d.tar") as writer:
        for number, sample in enumerate(ShardPool(write_pool([8])).read(range(8), ["png"])):
            writer.write({"__key__": str(number), "png": bytes(sample["png"]), "npy": np.zeros(3)})
    components = [
        Component("images", write_pool([8]), 1),
        Component("depth", str(tmp_path / "depth-0.tar"), 1),
    ]
    data = CuratedDataModule(mixture=Mixture(components), batch_size=4, image_size=8, loader=ALONE)
    with pytest.raises(ConfigError, match=r"'images' and 'depth' .*array"):
        batches(data)


@pytest.fixture
def curated(write_pool, tmp_path):
    """Two components of one pool with curations, and one of another pool without."""
    shards = write_pool([40, 21])
    components = [
        Component("balanced <1>", shards[0], 2, curation=curation(16)),
        Component("other", shards[0], 1, curation=curation(12, seed=1)),
        Component("whole", shards[1], 1),
    ]
    return CuratedDataModule(
        mixture=Mixture(components, epoch_size=64), embedder="pixels:8", views=to_float, batch_size=8,
        cache_dir=tmp_path / "cache", loader=ALONE,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_the_logger_logs_each_component(curated, tmp_path):
    logger = CSVLogger(tmp_path / "csv", flush_logs_every_n_steps=1)
    labels = np.arange(40) % 4
    run = trainer(tmp_path, 1, max_epochs=1, callbacks=[CurationLogger({"other": labels})], logger=logger)
    run.fit(TinyModule(), curated)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    logged = {name: value for row in rows for name, value in row.items() if value}
    assert float(logged["curation/balanced <1>/selected"]) == 16
    assert float(logged["curation/other/selected"]) == 12
    counts = np.bincount(labels[curated.component("other").curation.ids], minlength=4)
    shares = counts[counts > 0] / counts.sum()
    assert float(logged["curation/other/selected_class_entropy"]) == pytest.approx(
        -(shares * np.log(shares)).sum(), rel=1e-5
    )
    assert not [name for name in logged if name.startswith("curation/whole")]
    for wrong, told in (({"wohle": labels}, "wohle"), (labels, "^CurationLogger.labels: ")):
        with pytest.raises(ConfigError, match=told):
            trainer(tmp_path, 1, callbacks=[CurationLogger(wrong)]).fit(TinyModule(), curated)


def test_the_report_shows_size_share_and_what_others_hold(curated, tmp_path):
    with pytest.raises(ConfigError, match="setup"):
        write_mixture_report(curated, tmp_path / "report")
    curated.setup("fit")
    path = write_mixture_report(curated, tmp_path / "report", title="A & B")
    page = path.read_text()
    assert "<title>A &amp; B</title>" in page
    lines = [re.findall("<td[^>]*>(.*?)</td>", line) for line in re.findall("<tr>(.*?)</tr>", page)]
    rows = [line for line in lines if len(line) == 7]
    one, two = (curated.component(name).curation.ids for name in ("balanced <1>", "other"))
    common = len(set(one.tolist()) & set(two.tolist()))
    assert [row[2] for row in rows] == ["16", "12", "21"]
    assert [row[3].split("<")[0] for row in rows] == ["50.00%", "25.00%", "25.00%"]
    assert [row[5] for row in rows] == [f"{32 / 16:.2f}", f"{16 / 12:.2f}", f"{16 / 21:.2f}"]
    assert [row[6] for row in rows] == [
        f"{common} ({common / 16:.1%})", f"{common} ({common / 12:.1%})", "0 (0.0%)"
    ]  # fmt: skip
    assert common > 0
    assert [line[1:] for line in lines if len(line) == 4] == [
        ["16", f"{common}", "0"], [f"{common}", "12", "0"], ["0", "0", "21"]
    ]  # fmt: skip
    links = re.findall('href="(.*?)"', page)
    assert links == ["component-0.html", "component-1.html"]
    assert all((tmp_path / "report" / link).stat().st_size > 10_000 for link in links)
    assert "passes so far" not in page
    assert "Shares that change" not in page
    with pytest.raises(ConfigError, match=r"^write_mixture_report: "):
        write_mixture_report(CuratedDataModule(curated.pool), tmp_path / "report")


@pytest.mark.filterwarnings("ignore")
def test_the_report_after_a_training_says_how_often_each_was_seen(write_pool, tmp_path):
    shards = write_pool([24, 12])
    data = CuratedDataModule(
        mixture=Mixture(
            [Component("a", shards[0]), Component("b", shards[1])], weights={0: [2, 2], 100: [3, 1]}
        ),
        views=to_float, batch_size=6, loader=ALONE,
    )  # fmt: skip
    run = trainer(tmp_path, 1, max_epochs=2)
    run.fit(TinyModule(), data)
    page = write_mixture_report(run.datamodule, tmp_path / "report").read_text()
    rows = [re.findall("<td[^>]*>(.*?)</td>", line) for line in re.findall("<tr>(.*?)</tr>", page)]
    passes = data.component_passes()
    assert sum(passes[f"mixture/{name}"] * size for name, size in (("a", 24), ("b", 12))) == 2 * 36
    assert [row[-1] for row in rows if len(row) == 8] == [f"{value:.2f}" for value in passes.values()]
    assert [row for row in rows if len(row) == 3] == [["0", "50.00%", "50.00%"], ["100", "75.00%", "25.00%"]]


def test_a_mixture_is_opened_by_the_yaml_of_a_training(write_pool, tmp_path):
    shards = write_pool([40, 21])
    base, delta = tmp_path / "base.yaml", tmp_path / "delta.yaml"
    base.write_text(
        "seed_everything: 1\n"
        "model: {class_path: lightning_modules.SimCLR}\n"
        f"data: {{pool: {shards[0]}, batch_size: 4, views: {{class_path: V}}, loader: {{num_workers: 0}}}}\n"
    )
    delta.write_text(
        "data:\n  pool: null\n  mixture:\n    components:\n"
        f"    - {{name: chosen, pool: {shards[0]}, weight: 3, curation: {{target_size: 12}}}}\n"
        f"    - {{name: whole, pool: {shards[1]}, weight: 1, views: {{class_path: Views}}}}\n"
    )
    data = open_mixture([base, delta], embedder="pixels:4", cache_dir=tmp_path / "cache")
    assert (data.batch_size, data.mixture.schedule) == (4, {0: [0.75, 0.25]})
    data.setup("fit")
    assert len(data.component("chosen").selection) == 12
    own = delta.read_text().replace("data:\n", "data:\n  embedder: {class_path: timm.Net}\n")
    for text, told in (
        ("data: {pool: a.tar}", "`mixture`"),
        ("trainer: {max_steps: 3}", "`mixture`"),
        ("data: 3", "`mixture`"),
        ("data: {mixture: {components: '${data.parts}'}}", "parts"),
        (own, "embedder.*class_path"),
        (delta.read_text().replace("mixture:", "bach_size: 3\n  mixture:"), "'bach_size'"),
    ):
        delta.write_text(text)
        with pytest.raises(ConfigError, match=told):
            open_mixture([delta])
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        open_mixture(["nowhere.yaml"])
