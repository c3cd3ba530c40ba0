"""Grains: the smallest shards, and the fixed binary tree over them.

A grain is addressed by its index in [0, G), G a power of two. Sums over grains always follow one
binary tree: leaves are grains, a node over [a, b) adds its left half and its right half. A node is
named by its half-open span.

        [0,8)
       /     \\
    [0,4)   [4,8)        tp=3 holds [0,3) [3,6) [6,8): nodes [0,2) [2,3) | [3,4) [4,6) | [6,8)
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from hpcinfer.errors import MeshError
from hpcinfer.partition.split import align_up, split

GRAIN_MULTIPLE = 64  # MLP and vocabulary grains are padded to a multiple of this

A = TypeVar("A")


class Span(NamedTuple):
    """A node of the tree: the grains [start, stop), a power of two of them, aligned to their number."""

    start: int
    stop: int


def grain_ranges(total: int, grains: int) -> list[range]:
    """Cut `total` units (query heads, MLP columns, vocabulary ids) into grains; some are empty if total < grains."""
    return split(total, grains)


def padded_grain(total: int, grains: int, multiple: int = GRAIN_MULTIPLE) -> int:
    """Size of every grain in the store: the largest true size, rounded up to `multiple`."""
    return align_up(-(-total // grains), multiple)


def grain_runs(grains: int, tensor_parallel_size: int) -> list[range]:
    """Contiguous run of grains that each tp rank holds; tp=3 of 8 gives 3, 3, 2."""
    if not 1 <= tensor_parallel_size <= grains:
        raise MeshError(
            f"tensor_parallel_size={tensor_parallel_size} asks for more shards than the store has grains ({grains})",
            expected=f"tensor_parallel_size between 1 and {grains}",
            hint="use pipeline_parallel_size for the rest, or convert again with more --grains",
        )
    return split(grains, tensor_parallel_size)


def subtrees(run: range) -> list[Span]:
    """Decompose a run of grains into the largest nodes of the tree that it holds whole, left to right."""
    spans, start = [], run.start
    while start < run.stop:
        width = start & -start if start else 1 << (run.stop.bit_length() + 1)
        while start + width > run.stop:
            width //= 2
        spans.append(Span(start, start + width))
        start += width
    return spans


def tree_reduce(nodes: dict[Span, A], span: Span, add: Callable[[A, A], A]) -> A:
    """Combine the nodes below `span` in the fixed order of the tree.

    Args:
        nodes: values of nodes that together cover `span` exactly.
        span: the node that is asked for.
        add: combines a left and a right value.

    Returns:
        The value of `span`.
    """
    if span in nodes:
        return nodes[span]
    middle = (span.start + span.stop) // 2
    left = tree_reduce(nodes, Span(span.start, middle), add)
    return add(left, tree_reduce(nodes, Span(middle, span.stop), add))
