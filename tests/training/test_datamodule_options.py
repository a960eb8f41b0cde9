"""What the DataModule does besides ordering: views on a device, labels, slow workers, remote pools."""

import json
import logging
import time
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchvision.transforms import v2

from curated_data.errors import ConfigError
from curated_data.pool import RemoteOptions, ShardPool
from curated_data.pool.writer import ShardWriter
from curated_data.selection.captions import CaptionLabels
from curated_data.streaming.device import PerSample, ResizedCrops, uniform
from curated_data.streaming.order import _mix
from curated_data.training.datamodule import CenterCrop, CuratedDataModule
from curated_data.training.mixture import Component, Mixture
from tests.support.images import png
from tests.support.server import Server
from tests.support.trainers import quiet_trainer


class Seen(pl.LightningModule):
    """Keeps the batches that it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Linear(1, 1)
        self.batches: list[dict] = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return self.weight(torch.ones(1, 1, device=self.device)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def small(pool, **settings) -> CuratedDataModule:
    """A data module for images of 8 x 8 pixels, without workers unless settings say otherwise."""
    return CuratedDataModule(pool, **{"loader": {"num_workers": 0}, "image_size": 8} | settings)


def trained(data: CuratedDataModule, **arguments) -> list[dict]:
    """The batches that a module is given in training."""
    module = Seen()
    quiet_trainer(**{"max_epochs": 1} | arguments).fit(module, data)
    return module.batches


def by_sample(batches: list[dict]) -> dict[int, list[Tensor]]:
    """Each sample's views."""
    return {
        sample: [view[place].cpu() for view in batch.get("views", [batch.get("image")])]
        for batch in batches
        for place, sample in enumerate(batch["sample_id"].tolist())
    }


JITTER = PerSample(v2.Compose([v2.RandomCrop(5), v2.ColorJitter(0.4), v2.RandomHorizontalFlip()]))


@pytest.mark.filterwarnings("ignore")
class TestDeviceViews:
    def test_they_depend_on_the_sample_and_its_place_alone(self, write_pool):
        """Whatever the batch size, the workers, and the state of the global generators."""
        paths = write_pool([12])
        for views in (JITTER, ResizedCrops(6)):
            seen = []
            for batch_size, num_workers in ((12, 0), (3, 0), (4, 1)):
                torch.manual_seed(batch_size)
                data = small(
                    paths, device={"views": views}, batch_size=batch_size, loader={"num_workers": num_workers}
                )
                batches = trained(data)
                assert "view_seed" not in batches[0]
                seen.append(by_sample(batches))
            assert len(seen[0]) == 12
            for other in seen[1:]:
                for sample, made in seen[0].items():
                    for view, expected in zip(other[sample], made, strict=True):
                        assert view.dtype == expected.dtype
                        # A kernel may sum in another order in a batch of another size.
                        torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)
            assert not torch.equal(*[made[0] for made in list(seen[0].values())[:2]])
            before = torch.get_rng_state()
            views(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(2))
            assert torch.equal(torch.get_rng_state(), before)

    def test_epochs_draw_anew_and_validation_is_left_alone(self, write_pool):
        paths = write_pool([6])
        data = small(paths, device={"views": ResizedCrops(6)}, batch_size=6, val_pool=paths)
        batches = trained(data, max_epochs=2)
        first, second = (by_sample([batch]) for batch in batches)
        assert not any(torch.equal(first[sample][0], second[sample][0]) for sample in first)
        (batch,) = data.val_dataloader()
        expected = [CenterCrop(8)(image) for image in images(paths)]
        assert torch.equal(data.trainer.datamodule.on_after_batch_transfer(batch, 0)["image"],
                           torch.stack(expected))  # fmt: skip

    def test_crops_are_crops(self):
        """The whole image is itself, resized as torch's own interpolation resizes it; a crop lies within."""
        generator = torch.Generator().manual_seed(0)
        batch = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=generator)
        seeds = torch.arange(3)
        (whole,) = ResizedCrops(8, 1, scale=(1, 1), ratio=(1, 1), flip=0)(batch, seeds)
        oracle = torch.nn.functional.interpolate(batch.float() / 255, 8, mode="bilinear", align_corners=False)
        torch.testing.assert_close(whole, oracle, rtol=0, atol=1e-5)
        (flipped,) = ResizedCrops(8, 1, scale=(1, 1), ratio=(1, 1), flip=1)(batch, seeds)
        torch.testing.assert_close(flipped, oracle.flip(-1), rtol=0, atol=1e-5)
        ramp = (torch.arange(64) * 4).to(torch.uint8).expand(100, 1, 64, 64)
        (crops,) = ResizedCrops(64, 1, scale=(0.25, 0.25), ratio=(1, 1), flip=0)(ramp, torch.arange(100))
        low, high = crops[:, 0, 0, 0] * 255 / 4, crops[:, 0, 0, -1] * 255 / 4
        assert low.min() >= 0
        assert high.max() <= 63
        torch.testing.assert_close(high - low, torch.full((100,), 31.5), rtol=0, atol=0.6)
        assert low.min() < 3 < 28 < low.max()  # anywhere

    def test_numbers_are_splitmix64(self):
        seeds = np.random.default_rng(0).integers(0, 2**63, 50)
        golden = np.uint64(0x9E3779B97F4A7C15)
        state = seeds.astype(np.uint64)[:, None] + np.arange(3, dtype=np.uint64) * golden
        expected = (_mix(state) >> np.uint64(40)) / 2**24
        assert np.array_equal(uniform(torch.from_numpy(seeds), 3).numpy(), expected.astype(np.float32))

    def test_what_is_no_view_is_one_clear_error(self, write_pool):
        paths = write_pool([4])

        def no_view(*given: Tensor) -> dict[str, Tensor]:
            return {"a": given[0]}

        for arguments, match in (
            ({"device": {"views": no_view}}, "device.views: .*dict"),
            ({"views": no_view}, "views: .*dict.* in "),
        ):
            data = small(paths, batch_size=2, **arguments)
            with pytest.raises(ConfigError, match=f"^{match}"):
                trained(data)
        both = {"views": lambda image: [CenterCrop(8)(image)] * 2, "device": {"views": ResizedCrops(8)}}
        with pytest.raises(ConfigError, match=r"^views: .*device\.views"):
            trained(CuratedDataModule(paths, batch_size=2, loader={"num_workers": 0}, **both))
        validated = CuratedDataModule(
            paths, val_pool=paths, batch_size=2, loader={"num_workers": 0}, eval_transform=lambda image: None
        )
        with pytest.raises(ConfigError, match=r"^eval_transform: .*NoneType"):
            next(iter(validated.val_dataloader()))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_on_a_gpu_as_on_the_cpu(self, write_pool):
        paths = write_pool([12])
        made = {}
        for accelerator in ("cpu", "gpu"):
            data = small(paths, device={"views": ResizedCrops(6)}, batch_size=4, loader={"num_workers": 1})
            batches = trained(data, accelerator=accelerator, devices=1)
            assert batches[0]["views"][0].device.type == {"cpu": "cpu", "gpu": "cuda"}[accelerator]
            made[accelerator] = by_sample(batches)
        for sample, views in made["cpu"].items():
            for view, expected in zip(made["gpu"][sample], views, strict=True):
                torch.testing.assert_close(view, expected, rtol=0, atol=1e-4)
        per_sample = small(paths, device={"views": JITTER}, batch_size=4)
        state = torch.cuda.get_rng_state()
        assert len(by_sample(trained(per_sample, accelerator="gpu", devices=1))) == 12
        assert torch.equal(torch.cuda.get_rng_state(), state)


def images(paths):
    from curated_data.pool.decode import decode_image

    pool = ShardPool(paths)
    return [decode_image(sample["png"]) for sample in pool.read(np.arange(len(pool)))]


def of_batch(batch):
    return zip(batch["sample_id"].tolist(), batch["label"].tolist(), strict=True)


class TestLabels:
    def test_a_selection_labelled_by_captions_is_streamed(self, write_pool, tmp_path):
        found = CaptionLabels(np.array([1, 4, 9, 17]), np.array([2, 0, 2, 1]), np.ones(4, np.float32), [])
        found.save(tmp_path / "found")
        paths = write_pool([10, 10])
        for selection, labels in (
            (found.ids, found.labels),
            (tmp_path / "found" / "ids.npy", tmp_path / "found" / "labels.npy"),
        ):
            data = small(paths, selection=selection, labels=labels, batch_size=2, loader={"num_workers": 1})
            batches = list(data.train_dataloader())
            given = {
                sample: label
                for batch in batches
                for sample, label in zip(batch["sample_id"].tolist(), batch["label"].tolist(), strict=True)
            }
            assert given == dict(zip(found.ids.tolist(), found.labels.tolist(), strict=True))

    def test_without_a_selection_they_are_the_pools(self, write_pool):
        labels = np.arange(100, 112)
        data = small(write_pool([12]), labels=labels, batch_size=4)
        for batch in data.train_dataloader():
            assert batch["label"].tolist() == labels[batch["sample_id"]].tolist()

    @pytest.mark.parametrize("from_yaml", [False, True])
    def test_a_column_gives_them_to_training_and_validation(self, tmp_path, from_yaml):
        """By name, in code and in a configuration; two columns of one pool may be in a mixture."""
        paths = []
        for number, names in enumerate((["cat", "dog", "ant", "dog"], ["dog", "bee"])):
            with ShardWriter(tmp_path / f"{number}-%06d.tar") as writer:
                for key, name in enumerate(names):
                    image = png(np.full((8, 8, 3), key, np.uint8))
                    writer.write({"__key__": str(key), "png": image, "json": {"class": name, "id": key}})
            paths.append(str(tmp_path / f"{number}-*.tar"))
        settings = {
            "pool": paths[0], "val_pool": paths[1], "labels": "json.class", "batch_size": 2,
            "loader": {"num_workers": 0}, "image_size": 8,
        }  # fmt: skip
        if from_yaml:
            (tmp_path / "data.yaml").write_text(json.dumps({"data": settings}))
            parser = ArgumentParser()
            parser.add_class_arguments(CuratedDataModule, "data")
            data = parser.instantiate(parser.parse_path(tmp_path / "data.yaml")).data
        else:
            data = CuratedDataModule(**settings)
        given = dict(pair for batch in data.train_dataloader() for pair in of_batch(batch))
        assert given == {0: 2, 1: 3, 2: 0, 3: 3}
        assert data.class_names == ("ant", "bee", "cat", "dog")
        given = dict(pair for batch in data.val_dataloader() for pair in of_batch(batch))
        assert given == {0: 3, 1: 1}
        settings = {name: settings[name] for name in ("batch_size", "loader", "image_size")}
        parts = [Component(name, paths[0], 1, labels=f"json.{name}") for name in ("class", "id")]
        data = CuratedDataModule(mixture=Mixture(parts), **settings)
        assert [source.pool.label_column for source in data.sources] == ["json.class", "json.id"]

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({"labels": "json.class"}, "json.class"),
            ({"labels": "lable"}, "'lable'.*'label'"),
            ({"labels": np.arange(3)}, "^labels: 3 .* 12"),
            ({"labels": np.arange(3), "selection": np.arange(4)}, "^labels: .* 4 "),
            ({"labels": np.ones(4), "selection": np.arange(4)}, "^labels: .* 4 "),
            ({"labels": np.arange(4), "selection": np.array([1, 2, 3, 1])}, "sample 1 "),
            ({"labels": "nowhere.npy"}, "labels: nowhere.npy"),
            ({"device": {"views": "crops"}}, "^device.views: "),
            ({"loader": {"slow_after": -1}}, "slow_after"),
        ],
    )
    def test_wrong_arguments(self, write_pool, arguments, named):
        with pytest.raises(ConfigError, match=named):
            CuratedDataModule(
                write_pool([12]), **{"batch_size": 4, "loader": {"num_workers": 0}, **arguments}
            ).train_dataloader()

    def test_a_new_selection_needs_labels_too(self, write_pool):
        ids = np.arange(6)
        data = small(write_pool([12]), selection=ids, labels=ids, batch_size=3)
        data.set_selection(np.arange(6, 12))
        with pytest.raises(ConfigError, match=r"^labels: sample \d+"):
            list(data.train_dataloader())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_slow_batch_is_said_once_while_it_is_awaited(write_pool, caplog, num_workers):
    def slow(image: Tensor) -> Tensor:
        time.sleep(0.2)
        return image

    data = CuratedDataModule(
        write_pool([6]),
        views=slow,
        batch_size=3,
        loader={"num_workers": num_workers, "slow_after": 0.1, "worker_timeout": 60},
    )
    with caplog.at_level(logging.WARNING, logger="curated_data"):
        assert len(list(data.train_dataloader())) == 2
    waited = [record.getMessage() for record in caplog.records if "has waited" in record.getMessage()]
    assert len(waited) == 1
    assert waited[0].startswith(f"rank 0, {num_workers} workers: has waited ")
    assert "num_workers" in waited[0]
    assert any("came after" in record.getMessage() for record in caplog.records)
    caplog.clear()
    quick = small(write_pool([6]), batch_size=3, loader={"num_workers": num_workers})
    list(quick.train_dataloader())
    assert not caplog.records


@pytest.mark.parametrize("pin_memory", [None, True])
def test_memory_is_pinned_where_there_is_a_gpu_and_harmless_elsewhere(write_pool, pin_memory):
    data = small(write_pool([6]), batch_size=3, loader={"num_workers": 1, "pin_memory": pin_memory})
    loader = data.train_dataloader()
    assert loader.pin_memory is (torch.cuda.is_available() if pin_memory is None else True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there is nothing to pin for
        batches = list(loader)
    assert [batch["image"].shape for batch in batches] == [(3, 3, 8, 8)] * 2
    assert batches[0]["image"].is_pinned() == (loader.pin_memory and torch.cuda.is_available())


class Validated(Seen):
    """Keeps the ids that it validates on."""

    def validation_step(self, batch, batch_idx):
        self.validated = batch["sample_id"].tolist()


class TestValidationDataloader:
    """It is there for a Trainer where there is a pool for it, or a subclass that has its own."""

    def test_without_a_pool_a_trainer_finds_none(self, write_pool):
        data = small(write_pool([6]), batch_size=3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trained(data)
        assert not [str(w.message) for w in caught if "val_dataloader" in str(w.message)]
        with pytest.raises(MisconfigurationException, match="val_dataloader"):
            quiet_trainer().validate(Validated(), data)

    def test_the_filters_of_warnings_are_left_alone(self, write_pool):
        before = list(warnings.filters)
        CuratedDataModule(write_pool([6]))
        assert warnings.filters == before

    @pytest.mark.filterwarnings("ignore")
    def test_with_a_pool_or_in_a_subclass_it_is_asked(self, write_pool):
        class Own(CuratedDataModule):
            def val_dataloader(self):
                return torch.utils.data.DataLoader([{"sample_id": 7}])

        paths = write_pool([4])
        settings = {"batch_size": 4, "loader": {"num_workers": 0}, "image_size": 8}
        for data, expected in (
            (CuratedDataModule(paths, val_pool=paths, **settings), [0, 1, 2, 3]),
            (Own(paths, **settings), [7]),
        ):
            module = Validated()
            quiet_trainer(max_epochs=1).fit(module, data)
            assert module.validated == expected

    def test_a_subclass_that_asks_for_it_without_a_pool_is_told(self, write_pool):
        class Own(CuratedDataModule):
            def val_dataloader(self):
                return super().val_dataloader()

        with pytest.raises(ConfigError, match=r"^val_pool: "):
            Own(write_pool([4])).val_dataloader()


class TestRemotePools:
    """The DataModule plans how a remote pool is read, from what was selected; a real server counts bytes."""

    @pytest.fixture
    def server(self, write_pool, tmp_path):
        write_pool([40, 40, 40])
        server = Server(tmp_path)
        yield server
        server.close()

    @pytest.mark.filterwarnings("ignore")
    def test_few_are_read_by_ranges_and_many_downloaded(self, server, tmp_path):
        sizes = [(tmp_path / f"pool-{number:03d}.tar").stat().st_size for number in range(3)]
        cache = tmp_path / "cache"
        pool = ShardPool(server.url + "/pool-{000..002}.tar", cache_dir=cache, remote=RemoteOptions(gap=0))
        few_and_all = np.concatenate([[0, 10, 20, 30], np.arange(40, 80)])
        data = small(  # without labels, a few of which are looked at first
            pool, selection=few_and_all, batch_size=4, decoding={"fields": []}
        )
        pool.index()
        needed = pool.sizes([0, 10, 20, 30]).sum()
        server.bytes_sent = 0
        batches = trained(data, callbacks=[Then(np.arange(80, 120))], max_epochs=2)
        ids = torch.cat([batch["sample_id"] for batch in batches]).numpy()
        assert np.array_equal(np.sort(ids[:44]), few_and_all)
        assert np.array_equal(np.sort(ids[44:]), np.arange(80, 120))
        downloaded = {path.stem for path in (cache / "shards").glob("*.tar")}
        assert downloaded == {pool.shards[1].fingerprint, pool.shards[2].fingerprint}
        assert server.bytes_sent == sizes[1] + sizes[2] + needed


class Then(pl.Callback):
    """Sets another selection as the first epoch ends."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 0:
            trainer.datamodule.set_selection(self.ids)
