"""The tree all-reduce: finish the fixed binary tree over the grains across the ranks of a tp axis.

Every rank does the same additions in the same order, whatever tp is and in whatever form the sums travel
(hpcinfer.comm.forms); which form a size takes, the selector says (hpcinfer.comm.selector).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from hpcinfer.comm.device.arrays import DeviceArrays
from hpcinfer.comm.device.group import DeviceGroup
from hpcinfer.comm.device.library_sum import LibrarySum
from hpcinfer.comm.device.nccl_group import NcclGroup
from hpcinfer.comm.forms import FORMS, AllReduce
from hpcinfer.comm.node.opening import open_channel
from hpcinfer.comm.protocol import Collectives
from hpcinfer.comm.selector import LIBRARY, Selector
from hpcinfer.partition.grains import grain_runs, subtrees

Array = Any


class Traffic(NamedTuple):
    """What was reduced so far."""

    calls: int
    num_bytes: int  # of the sums
    seconds: float  # spent in them, waiting included


class Sum(NamedTuple):
    """A sum under way."""

    out: Array  # where it comes
    end: Callable[[], None] | None  # what makes it whole; None if it is


class TreeReducer:
    """Sums over grains, equal in every bit for every number of tp ranks.

    Args:
        group: the ranks of one tp axis.
        grains: leaves of the tree.
        allocate: makes a contiguous float32 array of a shape.
        selector: chooses the form of each sum; the same on all ranks.
        room_bytes: of shared memory that `room` may give, if ranks share a node.
        arrays: of a GPU, if the group is one of GPUs (see hpcinfer.comm.device.opening).
        most_elements: of a sum of GPUs: memory for it is taken now, and stays where it is, since graphs hold it.
        exact: whether bits must not depend on the number of ranks; else NCCL may add as it likes.

    Making one is collective over the group.
    """

    def __init__(
        self, group: Collectives, grains: int, allocate: Callable[[tuple[int, ...]], Array],
        selector: Selector | None = None, room_bytes: int = 0, *, arrays: DeviceArrays | None = None,
        most_elements: int = 0, exact: bool = True,
    ) -> None:  # fmt: skip
        self.group, self._allocate, self._arrays = group, allocate, arrays
        self.runs = grain_runs(grains, group.size)
        self._spans_by_rank = [subtrees(run) for run in self.runs]
        selector = selector or Selector()
        self._forms: dict[str, AllReduce | LibrarySum] = {}
        self._ways: dict[tuple[int, ...], _Way] = {}
        self._recorded_ways: dict[tuple[int, ...], _Way] = {}
        self._calls, self._num_bytes, self._seconds = 0, 0, 0.0
        self.channel = None if arrays is not None else open_channel(group, room_bytes)  # between the ranks of this node
        self._transports: Mapping[str, Collectives] = {"": group}
        if arrays is None:
            self._choose = self._choose_recorded = selector.chooser(group.locations, self._spans_by_rank)
            self._is_worth_halving = selector.judge(group.locations, group.size)
        else:
            groups = cast(DeviceGroup, group).transports
            recordable = [name for name, each in groups.items() if each.is_recordable]
            choosers = [selector.gpu_chooser(group.locations, self._spans_by_rank, names, is_exact=exact)
                        for names in (list(groups), recordable or list(groups))]  # fmt: skip
            self._transports, (self._choose, self._choose_recorded) = groups, choosers
            self._is_worth_halving = selector.judge(None, group.size)  # both halves would be on one stream
            self._reserve(most_elements)

    @property
    def run(self) -> range:
        """Grains of this rank."""
        return self.runs[self.group.rank]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Nodes that this rank holds whole, as half-open runs of its local grains."""
        first = self.run.start
        return [(span.start - first, span.stop - first) for span in self._spans_by_rank[self.group.rank]]

    @property
    def traffic(self) -> Traffic:
        """What was reduced so far. Not collective."""
        return Traffic(self._calls, self._num_bytes, self._seconds)

    @property
    def is_recordable(self) -> bool:
        """Whether a graph of a GPU may hold sums. Not collective; the same on all ranks."""
        return self.group.size == 1 or any(
            isinstance(each, DeviceGroup) and each.is_recordable for each in self._transports.values())  # fmt: skip

    def room(self, shape: tuple[int, ...]) -> Array:
        """Make a float32 array for a value that `reduce` will take: where it saves it a copy, in shared memory if there
        is room, or where sums of a GPU begin. Not collective. It is good until the call after the next.

        Args:
            shape: one array for each of `spans`, one after another.
        """
        if self._arrays is not None and self.group.size > 1:
            return self._way(shape[1:]).form.room(math.prod(shape[1:])).reshape(shape)
        found = None if self.channel is None else self.channel.room(shape)
        return self._allocate(shape) if found is None else found

    def form_for(self, num_bytes: int) -> str:
        """Name the form that a sum of this size takes. Not collective."""
        return self._choose(num_bytes)

    def is_worth_halving(self, num_bytes: int, least_rows: int) -> bool:
        """Whether a sum of this size is to travel in two halves, behind other work; the smaller one has so many rows.

        Not collective; the same on all ranks.
        """
        return self.group.size > 1 and self._is_worth_halving(num_bytes, least_rows)

    def close(self) -> None:
        """Let go of sums that are under way: a rank has died. Not collective."""
        for form in self._forms.values():
            form.close()

    def reduce(self, nodes: list[Array]) -> Array:
        """Finish the tree. Collective over tp. See `start`; the sum may be kept."""
        total = self.finish(self.start(nodes))
        if self._arrays is None or self.group.size == 1:
            return total
        kept = self._allocate(total.shape)
        self._arrays.copy(self._arrays.flat(total), self._arrays.flat(kept))
        return kept

    def start(self, nodes: list[Array]) -> Sum:
        """Begin to finish the tree.

        Collective over tp, as `finish` is; all in the same order. One other sum may begin before `finish`.

        Args:
            nodes: contiguous float32 arrays of one shape, a value for each of `spans`.

        Raises:
            RankFailedError: a rank has died.
        """
        if self.group.size == 1:
            return Sum(nodes[0], None)
        start, shape = time.perf_counter(), nodes[0].shape
        way = self._way(shape)
        out = self._allocate(way.shape) if self._arrays is None else way.form.result(way.length).reshape(way.shape)
        end = way.form.start(nodes, out)
        self._calls += 1
        self._num_bytes += 4 * way.length
        self._seconds += time.perf_counter() - start
        return Sum(out, end)

    def finish(self, total: Sum) -> Array:
        """Wait for the sum over all grains, the same on every rank. Collective over tp.

        One of GPUs is good until the next sum begins.
        """
        if total.end is not None:
            start = time.perf_counter()
            total.end()
            self._seconds += time.perf_counter() - start
        return total.out

    def _way(self, shape: tuple[int, ...]) -> _Way:
        is_recorded = self._arrays is not None and self._arrays.is_recording()
        ways = self._recorded_ways if is_recorded else self._ways
        way = ways.get(shape)
        if way is None:
            length = math.prod(shape)
            name = (self._choose_recorded if is_recorded else self._choose)(4 * length)
            ways[shape] = way = _Way(tuple(shape), length, self._form(name))
        return way

    def _form(self, name: str) -> AllReduce | LibrarySum:
        if name not in self._forms:
            transport, _, form = name.rpartition(":")
            group, arrays = self._transports[transport], self._arrays
            if name == LIBRARY and arrays is not None:
                self._forms[name] = LibrarySum(cast(NcclGroup, group), self._spans_by_rank[group.rank], arrays)
            else:
                self._forms[name] = AllReduce(group, self._spans_by_rank, FORMS[form], self.channel, arrays)
        return self._forms[name]

    def _reserve(self, most_elements: int) -> None:
        """Take the memory of each form, for the longest sum that takes it."""
        longest: dict[str, int] = {}
        for length in [1 << k for k in range(most_elements.bit_length())] if self.group.size > 1 else ():
            for choose in (self._choose, self._choose_recorded):
                longest[choose(4 * length)] = min(2 * length, most_elements)
        for name, length in longest.items():
            self._form(name).room(length)


class _Way(NamedTuple):
    """What arrays of a shape take."""

    shape: tuple[int, ...]
    length: int
    form: AllReduce | LibrarySum
