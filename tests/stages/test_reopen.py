"""A curation that is opened again is the one that was made, and each run begins with its own selection."""

import json

import lightning
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curated_data import CurationConfig, Level, RecurationCallback, ShardPool, curate
from curated_data.cache.artifacts import MANIFEST
from curated_data.config import EmbeddingConfig, NearDuplicateConfig
from curated_data.errors import CacheError
from curated_data.pipeline.extend import extend
from curated_data.pipeline.recurate import recurate
from curated_data.pipeline.reopen import reopen
from tests.support.forging import forge
from tests.support.images import png
from tests.support.recuration_runs import SIZES, TinyModule, by_epoch, datamodule, fit, seen
from tests.support.trainers import quiet_trainer


def check_reopened(cache, made) -> None:
    """All that the cache can know of a curation is what the run had."""
    found = reopen(cache, made.folders["selection"].name)
    expected = {name: value for name, value in made.report.items() if name not in ("cached", "seconds")}
    assert found.report == expected
    assert json.loads(json.dumps(found.report)) == found.report
    assert found.folders == made.folders
    assert found.config == made.config
    assert found.tree.metric == made.tree.metric == made.config.metric
    assert found.embeddings.fingerprint == made.embeddings.fingerprint
    np.testing.assert_array_equal(found.ids, made.ids)
    np.testing.assert_array_equal(found.tree.distance, made.tree.distance)
    for level, parent in made.tree.parent.items():
        np.testing.assert_array_equal(found.tree.parent[level], parent)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Writers of shards, each of which is written once: `shards(12, bad, copies)`."""
    import webdataset

    folder = tmp_path_factory.mktemp("shards")

    def write(number: int, size: int, n_bad: int, n_copies: int) -> str:
        path = folder / f"{number}-{size}-{n_bad}-{n_copies}.tar"
        if not path.exists():
            rng = np.random.default_rng(number)
            images = [png(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(size)]
            images[:n_bad] = [b"?"] * n_bad
            images[size - n_copies :] = [images[n_bad]] * n_copies
            with webdataset.TarWriter(str(path), mtime=0) as writer:
                for place, image in enumerate(images):
                    writer.write({"__key__": f"{number}/{place:03d}", "png": image})
        return str(path)

    return write


@pytest.mark.long
@given(
    n_bad=st.integers(0, 3),
    n_copies=st.integers(0, 3),
    removes=st.booleans(),
    holds_out=st.booleans(),
    metric=st.sampled_from(["l2", "cosine"]),
    share=st.sampled_from([0.4, 0.7, 1.0]),
    flat=st.booleans(),
    repeats=st.integers(1, 2),
    seed=st.integers(0, 3),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_reopened_curation_is_the_one_that_was_made(
    shards, tmp_path, n_bad, n_copies, removes, holds_out, metric, share, flat, repeats, seed
):
    """For `curate`, `extend`, `recurate`, and these upon each other, made or found in the cache."""
    cache = tmp_path / "cache"
    config = CurationConfig(
        target_size=12,
        levels=[Level(6), Level(2)],
        metric=metric,
        sampling="flat" if flat else "hierarchical",
        max_repeats=repeats,
        seed=seed,
        near_duplicates=NearDuplicateConfig(
            enabled=removes, threshold=0.999, held_out=[shards(2, 5, 0, 0)] if holds_out else []
        ),
        embedding=EmbeddingConfig(num_workers=0),
    )
    first, more = shards(0, 20, n_bad, n_copies), [shards(1, 8, n_bad // 2, n_copies), shards(2, 5, 0, 0)]
    pool = ShardPool([first, shards(3, 14, 0, 0)], cache_dir=cache)
    for _ in range(2):  # made, and found in the cache
        base = curate(pool, config, embedder="pixels:4", cache_dir=cache)
        again = recurate(pool, config, base=base, share=share, embedder="pixels:2", cache_dir=cache)
        upon = recurate(
            pool,
            config,
            base=reopen(cache, base.folders["selection"].name),
            share=share,
            embedder="pixels:2",
            cache_dir=cache,
        )
        assert upon.report.keys() == again.report.keys()
        assert {**upon.report, "seconds": 0} == {
            **again.report,
            "seconds": 0,
            "cached": upon.report["cached"],
        }
        grown = extend(
            [*pool.urls, *more], config, tree=base.folders["tree"], embedder="pixels:4", cache_dir=cache
        )
        over = ShardPool([*pool.urls, *more], cache_dir=cache)
        third = recurate(over, config, base=grown, share=share, embedder="pixels:2", cache_dir=cache)
        for made in (base, again, upon, grown, third):
            check_reopened(cache, made)
            assert made.report["samples"] == sum(
                made.report[name] for name in ("failed", "near_duplicates", "excluded")
            ) + int((made.tree.parent[1] >= 0).sum())


def test_a_selection_of_an_earlier_version_says_so(shards, tmp_path):
    config = CurationConfig(target_size=5, levels=[Level(3)], embedding=EmbeddingConfig(num_workers=0))
    made = curate([shards(0, 20, 0, 0)], config, embedder="pixels:2", cache_dir=tmp_path / "c")
    path = made.folders["selection"] / MANIFEST
    forge(path, lambda content: {name: content[name] for name in content if name != "report"})
    with pytest.raises(CacheError, match=made.folders["selection"].name):
        reopen(tmp_path / "c", made.folders["selection"].name)


def test_a_tree_that_is_its_own_base_is_damaged(shards, tmp_path):
    config = CurationConfig(target_size=5, levels=[Level(3)], embedding=EmbeddingConfig(num_workers=0))
    pool = ShardPool([shards(0, 20, 0, 0)], cache_dir=tmp_path / "c")
    base = curate(pool, config, embedder="pixels:4", cache_dir=tmp_path / "c")
    made = recurate(pool, config, base=base, share=0.5, embedder="pixels:2", cache_dir=tmp_path / "c")
    path = made.folders["tree"] / MANIFEST
    forge(path, lambda content: content | {"inputs": content["inputs"] | {"base": path.parent.name}})
    with pytest.raises(CacheError, match=f"{path.parent.name}.*base"):
        reopen(tmp_path / "c", made.folders["selection"].name)


def run(data, record, callbacks, epochs=2, trainer=None, **options):
    lightning.seed_everything(0, verbose=False)
    trainer = trainer or quiet_trainer(max_epochs=epochs, callbacks=callbacks, **options)
    trainer.fit(TinyModule(str(record)), data)
    return by_epoch(seen(record)), trainer


def test_a_second_run_begins_with_the_first_selection(write_pool, tmp_path):
    """With the same data module and callback, with a new callback, and without any."""
    data, callback = datamodule(write_pool(SIZES), tmp_path / "c"), RecurationCallback(1)
    whole, trainer = run(data, tmp_path / "1", [callback])
    assert sorted(whole[1]) != sorted(whole[0])
    assert run(data, tmp_path / "2", [callback])[0] == whole
    assert callback.n_recurations == 1
    assert run(data, tmp_path / "3", [RecurationCallback(1)])[0] == whole
    plain, _ = run(data, tmp_path / "4", [])
    assert plain[0] == whole[0]
    assert sorted(plain[1]) == sorted(whole[0])
    assert data.curation is data.base_curation
    # While the Trainer that continues streams what it has selected last.
    data = datamodule(data.pool.urls, tmp_path / "c")
    _, trainer = run(data, tmp_path / "5", [RecurationCallback(1, most=1)])
    trainer.fit_loop.max_epochs = 3
    longer, _ = run(data, tmp_path / "5", [], trainer=trainer)
    assert sorted(longer[2]) == sorted(whole[1])


def test_a_selection_set_between_runs_is_streamed_by_those_that_follow(write_pool, tmp_path):
    data = datamodule(write_pool(SIZES), tmp_path / "c")
    run(data, tmp_path / "1", [RecurationCallback(1)])
    mine = np.arange(16)
    data.set_selection(mine)
    for record in ("2", "3"):
        found, _ = run(data, tmp_path / record, [RecurationCallback(1)])
        assert sorted(found[0]) == mine.tolist()
        assert len(found[1]) == 32


def test_a_resumed_run_streams_what_its_checkpoint_says(write_pool, tmp_path):
    """Also with a data module that another run has used since."""
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path / "k", every_n_train_steps=1, save_top_k=-1)
    shards = write_pool(SIZES)
    fit(shards, tmp_path / "c", tmp_path / "w", epochs=3, callbacks=[RecurationCallback(1), saving],
        enable_checkpointing=True)  # fmt: skip
    whole = seen(tmp_path / "w")
    path = tmp_path / "k" / "epoch=1-step=6.ckpt"
    data = datamodule(shards, tmp_path / "c")
    run(data, tmp_path / "other", [RecurationCallback(1)])
    lightning.seed_everything(0, verbose=False)
    trainer = quiet_trainer(max_epochs=3, callbacks=[RecurationCallback(1)])
    trainer.fit(TinyModule(str(tmp_path / "r")), data, ckpt_path=path)
    assert seen(tmp_path / "r") == whole[6:]
