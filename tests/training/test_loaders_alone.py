"""Training loaders that no Trainer holds: with Fabric, in loops, and given to `fit` by themselves."""

import itertools
import json

import pytest
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.data import _update_dataloader
from torch.utils.data import DistributedSampler

from curated_data.errors import CacheError, ConfigError
from tests.support.listing import Listing, expected_stream
from tests.support.programs import run_python
from tests.support.trainer_runs import data, trainer

EPOCH = 5  # batches


def ids(batches) -> list[list[int]]:
    return [batch["sample_id"].tolist() for batch in batches]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_iterator_is_an_epoch_and_the_next_one_the_next(folder, num_workers):
    loader = data(folder, 1, num_workers=num_workers).train_dataloader()
    for epoch in range(3):
        assert len(loader) == EPOCH
        assert ids(loader) == expected_stream(4)[epoch * EPOCH :][:EPOCH]
    next(iter(loader))  # a look is an epoch of its own
    assert ids(loader) == expected_stream(5)[4 * EPOCH :]


@pytest.mark.parametrize("n", range(EPOCH + 1))
def test_a_look_at_the_data_leaves_a_whole_epoch(folder, n):
    loader = data(folder, 1).train_dataloader()
    list(itertools.islice(loader, n))
    assert ids(loader) == expected_stream(2)[EPOCH * (n > 0) :][:EPOCH]


def test_set_epoch_chooses_the_epoch(folder):
    loader = data(folder, 1).train_dataloader()
    for epoch in (2, 0, 2, 1):
        loader.set_epoch(epoch)
        assert ids(loader) == expected_stream(3)[epoch * EPOCH :][:EPOCH]
    for wrong in (-1, 1.0, "1", True):
        with pytest.raises(ConfigError, match="set_epoch"):
            loader.set_epoch(wrong)


@pytest.mark.long
@pytest.mark.parametrize("sets_epoch", [True, False])
@pytest.mark.parametrize("stop", range(2 * EPOCH + 1))
def test_a_state_goes_on_at_the_next_sample(folder, stop, sets_epoch):
    def stream(loader, first):
        for epoch in range(first, 3):
            if sets_epoch:
                loader.set_epoch(epoch)
            yield from loader

    first = data(folder, 1).train_dataloader()
    assert ids(itertools.islice(stream(first, 0), stop)) == expected_stream(3)[:stop]
    state = json.loads(json.dumps(first.state_dict()))
    resumed = data(folder, 1, num_workers=1).train_dataloader()
    resumed.load_state_dict(state)
    assert resumed.state_dict()["batch"] == stop % EPOCH
    assert ids(stream(resumed, stop // EPOCH)) == expected_stream(3)[stop:]


def test_a_loader_made_anew_for_every_epoch_goes_on(folder):
    loaded = data(folder, 1)
    assert [line for _ in range(3) for line in ids(loaded.train_dataloader())] == expected_stream(3)


def test_a_state_of_another_order_or_size_is_refused_within_an_epoch(folder):
    first = data(folder, 1).train_dataloader()
    next(iter(first))
    with pytest.raises(ConfigError, match="order"):
        data(folder, 1, seed=1).train_dataloader().load_state_dict(first.state_dict())
    with pytest.raises(ConfigError, match="batch_size"):
        data(folder, 1, batch_size=4).train_dataloader().load_state_dict(first.state_dict())
    with pytest.raises(CacheError, match="stream"):
        first.load_state_dict({})
    with pytest.raises(CacheError, match="batch"):
        first.load_state_dict(first.state_dict() | {"batch": EPOCH})


class Validated(Listing):
    def __init__(self):
        super().__init__()
        self.n_validated = 0

    def validation_step(self, batch, batch_idx):
        self.n_validated += 1


@pytest.mark.filterwarnings("ignore")
def test_fit_with_a_bare_loader_trains_and_validates_every_epoch(folder):
    loaded = data(folder, 1, val_pool=str(folder / "validation-0.tar"), eval_batch_size=13)
    loader = loaded.train_dataloader()
    next(iter(loader))
    module = Validated()
    trainer(folder, 1).fit(module, loader, loaded.val_dataloader())
    assert module.trained == expected_stream(4)[EPOCH:]
    assert module.n_validated == 3


def test_fit_with_a_bare_loader_resumes_within_an_epoch_without_a_warning(folder, tmp_path, recwarn):
    kept = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(folder, 1, callbacks=[kept]).fit(Listing(), data(folder, 1).train_dataloader())
    for step in (3, 7):
        module = Listing()
        path = tmp_path / f"step={step}.ckpt"
        trainer(folder, 1).fit(module, data(folder, 1).train_dataloader(), ckpt_path=path)
        assert module.trained == expected_stream(3)[step:]
    assert not [warning for warning in recwarn if "not resumable" in str(warning.message)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("validates", "at_train_end"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("workers", [0, 2])
def test_fit_with_a_bare_loader_resumes_between_two_epochs(
    folder, tmp_path, validates, at_train_end, workers
):
    """Lightning restores no loader's state there, and names the epoch only."""
    kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=at_train_end)
    settings = {"val_pool": str(folder / "validation-0.tar"), "eval_batch_size": 13} if validates else {}
    settings["num_workers"] = workers

    def fit(module, callbacks=(), **options):
        loaded = data(folder, 1, **settings)
        loaders = (loaded.train_dataloader(), *([loaded.val_dataloader()] if validates else ()))
        trainer(folder, 1, callbacks=list(callbacks)).fit(module, *loaders, **options)
        return module

    fit(Validated(), [kept])
    for epoch in (0, 1):
        resumed = fit(Validated(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert resumed.trained == expected_stream(3)[(epoch + 1) * EPOCH :]


def test_a_resumed_run_is_not_told_that_its_loader_is_not_resumable(folder, tmp_path, recwarn):
    kept = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(folder, 1, max_epochs=1, callbacks=[kept]).fit(Listing(), data(folder, 1))
    trainer(folder, 1).fit(Listing(), data(folder, 1), ckpt_path=tmp_path / "step=3.ckpt")
    assert not [warning for warning in recwarn if "not resumable" in str(warning.message)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapped", [True, False])
def test_fabric_saves_and_loads_the_loader(folder, tmp_path, wrapped):
    fabric = Fabric(accelerator="cpu", devices=1)

    def loaders():
        loader = data(folder, 1).train_dataloader()
        return loader, fabric.setup_dataloaders(loader)

    plain, loader = loaders()
    seen = ids(loader) + ids(itertools.islice(loader, 2))
    fabric.save(tmp_path / "state.ckpt", {"loader": loader if wrapped else plain})
    plain, loader = loaders()
    fabric.load(tmp_path / "state.ckpt", {"loader": loader if wrapped else plain})
    assert seen + ids(loader) + ids(loader) == expected_stream(3)


def test_a_bare_loader_on_several_ranks_says_what_to_pass(folder):
    """As Lightning makes a loader again with a sampler for two ranks."""
    loader = data(folder, 1).train_dataloader()
    # An error in a hook, as in other tests, leaves Lightning's wrapper around the class, which keeps these.
    for name in [name for name in vars(loader.batch_sampler) if "__pl_saved" in name]:
        delattr(loader.batch_sampler, name)
    sampler = DistributedSampler(loader.dataset, num_replicas=2, rank=0)
    with pytest.raises(ConfigError, match="datamodule=data"):
        _update_dataloader(loader, sampler)


FABRIC = """
import json, sys
from pathlib import Path
from lightning.fabric import Fabric
from tests.support.trainer_runs import data

if __name__ == "__main__":
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])

    def train(fabric):
        loader = data(folder, fabric.world_size).train_dataloader()
        stream = fabric.setup_dataloaders(loader, use_distributed_sampler=False)
        next(iter(stream))
        seen, states = [], []
        for _ in range(2):
            assert len(stream) == 5
            for batch in stream:
                fabric.all_reduce(batch["sample_id"].sum().float(), reduce_op="sum")  # hangs if out of step
                seen.append(batch["sample_id"].tolist())
                states.append(loader.state_dict())
        Path(out / f"fabric-{fabric.global_rank}.json").write_text(json.dumps([seen, states[2]]))

    Fabric(accelerator="cpu", devices=2, strategy="ddp_fork").launch(train)
"""


@pytest.mark.long
def test_ranks_of_fabric_stay_in_step_and_their_state_resumes_on_one(folder, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(FABRIC)
    run_python(program, folder, tmp_path)
    (first, state), (second, other) = (
        json.loads((tmp_path / f"fabric-{rank}.json").read_text()) for rank in (0, 1)
    )
    streamed = [
        [s for pair in zip(*both, strict=True) for s in pair] for both in zip(first, second, strict=True)
    ]
    assert streamed == expected_stream(3)[EPOCH:]
    assert state == other
    loader = data(folder, 1).train_dataloader()
    loader.load_state_dict(state)
    assert ids(loader) == expected_stream(2)[EPOCH + 3 :]
