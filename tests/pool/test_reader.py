"""Positioned reads: the plan against the ranges it must cover, and the bytes against the files'."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curated_data.errors import PoolError
from curated_data.pool.reader import LocalReader, plan_runs
from curated_data.pool.storage import stat_shards


@st.composite
def members(draw):
    """Disjoint members of some shards, in any order: (shard, offset, size) arrays."""
    found = []
    for shard in range(draw(st.integers(1, 3))):
        position = 0
        for gap, size in draw(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 40)), max_size=12)):
            found.append((shard, position + gap, size))
            position += gap + size + 1
    found = draw(st.permutations(found))
    return tuple(np.array([row[column] for row in found], np.int64) for column in range(3))


@settings(max_examples=50, deadline=None)
@given(members(), st.integers(0, 60))
def test_runs_cover_each_member_once_and_no_wide_gap(members, gap):
    shard, offset, size = members
    runs = plan_runs(shard, offset, size, gap)
    assert sorted(runs.order.tolist()) == list(range(len(shard)))
    for number in range(len(runs.shard)):
        inside = runs.order[runs.first[number] : runs.first[number + 1]]
        assert len(inside)
        assert (shard[inside] == runs.shard[number]).all()
        starts, stops = offset[inside], offset[inside] + size[inside]
        assert runs.start[number] == starts.min()
        assert runs.stop[number] == stops.max()
        assert (starts[1:] - stops[:-1] <= gap).all()
    for number in range(1, len(runs.shard)):  # neighbours that could have been joined were joined
        if runs.shard[number] == runs.shard[number - 1]:
            assert runs.start[number] - runs.stop[number - 1] > gap


def test_long_runs_are_cut():
    offset = np.arange(1000, dtype=np.int64) * 10
    runs = plan_runs(np.zeros(1000, np.int64), offset, np.full(1000, 10), gap=0, longest=500)
    assert len(runs.shard) == 20
    assert (runs.stop - runs.start <= 500).all()


@pytest.mark.parametrize("gap", [0, 100, 1 << 20])
def test_bytes_are_the_files(tmp_path, gap):
    rng = np.random.default_rng(0)
    contents = [rng.bytes(50_000) for _ in range(4)]
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
    reader = LocalReader(
        stat_shards([str(tmp_path / str(number)) for number in range(4)]), max_open=2, gap=gap
    )
    slots = rng.permutation(4 * 480)[:300]
    shard, offset = slots // 480, slots % 480 * 100
    size = rng.integers(0, 100, 300)
    found = reader.read(shard, offset, size)
    assert found == [contents[s][o : o + z] for s, o, z in zip(shard, offset, size)]
    assert reader.counters.bytes_needed == size.sum()
    assert reader.counters.n_members == 300
    assert reader.counters.bytes_read >= size.sum()
    assert (reader.counters.n_reads == 300) == (gap == 0)
    assert len(reader._open) <= 2
    reader.close()


@pytest.mark.parametrize("maps", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_mapped_or_not_the_bytes_are_the_same(tmp_path, maps, cached):
    rng = np.random.default_rng(0)
    contents = [rng.bytes(300_000) for _ in range(3)]
    for number, content in enumerate(contents):
        with open(tmp_path / str(number), "wb") as file:
            file.write(content)
            os.fsync(file.fileno())
            if not cached:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    reader = LocalReader(stat_shards([str(tmp_path / str(number)) for number in range(3)]), maps=maps)
    shard, offset, size = (rng.integers(0, high, 200) for high in (3, 290_000, 10_000))
    shard, offset, size = np.append(shard, 1), np.append(offset, 299_999), np.append(size, 0)
    distinct = np.unique(shard * 300_000 + offset, return_index=True)[1]
    for rows in (distinct, distinct[:1], distinct[:0]):
        found = reader.read(shard[rows], offset[rows], size[rows])
        assert found == [contents[s][o : o + z] for s, o, z in zip(shard[rows], offset[rows], size[rows])]
        assert all(type(data) is bytes for data in found)
    os.truncate(tmp_path / "1", 100)
    with pytest.raises(PoolError, match=f"{tmp_path / '1'}: .*300000.* 100 "):
        reader.read(shard[distinct], offset[distinct], size[distinct])
    reader.close()
