"""Weights that pass between replicas, on the side of the rank that refills (see `hpcinfer.recovery.failover.giving`).

A sister that does not answer in time, dies or says no costs nothing but that time: the store has everything.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpcinfer.comm.outbox import Outbox
from hpcinfer.kernels.protocol import Weight
from hpcinfer.model.refill import Rate, held_units
from hpcinfer.model.shard import ShardPlan
from hpcinfer.partition.layout import Layout
from hpcinfer.recovery.failover.giving import (
    END,
    ENDED,
    HERE,
    TAG_ASK,
    TAG_GIVE,
    WANT,
    WHO,
    Note,
    plan_of,
    rows_of_slice,
)
from hpcinfer.weights.reader import Store

if TYPE_CHECKING:
    from hpcinfer.comm.mpi import MpiGroup

log = logging.getLogger(__name__)

_PATIENCE_S = 0.5  # with a sister that the store can stand in for
_LONG_PATIENCE_S = 2.0  # where the user wants no store
_NUM_REPLICAS = 2  # that are asked; the next ones, so that not all ask the same

_numbers = itertools.count(1)  # of requests of this process


class _Taken(NamedTuple):
    """A weight on its way: slices are put in their places."""

    units: range
    weight: Weight

    @staticmethod
    def like(part: Weight, units: range, outs: int) -> _Taken:
        """Room for units of that many outputs, of which a slice has come."""
        values, scales = (
            None if each is None else np.empty((len(units), outs, *each.shape[2:]), each.dtype)
            for each in (part.values, part.scales)
        )
        assert values is not None
        return _Taken(units, Weight(values, part.dtype, scales))

    def put(self, note: Note) -> int:
        """Put a slice in its place; returns its outputs."""
        assert note.weight is not None
        unit, first, count = note.facts["unit"] - self.units.start, note.facts["first"], note.weight.values.shape[1]
        self.weight.values[unit, first : first + count] = note.weight.values[0]
        if self.weight.scales is not None and note.weight.scales is not None:
            self.weight.scales[unit, first : first + count] = note.weight.scales[0]
        return count


class Sister:
    """A rank of another replica, as a holder of weights."""

    source = "sister"

    def __init__(self, sisters: Sisters, rank: int) -> None:
        self._sisters, self.rank = sisters, rank
        self.plan: ShardPlan | None = None  # since it has answered
        self.said = 0.0  # bytes per second that it can spare
        self.is_silent = False  # it has not answered in time
        self._rate = Rate()

    @property
    def bytes_per_s(self) -> float:
        """What it has given; what it says that it can spare, before that."""
        if self.plan is None or self.is_silent:
            return 0.0
        return inf if self._sisters.is_forced else self._rate.per_s(self.said)

    def held(self, name: str) -> range:
        """Units of a weight that it holds; none until it has answered."""
        while self._sisters.listen() is not None:
            continue
        return range(0) if self.plan is None else held_units(self._sisters.store.config, self.plan, name)

    def fetch(self, name: str, units: range) -> Weight | None:
        """Ask for units, and wait until they are there; None if it is silent, dies or refuses."""
        start = time.monotonic()
        weight = self._sisters.take(self, name, units)
        if weight is not None:
            self._rate.add(weight.values.nbytes, time.monotonic() - start)
        return weight


class Sisters:
    """All sisters of a rank that refills. Not collective; a sister's death raises nothing here."""

    def __init__(self, line: MpiGroup, store: Store, ranks: Sequence[int], *, is_forced: bool) -> None:
        """Ask who they are.

        Args:
            line: all ranks of the world.
            store: of the same weights.
            ranks: of other replicas.
            is_forced: whether they are to be taken for faster than the store.
        """
        self._line, self.store, self.is_forced = line, store, is_forced
        self._patience_s = _LONG_PATIENCE_S if is_forced else _PATIENCE_S
        self._sent = Outbox()
        self._owing: set[int] = set()  # ranks that may still send what is not wanted any more
        self._by_rank = {rank: Sister(self, rank) for rank in ranks}
        for rank in ranks:
            self._ask(rank, Note(WHO, next(_numbers), {}))

    @property
    def all(self) -> list[Sister]:
        """The sisters, as holders."""
        return list(self._by_rank.values())

    def wait(self) -> None:
        """Wait until all have said who they are, but not for long."""
        deadline, pause = time.monotonic() + self._patience_s, self._line.pause()
        while time.monotonic() < deadline and any(
            each.plan is None and each.rank not in self._line.failed() for each in self.all
        ):
            if self.listen() is None:
                pause()

    def clear_up(self) -> None:
        """Take what comes too late, so that the sister's messages leave; to be called now and then."""
        if self._owing:
            self.listen()

    def listen(self) -> Note | None:
        """Take one message, if there is one; learn from it who holds what."""
        message = self._line.probe_bytes(TAG_GIVE)
        if message is None:
            return None
        rank, note = message[0], Note.from_bytes(message[1])
        if note.kind == HERE and rank in self._by_rank:
            sister = self._by_rank[rank]
            sister.plan, sister.said = plan_of(note.facts), note.facts["bytes_per_s"]
        elif note.kind == ENDED:
            self._owing.discard(rank)
        return note

    def take(self, sister: Sister, name: str, units: range) -> Weight | None:
        """Get units of a weight, slice by slice; None if that fails."""
        outs, width = self.store.spec(name).shape[1:]
        number = next(_numbers)
        facts = {"name": name, "units": (units.start, units.stop), "outs": outs, "rows": rows_of_slice(width)}
        self._ask(sister.rank, Note(WANT, number, facts))
        taken: _Taken | None = None
        missing = len(units) * outs
        while missing:
            note = self._answer(sister, number)
            if note is None or note.weight is None:
                return None
            taken = taken or _Taken.like(note.weight, units, outs)
            missing -= taken.put(note)
        return None if taken is None else taken.weight

    def _answer(self, sister: Sister, number: int) -> Note | None:
        """Wait for the next answer to a request; None if none comes."""
        deadline, pause = time.monotonic() + self._patience_s, self._line.pause()
        while time.monotonic() < deadline and sister.rank not in self._line.failed():
            note = self.listen()
            if note is None:
                pause()
            elif note.number == number:
                return note
        log.info("rank %d gives no weights", sister.rank)
        sister.is_silent = True
        self._owing.add(sister.rank)
        self._ask(sister.rank, Note(END, next(_numbers), {}))
        return None

    def _ask(self, rank: int, note: Note) -> None:
        self._sent.keep(self._line.send_bytes(note.to_bytes(), rank, TAG_ASK))


def sisters_of(layout: Layout, replica: int, failed: frozenset[int]) -> list[int]:
    """Ranks to ask for weights of a replica: those that live of the next replicas, as they were at the start."""
    others = [layout.replicas[(replica + step) % len(layout.replicas)] for step in range(1, len(layout.replicas))]
    living = [[rank for rank in other.members if rank not in failed] for other in others]
    return [rank for members in list(filter(None, living))[:_NUM_REPLICAS] for rank in members]
