"""Weights that pass between replicas, on the side of the sister: a rank that serves gives slices between its steps.

    rank that refills ── WHO ───> sister      who are you?
                      <── HERE ──             its shard, and the bytes per second that it can spare
                      ── WANT ──>             units of a weight
                      <── SLICE ...           its outputs, at most 1 MiB at a time
                      ── END ───>             nothing more, please
                      <── ENDED ─             so be it

At most a tenth of a sister's time goes to others, in pieces of 10 ms; more while it has nothing to do.
"""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hpcinfer.kernels.protocol import Weight
from hpcinfer.model.refill import HeldWeights, Rate
from hpcinfer.model.shard import ShardPlan
from hpcinfer.partition.grains import padded_grain

if TYPE_CHECKING:
    from hpcinfer.comm.mpi import MpiGroup
    from hpcinfer.comm.protocol import Pending

TAG_ASK, TAG_GIVE = 41, 42
WHO, WANT, END = "who", "want", "end"
HERE, SLICE, REFUSED, ENDED = "here", "slice", "refused", "ended"

_SLICE_BYTES = 1 << 20  # unless a single output is more
_SHARE = 0.1  # of a serving rank's time
_MOST_S = 0.01  # at once
_IDLE_S = 0.002  # at once while there is nothing to do: it comes again soon
_IN_FLIGHT = 2  # slices to one rank


class Note(NamedTuple):
    """A message: what it is about, as JSON values, and perhaps values and scales."""

    kind: str
    number: int  # of the request, unique on the rank that refills
    facts: dict[str, Any]
    weight: Weight | None = None

    def to_bytes(self) -> bytes:
        """Encode."""
        arrays = [] if self.weight is None else [self.weight.values, self.weight.scales]
        present = [each for each in arrays if each is not None]
        shapes = [(each.dtype.str, each.shape) for each in present]
        dtype = "" if self.weight is None else self.weight.dtype
        head = json.dumps([self.kind, self.number, self.facts, dtype, shapes]).encode()
        return b"".join([head, b"\n", *(np.ascontiguousarray(each).data for each in present)])

    @staticmethod
    def from_bytes(data: bytes) -> Note:
        """Decode what `to_bytes` made; its arrays are views."""
        start = data.index(b"\n") + 1
        kind, number, facts, dtype, shapes = json.loads(data[:start])
        arrays: list[np.ndarray] = []
        for stored, shape in shapes:
            arrays.append(np.frombuffer(data, stored, int(np.prod(shape)), start).reshape(shape))
            start += arrays[-1].nbytes
        weight = Weight(arrays[0], dtype, arrays[1] if len(arrays) > 1 else None) if arrays else None
        return Note(kind, number, facts, weight)


@dataclass
class _Order:
    """What a rank wants, as far as it has not been given."""

    rank: int
    number: int
    name: str
    outs: int  # of a unit
    rows: int  # outputs in a slice
    left: deque[tuple[int, int]] = field(default_factory=deque)  # unit and first output of each slice
    sent: deque[Pending] = field(default_factory=deque)


class Giver:
    """Answers ranks of other replicas that refill. On every rank that serves; it holds nobody's weights but its own."""

    def __init__(self, line: MpiGroup, weights: HeldWeights) -> None:
        self._line, self._weights = line, weights
        self._orders: deque[_Order] = deque()
        self._sent: deque[Pending] = deque()  # answers that are no slices
        self._last, self._credit = time.monotonic(), 0.0

    def turn(self, *, is_idle: bool = False) -> None:
        """Do what there is to do between two steps. Not collective.

        Args:
            is_idle: whether this rank has nothing to compute.
        """
        now = time.monotonic()
        self._credit = min(self._credit + _SHARE * (now - self._last), _MOST_S)
        self._last = now
        while (message := self._line.probe_bytes(TAG_ASK)) is not None:
            self._hear(message[0], Note.from_bytes(message[1]))
        if self._orders and (is_idle or self._credit > 0):
            start = time.monotonic()
            self._give(start + (_IDLE_S if is_idle else self._credit))
            self._credit -= time.monotonic() - start

    def _hear(self, rank: int, note: Note) -> None:
        if note.kind == WHO:
            self._answer(rank, Note(HERE, note.number, self._facts()))
        elif note.kind == END:
            self._orders = deque(order for order in self._orders if order.rank != rank)
            self._answer(rank, Note(ENDED, note.number, {}))
        else:
            self._orders.append(self._order(rank, note))

    def _order(self, rank: int, note: Note) -> _Order:
        facts = note.facts
        order = _Order(rank, note.number, facts["name"], facts["outs"], facts["rows"])
        firsts = range(0, order.outs, order.rows)
        order.left.extend((unit, first) for unit in range(*facts["units"]) for first in firsts)
        return order

    def _facts(self) -> dict[str, Any]:
        """What this rank holds, and what it can spare: by the time that one slice takes."""
        plan = self._weights.plan
        facts = {"layers": _pair(plan.layers), "run": _pair(plan.run), "num_grains": plan.num_grains,
                 "is_first": plan.is_first, "is_last": plan.is_last}  # fmt: skip
        config, start = self._weights.config, time.monotonic()
        outs = min(padded_grain(config.intermediate_size, plan.num_grains), rows_of_slice(config.hidden_size))
        name, unit = f"layers.{plan.layers.start}.gate_proj.weight", range(plan.run.start, plan.run.start + 1)
        sample = self._weights.fetch(name, unit, range(outs))
        num_bytes = 0 if sample is None else len(Note(SLICE, 0, {}, sample).to_bytes())
        return {**facts, "bytes_per_s": _SHARE * Rate(num_bytes, time.monotonic() - start).per_s(0.0)}

    def _give(self, deadline: float) -> None:
        """Send slices until all have left, or the time is over; one at least."""
        pause, is_over = self._line.pause(), False
        while self._orders and not is_over:
            order = self._orders[0]
            while order.sent and order.sent[0].test():
                order.sent.popleft()
            if not order.left or order.rank in self._line.failed():
                self._orders.popleft()
                self._sent.extend(order.sent)
            elif len(order.sent) < _IN_FLIGHT:
                self._send_slice(order)
            else:
                pause()
            is_over = time.monotonic() > deadline

    def _send_slice(self, order: _Order) -> None:
        unit, first = order.left.popleft()
        units, outs = range(unit, unit + 1), range(first, min(first + order.rows, order.outs))
        held = self._weights.held(order.name)
        weight = self._weights.fetch(order.name, units, outs) if unit in held else None
        if weight is None:
            order.left.clear()
            self._answer(order.rank, Note(REFUSED, order.number, {}))
            return
        data = Note(SLICE, order.number, {"unit": unit, "first": first}, weight).to_bytes()
        order.sent.append(self._line.send_bytes(data, order.rank, TAG_GIVE))

    def _answer(self, rank: int, note: Note) -> None:
        while self._sent and self._sent[0].test():
            self._sent.popleft()
        self._sent.append(self._line.send_bytes(note.to_bytes(), rank, TAG_GIVE))


def rows_of_slice(width: int) -> int:
    """Outputs of so many inputs that are a slice."""
    return max(1, _SLICE_BYTES // (4 * width))


def plan_of(facts: dict[str, Any]) -> ShardPlan:
    """What a sister says that it holds."""
    layers, run = range(*facts["layers"]), range(*facts["run"])
    return ShardPlan(layers, run, facts["num_grains"], facts["is_first"], facts["is_last"])


def _pair(numbers: range) -> tuple[int, int]:
    return numbers.start, numbers.stop
