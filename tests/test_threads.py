"""Threads of one core: as many as asked, whatever torch's own number is, which they leave alone."""

import threading

import pytest
import torch

from curated_data.threads import parallel_map, threads_of_one_core


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def cores_and_thread(together):
    together.wait(10)
    before = torch.get_num_threads()
    torch.ones(300, 300) @ torch.ones(300, 300)  # torch settles a thread's number at its first such call
    return {before, torch.get_num_threads()}, threading.get_ident()


def test_each_thread_has_one_core_and_the_others_keep_theirs(three_threads):
    together = threading.Barrier(3)  # each waits for the others, so they are at work at once
    found = parallel_map(cores_and_thread, [(together,)] * 3)
    assert [cores for cores, _ in found] == [{1}] * 3
    assert len({thread for _, thread in found}) == 3
    assert torch.get_num_threads() == 3
    fresh = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [3]
    assert threads_of_one_core(3, "curated-data-compute") is threads_of_one_core(3, "curated-data-compute")


def test_pieces_come_in_order_and_one_is_done_here(three_threads):
    assert parallel_map(lambda a, b: a - b, [(n, 1) for n in range(50)]) == list(range(-1, 49))
    assert parallel_map(threading.get_ident, [()]) == [threading.get_ident()]
    assert parallel_map(threading.get_ident, [(), ()], workers=1) == [threading.get_ident()] * 2
    with pytest.raises(ZeroDivisionError):
        parallel_map(lambda a: 1 // a, [(1,), (0,)])
