import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.recovery.order import MAX_BLOCK_ROWS, work_order


def _order(prefixes, costs):
    return work_order(np.array(prefixes, np.uint64), np.array(costs, np.uint32))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2**32 - 1)), min_size=1, max_size=300))
def test_each_row_is_in_exactly_one_block(rows):
    order, starts = _order(*zip(*rows, strict=True))
    assert sorted(order.tolist()) == list(range(len(rows)))
    sizes = np.diff(starts.astype(int))
    assert starts[0] == 0 and starts[-1] == len(rows)
    assert sizes.min() >= 1 and sizes.max() <= MAX_BLOCK_ROWS


def test_rows_with_a_common_prefix_are_neighbours_largest_group_first():
    rng = np.random.default_rng(0)
    prefixes = rng.permutation(np.repeat(np.arange(1, 21), np.arange(1, 21)))
    order, _ = _order(prefixes, np.ones(len(prefixes)))
    groups = prefixes[order[np.isin(prefixes[order], np.arange(2, 21))]]
    assert np.flatnonzero(np.diff(groups)).size == 18
    assert groups[np.concatenate(([0], np.flatnonzero(np.diff(groups)) + 1))].tolist() == list(range(20, 1, -1))


def test_a_group_that_fits_a_block_is_not_cut():
    prefixes = np.repeat(np.arange(1, 1001), 10)
    order, starts = _order(prefixes, np.ones(10_000))
    sizes = np.diff(starts.astype(int))
    blocks = np.repeat(np.arange(len(sizes)), sizes)
    for group in range(1, 1001):
        touched = np.unique(blocks[prefixes[order] == group])
        assert len(touched) == 1 or sizes[touched].min() < 10


def test_single_rows_come_by_descending_work():
    costs = np.random.default_rng(1).integers(0, 50, 500)
    order, _ = _order(np.zeros(500), costs)
    assert order.tolist() == sorted(range(500), key=lambda row: (-costs[row], row))


def test_groups_and_single_rows_are_interleaved():
    prefixes = np.concatenate((np.full(5000, 7), np.zeros(5000)))
    order, _ = _order(prefixes, np.ones(10_000))
    assert 0.4 < (order[:2000] < 5000).mean() < 0.6


@pytest.mark.parametrize("num_rows", [64, 100, 200])
def test_small_inputs_can_be_shared(num_rows):
    _, starts = _order(np.zeros(num_rows), np.ones(num_rows))
    assert 16 <= len(starts) - 1 <= num_rows


@pytest.mark.parametrize("num_rows", [1, 300, 5_000, 300_000])
def test_blocks_shrink_towards_the_end(num_rows):
    _, starts = _order(np.zeros(num_rows), np.arange(num_rows))
    sizes = np.diff(starts.astype(int))
    assert (np.diff(sizes[:-1]) <= 0).all() and len(sizes) < 20_000
