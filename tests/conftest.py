"""Pools that tests share: real images, and small ones written by webdataset's own writer."""

import multiprocessing
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import hypothesis
import numpy as np
import pytest
import webdataset

from tests.support.images import png

# Tests give workers functions of their own, which do not pickle; Python 3.14 would start them otherwise. The
# other ways have tests in test_workers.py.
multiprocessing.set_start_method("fork")

# The same examples in every run that decides whether a commit lands; new ones everywhere else.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

FASHION = Path(__file__).parents[1] / "recipes" / "data" / "fashion-lt50"


@pytest.fixture(scope="session")
def fashion_train() -> list[str]:
    """The long-tailed Fashion-MNIST pool: 4 shards, 4,196 labelled images of 28 x 28."""
    return sorted(map(str, FASHION.glob("fashion-lt50-train-*.tar")))


@pytest.fixture(scope="session")
def fashion_test() -> list[str]:
    """1,500 held-out images, balanced."""
    return [str(FASHION / "fashion-test-00.tar")]


@pytest.fixture
def write_pool(tmp_path) -> Callable[..., list[str]]:
    """A writer of small pools: `write_pool([10, 7])` gives two shards of so many random 8 x 8 images.

    `bad` maps (shard, place) to the bytes that stand there instead of an image.
    """

    def write(sizes, *, bad=None, name="pool", seed=0) -> list[str]:
        rng = np.random.default_rng(seed)
        paths = []
        for number, size in enumerate(sizes):
            path = tmp_path / f"{name}-{number:03d}.tar"
            with webdataset.TarWriter(str(path), mtime=0) as writer:
                for place in range(size):
                    image = png(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                    image = (bad or {}).get((number, place), image)
                    key = f"{number:03d}/{place:04d}"
                    writer.write({"__key__": key, "png": image, "cls": str(place % 3).encode()})
            paths.append(str(path))
        return paths

    return write


@pytest.fixture
def s3() -> Iterator[tuple[dict[str, Any], str]]:
    """moto's S3 server: the options for fsspec, and the URL of an empty bucket."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "k", "secret": "s3cr3t", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    fsspec.filesystem("s3", **options).mkdir(name)
    yield options, f"s3://{name}"
    server.stop()


@pytest.fixture(autouse=True)
def no_group_stays():
    """A test that leaves a process group behind lets later ones, which fork, wait for ever."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        pytest.fail("the test left a process group behind")
