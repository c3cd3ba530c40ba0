"""The tree over the grains as a straight-line program: which values are added, in which order, and what comes out.

Ranks hold nodes of the tree; a program merges the nodes of some ranks as far as they go, which is up to the root when
those ranks hold all grains. Each element of a result is the same sequence of additions, whoever evaluates it, whole
or in parts.

        ranks hold [0,2) [2,3) | [3,4) [4,6) | [6,8):   values 0 1 | 2 3 | 4
        adds: 5 = 1 + 2, 6 = 0 + 5, 7 = 3 + 4, 8 = 6 + 7;   result: value 8, which is [0,8)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, TypeVar

from hpcinfer.partition.grains import Span

A = TypeVar("A")


class Input(NamedTuple):
    """A value that is there at the beginning: a node of a rank."""

    rank: int
    node: int  # its place among those of the rank


class Add(NamedTuple):
    """A value is the sum of two earlier ones."""

    left: int
    right: int


@dataclass(frozen=True, eq=False)
class TreeProgram:
    """Additions in an order. Values are numbered: the inputs first, then one for each addition."""

    inputs: tuple[Input, ...]  # by rank, then by node
    adds: tuple[Add, ...]
    results: tuple[int, ...]  # values that nobody adds any more, left to right
    outputs: tuple[Span, ...]  # the nodes of the tree that they are
    nodes_by_rank: tuple[tuple[Span, ...], ...]  # what the ranks hold

    @property
    def num_ranks(self) -> int:
        """Ranks whose nodes are merged."""
        return len(self.nodes_by_rank)

    @property
    def max_nodes(self) -> int:
        """Nodes of the rank that holds most."""
        return max(map(len, self.nodes_by_rank))

    def evaluate(self, nodes: Sequence[Sequence[A]], add: Callable[[A, A], A]) -> list[A]:
        """Run the program.

        Args:
            nodes: values of the nodes of each rank.
            add: combines a left and a right value.

        Returns:
            A value for each of `outputs`.
        """
        values = [nodes[each.rank][each.node] for each in self.inputs]
        for left, right in self.adds:
            values.append(add(values[left], values[right]))
        return [values[result] for result in self.results]


def tree_program(nodes_by_rank: Sequence[Sequence[Span]]) -> TreeProgram:
    """Merge nodes of some ranks into the largest nodes of the tree that these ranks hold whole together.

    The same nodes give the same object.

    Args:
        nodes_by_rank: disjoint nodes of the tree, for each rank (hpcinfer.partition.grains.subtrees), in any order.
    """
    return _build(tuple(tuple(Span(*span) for span in nodes) for nodes in nodes_by_rank))


@cache
def _build(nodes_by_rank: tuple[tuple[Span, ...], ...]) -> TreeProgram:
    inputs = tuple(Input(rank, node) for rank, nodes in enumerate(nodes_by_rank) for node in range(len(nodes)))
    spans = sorted((span, value) for value, span in enumerate(span for nodes in nodes_by_rank for span in nodes))
    merged: list[tuple[Span, int]] = []  # what is left of the next one, with its value
    adds: list[Add] = []
    for span, value in spans:
        while merged and _are_siblings(merged[-1][0], span):
            left, left_value = merged.pop()
            adds.append(Add(left_value, value))
            span, value = Span(left.start, span.stop), len(inputs) + len(adds) - 1
        merged.append((span, value))
    outputs, results = zip(*merged, strict=True) if merged else ((), ())
    return TreeProgram(inputs, tuple(adds), results, outputs, nodes_by_rank)


def _are_siblings(left: Span, right: Span) -> bool:
    """Whether two nodes are the halves of one."""
    width = left.stop - left.start
    return left.stop == right.start and right.stop - right.start == width and left.start % (2 * width) == 0
