"""Who adds what in an all-reduce over several levels: nodes, switches, all. Pure integers.

At each level but the last the ranks of a unit (a node, say) cut the columns into slices; each of the first `width`
of them adds one slice and goes on with it among its like in other units: that is its lane. Behind the last level the
slices are gathered again, level by level. The width is that of the smallest unit, so that a lane has one rank in each
unit: the network of a node carries the same bytes however many of its ranks send them, and nobody has two roles.
"""

from collections.abc import Sequence
from typing import NamedTuple

from hpcinfer.partition.grains import Span
from hpcinfer.partition.split import split
from hpcinfer.partition.tree_program import TreeProgram, tree_program

COLUMNS = 16  # slices begin at multiples of this: 64 bytes of float32


class Level(NamedTuple):
    """One level, for one rank."""

    peers: tuple[int, ...]  # ranks that exchange, this one among them
    place: int  # of this rank among them
    width: int  # so many of them add a slice
    program: TreeProgram  # merges what the peers bring

    @property
    def is_adder(self) -> bool:
        """Whether this rank adds a slice."""
        return self.place < self.width


def levels_of(
    rank: int, units: Sequence[Sequence[int]], spans: Sequence[Sequence[Span]], *, has_lanes: bool = True
) -> list[Level]:
    """Plan an all-reduce for one rank.

    Args:
        rank: whose part is asked for.
        units: for each level, from the innermost, the number of the unit of each rank; all are in one at the last.
        spans: nodes of the tree that each rank holds.
        has_lanes: whether all ranks of a unit go on with a slice each, or one of them with everything.

    Returns:
        The levels in which this rank takes part: fewer than there are if it adds nothing at one.
    """
    lanes: dict[int, tuple[int, ...]] = dict.fromkeys(range(len(spans)), ())
    held, levels = {each: tuple(own) for each, own in enumerate(spans)}, []
    for depth, unit_of in enumerate(units):
        members: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for each in sorted(lanes):
            members.setdefault((lanes[each], unit_of[each]), []).append(each)
        smallest = min(map(len, members.values()))
        width = smallest if has_lanes or depth == len(units) - 1 else 1
        for peers in members.values():
            program = tree_program([held[peer] for peer in peers])
            if rank in peers:
                levels.append(Level(tuple(peers), peers.index(rank), width, program))
            for place, peer in enumerate(peers):
                held[peer] = program.outputs
                lanes[peer] = (*lanes[peer], place)
            for peer in peers[width:]:
                del lanes[peer]
        if rank not in lanes:
            break
    return levels


def cut(columns: range, width: int) -> list[range]:
    """Cut columns into slices that begin at multiples of `COLUMNS` from the first; the last ones may be empty."""
    blocks = split(-(-len(columns) // COLUMNS), width)
    edges = [min(columns.start + COLUMNS * block.stop, columns.stop) for block in blocks]
    return [range(start, stop) for start, stop in zip([columns.start, *edges], edges, strict=False)]
