"""Measuring forms and ways of operations on the ranks at hand, in seconds: loops of calls, all of them in turn."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from hpcinfer.comm.device.arrays import DeviceArrays
from hpcinfer.comm.device.calibration import measure_on_gpus
from hpcinfer.comm.forms import FORMS, AllReduce, forms_for
from hpcinfer.comm.node.channel import NodeChannel
from hpcinfer.comm.node.opening import open_channel
from hpcinfer.comm.operations import Operations
from hpcinfer.comm.protocol import Collectives
from hpcinfer.comm.selector import (
    ALL_REDUCE,
    MESSAGES,
    NODE,
    OF_GPUS,
    OPERATIONS,
    Curves,
    Point,
    Selector,
    shape_of,
)
from hpcinfer.comm.timing import PATIENCE, Work, curves_of, is_said, time_in_turn
from hpcinfer.partition.grains import grain_runs, subtrees
from hpcinfer.partition.mesh import Mesh
from hpcinfer.partition.placement import place_ranks
from hpcinfer.partition.topology import by_node
from hpcinfer.partition.tree_program import tree_program

SIZES = tuple(1 << k for k in range(10, 25, 2))  # bytes of a sum: 1 KiB to 16 MiB
_WAY_SIZES = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 24)  # of the other operations
_SUMS_SHARE = 0.6  # of the time
_GRAINS = 16  # of the largest stores: tp groups have as many ranks at most
_WORK_S, _LEAST_S, _LEAST_CALLS = 0.001, 1e-7, 20  # before a message is sent; what it takes at least; of a size
_TAG = 4  # of the messages that are measured


def calibrate(
    world: Collectives, budget_s: float, arrays: DeviceArrays | None = None
) -> dict[str, dict[str, dict[str, list[Point]]]]:
    """Measure all forms and ways for the tp groups that a mesh of this world may have.

    Collective over the world.

    Args:
        world: ranks whose locations are known.
        budget_s: about how long it may take.
        arrays: of this rank's GPU: then sums of GPUs are measured, and nothing else.

    Returns:
        Seconds by shape of the group, operation, and form or way, on all ranks; of equal groups those of the slowest.
    """
    sizes = [tp for tp in range(2, min(world.size, _GRAINS) + 1) if world.size % tp == 0]
    table: dict[str, dict[str, dict[str, list[Point]]]] = {}
    for tp in sizes:
        order = place_ranks(Mesh(world.size // tp, 1, tp), world.locations or ())
        place = order.index(world.rank) if order else world.rank
        group = world.split(place // tp, place)
        share, kind = budget_s / len(sizes), "" if arrays is None else OF_GPUS
        found = measure(group, share) if arrays is None else measure_on_gpus(group, arrays, share, SIZES, _GRAINS)
        mine = {shape_of(group.locations, group.size) + kind: found} if group.rank == 0 else {}
        for data in world.all_gather_bytes(json.dumps(mine).encode()):
            for shape, operations in json.loads(data).items():
                known = table.setdefault(shape, {})
                known.update((name, _slower(known.get(name, {}), curves)) for name, curves in operations.items())
    return table


def measure(group: Collectives, budget_s: float, sizes: Sequence[int] = SIZES) -> dict[str, dict[str, list[Point]]]:
    """Measure all operations on a group.

    Collective over the group.

    Returns:
        Seconds by operation, by form or way, the same on all ranks. Where no memory is shared there is one way alone.
    """
    channel, way_sizes = open_channel(group), [size for size in _WAY_SIZES if size <= max(sizes)]
    found = {ALL_REDUCE: measure_sums(group, channel, budget_s * _SUMS_SHARE, sizes)}
    if channel is not None:
        found |= measure_ways(group, channel, budget_s * (1 - _SUMS_SHARE), way_sizes)
        channel.close()
    return found


def measure_ways(
    group: Collectives, channel: NodeChannel, budget_s: float, sizes: Sequence[int]
) -> dict[str, dict[str, list[Point]]]:
    """Measure all other operations through memory and through the MPI.

    Collective over the group.
    """
    ways = {way: Operations(group, channel, _always(group, way)) for way in (NODE, MESSAGES)}
    names = [name for name in OPERATIONS if name != "send"]
    found: dict[str, dict[str, list[Point]]] = {name: {way: [] for way in ways} for name in names}
    share, end = budget_s / len(sizes) / len(OPERATIONS), time.monotonic() + PATIENCE * budget_s
    found["send"] = measure_messages(group, ways, [size for size in sizes if 2 * size <= channel.ring_bytes], share)
    for size in sizes:
        for name in names:
            works = {way: _work_of(name, operations, size) for way, operations in ways.items()}
            for way, value in time_in_turn(group, works, share).items():
                found[name][way].append(Point(size, value))
        if is_said(group, time.monotonic() > end):
            break
    return found


def measure_messages(
    group: Collectives, ways: Mapping[str, Operations], sizes: Sequence[int], share_s: float
) -> dict[str, list[Point]]:
    """Measure messages between two neighbours of a node as stages exchange them, each way in turn.

    Collective over the group: the others wait for what the first of the two says, asleep.

    Args:
        group: ranks whose locations are known, two of them on one node.
        ways: what the two exchange messages with.
        sizes: bytes of a message, as long as memory takes it.
        share_s: seconds for each size.

    Returns:
        Medians of the calls, the same on all ranks.
    """
    first, second = next(node for node in by_node(group.locations or ()) if len(node) > 1)[:2]
    num_calls = max(_LEAST_CALLS, int(share_s / (2 * len(ways) * _WORK_S)))
    curves: dict[str, list[Point]] = {way: [] for way in ways}
    for size in sizes if group.rank in (first, second) else ():
        send, receive = np.zeros(size // 4, np.float32), np.empty(size // 4, np.float32)
        rounds = [[_exchange(operations, first + second - group.rank, send, receive) for operations in ways.values()]
                  for _ in range(num_calls)]  # fmt: skip
        for way, seconds in zip(ways, zip(*rounds, strict=True), strict=True):
            curves[way].append(Point(size, max(_LEAST_S, statistics.median(seconds) / 2 - _WORK_S)))
    if group.rank != first:
        told = json.loads(group.receive_bytes(first, _TAG))
        return {way: [Point(*each) for each in points] for way, points in told.items()}
    others = [rank for rank in range(group.size) if rank != first]
    group.wait_all([group.send_bytes(json.dumps(curves).encode(), rank, _TAG) for rank in others])
    return curves


def measure_sums(
    group: Collectives, channel: NodeChannel | None, budget_s: float, sizes: Sequence[int]
) -> dict[str, list[Point]]:
    """Measure all forms of the all-reduce.

    Collective over the group.
    """
    spans = [subtrees(run) for run in grain_runs(_GRAINS, group.size)]
    reduces = {name: AllReduce(group, spans, FORMS[name], channel) for name in forms_for(group.locations)}

    def works_of(size: int) -> dict[str, Work]:
        nodes = [np.zeros(size // 4, np.float32) for _ in spans[group.rank]]
        out = np.empty(size // 4, np.float32)
        return {name: partial(reduce, nodes, out) for name, reduce in reduces.items()}

    return curves_of(group, works_of, time_in_turn, budget_s, sizes)


def _always(group: Collectives, way: str) -> Selector:
    """What takes one way for everything."""
    only = {name: {each: [Point(1, 1.0 if each == way else 2.0)] for each in (NODE, MESSAGES)} for name in OPERATIONS}
    return Selector(table={shape_of(group.locations, group.size): only})


def _work_of(name: str, operations: Operations, num_bytes: int) -> Work:
    """One call of an operation on so many bytes: of all ranks together where there are parts, of a message."""
    size, rank = operations.size, operations.rank
    count = max(1, num_bytes // 4 // size)
    send, receive = np.zeros(size * count, np.float32), np.empty(size * count, np.float32)
    if name == "broadcast":
        return lambda: operations.broadcast(send)
    if name == "all_to_all":
        return lambda: operations.all_to_all(send, receive, [[count] * size] * size)
    if name == "reduce_scatter":
        program = tree_program([subtrees(run) for run in grain_runs(_GRAINS, size)])
        nodes = [send] * len(program.nodes_by_rank[rank])
        bounds = range(0, size * count + 1, count)
        return lambda: operations.reduce_scatter(program, nodes, receive[:count], bounds)
    gather = operations.all_gather if name == "all_gather" else operations.gather
    return lambda: gather(send[:count], receive, [count] * size)


def _exchange(operations: Operations, peer: int, send: np.ndarray, receive: np.ndarray) -> float:
    """Seconds of a message there and one back: who sends has worked before, who receives has waited long."""
    start = time.perf_counter()
    if operations.rank > peer:
        operations.receive(receive, peer, _TAG)
    end = time.perf_counter() + _WORK_S
    while time.perf_counter() < end:
        pass
    operations.send(send, peer, _TAG).wait()
    if operations.rank < peer:
        operations.receive(receive, peer, _TAG)
    return time.perf_counter() - start


def _slower(known: Curves, found: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, list[Point]]:
    """The slower of two measurements of each size; sizes that only one of them has are left out."""
    points = {name: {int(size): seconds for size, seconds in curve} for name, curve in found.items()}
    if not known:
        return {name: [Point(*item) for item in curve.items()] for name, curve in points.items()}
    return {name: [Point(each.num_bytes, max(each.seconds, points[name][each.num_bytes])) for each in curve
                   if each.num_bytes in points[name]]
            for name, curve in known.items()}  # fmt: skip
