"""The tree all-reduce: finish the fixed binary tree over the grains across the ranks of a tp axis.

One shot: everyone gathers the nodes that all ranks hold whole and finishes the tree locally, so that every
rank does the same additions in the same order, whatever tp is.
"""

from collections.abc import Callable
from operator import add
from typing import Any

from hpcinfer.comm.protocol import Collectives
from hpcinfer.partition.grains import Span, grain_runs, subtrees, tree_reduce

Array = Any


class TreeReducer:
    """Sums over grains, equal in every bit for every number of tp ranks.

    Args:
        group: the ranks of one tp axis.
        grains: leaves of the tree.
        allocate: makes a contiguous float32 array of a shape.
    """

    def __init__(self, group: Collectives, grains: int, allocate: Callable[[tuple[int, ...]], Array]) -> None:
        self.group, self._allocate = group, allocate
        self.runs = grain_runs(grains, group.size)
        self._nodes_by_rank = [subtrees(run) for run in self.runs]
        self._root = Span(0, grains)

    @property
    def run(self) -> range:
        """Grains of this rank."""
        return self.runs[self.group.rank]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Nodes that this rank holds whole, as half-open runs of its local grains."""
        first = self.run.start
        return [(span.start - first, span.stop - first) for span in self._nodes_by_rank[self.group.rank]]

    def reduce(self, nodes: list[Array]) -> Array:
        """Finish the tree.

        Collective over tp.

        Args:
            nodes: contiguous float32 arrays of one shape, a value for each of `spans`.

        Returns:
            The sum over all grains, the same on every rank.
        """
        if self.group.size == 1:
            return nodes[0]
        return self._finish(nodes[0] if len(nodes) == 1 else self._stack(nodes), tuple(nodes[0].shape))

    def _stack(self, nodes: list[Array]) -> Array:
        stacked = self._allocate((len(nodes), *nodes[0].shape))
        for i, node in enumerate(nodes):
            stacked[i] = node
        return stacked

    def _finish(self, send: Array, shape: tuple[int, ...]) -> Array:
        spans = [span for nodes in self._nodes_by_rank for span in nodes]
        size = 1
        for length in shape:
            size *= length
        receive = self._allocate((len(spans), *shape))
        self.group.all_gather(send, receive, [len(nodes) * size for nodes in self._nodes_by_rank])
        return tree_reduce(dict(zip(spans, receive, strict=True)), self._root, add)
