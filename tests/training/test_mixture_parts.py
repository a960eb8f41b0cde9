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
)
from curated_data.errors import ConfigError
from curated_data.report.mixture import write_mixture_report
from curated_data.streaming.device import ResizedCrops
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
        ({"labels": np.arange(3)}, "'some', labels: 3 of them"),
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
    for wrong, told in (({"wohle": labels}, "wohle"), (labels, "by its name")):
        with pytest.raises(ConfigError, match=told):
            trainer(tmp_path, 1, callbacks=[CurationLogger(wrong)]).fit(TinyModule(), curated)


def test_the_report_shows_size_share_and_what_others_hold(curated, tmp_path):
    with pytest.raises(ConfigError, match="setup"):
        write_mixture_report(curated, tmp_path / "report")
    curated.setup("fit")
    path = write_mixture_report(curated, tmp_path / "report", title="A & B")
    page = path.read_text()
    assert "<title>A &amp; B</title>" in page
    lines = [re.findall("<td>(.*?)</td>", line) for line in re.findall("<tr>(.*?)</tr>", page)]
    rows = [line for line in lines if len(line) == 8]
    one, two = (curated.component(name).curation.ids for name in ("balanced <1>", "other"))
    common = len(set(one.tolist()) & set(two.tolist()))
    assert [row[2] for row in rows] == ["16", "12", "21"]
    assert [row[3] for row in rows] == ["50.00%", "25.00%", "25.00%"]
    assert [row[6] for row in rows] == [f"{32 / 16:.2f}", f"{16 / 12:.2f}", f"{16 / 21:.2f}"]
    assert [row[7] for row in rows] == [
        f"{common} ({common / 16:.1%})", f"{common} ({common / 12:.1%})", "0 (0.0%)"
    ]  # fmt: skip
    assert common > 0
    assert [line[1:] for line in lines if len(line) == 4] == [
        ["16", f"{common}", "0"], [f"{common}", "12", "0"], ["0", "0", "21"]
    ]  # fmt: skip
    links = re.findall('href="(.*?)"', page)
    assert links == ["component-0.html", "component-1.html"]
    assert all((tmp_path / "report" / link).stat().st_size > 10_000 for link in links)
    with pytest.raises(ConfigError, match="no mixture"):
        write_mixture_report(CuratedDataModule(curated.pool), tmp_path / "report")
