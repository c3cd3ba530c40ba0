"""The forms of the tree all-reduce: who sends what to whom. All do the same additions, so all give the same bits.

    one_shot        everybody sends all to all, and adds all
    two_shot        everybody adds a slice, and sends it to all
    leader          one rank of each node adds and exchanges all with its like, then tells its node
    node_one_shot   the ranks of a node add a slice each and exchange it with their like, one shot; then gather
    node_two_shot   the same, two shots between the nodes
    switch_*        the same over nodes, switches, and all

A tree node is sent as it lies in memory, and sums are added in the order of the tree, so a form changes no bit.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from hpcinfer.comm.node.channel import NodeChannel
from hpcinfer.comm.node.library import evaluate
from hpcinfer.comm.protocol import Buffer, Collectives, Pending
from hpcinfer.partition.grains import Span
from hpcinfer.partition.lanes import Level, cut, levels_of
from hpcinfer.partition.topology import Location, by_node, by_switch, numbered

_TAG_NODES, _TAG_SUM = 1, 2
_PIECE = 15 * 1024  # floats of a message: what Open MPI and MPICH send over TCP without asking first (64 KiB)
Locations = tuple[Location, ...] | None
Arrays = Sequence[np.ndarray]


class Form(NamedTuple):
    """How an all-reduce goes."""

    levels: tuple[str, ...]  # below that of all ranks: node, switch
    is_two_shot: bool  # between the units of the last level
    has_lanes: bool = True


FORMS = {
    "one_shot": Form((), is_two_shot=False),
    "two_shot": Form((), is_two_shot=True),
    "leader": Form(("node",), is_two_shot=False, has_lanes=False),
    "node_one_shot": Form(("node",), is_two_shot=False),
    "node_two_shot": Form(("node",), is_two_shot=True),
    "switch_one_shot": Form(("node", "switch"), is_two_shot=False),
    "switch_two_shot": Form(("node", "switch"), is_two_shot=True),
}


def forms_for(locations: Locations) -> tuple[str, ...]:
    """Name the forms that differ from one another on such a group."""
    if locations is None:
        return ("one_shot", "two_shot")
    num_nodes, num_switches = len(by_node(locations)), len(by_switch(locations))
    has_nodes = 1 < num_nodes < len(locations)
    has_switches = has_nodes and 1 < num_switches < num_nodes
    levels = {"node": has_nodes, "switch": has_switches}
    return tuple(name for name, form in FORMS.items() if all(levels[level] for level in form.levels))


def units_of(locations: Locations, size: int, form: Form) -> list[list[int]]:
    """Number the units of the ranks, level by level."""
    assert locations is not None or not form.levels, f"{form = } of a group whose locations are unknown"
    units = [numbered([each.node if level == "node" else each.switches for each in locations or ()])
             for level in form.levels]  # fmt: skip
    return [*units, [0] * size]


class AllReduce:
    """One form of the all-reduce over a group.

    Args:
        group: all ranks that take part.
        spans: nodes of the tree that each rank holds whole.
        form: how.
        channel: shared memory of the ranks of this node, in the order of the group; without one they send messages.
    """

    def __init__(
        self, group: Collectives, spans: Sequence[Sequence[Span]], form: Form, channel: NodeChannel | None = None
    ) -> None:
        self._group, self._form, self._channel = group, form, channel if form.levels else None
        units = units_of(group.locations, group.size, form)
        self._num_levels = len(units)
        self._levels = levels_of(group.rank, units, spans, has_lanes=form.has_lanes)
        self._scratch: dict[tuple[int, str], np.ndarray] = {}
        self.in_node: Callable[..., None] | None = None  # all of it, where all ranks share a node
        if channel is not None and channel.size == group.size:
            shots = "two_shot" if form.is_two_shot else "one_shot"
            self.in_node = partial(channel.all_reduce, self._levels[0].program, form=shots)

    def __call__(self, nodes: Sequence[Buffer], out: Buffer) -> None:
        """Sum over the group. Collective over it.

        Args:
            nodes: contiguous float32 arrays, a value for each of this rank's spans.
            out: as large as each of them.

        Raises:
            RankFailedError: a rank has died.
        """
        if self.in_node is not None:
            return self.in_node(nodes, out)
        flat = [np.asarray(node).reshape(-1) for node in nodes]
        if self._channel is not None:
            return self._run_from_node(self._channel, flat, np.asarray(out).reshape(-1))
        self._run(0, flat, range(len(flat[0])), np.asarray(out).reshape(-1))

    def _run_from_node(self, channel: NodeChannel, nodes: Arrays, out: np.ndarray) -> None:
        """Do the first level through shared memory."""
        level, slices = self._levels[0], cut(range(len(out)), self._levels[0].width)
        bounds = [0, *(each.stop for each in slices), *[len(out)] * (len(level.peers) - level.width)]
        mine = range(bounds[level.place], bounds[level.place + 1])
        sums = self._scratch_of(0, "sums", len(level.program.outputs), len(mine))
        channel.reduce_slices(level.program, nodes, sums, bounds)
        if level.is_adder:
            self._run(1, sums, mine, out)
        channel.gather_slices(out[mine.start : mine.stop], out, bounds)

    def _run(self, depth: int, nodes: Arrays, columns: range, out: np.ndarray) -> None:
        """Sum some columns among the peers of a level, and write them into `out` on all of them."""
        level, is_last = self._levels[depth], depth == self._num_levels - 1
        if is_last and not self._form.is_two_shot:
            evaluate(level.program, self._share(depth, nodes), [out[columns.start : columns.stop]])
            return
        slices = cut(columns, level.width)
        values = self._deal(depth, nodes, columns, slices)
        if level.is_adder:
            mine = slices[level.place]
            if is_last:
                evaluate(level.program, values, [out[mine.start : mine.stop]])
            else:
                sums = self._scratch_of(depth, "sums", len(level.program.outputs), len(mine))
                evaluate(level.program, values, sums)
                self._run(depth + 1, sums, mine, out)
        self._gather(level, slices, out)

    def _share(self, depth: int, nodes: Arrays) -> list[Arrays]:
        """Give all peers all nodes; returns those of each."""
        level = self._levels[depth]
        incoming = self._room(depth, len(nodes[0]))
        incoming[level.place] = nodes
        self._exchange(level, [nodes] * len(level.peers), incoming, _TAG_NODES)
        return incoming

    def _deal(self, depth: int, nodes: Arrays, columns: range, slices: list[range]) -> list[Arrays]:
        """Give each peer the slice of all nodes that it adds; returns what each brought for that of this rank."""
        level = self._levels[depth]
        offsets = [slice(each.start - columns.start, each.stop - columns.start) for each in slices]
        outgoing = [[node[offset] for node in nodes] for offset in offsets]
        incoming = self._room(depth, len(slices[level.place])) if level.is_adder else []
        if level.is_adder:
            incoming[level.place] = outgoing[level.place]
        self._exchange(level, outgoing, incoming, _TAG_NODES)
        return incoming

    def _gather(self, level: Level, slices: list[range], out: np.ndarray) -> None:
        """Give all peers all slices of the sum."""
        parts = [[out[each.start : each.stop]] for each in slices]
        outgoing = [parts[level.place]] * len(level.peers) if level.is_adder else []
        self._exchange(level, outgoing, parts, _TAG_SUM)

    def _exchange(self, level: Level, outgoing: Sequence[Arrays], incoming: Sequence[Arrays], tag: int) -> None:
        """Send and receive arrays by place; who has none given there, or empty ones, takes no part."""
        places = [(level.place + step) % len(level.peers) for step in range(1, len(level.peers))]
        pending: list[Pending] = []
        for place in places:
            pieces = _pieces(incoming[place]) if place < len(incoming) else ()
            pending += [self._group.start_receive(each, level.peers[place], tag) for each in pieces]
        for place in places:
            pieces = _pieces(outgoing[place]) if place < len(outgoing) else ()
            pending += [self._group.send(each, level.peers[place], tag) for each in pieces]
        self._group.wait_all(pending)

    def _room(self, depth: int, length: int) -> list[Arrays]:
        """Room for what each peer brings."""
        level = self._levels[depth]
        rows = iter(self._scratch_of(depth, "room", len(level.program.inputs), length))
        return [[next(rows) for _ in nodes] for nodes in level.program.nodes_by_rank]

    def _scratch_of(self, depth: int, use: str, count: int, length: int) -> Arrays:
        """Some rows of memory that later calls use again."""
        known = self._scratch.get((depth, use))
        if known is None or len(known) < count * length:
            known = self._scratch[depth, use] = np.empty(count * length, np.float32)
        return list(known[: count * length].reshape(count, length))


def _pieces(arrays: Arrays) -> list[np.ndarray]:
    """Cut arrays into messages."""
    return [each[start : start + _PIECE] for each in arrays for start in range(0, len(each), _PIECE)]
