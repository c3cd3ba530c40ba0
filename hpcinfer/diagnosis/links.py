"""Measuring messages between pairs of ranks: rounds of disjoint pairs, so that no pair disturbs another on its rank."""

import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hpcinfer.diagnosis.collecting import collect
from hpcinfer.diagnosis.network import Link

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

_TAG = 78
_ALL_PAIRS = 16  # ranks up to which every rank is measured; above, one for each node
_PINGS, _WARM_UP, _TRANSFERS = 20, 3, 3
_PROBE_BYTES, _LARGE_BYTES = 1 << 16, 1 << 20
_PATIENCE_S = 0.005  # for the probe; a slower link is not asked for more
_PAIRS = np.dtype([("a", "<i4"), ("b", "<i4"), ("latency", "<f8"), ("bandwidth", "<f8")])


def measure_links(world: "Collectives", nodes: Sequence[Sequence[int]], limit_s: float) -> list[Link]:
    """Measure pairs within nodes, then between them; as many rounds as fit into the time, in a fixed random order.

    Collective over the world.

    Args:
        world: all ranks.
        nodes: the ranks of each node.
        limit_s: for everything; a round that has begun is finished.

    Returns:
        On the root the pairs that were measured; elsewhere nothing.
    """
    mine: list[Link] = []
    node = next(index for index, ranks in enumerate(nodes) if world.rank in ranks)
    between = [rank for ranks in nodes for rank in (ranks if world.size <= _ALL_PAIRS else ranks[:1])]
    stages = ((nodes[node], max(map(len, nodes)), 0.4), (between, len(between) if len(nodes) > 1 else 0, 1.0))
    start = time.monotonic()
    for members, count, share in stages:
        for number in random.Random(0).sample(range(num_rounds(count)), num_rounds(count)):
            if not _goes_on(world, start + share * limit_s):
                break
            peer = opponent(world.rank, number, members)
            if peer is not None and (members is nodes[node] or peer not in nodes[node]):
                mine += _measure(world, peer)
    table = np.array([tuple(link) for link in mine], _PAIRS)
    tables = collect(world, table.tobytes(), limit_s)
    return [Link(*row) for data in tables.values() for row in np.frombuffer(data, _PAIRS).tolist()]


def num_rounds(count: int) -> int:
    """Rounds of a tournament in which each of `count` meets each other once."""
    return max(count - 1 + count % 2, 0) if count > 1 else 0


def opponent(rank: int, number: int, members: Sequence[int]) -> int | None:
    """Whom a rank meets in a round; None when it pauses or does not take part. The circle method."""
    if rank not in members:
        return None
    last = num_rounds(len(members))
    if number >= last:
        return None
    index = members.index(rank)
    if index == last:
        other = number * (last + 1) // 2 % last
    else:
        other = (number - index) % last
        other = last if other == index else other
    return members[other] if other < len(members) else None


def _goes_on(world: "Collectives", end_s: float) -> bool:
    return world.broadcast_bytes(bytes([time.monotonic() < end_s]) if world.rank == 0 else None) == b"\1"


def _measure(world: "Collectives", peer: int) -> list[Link]:
    """Latency and bandwidth to a peer, which does the same; the lower rank has the result."""
    note = np.zeros(1, np.int64)
    _one_way(world, peer, note, _WARM_UP)
    latency_s = _one_way(world, peer, note, _PINGS)
    size, best_s = _PROBE_BYTES, _one_way(world, peer, np.zeros(_PROBE_BYTES, np.uint8), 2)
    note[0] = best_s < _PATIENCE_S  # the lower rank's opinion, as the other learns here
    _one_way(world, peer, note, 1)
    if note[0]:
        size, best_s = _LARGE_BYTES, _one_way(world, peer, np.zeros(_LARGE_BYTES, np.uint8), _TRANSFERS)
    return [Link(world.rank, peer, latency_s, size / best_s)] if world.rank < peer else []


def _one_way(world: "Collectives", peer: int, buffer: np.ndarray, repeats: int) -> float:
    """Seconds that the quickest of some messages took; to and fro, begun by the lower rank."""
    best_s = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        if world.rank < peer:
            world.send(buffer, peer, _TAG).wait()
        world.receive(buffer, peer, _TAG)
        if world.rank > peer:
            world.send(buffer, peer, _TAG).wait()
        best_s = min(best_s, time.perf_counter() - start)
    return best_s / 2
