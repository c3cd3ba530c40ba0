from itertools import pairwise
from mmap import PAGESIZE, mmap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.weights import requests
from hpcinfer.weights.requests import MAX_GAP, Chunk, aligned_empty, plan_requests

REQUEST = 4 * PAGESIZE  # instead of 16 MiB, so that small units are cut


@st.composite
def units(draw):
    """Units in some files, with gaps of any size between them, in any order; some begin on pages, in memory too."""
    chunks = []
    for file in range(draw(st.integers(1, 3))):
        start = 0
        for _ in range(draw(st.integers(1, 12))):
            gap = draw(st.sampled_from([0, 0, 1, PAGESIZE, MAX_GAP, MAX_GAP + 1, 3 * MAX_GAP]))
            size = draw(st.sampled_from([1, 100, PAGESIZE, 3 * PAGESIZE + 7, 16 * PAGESIZE, 65 * PAGESIZE]))
            shift = draw(st.sampled_from([0, 0, 8]))
            memory = memoryview(mmap(-1, size + shift))[shift:]
            chunks.append(Chunk(Path(f"file-{file}"), start + gap, memory, checksum=0))
            start += gap + size
    return draw(st.permutations(chunks))


@pytest.fixture(autouse=True, scope="module")
def small_requests():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests, "REQUEST_BYTES", REQUEST)
        patch.setattr(requests, "MAX_PIECES", 5)
        yield


@given(units(), st.booleans())
def test_requests_cover_each_byte_of_each_unit_once(chunks, direct):
    covered = [0] * len(chunks)
    for request in plan_requests(chunks, direct=direct):
        offset = request.start
        for index, raw in request.pieces:
            if index >= 0:
                chunk, done = chunks[index], covered[index]
                assert (request.path, offset) == (chunk.path, chunk.start + done)
                assert len(raw) == 0 or np.shares_memory(
                    np.frombuffer(raw, np.uint8), np.frombuffer(chunk.raw, np.uint8)[done : done + len(raw)]
                )
                covered[index] += len(raw)
            offset += len(raw)
    assert covered == [len(chunk.raw) for chunk in chunks]


@given(units(), st.booleans())
def test_requests_are_bounded_and_in_the_order_of_the_files(chunks, direct):
    planned = plan_requests(chunks, direct=direct)
    assert all(0 < each.num_bytes < 2 * REQUEST + PAGESIZE and len(each.pieces) <= 5 for each in planned)
    assert all((a.path, a.start + a.num_bytes) <= (b.path, b.start) or a.path < b.path for a, b in pairwise(planned))
    dropped = sum(len(raw) for each in planned for index, raw in each.pieces if index < 0)
    assert dropped <= min(MAX_GAP * (len(chunks) - 1), sum(len(each.raw) for each in chunks) // 16)


@given(units())
def test_what_goes_past_the_page_cache_is_whole_pages(chunks):
    for request in plan_requests(chunks, direct=True):
        if request.can_be_direct:
            assert request.start % PAGESIZE == 0
            for _, raw in request.pieces:
                assert len(raw) % PAGESIZE == 0 and np.frombuffer(raw, np.uint8).ctypes.data % PAGESIZE == 0


def test_small_units_keep_none_of_the_large_ones_in_the_page_cache():
    memory, places = memoryview(mmap(-1, 40 * PAGESIZE)), [(2048, 4096), (6144, 4096), (12288, 40 * PAGESIZE)]
    chunks = [Chunk(Path("x"), start, memory[:size], 0) for start, size in places]
    sizes = {each.start: each.num_bytes for each in plan_requests(chunks, direct=True) if each.can_be_direct}
    assert min(sizes) == 12288 and sum(sizes.values()) == 40 * PAGESIZE


def test_neighbours_become_large_requests():
    memory = memoryview(mmap(-1, 100 * PAGESIZE))
    pages = [Chunk(Path("x"), at * PAGESIZE, memory[at * PAGESIZE : (at + 1) * PAGESIZE], 0) for at in range(100)]
    sizes = [each.num_bytes for each in plan_requests([*pages[50:], *pages[:50]], direct=False)]
    assert sum(sizes) == 100 * PAGESIZE and min(sizes[:-1]) >= REQUEST


def test_one_unit_is_cut_and_no_unit_is_nothing():
    memory = memoryview(mmap(-1, 10 * REQUEST + 5))
    sizes = [each.num_bytes for each in plan_requests([Chunk(Path("x"), 3, memory, 0)], direct=False)]
    assert len(sizes) == 9 and min(sizes[:-1]) >= REQUEST and sum(sizes) == len(memory)
    assert plan_requests([], direct=True) == []


@pytest.mark.parametrize("shape", [(0, 3), (1,), (7, 5), (3, 1 << 20)])
def test_memory_for_units_begins_on_a_page(shape):
    array = aligned_empty(shape, np.dtype("<u2"))
    assert array.shape == shape and array.dtype == "<u2" and array.flags.c_contiguous and array.flags.writeable
    assert array.ctypes.data % PAGESIZE == 0 or not array.size
