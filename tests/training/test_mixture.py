"""A mixture in the data module: what is streamed, where it continues, and what cannot be mixed."""

import itertools
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from curated_data import Component, CuratedDataModule, Mixture, RecurationCallback
from curated_data.errors import CacheError, ConfigError, CuratedDataError, PoolError
from curated_data.streaming import EpochOrder
from curated_data.streaming.mixture import MixtureOrder
from curated_data.streaming.state import checked_state
from curated_data.training.components import mixture_rows
from tests.support.mixture_runs import EPOCH_BATCHES, data, fit_recurated, left_corner, mixture, reselected
from tests.support.options import grouped
from tests.support.programs import run_python
from tests.support.recuration_runs import TinyModule, to_float
from tests.support.trainer_runs import (
    EPOCHS,
    GLOBAL_BATCH,
    N_SAMPLES,
    N_VALIDATION,
    SELECTION,
    noisy_crop,
    trainer,
    write_pools,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What `mixture_runs` wrote down."""
    folder = tmp_path_factory.mktemp("mixture-runs")
    run_python("-m", "tests.support.mixture_runs", folder)
    return folder


def lines(folder: Path, run: str, rank: int = 0) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{run}-{rank}.jsonl").read_text().splitlines()]


def streamed(batches: list[dict]) -> list[tuple]:
    """Samples in order: id, component and what its views gave."""
    names = ("ids", "sources", "sum")
    return [sample for batch in batches for sample in zip(*(batch[name] for name in names), strict=True)]


def joined(*ranks: list[dict]) -> list[tuple]:
    """The stream, from the slices of all ranks."""
    per_rank = [streamed(batches) for batches in ranks]
    return list(itertools.chain(*zip(*per_rank, strict=True)))


@pytest.mark.long
def test_two_ranks_with_workers_get_the_stream_of_one(runs):
    one = lines(runs, "one")
    assert len(one) == EPOCHS * EPOCH_BATCHES
    assert {line["length"] for line in one} == {EPOCH_BATCHES}
    assert joined(lines(runs, "two", 0), lines(runs, "two", 1)) == streamed(one)
    assert lines(runs, "two", 1)[-1]["passes"] == one[-1]["passes"]


@pytest.mark.long
def test_the_stream_is_that_of_the_order_alone(runs):
    built = data(runs, 1)
    built.setup("fit")
    order = built.train_dataloader().batch_sampler.order
    assert isinstance(order, MixtureOrder)
    found = streamed(lines(runs, "one"))
    ids = np.concatenate([order.batches(epoch, 0, EPOCH_BATCHES)[1] for epoch in range(EPOCHS)])
    sources = np.concatenate([order.components(epoch, 0, EPOCH_BATCHES) for epoch in range(EPOCHS)])
    assert [sample[0] for sample in found] == ids.tolist()
    assert [sample[1] for sample in found] == sources.tolist()
    assert set(ids[sources == 2]) <= set(SELECTION.tolist())
    assert (ids[sources == 1] >= N_SAMPLES).all()
    assert len(np.unique(order.selection)) == N_SAMPLES + N_VALIDATION
    for batch in sources.reshape(-1, GLOBAL_BATCH):
        assert (batch == 2).all() or not (batch == 2).any()


@pytest.mark.long
def test_a_run_that_was_killed_on_two_ranks_goes_on_at_the_next_sample_on_one(runs):
    whole = streamed(lines(runs, "one"))
    began = joined(lines(runs, "killed-first", 0)[:10], lines(runs, "killed-first", 1)[:10])
    resumed = lines(runs, "killed")
    assert began + streamed(resumed) == whole
    assert (10 % EPOCH_BATCHES) != 0
    assert resumed[-1]["passes"] == lines(runs, "one")[-1]["passes"]


def batches(loaded: CuratedDataModule) -> list[dict]:
    loaded.setup("fit")
    return list(loaded.train_dataloader())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shuffle": "block"},
        {"last_batch": "pad", "batch_size": 7},
        {"num_workers": 2, "seed": 5},
        {"shuffle": "none"},
    ],
)
def test_one_component_is_bit_for_bit_the_stream_of_its_selection(folder, settings):
    pool = str(folder / "pool-{0..2}.tar")
    settings = grouped({"batch_size": 8, "num_workers": 0, "views": noisy_crop} | settings)
    plain = CuratedDataModule(pool, selection=SELECTION, **settings)
    mixed = CuratedDataModule(mixture=Mixture([Component("a", pool, selection=SELECTION)]), **settings)
    for _ in range(2):
        for one, other in zip(batches(plain), batches(mixed), strict=True):
            assert (other.pop("source") == 0).all()
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
    order = mixed.train_dataloader().batch_sampler.order
    assert isinstance(order, EpochOrder)
    assert order.fingerprint == plain.train_dataloader().batch_sampler.order.fingerprint
    assert mixed.component_passes() == {"mixture/a": 2.0}


def test_pools_of_other_image_sizes_mix_by_their_own_views(tmp_path, folder, write_pool):
    small = str(folder / "pool-0.tar")
    large = large_pool(tmp_path)
    components = [
        Component("small", small, 3, views=left_corner),
        Component("large", large, 1, views=every_second),
    ]
    built = CuratedDataModule(mixture=Mixture(components), batch_size=8, loader={"num_workers": 0})
    plain = {
        "small": CuratedDataModule(
            small, views=left_corner, shuffle="none", batch_size=1, loader={"num_workers": 0}
        ),
        "large": CuratedDataModule(
            large, views=every_second, shuffle="none", batch_size=1, loader={"num_workers": 0}
        ),
    }
    images = {name: [batch["image"][0] for batch in batches(one)] for name, one in plain.items()}
    found = batches(built)
    assert len(found) == (20 + 12) // 8
    for batch in found:
        assert batch["source"].tolist().count(1) == 2
        for (name, own), image in zip(
            built.component_of(batch["sample_id"], batch["source"]), batch["image"], strict=True
        ):
            assert torch.equal(image, images[name][own])
    # Prediction goes through both pools, with one transform.
    built = CuratedDataModule(
        mixture=Mixture(components), batch_size=8, loader={"num_workers": 0}, image_size=6
    )
    ids = torch.cat([batch["sample_id"] for batch in built.predict_dataloader()])
    assert ids.tolist() == list(range(32))


def large_pool(folder: Path) -> str:
    import webdataset

    from tests.support.images import png

    rng = np.random.default_rng(3)
    path = folder / "large.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for place in range(12):
            image = png(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            writer.write({"__key__": f"{place:03d}", "png": image, "cls": "1"})
    return str(path)


def every_second(image):
    return image[:, ::2, ::2].float()


def test_the_log_and_the_statistics_say_how_often_each_component_was_seen(folder, caplog):
    caplog.set_level(logging.INFO)
    built = CuratedDataModule(
        mixture=mixture(folder, weights={0: [2, 1, 1]}),
        batch_size=8,
        loader={"num_workers": 0},
        views=noisy_crop,
    )
    found = batches(built)
    sources = torch.cat([batch["source"] for batch in found])
    counts = torch.bincount(sources, minlength=3).tolist()
    assert sum(counts) == EPOCH_BATCHES * 8
    assert built.statistics.of_component == dict(zip(["all", "others", "own"], counts, strict=True))
    sizes = [N_SAMPLES, N_VALIDATION, len(SELECTION)]
    assert list(built.component_passes().values()) == [
        count / size for count, size in zip(counts, sizes, strict=True)
    ]
    told = [message for message in caplog.messages if message.startswith("mixture: passes")]
    assert len(told) == 1
    assert f"all {counts[0] / N_SAMPLES:.2f}" in told[0]
    rows = mixture_rows(built.mixture, built.components)
    assert [(row.size, row.share, row.shared) for row in rows] == [
        (53, 0.5, 39),
        (13, 0.25, 0),
        (40, 0.25, 39),
    ]


def test_an_epoch_is_rounded_up_with_pad_and_nothing_is_left_out(folder):
    settings = {"batch_size": 8, "loader": {"num_workers": 0}, "views": noisy_crop}
    dropped = CuratedDataModule(mixture=mixture(folder), **settings)
    padded = CuratedDataModule(mixture=mixture(folder), last_batch="pad", **settings)
    by_epoch = [batches(dropped), batches(dropped), batches(padded)]
    assert [len(epoch) for epoch in by_epoch] == [EPOCH_BATCHES, EPOCH_BATCHES, EPOCH_BATCHES + 1]
    ids = [torch.cat([batch["sample_id"] for batch in epoch]) for epoch in by_epoch]
    assert torch.equal(torch.cat(ids[:2])[: len(ids[2])], ids[2])


def test_what_cannot_be_read_is_replaced_from_the_same_component(write_pool, folder):
    damaged = {(0, place): b"\x89PNG but no more" for place in (1, 4, 9)}
    write_pool([30], bad=damaged, name="bad")
    bad = str(next(iter(write_pool([30], bad=damaged, name="bad"))))
    components = [Component("good", str(folder / "validation-0.tar"), 1), Component("bad", bad, 1)]
    built = CuratedDataModule(
        mixture=Mixture(components, epoch_size=120),
        batch_size=8, loader={"num_workers": 0}, views=noisy_crop, decoding={"on_error": "skip"},
    )  # fmt: skip
    found = batches(built)
    sources = torch.cat([batch["source"] for batch in found])
    ids = torch.cat([batch["sample_id"] for batch in found])
    assert built.statistics.n_skipped >= 3
    assert ((ids >= 13) == (sources == 1)).all()
    assert not set(ids.tolist()) & {13 + 1, 13 + 4, 13 + 9}


def curation(target: int, seed: int = 0) -> dict:
    return {
        "target_size": target,
        "levels": [{"n_clusters": 8}, {"n_clusters": 3}],
        "seed": seed,
        "embedding": {"num_workers": 0, "dtype": "float32"},
    }


def reselections(folder: Path, run: str, ranks: int = 1) -> list[tuple[int, int, int]]:
    """Every sample of a run in order: its epoch, id and component."""
    by_rank = [
        [
            sample
            for epoch, ids, sources in lines(folder, run, rank)
            for sample in zip([epoch] * len(ids), ids, sources, strict=True)
        ]
        for rank in range(ranks)
    ]
    return list(itertools.chain(*zip(*by_rank, strict=True)))


def check_that_only_one_was_reselected(folder: Path, stream: list[tuple[int, int, int]]) -> None:
    assert len(stream) == EPOCHS * 48
    selected = [
        {sample for e, sample, source in stream if (e, source) == (epoch, 0)} for epoch in range(EPOCHS)
    ]
    assert len({tuple(sorted(ids)) for ids in selected}) == EPOCHS
    assert all(len(ids) == 16 for ids in selected)  # two passes over each
    # The other component continues where it was: as without any curation.
    plain = reselected(folder, 1, None)
    alone = [
        (epoch, sample)
        for epoch in range(EPOCHS)
        for batch in batches(plain)
        for sample, source in zip(batch["sample_id"].tolist(), batch["source"].tolist(), strict=True)
        if source == 1
    ]
    assert [(epoch, sample) for epoch, sample, source in stream if source == 1] == alone


def test_a_re_curation_replaces_one_component_and_leaves_the_other(tmp_path):
    folder = write_pools(tmp_path)
    run = fit_recurated(folder, "whole")
    stream = reselections(folder, "whole")
    check_that_only_one_was_reselected(folder, stream)
    assert run.callback_metrics["mixture/whole"] > 2
    last = {sample for epoch, sample, source in stream if (epoch, source) == (2, 0)}
    assert last == set(run.datamodule.component("curated").selection.tolist())

    # Stopped in the middle of the second epoch, and resumed there.
    fit_recurated(folder, "stopped", max_steps=9).save_checkpoint(folder / "nine.ckpt")
    fit_recurated(folder, "resumed", ckpt_path=folder / "nine.ckpt")
    assert reselections(folder, "resumed") == stream[72:]


@pytest.mark.long
def test_on_two_ranks_one_component_is_re_curated_too_and_the_run_resumes_afterwards(tmp_path):
    run_python("-m", "tests.support.mixture_runs", tmp_path, "recurated")
    stream = reselections(tmp_path, "whole", ranks=2)
    check_that_only_one_was_reselected(tmp_path, stream)
    assert reselections(tmp_path, "stopped", ranks=2) == stream[:80]
    assert reselections(tmp_path, "resumed", ranks=2) == stream[72:]


def test_a_re_curation_names_its_component(write_pool, tmp_path):
    shards = write_pool([20, 20])
    components = [Component("curated", shards[0], 2, curation=curation(16)), Component("whole", shards[1], 1)]
    for name, told in ((None, "'?component'?"), ("wohle", "'wohle'"), ("whole", "'whole'.*`curation`")):
        loaded = CuratedDataModule(
            mixture=Mixture(components), embedder="pixels:8", views=to_float, batch_size=8,
            loader={"num_workers": 0},
            cache_dir=tmp_path / "cache",
        )  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            trainer(tmp_path, 1, callbacks=[RecurationCallback(1, component=name)]).fit(TinyModule(), loaded)
    assert RecurationCallback(1).state_key != RecurationCallback(1, component="a").state_key


def test_a_selection_of_a_component_is_set_and_found_in_checkpoints(folder):
    built = data(folder, 1)
    built.setup("fit")
    with pytest.raises(ConfigError, match=r"^component: "):
        built.set_selection(np.arange(5))
    with pytest.raises(ConfigError, match="id 13"):
        built.set_selection(np.array([13]), component="others")
    built.set_selection(np.array([3, 1, 3]), component="others")
    built.set_selection(np.array([7]), component="own")
    assert built.component("others").selection.tolist() == [3, 1, 3]
    assert built.component("own").selection.tolist() == [7]
    assert built.component("all").selection is None
    state = built.state_dict()
    again = data(folder, 1)
    again.load_state_dict(state)
    again.setup("fit")
    assert again.component("others").selection.tolist() == [3, 1, 3]
    found = batches(again)
    others = {
        i for b in found for i, s in zip(b["sample_id"].tolist(), b["source"].tolist(), strict=True) if s == 1
    }
    assert others == {N_SAMPLES + 1, N_SAMPLES + 3}
    for array in ([9, 1, 0], [1, 5, 0], [1, 1, 99], [0], [1, -1, 4], [1, 1, 3, 1, 1, 3]):
        torn = {**checked_state(state), "selection": torch.tensor(array)}
        with pytest.raises((ConfigError, CacheError)):
            data(folder, 1).load_state_dict(torn)


def test_everything_bad_is_one_error_that_names_it_before_anything_is_embedded(folder, tmp_path):
    pool, other = str(folder / "pool-{0..2}.tar"), str(folder / "validation-0.tar")

    def stop(images):
        raise AssertionError("embedded before the error")

    curated = {"name": "a", "pool": pool, "weight": 1, "curation": curation(16), "embedder": stop}
    b = {"name": "b", "pool": other, "weight": 1}
    tarfile.open(tmp_path / "empty.tar", "w").close()
    cases = [
        ({"components": [curated, b | {"pool": str(tmp_path / "empty.tar")}]}, "'b', .*empty"),
        ({"components": []}, "components"),
        ({"components": "web.tar"}, "components"),
        ({}, "components"),
        ({"components": [curated], "epoch_sise": 10}, "'epoch_size'"),
        ({"components": [curated | {"wieght": 3}]}, "'weight'"),
        ({"components": [curated, b | {"name": "a"}]}, "'a'"),
        ({"components": [curated, b | {"name": ""}]}, "name"),
        ({"components": [curated, {"name": "b", "weight": 1}]}, "'b', pool"),
        ({"components": [curated, b | {"pool": str(folder / "none-*.tar")}]}, "'b', .*none-"),
        ({"components": [curated, b | {"weight": 0}]}, "'b'"),
        ({"components": [curated, b | {"weight": -1}]}, "'b'"),
        ({"components": [curated, b | {"weight": None}]}, "'b'"),
        ({"components": [curated, b | {"weight": 1e-7}]}, "'b'"),
        ({"components": [curated, b], "weights": {0: [1, 2]}}, "'a', weight"),
        ({"components": [curated, b], "epoch_size": 0}, "epoch_size"),
        ({"components": [curated, b], "epoch_size": 7}, "epoch_size"),
        ({"components": [curated, b | {"batches": "alone"}]}, "'b', batches"),
        ({"components": [curated, b | {"shuffle": "ful"}]}, "'b', shuffle"),
        ({"components": [curated, b | {"views": 3}]}, "'b', views"),
        ({"components": [curated, b | {"selection": np.array([], np.int64)}]}, "'b', selection"),
        ({"components": [curated, b | {"selection": [13]}]}, "'b', selection.*id 13"),
        ({"components": [curated, b | {"stratify_level": 1}]}, "'b', stratify_level"),
        ({"components": [curated | {"stratify_level": 3}, b]}, "'a', stratify_level"),
        ({"components": [curated | {"stratify_level": 1, "shuffle": "block"}, b]}, "'a', stratify_level"),
        ({"components": [curated | {"selection": [1]}, b]}, "'a', selection"),
        ({"components": [curated | {"curation": {"target_sise": 3}}, b]}, "'a', curation.*target_size"),
        ({"components": [curated, b | {"views": smaller}]}, "'a' and 'b'.*image"),
        ({"components": [curated, b | {"views": as_bytes}]}, "'a' and 'b'.*uint8"),
        ({"components": [curated, b | {"views": twice}]}, "'a' and 'b'"),
        ({"components": [curated, b | {"weight": 0.01, "batches": "own"}], "epoch_size": 160}, "'b', weight"),
    ]
    for mapping, told in cases:
        with pytest.raises((ConfigError, PoolError), match=told):
            CuratedDataModule(
                mixture=mapping, cache_dir=tmp_path, batch_size=8, loader={"num_workers": 0}, views=noisy_crop
            ).setup("fit")
    for arguments, told in (
        ({"pool": pool}, "^pool: "),
        ({"selection": [1]}, "^selection: "),
        ({"curation": curation(16), "embedder": stop}, "^curation: "),
        ({"labels": [1]}, "^labels: "),
        ({"stratify_level": 1}, "^stratify_level: "),
        ({"decoding": {"decoders": {"source": len}}}, "source"),
        ({"cache_dir": None}, "component 'a', cache_dir: "),
    ):
        with pytest.raises(ConfigError, match=told):
            CuratedDataModule(
                **({"mixture": {"components": [curated, b]}, "cache_dir": tmp_path} | arguments)
            )
    with pytest.raises(ConfigError, match=r"^pool: "):
        CuratedDataModule()
    with pytest.raises(ConfigError, match="embedder"):
        CuratedDataModule(mixture={"components": [curated | {"embedder": None}, b]}, cache_dir=tmp_path)
    # With batches of its own a component may have other views.
    built = CuratedDataModule(
        mixture={"components": [b | {"name": "a", "pool": pool}, b | {"views": smaller, "batches": "own"}]},
        batch_size=8, loader={"num_workers": 0}, views=noisy_crop,
    )  # fmt: skip
    assert {batch["image"].shape[-1] for batch in batches(built)} == {5, 6}


def smaller(image):
    return image[:, :5, :5].float()


def as_bytes(image):
    return image[:, :6, :6]


def twice(image):
    return [noisy_crop(image), noisy_crop(image)]


def test_a_mixture_of_another_run_is_not_resumed_in_the_middle_of_an_epoch(folder):
    built = data(folder, 1)
    built.setup("fit")
    loader = built.train_dataloader()
    next(iter(loader))
    state = loader.state_dict()
    assert state["batch"] == 1
    other = CuratedDataModule(
        mixture=mixture(folder, weights={0: [1, 1, 1]}), batch_size=8, views=noisy_crop,
        loader={"num_workers": 0},
        cache_dir=folder / "cache",
    )  # fmt: skip
    other.load_state_dict(state)
    with pytest.raises(CuratedDataError, match="another order"):
        batches(other)
