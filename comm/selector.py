"""Which form of the all-reduce a size takes, and which operations go through the memory of nodes.

What was measured decides, and where nothing was, an estimate.

Every rank chooses by itself, from the same table and the same locations, with additions, multiplications and divisions
alone, so that all choose alike, whatever their processors are.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from hpcinfer.comm.device.group import NCCL
from hpcinfer.comm.forms import FORMS, Form, Locations, forms_for, units_of
from hpcinfer.partition.grains import Span
from hpcinfer.partition.lanes import Level, levels_of
from hpcinfer.partition.topology import by_node, by_switch

AUTO, ALWAYS, NEVER = "auto", "always", "never"
ALL_REDUCE = "all_reduce"
NODE, MESSAGES = "node", "mpi"  # ways of all other operations (hpcinfer.comm.operations)
OF_GPUS = " of GPUs"  # behind the shape of a group
LIBRARY = f"{NCCL}:library"  # a sum by NCCL itself, in no order that would be the same for other meshes
_MOST_BY_NODE = {  # bytes that go through memory where nothing was measured
    "all_gather": 1 << 22, "gather": 0, "broadcast": 1 << 40, "reduce_scatter": 1 << 40, "all_to_all": 1 << 22,
    "send": 1 << 16,
}
_LONG_S, _HARDLY_MORE = 0.0005, 1.25  # of a sum worth hiding; what its halves may take together, of the whole
_LEAST_ROWS = 32  # of a half
_CLEARLY = 1.1  # ways that differ by less are alike: their difference is that of two measurements of the same
OPERATIONS = tuple(_MOST_BY_NODE)


class Links(NamedTuple):
    """Estimates of a message between nodes and of one inside a node."""

    far_s: float  # latency
    far_more_s: float  # what each further one costs
    far_bytes_per_s: float
    near_s: float
    near_more_s: float
    near_bytes_per_s: float


# Ethernet of 10 Gbit/s through TCP: on faster networks all forms are, and their order is nearly the same.
_HOSTS = Links(20e-6, 5e-6, 1.0e9, 2e-6, 1e-6, 4.0e9)
_GPUS = Links(25e-6, 2e-6, 25e9, 10e-6, 0.5e-6, 200e9)  # a network card for each GPU, NVLink


class Point(NamedTuple):
    """One measurement."""

    num_bytes: int  # of the sum
    seconds: float


Curves = Mapping[str, Sequence[Point]]  # by form, or way, sizes ascending
Measured = Mapping[str, Curves]  # by operation


@dataclass(frozen=True)
class Selector:
    """Chooses forms and ways; the same on all ranks of a job."""

    wanted: str = AUTO  # a form that all sums take, where a group can have it
    table: Mapping[str, Measured] = field(default_factory=dict)  # by shape of the group
    overlap: str = AUTO  # always, never, or where it pays: sums of one half of a batch behind the other's products

    def chooser(self, locations: Locations, spans: Sequence[Sequence[Span]]) -> Callable[[int], str]:
        """Make what names the form for a number of bytes, for a group and the nodes of the tree that its ranks hold.

        Not collective.
        """
        return functools.cache(partial(_fastest, self._curves_of_sums(locations, spans)))

    def gpu_chooser(
        self, locations: Locations, spans: Sequence[Sequence[Span]], transports: Sequence[str], *, is_exact: bool = True
    ) -> Callable[[int], str]:
        """Make what names transport and form for a number of bytes, as nccl:two_shot, for a group of GPUs.

        Not collective. Where not all transports were measured, it is the first one.

        Args:
            locations: of the ranks.
            spans: nodes of the tree that each rank holds.
            transports: of the group, NCCL first.
            is_exact: whether sums must be in the order of the tree.
        """
        forms = self._names(locations)
        names = [f"{transport}:{form}" for transport in transports for form in forms]
        has_library = not is_exact and NCCL in transports and self.wanted == AUTO
        names += [LIBRARY] * has_library
        curves = self._measured(ALL_REDUCE, locations, len(spans), names, OF_GPUS)
        if {name.partition(":")[0] for name in curves} != set(transports):
            curves = {f"{transports[0]}:{form}": estimate(FORMS[form], locations, spans, _GPUS) for form in forms}
            curves = {LIBRARY: [Point(1, 0.0)]} if has_library else curves
        return functools.cache(partial(_fastest, curves))

    def judge(self, locations: Locations, size: int) -> Callable[[int, int], bool]:
        """Make what says whether a sum is to travel in halves, each behind the other's products, for a group.

        What it makes takes the bytes of the whole, and the rows of the smaller half. It pays where a sum is long and
        its halves take hardly longer, as over slow links between nodes, and where a half has many rows: few rows take
        nearly as long as all, since all weights are read for them. Where nothing was measured, sums stay whole.

        Not collective.
        """
        curves: Curves = {}
        if self.overlap == AUTO and locations is not None and len(by_node(locations)) > 1:
            curves = self._measured(ALL_REDUCE, locations, size, self._names(locations))

        def is_worth_it(num_bytes: int, least_rows: int) -> bool:
            if not curves:
                return self.overlap == ALWAYS
            whole, half = (min(interpolate(points, each) for points in curves.values())
                           for each in (num_bytes, num_bytes // 2))  # fmt: skip
            return least_rows >= _LEAST_ROWS and whole >= _LONG_S and 2 * half <= _HARDLY_MORE * whole

        return is_worth_it

    def _curves_of_sums(self, locations: Locations, spans: Sequence[Sequence[Span]]) -> Curves:
        """What is known of the forms that may be chosen on such a group: measured, else estimated."""
        names = self._names(locations)
        measured = self._measured(ALL_REDUCE, locations, len(spans), names)
        return measured or {name: estimate(FORMS[name], locations, spans) for name in names}

    def _names(self, locations: Locations) -> tuple[str, ...]:
        """Forms that may be chosen."""
        names = forms_for(locations)
        return names if self.wanted == AUTO else (nearest(self.wanted, names),)

    def way_chooser(self, locations: Locations, size: int) -> Callable[[str, int], str]:
        """Make what names the way, NODE or MESSAGES, for an operation and a number of bytes, for a group of that size.

        Not collective.
        """
        measured = {name: self._measured(name, locations, size, (NODE, MESSAGES)) for name in OPERATIONS}

        @functools.cache
        def choose(operation: str, num_bytes: int) -> str:
            seconds = sorted(interpolate(points, num_bytes) for points in measured[operation].values())
            if len(seconds) == 2 and seconds[1] > _CLEARLY * seconds[0]:
                return _fastest(measured[operation], num_bytes)
            return NODE if num_bytes <= _MOST_BY_NODE[operation] else MESSAGES

        return choose

    def _measured(
        self, operation: str, locations: Locations, size: int, names: Sequence[str], kind: str = ""
    ) -> Curves:
        """What was measured of some forms or ways on groups of this shape and kind."""
        curves = self.table.get(shape_of(locations, size) + kind, {}).get(operation, {})
        return {name: points for name, points in curves.items() if name in names and points}


def _fastest(curves: Curves, num_bytes: int) -> str:
    return min(curves, key=lambda name: interpolate(curves[name], num_bytes))


def shape_of(locations: Locations, size: int) -> str:
    """Say how many ranks each node has, as 2+2|2+2 with two switches; "8 anywhere" if it is not known."""
    if locations is None:
        return f"{size} anywhere"
    nodes, switches = by_node(locations), by_switch(locations)
    return "|".join("+".join(str(len(node)) for node in nodes if node[0] in below) for below in switches)


def nearest(wanted: str, names: Sequence[str]) -> str:
    """The form among these that is most like the wanted one: with fewer levels where a group has not as many."""
    form = FORMS[wanted]
    alike = [name for name in names if FORMS[name].levels == form.levels[: len(FORMS[name].levels)]
             and FORMS[name].is_two_shot == form.is_two_shot]  # fmt: skip
    return wanted if wanted in alike else max(alike, key=lambda name: len(FORMS[name].levels))


def interpolate(points: Sequence[Point], num_bytes: int) -> float:
    """Seconds of a size: on the line between its neighbours; as the smallest below it, in proportion above the last."""
    below = points[0]
    if num_bytes <= below.num_bytes:
        return below.seconds
    for point in points:
        if num_bytes <= point.num_bytes:
            part = (num_bytes - below.num_bytes) / (point.num_bytes - below.num_bytes)
            return below.seconds + part * (point.seconds - below.seconds)
        below = point
    return below.seconds * (num_bytes / below.num_bytes)


def estimate(
    form: Form, locations: Locations, spans: Sequence[Sequence[Span]], links: Links = _HOSTS
) -> list[Point]:
    """Estimate seconds from the bytes that leave each node and the messages of each rank, level by level."""
    size = len(spans)
    node_of = list(range(size)) if locations is None else [each.node for each in locations]
    plans = [levels_of(rank, units_of(locations, size, form), spans, has_lanes=form.has_lanes) for rank in range(size)]
    fixed, per_byte, share = 0.0, 0.0, 1.0
    for depth in range(max(map(len, plans))):
        levels = {rank: plan[depth] for rank, plan in enumerate(plans) if len(plan) > depth}
        is_last = depth == max(map(len, plans)) - 1
        is_whole = is_last and not form.is_two_shot
        width = 1 if is_whole else next(iter(levels.values())).width
        for is_sum in (False,) if is_whole else (False, True):
            messages = {rank: _peers(level, everybody=is_whole or is_sum, is_sum=is_sum)
                        for rank, level in levels.items()}  # fmt: skip
            step = _step(messages, levels, node_of, links, is_sum=is_sum)
            fixed, per_byte = fixed + step.fixed_s, per_byte + step.s_per_byte * share / width
        share /= width
    return [Point(1, fixed + per_byte), Point(1 << 30, fixed + per_byte * (1 << 30))]


class _Step(NamedTuple):
    """What one exchange costs."""

    fixed_s: float
    s_per_byte: float  # of the share that one adder has


def _peers(level: Level, *, everybody: bool, is_sum: bool) -> list[int]:
    """Whom a rank sends to."""
    if is_sum and not level.is_adder:
        return []
    to = level.peers if everybody else level.peers[: level.width]
    return [peer for peer in to if peer != level.peers[level.place]]


def _step(
    messages: Mapping[int, Sequence[int]], levels: Mapping[int, Level], node_of: Sequence[int], links: Links, *,
    is_sum: bool,
) -> _Step:  # fmt: skip
    """Cost of one exchange: the rank with most messages, the node with most bytes."""
    fixed, far_bytes, near_bytes = 0.0, dict.fromkeys(node_of, 0), dict.fromkeys(node_of, 0)
    for rank, peers in messages.items():
        level = levels[rank]
        arrays = 1 if is_sum else len(level.program.nodes_by_rank[level.place])
        far = sum(node_of[peer] != node_of[rank] for peer in peers)
        near = len(peers) - far
        cost = links.far_s + links.far_more_s * far * arrays if far else 0.0
        cost += links.near_s if near and not far else 0.0
        fixed = max(fixed, cost + links.near_more_s * near * arrays)
        far_bytes[node_of[rank]] += far * arrays
        near_bytes[node_of[rank]] += near * arrays
    slowest = max(far_bytes.values()) / links.far_bytes_per_s + max(near_bytes.values()) / links.near_bytes_per_s
    return _Step(fixed, slowest)
