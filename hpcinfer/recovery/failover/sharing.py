"""Weights between this rank and its sisters: it gives while it serves, and takes while it refills."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcinfer.model.refill import HeldWeights, Holder, Refill
from hpcinfer.recovery.failover.giving import Giver
from hpcinfer.recovery.failover.sister import Sisters, sisters_of

if TYPE_CHECKING:
    from hpcinfer.comm.mpi import MpiGroup
    from hpcinfer.recovery.serve import Serving


class Sharing:
    """Both sides of it, on one rank. Not collective; nothing happens where ranks may not die."""

    def __init__(self, serving: Serving, line: MpiGroup | None) -> None:
        self._serving, self._line = serving, line
        self._giver: Giver | None = None
        self._sisters: Sisters | None = None

    def source(self, replica: int, held: HeldWeights | None) -> Refill:
        """Where a rank that joins a replica takes its weights, which it may hold in part. See `--refill`."""
        holders: list[Holder] = [] if held is None else [held]
        wanted = self._serving.refill
        if self._line is not None and wanted != "store":
            ranks = sisters_of(self._serving.layout, replica, self._line.failed() | {self._line.rank})
            self._sisters = Sisters(self._line, self._serving.store, ranks, is_forced=wanted == "sister")
            if wanted == "sister":
                self._sisters.wait()
            holders += self._sisters.all
        return Refill(self._serving.store, holders)

    def begin(self, weights: HeldWeights) -> None:
        """Give these to who asks, from now on."""
        if self._line is not None:
            self._giver = Giver(self._line, weights)

    def end(self) -> None:
        """Give no more, and let go of the weights."""
        self._giver = None

    def turn(self, *, is_idle: bool = False) -> None:
        """Do what there is to do between two steps; more if there are none now."""
        if self._giver is not None:
            self._giver.turn(is_idle=is_idle)
        if self._sisters is not None:
            self._sisters.clear_up()
