from operator import add

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.partition.grains import Span, grain_runs, subtrees, tree_reduce
from hpcinfer.partition.tree_program import tree_program


@st.composite
def meshes(draw):
    """Nodes by rank of a mesh, its grains, and some of its ranks."""
    grains = 1 << draw(st.integers(0, 5))
    tp = draw(st.integers(1, grains))
    ranks = draw(st.permutations(range(tp)))[: draw(st.integers(1, tp))]
    return grains, [subtrees(run) for run in grain_runs(grains, tp)], ranks


def words(span):
    """The tree below a node, written out."""
    leaves = {Span(grain, grain + 1): str(grain) for grain in range(span.start, span.stop)}
    return tree_reduce(leaves, span, lambda left, right: f"({left}+{right})")


@given(meshes())
def test_every_sum_is_that_of_the_tree(mesh):
    grains, nodes, _ = mesh
    program = tree_program(nodes)
    values = [[words(span) for span in rank] for rank in nodes]
    assert program.evaluate(values, lambda left, right: f"({left}+{right})") == [words(Span(0, grains))]
    assert program.outputs == (Span(0, grains),)


@given(meshes(), st.integers(0, 2**32))
def test_bits_are_those_of_tree_reduce(mesh, seed):
    grains, nodes, _ = mesh
    random = np.random.default_rng(seed)
    leaves = {Span(grain, grain + 1): random.standard_normal(3).astype("f4") for grain in range(grains)}
    values = [[tree_reduce(leaves, span, add) for span in rank] for rank in nodes]
    (result,) = tree_program(nodes).evaluate(values, add)
    assert result.tobytes() == tree_reduce(leaves, Span(0, grains), add).tobytes()


@given(meshes())
def test_some_ranks_get_as_far_as_they_can_in_whatever_order(mesh):
    _, nodes, ranks = mesh
    some = [nodes[rank] for rank in ranks]
    program = tree_program(some)
    held = {grain for spans in some for span in spans for grain in range(*span)}
    assert {grain for span in program.outputs for grain in range(*span)} == held
    assert list(program.outputs) == sorted(program.outputs)
    for span in program.outputs:  # its sibling is not there
        width = span.stop - span.start
        sibling = Span(span.start ^ width, (span.start ^ width) + width)
        assert sibling not in program.outputs
    values = [[words(span) for span in rank] for rank in some]
    merged = program.evaluate(values, lambda left, right: f"({left}+{right})")
    assert merged == [words(span) for span in program.outputs]


def test_example_of_the_module():
    program = tree_program([[Span(0, 2), Span(2, 3)], [Span(3, 4), Span(4, 6)], [Span(6, 8)]])
    assert program.inputs == ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))
    assert program.adds == ((1, 2), (0, 5), (3, 4), (6, 7)) and program.results == (8,)
    assert (program.num_ranks, program.max_nodes) == (3, 2)


def test_the_same_nodes_are_the_same_program():
    assert tree_program([[Span(0, 1)], [(1, 2)]]) is tree_program([(Span(0, 1),), (Span(1, 2),)])
