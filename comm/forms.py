"""The forms of the tree all-reduce: who sends what to whom. All do the same additions, so all give the same bits.

    one_shot        everybody sends all to all, and adds all
    two_shot        everybody adds a slice, and sends it to all
    leader          one rank of each node adds and exchanges all with its like, then tells its node
    node_one_shot   the ranks of a node add a slice each and exchange it with their like, one shot; then gather
    node_two_shot   the same, two shots between the nodes
    switch_*        the same over nodes, switches, and all

A tree node is sent as it lies in memory, and sums are added in the order of the tree, so a form changes no bit.
Messages and sums of a length are prepared once: a layer sums what the layer before it did.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from hpcinfer.comm.device.arrays import DeviceArrays
from hpcinfer.comm.host_arrays import HostArrays
from hpcinfer.comm.node.channel import NodeChannel
from hpcinfer.comm.protocol import Buffer, Collectives, Exchange
from hpcinfer.partition.grains import Span
from hpcinfer.partition.lanes import Level, cut, levels_of
from hpcinfer.partition.topology import Location, by_node, by_switch, numbered

_TAG_NODES, _TAG_SUM = 1, 2
_MOST_PLANS = 16  # sums whose messages stay prepared: some lengths, in two sets of memory
Locations = tuple[Location, ...] | None
Array = Any  # of the host, or of a GPU
Arrays = Sequence[Array]
Step = Callable[[], None]


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
        arrays: of a GPU, which all arrays are of then; the group moves them.
    """

    def __init__(
        self, group: Collectives, spans: Sequence[Sequence[Span]], form: Form, channel: NodeChannel | None = None,
        arrays: DeviceArrays | None = None,
    ) -> None:  # fmt: skip
        self._group, self._form, self._channel = group, form, channel if form.levels else None
        self._arrays: DeviceArrays | HostArrays = arrays or HostArrays()
        units = units_of(group.locations, group.size, form)
        self._num_levels = len(units)
        self._levels = levels_of(group.rank, units, spans, has_lanes=form.has_lanes)
        self._memory: dict[tuple[int, int, str], Array] = {}
        self._plans: OrderedDict[tuple[int, int], _Plan] = OrderedDict()
        self._recorded: dict[tuple[int, int], _Plan] = {}  # graphs hold their addresses
        self._under_way: dict[int, _Plan] = {}  # by the set of memory that each of at most two takes
        self._in_node: Callable[..., None] | None = None  # all of it, where all ranks share a node
        if channel is not None and channel.size == group.size:
            shots = "two_shot" if form.is_two_shot else "one_shot"
            self._in_node = partial(channel.all_reduce, self._levels[0].program, form=shots)

    def __call__(self, nodes: Sequence[Buffer], out: Buffer) -> None:
        """Sum over the group. Collective over it. See `start`."""
        if (end := self.start(nodes, out)) is not None:
            end()

    def start(self, nodes: Sequence[Buffer], out: Buffer) -> Step | None:
        """Begin a sum; what is returned ends it, None if it is whole.

        Collective over the group, as the end is; all in the same order. One other sum may begin before the end.

        Args:
            nodes: contiguous float32 arrays, a value for each of this rank's spans; unless they stand in a room of the
                channel, they may be overwritten when this returns.
            out: as large as each of them.

        Raises:
            RankFailedError: a rank has died.
        """
        if self._in_node is not None:
            return self._in_node(nodes, out)
        whole, memory = self._arrays.flat(out), int(0 in self._under_way)
        assert memory not in self._under_way, "two sums are under way"
        plan = self._under_way[memory] = self._plan_for(len(whole), memory)
        if self._channel is None:
            for own, node in zip(plan.nodes, nodes, strict=True):
                self._arrays.copy(self._arrays.flat(node), own)
        else:
            self._channel.reduce_slices(self._levels[0].program, nodes, plan.nodes, plan.bounds)
        if plan.rounds:
            plan.rounds[0].exchange.start()
        return partial(self._end, plan, whole, memory)

    def room(self, length: int) -> Array:
        """Memory where the nodes of the next sum of that length need no copy, one after another. Without a channel.

        Not collective. It is good until that sum begins; a first room of the longest sum makes the memory of all.
        """
        memory = int(0 in self._under_way)
        plan = self._plan_for(length, memory)
        return self._memory[memory, 0, "nodes"][: len(plan.nodes) * length]

    def result(self, length: int) -> Array:
        """Memory where the next sum of that length needs no copy. Without a channel. Not collective.

        It is good until a sum begins after that one has ended.
        """
        return self._plan_for(length, int(0 in self._under_way)).total

    def close(self) -> None:
        """Let go of sums that are under way: a rank has died. Not collective."""
        for plan in self._under_way.values():
            for exchange, _ in plan.rounds:
                exchange.cancel()

    def _end(self, plan: _Plan, whole: Array, memory: int) -> None:
        for i, (exchange, add) in enumerate(plan.rounds):
            if i > 0:
                exchange.start()
            exchange.finish()
            add()
        del self._under_way[memory]
        if self._channel is None:
            self._arrays.copy(plan.total, whole)
        else:
            self._channel.gather_slices(plan.total, whole, plan.bounds)

    def _plan_for(self, length: int, memory: int) -> _Plan:
        plan = self._plans.pop((memory, length), None) or self._recorded.get((memory, length))
        if plan is None:
            plan = self._make_plan(length, memory)
            while len(self._plans) >= _MOST_PLANS:
                self._plans.popitem(last=False)
        self._plans[memory, length] = plan
        if self._arrays.is_recording():
            self._recorded[memory, length] = plan
        return plan

    def _make_plan(self, length: int, memory: int) -> _Plan:
        level, rows = self._levels[0], partial(self._rows, memory)
        if self._channel is None:
            nodes = rows(0, "nodes", len(level.program.nodes_by_rank[level.place]), length)
            [total] = rows(0, "total", 1, length)
            return _Plan(nodes, total, self._rounds(0, nodes, total, rows), ())
        slices = cut(range(length), level.width)
        bounds = [0, *(each.stop for each in slices), *[length] * (len(level.peers) - level.width)]
        mine = bounds[level.place + 1] - bounds[level.place]
        sums = rows(0, "sums", len(level.program.outputs), mine)
        [total] = rows(0, "total", 1, mine)
        return _Plan(sums, total, self._rounds(1, sums, total, rows) if level.is_adder else [], bounds)

    def _rounds(self, depth: int, nodes: Arrays, out: Array, rows: Callable[..., Arrays]) -> list[_Round]:
        """What a rank does at a level and below it: add up what the peers bring, and tell all of them."""
        level, is_last = self._levels[depth], depth == self._num_levels - 1
        if is_last and not self._form.is_two_shot:
            incoming = _room(level, rows(depth, "room", len(level.program.inputs), len(out)))
            incoming[level.place] = nodes
            share = self._exchange(level, [nodes] * len(level.peers), incoming, _TAG_NODES)
            return [_Round(share, self._arrays.evaluation(level.program, incoming, [out]))]
        slices = [slice(each.start, each.stop) for each in cut(range(len(out)), level.width)]
        outgoing = [[node[each] for node in nodes] for each in slices]
        parts = [[out[each]] for each in slices]
        if not level.is_adder:
            return [_Round(self._exchange(level, outgoing, [], _TAG_NODES)),
                    _Round(self._exchange(level, [], parts, _TAG_SUM))]  # fmt: skip
        [mine] = parts[level.place]
        incoming = _room(level, rows(depth, "room", len(level.program.inputs), len(mine)))
        incoming[level.place] = outgoing[level.place]
        sums = [mine] if is_last else rows(depth, "sums", len(level.program.outputs), len(mine))
        deal = self._exchange(level, outgoing, incoming, _TAG_NODES)
        gather = self._exchange(level, [parts[level.place]] * len(level.peers), parts, _TAG_SUM)
        below = [] if is_last else self._rounds(depth + 1, sums, mine, rows)
        return [_Round(deal, self._arrays.evaluation(level.program, incoming, sums)), *below, _Round(gather)]

    def _exchange(self, level: Level, outgoing: Sequence[Arrays], incoming: Sequence[Arrays], tag: int) -> Exchange:
        """Send and receive arrays by place; who has none given there, or empty ones, takes no part."""
        piece = self._arrays.piece if isinstance(self._arrays, HostArrays) else 0
        return self._group.prepare_exchange(_messages(level, outgoing, piece), _messages(level, incoming, piece), tag)

    def _rows(self, memory: int, depth: int, use: str, count: int, length: int) -> Arrays:
        """Some rows of a set of memory; all plans of that set use them."""
        known = self._memory.get((memory, depth, use))
        if known is None or len(known) < count * length:
            room = max(count * length, 0 if known is None else 2 * len(known))  # no new one for each row more
            known = self._memory[memory, depth, use] = self._arrays.empty(room)
            for key in [key for key in self._plans if key[0] == memory]:
                del self._plans[key]  # they go on with what was there before
        return [known[i * length : (i + 1) * length] for i in range(count)]


class _Plan(NamedTuple):
    """A sum of some length."""

    nodes: Arrays  # memory for what this rank brings: its nodes, or what its node has made of its slice
    total: Array  # memory for the sum, or this rank's slice of it
    rounds: list[_Round]  # from the one to the other
    bounds: Sequence[int]  # of the slices inside a node


def _nothing() -> None:
    pass


class _Round(NamedTuple):
    """Messages, and what is added up then."""

    exchange: Exchange
    add: Step = _nothing


def _room(level: Level, rows: Arrays) -> list[Arrays]:
    """Room for what each peer brings."""
    each = iter(rows)
    return [[next(each) for _ in nodes] for nodes in level.program.nodes_by_rank]


def _messages(level: Level, arrays: Sequence[Arrays], piece: int) -> list[tuple[Array, int]]:
    """Pieces of the arrays of each place and the rank there, this rank's successor first; whole arrays if 0."""
    places = [(level.place + step) % len(level.peers) for step in range(1, len(level.peers))]
    return [(each[start : start + (piece or len(each))], level.peers[place]) for place in places if place < len(arrays)
            for each in arrays[place] for start in range(0, len(each), piece or len(each) or 1)]  # fmt: skip
