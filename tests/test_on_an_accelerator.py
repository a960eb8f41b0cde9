"""Everything that takes a device gives the CPU's result on another one, and mixes no tensors of the two."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from curated_data import CuratedDataModule, RecurationCallback
from curated_data.clustering import Level, hierarchical_kmeans, kmeans
from curated_data.embedding.extract import embed_pool
from curated_data.embedding.resolve import resolve_embedder
from curated_data.pool import ShardPool
from lightning_modules.evaluation.dense import DenseSettings
from lightning_modules.evaluation.depth import depth
from lightning_modules.evaluation.health import health
from lightning_modules.evaluation.knn import knn
from lightning_modules.evaluation.linear import LinearSettings, linear
from lightning_modules.evaluation.multilabel import multilabel
from lightning_modules.evaluation.online import OnlineKNN, OnlineLinear
from lightning_modules.evaluation.retrieval import retrieval
from lightning_modules.evaluation.robustness import ShiftedSet, robustness
from lightning_modules.evaluation.segmentation import segmentation
from lightning_modules.transport import p2ot
from tests.clustering.test_kmeans import clouds
from tests.lightning_modules import test_knn as online
from tests.lightning_modules import test_pretraining as pretraining
from tests.lightning_modules import test_sp2ot as transport
from tests.lightning_modules.test_transport import TIGHT, random_cost
from tests.support.accelerator import NAME, Worker, needs_backends_in_python, trainer
from tests.training import test_datamodule_options as options
from tests.training import test_recuration as recuration

pytestmark = [
    needs_backends_in_python,
    pytest.mark.filterwarnings("ignore"),  # of Lightning, that there are few workers
]


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture
def on_both(worker):
    """The results elsewhere and on the CPU, which must agree, of a function that takes the device first."""

    def run(function, *arguments):
        return tuple(worker.run(function, device, *arguments, device=device) for device in (NAME, "cpu"))

    return run


def mixing():
    here, there = torch.ones(3), torch.ones(3, device=NAME)
    assert (there + there).cpu().tolist() == [2, 2, 2]
    assert (there + 1.0).device.type == there[torch.tensor([0])].device.type == NAME
    refused = [lambda: here + there, there.numpy, lambda: here[there.long()]]
    refused.append(lambda: torch.rand(3, device=NAME, generator=torch.Generator()))
    count = 0
    for each in refused:
        try:
            each()
        except (RuntimeError, TypeError):
            count += 1
    return count


@pytest.mark.long
def test_the_accelerator_refuses_mixed_devices(worker):
    assert worker.run(mixing) == 4


# --- clustering


def clustered(device, k, settings):
    result = kmeans(clouds(6000, 16, 60, seed=0), k, seed=0, device=device, **settings)
    return result.assignment, result.inertia


@pytest.mark.parametrize(
    ("k", "settings"),
    [(50, {}), (40, {"metric": "cosine"}), (40, {"max_memory": 300_000}), (10, {"n_init": 3})],
)
def test_kmeans(on_both, k, settings):
    (there, inertia), (here, expected) = on_both(clustered, k, settings)
    assert inertia == pytest.approx(expected, rel=1e-6)
    assert (there == here).mean() > 0.999


def test_many_clusters_without_neighbourhoods(on_both):
    (_, inertia), (_, expected) = on_both(clustered, 1100, {"init": "random"})
    assert inertia == pytest.approx(expected, rel=5e-3)


def a_tree(device, folder):
    tree = hierarchical_kmeans(
        clouds(3000, 8, 40, seed=0), [Level(150, 2, 4), Level(20, 1, 3)], seed=0, device=device,
        checkpoint=f"{folder}/{device}", checkpoint_seconds=0,
    )  # fmt: skip
    return tree.parent[1], tree.parent[2]


def test_a_tree_with_checkpoints(on_both, tmp_path):
    there, here = on_both(a_tree, tmp_path)
    for a, b in zip(there, here, strict=True):
        np.testing.assert_array_equal(a, b)


# --- embedding, streaming, re-curation


def embedded(device, paths, spec, folder):
    pool = ShardPool(paths)
    store = embed_pool(pool, resolve_embedder(spec), f"{folder}/{device}", num_workers=0, device=device)
    return store.as_array()


@pytest.mark.parametrize("spec", ["pixels:8", "efficientnet_lite0"])
def test_embedding(on_both, spec, write_pool, tmp_path):
    there, here = on_both(embedded, write_pool([5, 3]), spec, tmp_path)
    np.testing.assert_allclose(there, here, atol=1e-3)


def viewed(device, paths, views):
    batches = []

    class Module(recuration.TinyModule):
        def training_step(self, batch, index):
            batches.append(batch)
            return self.network(torch.zeros(4, 192, device=self.device)).sum()

    data = CuratedDataModule(
        paths, device={"views": views}, batch_size=4, loader={"num_workers": 0}, image_size=8
    )
    trainer(device, max_epochs=1).fit(Module(), data)
    for batch in batches:
        for name, value in batch.items():
            batch[name] = [view.cpu() for view in value] if isinstance(value, list) else value.cpu()
    return {s: [view.numpy() for view in views] for s, views in options.by_sample(batches).items()}


@pytest.mark.parametrize("views", [options.JITTER, options.ResizedCrops(6)])
def test_views_made_on_the_device(on_both, views, write_pool):
    there, here = on_both(viewed, write_pool([12]), views)
    assert len(there) == 12
    for sample, made in here.items():
        np.testing.assert_allclose(there[sample], made, atol=1e-5)


def recurated(device, paths, folder):
    torch.manual_seed(0)
    callback = RecurationCallback(every_n_epochs=1)
    data = recuration.datamodule(paths, f"{folder}/cache-{device}")
    module = recuration.TinyModule(f"{folder}/{device}")
    trainer(device, max_epochs=3, callbacks=[callback]).fit(module, data)
    return callback.n_recurations, recuration.by_epoch(recuration.seen(f"{folder}/{device}"))


def test_re_curation_in_training(on_both, write_pool, tmp_path):
    there, here = on_both(recurated, write_pool(recuration.SIZES), tmp_path)
    assert there == here
    assert there[0] == 2


# --- training


def losses(device, name):
    module, kept = pretraining.build(name), []
    step = module.training_step

    def kept_step(*arguments):
        assert {p.device.type for p in module.parameters()} == {torch.device(device).type}
        loss = step(*arguments)
        kept.append(float(loss))
        return loss

    module.training_step = kept_step
    loader = DataLoader(pretraining.Images(module), batch_size=4, sampler=[3, 1, 2, 0])
    trainer(device, max_epochs=4).fit(module, loader)
    return kept


@pytest.mark.parametrize("name", pretraining.BUILD)
def test_pretraining(on_both, name):
    there, here = on_both(losses, name)
    assert len(there) == 4
    assert there == pytest.approx(here, rel=1e-4)


def heads(device, method):
    module = transport.module(method=method)
    trainer(device, max_epochs=2).fit(module, transport.loader(32))
    return module.prototypes.detach().cpu().numpy()


@pytest.mark.parametrize("method", ["p2ot", "ot"])  # sp2ot's similarities are sparse
def test_transport_clustering(on_both, method):
    there, here = on_both(heads, method)
    np.testing.assert_allclose(there, here, atol=1e-5)


def plan(device):
    return p2ot(random_cost(100, 20).to(device), 0.5, **TIGHT).cpu().numpy()


def test_transport(on_both):
    there, here = on_both(plan)
    np.testing.assert_allclose(there, here, atol=1e-6)


# --- evaluation

rng = np.random.default_rng(0)
Y = np.arange(120) % 4
X = (np.eye(4)[Y] @ rng.normal(size=(4, 8)) + rng.normal(size=(120, 8))).astype(np.float32)
MARKS = np.eye(4, dtype=int)[Y]
TOKENS = rng.normal(size=(6, 3, 3, 8)).astype(np.float32)
MASKS, DEPTHS = rng.integers(0, 3, (6, 12, 12)), rng.uniform(0.5, 5, (6, 12, 12))
FEW = DenseSettings(n_iter=10, batch_size=2)
HEADS = LinearSettings(
    protocols=("sgd", "logistic", "few_shot"), n_iter=10, learning_rates=(0.1, 1.0), inverse_penalties=(1.0,),
    max_iter=10, shots=(1, 2), n_draws=2,
)  # fmt: skip
SHIFTED = {"same": ShiftedSet(X[::3], Y[::3]), "map": ShiftedSet(X[::3], Y[::3] % 2, classes=[[0], [1, 2]])}

EVALUATIONS = {
    "knn": lambda device: knn(X, Y, X[::2], Y[::2], k=(1, 5), device=device),
    "knn, euclidean": lambda device: knn(X, Y, X[::2], Y[::2], k=3, metric="euclidean", device=device),
    "linear": lambda device: linear(X, Y, X[::2], Y[::2], settings=HEADS, device=device),
    "multilabel": lambda device: multilabel(
        X, MARKS, X[::2], MARKS[::2], inverse_penalties=(1.0,), device=device
    ),
    "retrieval": lambda device: retrieval(
        X, X, query_labels=Y, gallery_labels=Y, k=(1, 5), leave_one_out=True, device=device
    ),
    "instances": lambda device: retrieval(X[:5], X, ground_truth=[{"easy": [7]}] * 5, k=2, device=device),
    "robustness": lambda device: robustness(
        X, Y, SHIFTED, inverse_penalties=(1.0,), max_iter=10, device=device
    ),
    "segmentation": lambda device: segmentation(
        TOKENS, MASKS, TOKENS[:2], MASKS[:2], n_classes=3, settings=FEW, device=device
    ),
    "depth": lambda device: depth(TOKENS, DEPTHS, TOKENS[:2], DEPTHS[:2], settings=FEW, device=device),
    "health": lambda device: health(X, X + 0.1, device=device),
}


def evaluated(device, name):
    return [list(row.values()) for row in EVALUATIONS[name](device).rows()]


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation(on_both, name):
    there, here = on_both(evaluated, name)
    assert [str(value) for row in there for value in row] == [str(value) for row in here for value in row]


def probed(device):
    settings = LinearSettings(n_iter=20, learning_rates=(0.1, 1.0))
    probes = [
        OnlineKNN(online.Drawing(40), online.Drawing(13), k=[1, 5]),
        OnlineLinear(online.Drawing(40), online.Drawing(13), settings=settings),
    ]
    loader = DataLoader(online.TwoViews(16), batch_size=8)
    trainer(device, max_epochs=2, callbacks=probes).fit(online.small_module(), loader)
    return [row for probe in probes for row in probe.history]


@pytest.mark.long
def test_online_probes(on_both):
    there, here = on_both(probed)
    assert there == here
    assert len(there) == 4
