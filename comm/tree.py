"""The tree all-reduce: finish the fixed binary tree over the grains across the ranks of a tp axis.

Every rank does the same additions in the same order, whatever tp is and in whatever form the sums travel
(hpcinfer.comm.forms); which form a size takes, the selector says (hpcinfer.comm.selector).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from hpcinfer.comm.forms import FORMS, AllReduce
from hpcinfer.comm.node.opening import open_channel
from hpcinfer.comm.protocol import Collectives
from hpcinfer.comm.selector import Selector
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

    Making one is collective over the group.
    """

    def __init__(
        self, group: Collectives, grains: int, allocate: Callable[[tuple[int, ...]], Array],
        selector: Selector | None = None, room_bytes: int = 0,
    ) -> None:  # fmt: skip
        self.group, self._allocate = group, allocate
        self.runs = grain_runs(grains, group.size)
        self._spans_by_rank = [subtrees(run) for run in self.runs]
        selector = selector or Selector()
        self._choose = selector.chooser(group.locations, self._spans_by_rank)
        self._is_worth_halving = selector.judge(group.locations, group.size)
        self.channel = open_channel(group, room_bytes)  # between the ranks of this node
        self._forms: dict[str, AllReduce] = {}
        self._ways: dict[tuple[int, ...], _Way] = {}
        self._calls, self._num_bytes, self._seconds = 0, 0, 0.0

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

    def room(self, shape: tuple[int, ...]) -> Array:
        """Make a float32 array for a value that `reduce` will take: in shared memory where there is room, which saves
        it a copy. Not collective. It is good until the call after the next.
        """
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
        """Finish the tree. Collective over tp. See `start`."""
        return self.finish(self.start(nodes))

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
        way = self._ways.get(shape) or self._find_way(tuple(shape))
        out = self._allocate(way.shape)
        end = way.form.start(nodes, out)
        self._calls += 1
        self._num_bytes += way.num_bytes
        self._seconds += time.perf_counter() - start
        return Sum(out, end)

    def finish(self, total: Sum) -> Array:
        """Wait for the sum over all grains, the same on every rank. Collective over tp."""
        if total.end is not None:
            start = time.perf_counter()
            total.end()
            self._seconds += time.perf_counter() - start
        return total.out

    def _find_way(self, shape: tuple[int, ...]) -> _Way:
        num_bytes = 4 * math.prod(shape)
        name = self._choose(num_bytes)
        if name not in self._forms:
            self._forms[name] = AllReduce(self.group, self._spans_by_rank, FORMS[name], self.channel)
        self._ways[shape] = way = _Way(shape, num_bytes, self._forms[name])
        return way


class _Way(NamedTuple):
    """What arrays of a shape take."""

    shape: tuple[int, ...]
    num_bytes: int
    form: AllReduce
