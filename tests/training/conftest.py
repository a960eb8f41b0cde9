"""The pools that most tests of trainings read."""

from pathlib import Path

import pytest

from tests.support.trainer_runs import write_pools


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pools of 53 and 13 images of 8 x 8, with a cache beside them."""
    return write_pools(tmp_path_factory.mktemp("pool"))
