"""The rule by which a remote shard is kept whole or read in ranges."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curated_data.errors import ConfigError
from curated_data.pool import RemoteOptions
from curated_data.pool.access import choose_access


def test_the_rule():
    """A shard is kept whole if all epochs read as many samples as it holds, or more."""
    size, held, read = np.full(6, 25e6), np.full(6, 1000), np.array([0, 1, 99, 100, 1000, 999])

    def chosen(epochs, cache_bytes=10**9):
        return np.flatnonzero(
            choose_access(size, held, read, epochs=epochs, cache_bytes=cache_bytes)
        ).tolist()

    assert chosen(1) == [4]
    assert chosen(2) == [4, 5]
    assert chosen(10) == [3, 4, 5]
    assert chosen(1000) == [1, 2, 3, 4, 5]
    assert chosen(1000, int(6e7)) == [4, 5]  # room for two: those of which most is read
    assert chosen(1000, int(2e7)) == []


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 20), st.integers(0, 20)), max_size=8),
    st.integers(1, 50),
    st.integers(0, 400),
)
def test_any_choice_fits_and_transfers_no_more_than_ranges(shards_, epochs, cache_bytes):
    size, held, read = np.array([(s, max(h, r), r) for s, h, r in shards_]).reshape(-1, 3).T
    chosen = choose_access(size, held, read, epochs=epochs, cache_bytes=cache_bytes)
    assert size[chosen].sum() <= cache_bytes
    assert (read[chosen] * epochs >= held[chosen]).all()
    assert (read[chosen] > 0).all()
    roomy = choose_access(size, held, read, epochs=epochs, cache_bytes=10**9)
    assert not (chosen & ~roomy).any()


def test_an_unknown_access_is_named():
    with pytest.raises(ConfigError, match=r"RemoteOptions\.access.*'download'"):
        RemoteOptions(access="download")
