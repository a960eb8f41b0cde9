"""SP2OT: labels against the solvers on a buffer kept by hand, ranks, resume, bad input; embeddings."""

import math

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_modules import SP2OT
from lightning_modules.distributed import all_gather_rows
from lightning_modules.evaluation.clustering import clustering
from lightning_modules.transport import p2ot, solve_sp2ot
from lightning_modules.transport_clustering import cluster_embeddings
from tests.support.ranks import on_two_ranks

SMALL = {"backbone": "resnet10", "image_size": 16, "small_images": True, "backbone_options": {"width": 4}}


class Patches(torch.utils.data.Dataset):
    """Noisy patches of three colours, 40, 16 and 8 of them, as training batches want them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.tensor([0] * 40 + [1] * 16 + [2] * 8)
        images = torch.eye(3)[self.labels][:, :, None, None] * 2 - 1
        self.images = images + 0.3 * torch.randn(64, 3, 16, 16, generator=generator)

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict:
        image = self.images[i]
        return {"views": [image, image.flip(-1)], "sample_id": 1000 + 7 * i}


def module(**options) -> SP2OT:
    torch.manual_seed(0)
    return SP2OT(4, **(SMALL | {"buffer_size": 32, "n_neighbors": 5, "n_heads": 2} | options))


def loader(batch_size: int = 16) -> DataLoader:
    return DataLoader(Patches(), batch_size, shuffle=False)


def trainer(tmp_path, epochs: int = 2, **options) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"enable_checkpointing": False} | quiet | options
    return L.Trainer(accelerator="cpu", max_epochs=epochs, default_root_dir=tmp_path, **options)


def batch(rows: slice) -> dict:
    samples = [Patches()[i] for i in range(64)[rows]]
    return {
        "views": [torch.stack([s["views"][v] for s in samples]) for v in range(2)],
        "sample_id": torch.tensor([s["sample_id"] for s in samples]),
    }


@pytest.mark.parametrize("method", ["sp2ot", "p2ot", "ot"])
def test_trains_and_selects_a_head(tmp_path, method):
    model = module(method=method)
    before = model.prototypes.detach().clone()
    run = trainer(tmp_path)
    run.fit(model, loader())
    assert not torch.equal(before, model.prototypes)
    assert run.callback_metrics["selection"] == pytest.approx(model.best["value"], rel=0.5)
    assert model.state["buffer_ids"].tolist() == [1000 + 7 * i for i in range(32, 64)]
    clusters = model.eval().assign(Patches().images)
    assert clusters.shape == (64,)
    assert int(clusters.max()) < 4


def test_the_first_pass_leaves_the_trainers_own_workers_alone(tmp_path):
    kept = DataLoader(Patches(), 16, num_workers=1, persistent_workers=True)
    model = module(method="sp2ot")
    run = trainer(tmp_path, 2)
    run.fit(model, kept)
    assert run.global_step == 8
    assert model.best is not None


def test_trains_with_weights_of_bf16(tmp_path):
    trained = module(method="sp2ot")
    trainer(tmp_path, 1, precision="bf16-true").fit(trained, loader())
    assert trained.prototypes.dtype == torch.bfloat16
    assert len(trained.state["neighbor_ids"]) == 64


def test_trains_in_bf16_with_accumulated_gradients(tmp_path):
    model = module()
    trainer(tmp_path, 1, precision="bf16-mixed", accumulate_grad_batches=2).fit(model, loader())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert model.state["buffer"].dtype == torch.float32


def test_rho_follows_its_formula():
    model = module()
    model._n_steps = 100
    for step in (0, 30, 100):
        want = 0.1 + 0.9 * math.exp(-5 * (1 - step / 100) ** 2)
        assert model.rho_at(step) == pytest.approx(want)
    model.hparams.method = "ot"
    assert model.rho_at(0) == 1.0


@pytest.mark.parametrize("method", ["sp2ot", "p2ot"])
def test_labels_are_the_plan_of_the_buffer(method):
    """Two batches through the module against the solver on the same logits and a dense similarity."""
    model = module(
        method=method, buffer_from_epoch=0, n_heads=1, buffer_size=32, similarity_weight=3000.0
    ).eval()
    model._n_steps = 10
    features = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([1000 + 7 * i for i in range(64)])
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    model.set_neighbors(ids[shuffled], features[shuffled])
    first, second = batch(slice(0, 16)), batch(slice(16, 32))
    logits = [torch.stack([model.logits(v)[0] for v in b["views"]]).detach() for b in (first, second)]
    rows = [x.permute(1, 0, 2)[:, None] for x in logits]  # (B, heads, 2, K)
    model._push(rows[0], first["sample_id"])
    rho = model.rho_at(0)
    got = model._labels(logits[1][None], second["sample_id"], rho)[0]
    cost = -torch.cat(logits, 1).log_softmax(-1)
    if method == "p2ot":
        want = p2ot(cost, rho)
    else:
        distances = torch.cdist(features.double(), features.double()).square()
        distances.fill_diagonal_(math.inf)
        nearest = distances.topk(5, largest=False)
        dense = torch.zeros(64, 64, dtype=torch.float64)
        dense.scatter_(1, nearest.indices, torch.exp(-nearest.values / (8 * 6)))
        want = solve_sp2ot(cost, dense[:32, :32].float(), rho, weight=3000 * (1 - rho) * 32 / 5120).plan
    torch.testing.assert_close(got, want[:, 16:] * 32, atol=1e-4, rtol=0)


def test_a_sample_twice_in_the_buffer_is_a_neighbour_twice():
    model = module()
    features = torch.tensor([[0.0, 0], [1, 0], [9, 9]])
    model.hparams.n_neighbors = 1
    model.set_neighbors(torch.tensor([5, 3, 8]), features)
    matrix = model._similarity_among(torch.tensor([3, 5, 3, 77])).to_dense()
    weight = math.exp(-1 / (2 * 4 * 2))
    want = torch.tensor([[0, weight, 0, 0], [weight, 0, weight, 0], [0, weight, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(matrix, want)


def test_loss_is_the_swapped_cross_entropy():
    model = module(method="ot", buffer_size=0, n_heads=1).eval()
    model._n_steps = 10
    data = batch(slice(0, 16))
    loss, _ = model.loss(data)
    a, b = (model.logits(view)[0].log_softmax(-1) for view in data["views"])
    labels_a, labels_b = (16 * p2ot(-x.detach(), 1.0, gamma=math.inf) for x in (a, b))
    want = 0.0
    for i in range(16):
        want -= float((labels_b[i] * a[i]).sum() + (labels_a[i] * b[i]).sum()) / 32
    assert float(loss) == pytest.approx(want, rel=1e-5)


def _loss_and_gradients(rank: int, world: int) -> tuple[Tensor, list[Tensor], Tensor]:
    model = module(
        buffer_from_epoch=0, buffer_size=32
    ).eval()  # evaluation mode: BatchNorm's statistics are per rank
    model._n_steps = 10
    generator = torch.Generator().manual_seed(3)
    model.set_neighbors(
        torch.tensor([1000 + 7 * i for i in range(64)]), torch.randn(64, 6, generator=generator)
    )
    losses = []
    for start in (0, 16):
        share = 16 // world
        rows = slice(start + rank * share, start + (rank + 1) * share)
        if start == 0:
            with torch.no_grad():
                data = batch(rows)
                logits = torch.stack([model.logits(v) for v in data["views"]], 1).permute(2, 0, 1, 3)
                model._push(all_gather_rows(logits.contiguous()), all_gather_rows(data["sample_id"]))
        else:
            losses.append(model.loss(batch(rows))[0])
    losses[0].backward()
    return losses[0], [p.grad for p in model.parameters() if p.grad is not None], model.state["selection_sum"]


def test_two_ranks_have_the_loss_and_gradients_of_one():
    loss, gradients, selection = _loss_and_gradients(0, 1)
    ranks = on_two_ranks(_loss_and_gradients, 2)
    # Of checkpoints written within an epoch, which rank zero writes and every rank reads.
    np.testing.assert_array_equal(ranks[0][2], ranks[1][2])
    np.testing.assert_allclose(ranks[0][2][:-1] / ranks[0][2][-1], selection[:-1], rtol=1e-5)
    assert (ranks[0][0] + ranks[1][0]) / 2 == pytest.approx(float(loss.detach()), rel=1e-5)
    for i, want in enumerate(gradients):
        np.testing.assert_allclose((ranks[0][1][i] + ranks[1][1][i]) / 2, want, atol=1e-5)


def test_resumes_exactly(tmp_path):
    whole = module(method="sp2ot")
    trainer(tmp_path, 3).fit(whole, loader())

    stopped = module(method="sp2ot")
    saved = L.pytorch.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, save_on_train_epoch_end=True)
    trainer(tmp_path, 3, callbacks=[saved], enable_checkpointing=True).fit(stopped, loader())
    path = next(tmp_path.glob("*step=8.ckpt"))
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["module_class"] == "lightning_modules.pretraining.sp2ot.SP2OT"
    resumed = module(method="sp2ot")
    trainer(tmp_path, 3).fit(resumed, loader(), ckpt_path=path)
    for (name, want), got in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(want, got), name
    for name, want in whole.state.items():
        assert torch.equal(want, resumed.state[name]), name
    assert whole.best == resumed.best


class Stop(L.Callback):
    """Save after so many batches, and stop there as a kill would."""

    def __init__(self, batches: int, path: str) -> None:
        self.left, self.path = batches, path

    def on_train_batch_end(self, trainer, *args) -> None:
        self.left -= 1
        if not self.left:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


@pytest.mark.long
@pytest.mark.parametrize(("method", "stop"), [("sp2ot", 6), ("p2ot", 3)])
def test_resumes_exactly_within_an_epoch(tmp_path, method, stop):
    # The same sixteen samples in every batch: a stock loader starts again within an epoch, and what is tested
    # is the module, whose buffer, potentials, ρ and selection continue.
    same = DataLoader(Patches(), 16, sampler=list(range(0, 64, 4)) * 4)
    path = str(tmp_path / "stopped.ckpt")
    whole, resumed = module(method=method), module(method=method)
    trainer(tmp_path, 3).fit(whole, same)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, 3, callbacks=[Stop(stop, path)]).fit(module(method=method), same)
    trainer(tmp_path, 3).fit(resumed, same, ckpt_path=path)
    for (name, want), got in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(want, got), name
    assert whole.best == resumed.best


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "kmeans"}, "method"),
        ({"n_heads": 0}, "n_heads"),
        ({"rho_start": 0.0}, "rho_start"),
        ({"buffer_size": 3}, "buffer_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"image_size": 15, "backbone": "timm:vit_tiny_patch16_224", "small_images": False,
          "backbone_options": {"patch_size": 4}}, "15"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_one_cluster_is_an_error():
    with pytest.raises(ValueError, match="n_clusters"):
        SP2OT(1, **SMALL)


def test_bad_batches_are_named(tmp_path):
    with pytest.raises(ValueError, match="n_clusters"):
        trainer(tmp_path).fit(module(method="p2ot", buffer_size=0), loader(batch_size=2))
    with pytest.raises(RuntimeError, match=r"64 .*buffer_size=100"):
        trainer(tmp_path).fit(module(buffer_size=100), loader())
    with pytest.raises(RuntimeError, match=r"80 .*buffer_size=100"):
        trainer(tmp_path).fit(module(method="p2ot", buffer_size=100), loader())
    broken = loader()
    broken.dataset.images[20] = math.nan
    with pytest.raises(RuntimeError, match="1140"):
        trainer(tmp_path).fit(module(method="p2ot"), broken)


def test_the_last_batch_may_have_fewer_samples_than_clusters(tmp_path):
    short = loader(batch_size=61)  # the last has 3
    for options in ({"buffer_size": 0}, {"buffer_size": 64}):  # the buffer is used from the second epoch
        trained = module(method="p2ot", **options)
        trainer(tmp_path, 1).fit(trained, short)
        assert trained.global_step == 2
        assert all(torch.isfinite(value).all() for value in trained.state_dict().values())


class Nameless(Patches):
    """Samples without ids, as a plain data set gives them."""

    def __getitem__(self, i: int) -> dict:
        return {"views": super().__getitem__(i)["views"]}


def test_neighbours_need_sample_ids(tmp_path):
    with pytest.raises(ValueError, match="'sample_id'"):
        trainer(tmp_path).fit(module(), DataLoader(Nameless(), 16))
    trainer(tmp_path, 1).fit(module(method="p2ot"), DataLoader(Nameless(), 16))


def blobs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(6), [300, 150, 80, 40, 20, 10])
    centers = generator.normal(size=(6, 24))
    return (centers[labels] + 0.35 * generator.normal(size=(600, 24)) + 2).astype(np.float32), labels


@pytest.mark.parametrize("method", ["p2ot", "sp2ot", "ot"])
def test_embeddings_of_a_long_tail_find_their_classes(method):
    x, labels = blobs()
    result = cluster_embeddings(x, 6, method=method, n_iter=10)
    assert clustering(result.assignment, labels).nmi > 0.6
    again = cluster_embeddings(torch.from_numpy(x), 6, method=method, n_iter=10)
    np.testing.assert_array_equal(result.assignment, again.assignment)
    unit = (x - result.center) / np.linalg.norm(x - result.center, axis=1, keepdims=True)
    cosine = unit @ result.prototypes.T
    np.testing.assert_allclose(cosine[np.arange(600), result.assignment], cosine.max(1), atol=1e-5)
    assert result.inertia == pytest.approx((1 - cosine.max(1)).mean(), abs=1e-5)


def test_embeddings_of_any_size_go_by_a_sample():
    x, _ = blobs()
    result = cluster_embeddings(
        x.astype(np.float16), 6, method="p2ot", n_iter=20, sample_size=300, block_size=64
    )
    whole = cluster_embeddings(x, 6, method="p2ot", n_iter=20)
    assert clustering(result.assignment, whole.assignment).accuracy > 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": 1}, "n_clusters"),
        ({"n_clusters": 601}, "600"),
        ({"method": "x"}, "method"),
        ({"n_iter": 0}, "n_iter"),
    ],
)
def test_bad_embeddings_are_named(options, message):
    x, _ = blobs()
    with pytest.raises(ValueError, match=message):
        cluster_embeddings(x, **({"n_clusters": 3} | options))
    x[17] = np.nan
    with pytest.raises(ValueError, match="17"):
        cluster_embeddings(x, 3)


@pytest.mark.parametrize("center", [False, True])
def test_embeddings_of_every_kind_are_clustered_alike(center, tmp_path):
    x = blobs()[0].astype(np.float16).astype(np.float32)
    options = {"method": "p2ot", "n_iter": 5, "center": center}
    expected = cluster_embeddings(x, 6, **options)
    np.save(tmp_path / "x.npy", x)
    kinds = {
        "big-endian": x.astype(">f4"), "float64": x.astype(np.float64), "half": torch.from_numpy(x).half(),
        "strided": np.repeat(x, 2, axis=0)[::2], "map": np.load(tmp_path / "x.npy", mmap_mode="r"),
        "grad": torch.from_numpy(x).requires_grad_(), "large": x * np.float32(2.0**100),
        "small": x * np.float32(2.0**-100),
    }  # fmt: skip
    for name, given in kinds.items():
        found = cluster_embeddings(given, 6, **options)
        assert (found.assignment == expected.assignment).mean() > 0.99, name
    found = cluster_embeddings(torch.from_numpy(x).bfloat16(), 6, **options)
    assert clustering(found.assignment, expected.assignment).nmi > 0.8
