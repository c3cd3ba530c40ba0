"""How far the clocks of nodes are from the root's."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

_TAG = 79
_PINGS = 5
_AT_MOST = 512  # nodes that are asked; the root asks one after the other


def measure_clocks(world: "Collectives", ranks: Sequence[int]) -> dict[int, float]:
    """Compare clocks: the peer's answer belongs to the middle of the quickest round trip.

    Collective over the root and `ranks`.

    Args:
        world: all ranks.
        ranks: one for each node.

    Returns:
        On the root the seconds by which each clock is ahead, by rank; elsewhere nothing.
    """
    asked = [rank for rank in ranks if rank != 0][:_AT_MOST]
    if world.rank == 0:
        return {rank: _ask(world, rank) for rank in asked}
    if world.rank in asked:
        _answer(world)
    return {}


def _ask(world: "Collectives", peer: int) -> float:
    theirs, trips = np.zeros(1), []
    for _ in range(_PINGS):
        before = time.time()
        world.send(theirs, peer, _TAG).wait()
        world.receive(theirs, peer, _TAG)
        after = time.time()
        trips.append((after - before, float(theirs[0]) - (before + after) / 2))
    return min(trips)[1]


def _answer(world: "Collectives") -> None:
    note = np.zeros(1)
    for _ in range(_PINGS):
        world.receive(note, 0, _TAG)
        note[0] = time.time()
        world.send(note, 0, _TAG).wait()
