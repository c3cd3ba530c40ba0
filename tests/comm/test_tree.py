import numpy as np
import pytest
import torch
from grain_values import own_nodes, values_of
from thread_group import run_ranks

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.comm.tree import TreeReducer
from hpcinfer.errors import MeshError


def empty(shape):
    return np.empty(shape, np.float32)


def grains_with_zeros(grains, shape=(3, 5)):
    """Grains with -0 everywhere in one column."""
    values = values_of(grains, shape)
    values[..., 0] = -0.0
    return values


def reduce_on(group, values, allocate=empty):
    """What a rank does: its own nodes, then the tree across ranks."""
    reducer = TreeReducer(group, len(values), allocate)
    return reducer.reduce(own_nodes(values, reducer.run))


@pytest.mark.parametrize("grains", [8, 16])
def test_sum_is_the_same_bits_for_every_tp(grains):
    values = grains_with_zeros(grains)
    expected = reduce_on(SerialGroup(), values).tobytes()
    assert expected != values.sum(0).tobytes() or expected != values[::-1].sum(0).tobytes()  # order matters here
    for tp in range(1, 9):
        assert {result.tobytes() for result in run_ranks(tp, lambda group: reduce_on(group, values))} == {expected}


def test_one_rank_adds_by_halves():
    values = grains_with_zeros(8)
    pairs = [values[i] + values[i + 1] for i in range(0, 8, 2)]
    assert reduce_on(SerialGroup(), values).tobytes() == ((pairs[0] + pairs[1]) + (pairs[2] + pairs[3])).tobytes()


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (2, 3, 4), (7,)])
def test_any_shape_is_kept(shape):
    values = grains_with_zeros(8, shape)
    for result in run_ranks(3, lambda group: reduce_on(group, values)):
        assert result.shape == shape and result.tobytes() == reduce_on(SerialGroup(), values).tobytes()


def test_tensors_are_reduced_in_place_of_arrays():
    values = grains_with_zeros(8)
    results = run_ranks(3, lambda group: reduce_on(group, torch.from_numpy(values), torch.empty))
    assert {result.numpy().tobytes() for result in results} == {reduce_on(SerialGroup(), values).tobytes()}


def test_spans_are_local_and_cover_the_run():
    def spans(group):
        reducer = TreeReducer(group, 8, empty)
        return reducer.run, reducer.spans

    assert run_ranks(3, spans) == [
        (range(0, 3), [(0, 2), (2, 3)]), (range(3, 6), [(0, 1), (1, 3)]), (range(6, 8), [(0, 2)]),
    ]  # fmt: skip


def test_more_ranks_than_grains_are_refused():
    assert all(isinstance(error, MeshError) for error in run_ranks(3, lambda group: TreeReducer(group, 2, empty)))
