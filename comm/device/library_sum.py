"""A sum by NCCL itself: each rank adds up what it has, then NCCL adds the ranks, in whatever order it takes."""

from collections.abc import Sequence

from hpcinfer.comm.device.arrays import Array, DeviceArrays
from hpcinfer.comm.device.nccl_group import NcclGroup
from hpcinfer.partition.grains import Span
from hpcinfer.partition.tree_program import Add, Input, TreeProgram


class LibrarySum:
    """Sums over a group of GPUs, faster where the order does not matter: bits depend on the number of ranks."""

    def __init__(self, group: NcclGroup, spans: Sequence[Span], arrays: DeviceArrays) -> None:
        self._group, self._arrays = group, arrays
        self._program = _left_to_right(tuple(spans))

    def start(self, nodes: Sequence[Array], out: Array) -> None:
        """Sum `nodes` of all ranks, which are overwritten, into `out`. Collective over the group."""
        flat = self._arrays.flat(out)
        self._arrays.evaluation(self._program, [[self._arrays.flat(node) for node in nodes]], [flat])()
        self._group.all_reduce(flat)

    def room(self, length: int) -> Array:
        """Memory for the nodes of a sum of that length. Not collective."""
        return self._arrays.empty(len(self._program.inputs) * length)

    def result(self, length: int) -> Array:
        """Memory for a sum of that length. Not collective."""
        return self._arrays.empty(length)

    def close(self) -> None:
        """Nothing is under way but on the stream. Not collective."""


def _left_to_right(spans: tuple[Span, ...]) -> TreeProgram:
    """Add neighbours up, whether or not they are siblings in the tree."""
    inputs = tuple(Input(0, node) for node in range(len(spans)))
    sums = range(len(spans), 2 * len(spans) - 1)
    adds = tuple(Add(left, right) for left, right in zip((0, *sums), range(1, len(spans)), strict=False))
    return TreeProgram(inputs, adds, (2 * len(spans) - 2,), (Span(spans[0].start, spans[-1].stop),), (spans,))
