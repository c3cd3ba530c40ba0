import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.errors import MeshError
from hpcinfer.partition.grains import Span, grain_ranges, grain_runs, padded_grain, subtrees, tree_reduce


def is_node(span: Span) -> bool:
    """Whether a span is a node of the tree: a power of two of grains, aligned to their number."""
    width = span.stop - span.start
    return width > 0 and width & (width - 1) == 0 and span.start % width == 0


def join(left: str, right: str) -> str:
    return f"({left}+{right})"


@pytest.mark.parametrize("grains", [1, 2, 4, 8, 16, 64])
def test_runs_decompose_into_the_largest_nodes(grains):
    for start in range(grains):
        for stop in range(start + 1, grains + 1):
            spans = subtrees(range(start, stop))
            assert [grain for span in spans for grain in range(*span)] == list(range(start, stop))
            assert all(map(is_node, spans))
            parents = (Span(left.start, right.stop) for left, right in zip(spans, spans[1:], strict=False))
            assert not any(map(is_node, parents)), (start, stop)


def test_empty_run_has_no_node():
    assert subtrees(range(0)) == subtrees(range(5, 5)) == []


@pytest.mark.parametrize("grains", [1, 2, 8, 16])
def test_sum_is_one_expression_for_every_tp(grains):
    leaves = {Span(g, g + 1): str(g) for g in range(grains)}
    root = Span(0, grains)
    expected = tree_reduce(leaves, root, join)
    for tp in range(1, grains + 1):
        nodes = {span: tree_reduce(leaves, span, join) for run in grain_runs(grains, tp) for span in subtrees(run)}
        assert tree_reduce(nodes, root, join) == expected


def test_expression_is_the_balanced_tree():
    leaves = {Span(g, g + 1): "abcdefgh"[g] for g in range(8)}
    assert tree_reduce(leaves, Span(0, 8), join) == "(((a+b)+(c+d))+((e+f)+(g+h)))"
    assert tree_reduce(leaves, Span(4, 6), join) == "(e+f)"


def test_nodes_that_do_not_cover_the_span_are_no_silent_sum():
    with pytest.raises(RecursionError):
        tree_reduce({Span(0, 1): "a"}, Span(0, 2), join)


@pytest.mark.parametrize("grains", [8, 16])
def test_every_tp_rank_has_grains_and_all_are_held_once(grains):
    for tp in range(1, grains + 1):
        runs = grain_runs(grains, tp)
        assert [grain for run in runs for grain in run] == list(range(grains)) and min(map(len, runs)) >= 1
    assert [len(run) for run in grain_runs(8, 3)] == [3, 3, 2]


@pytest.mark.parametrize("tp", [0, -1, 9])
def test_impossible_tp_is_refused_with_the_number_of_grains(tp):
    with pytest.raises(MeshError, match=rf"tensor_parallel_size={tp} .*\(8\)") as caught:
        grain_runs(8, tp)
    assert caught.value.expected == "tensor_parallel_size between 1 and 8" and caught.value.exit_code == 2


@given(total=st.integers(1, 300_000), grains=st.sampled_from([1, 2, 8, 16]))
def test_padded_grains_hold_every_true_grain(total, grains):
    padded, sizes = padded_grain(total, grains), [len(ids) for ids in grain_ranges(total, grains)]
    assert padded % 64 == 0 and max(sizes) <= padded < max(sizes) + 64
    assert sum(sizes) == total


def test_heads_are_not_padded_to_a_multiple():
    assert [len(heads) for heads in grain_ranges(14, 8)] == [2, 2, 2, 2, 2, 2, 1, 1]
    assert padded_grain(14, 8, 1) == 2
