"""Dealing: one claimant per MPI job takes blocks from the job directory and deals them to the replicas' leaders.

The claimant is the leader of replica 0. Its file accesses happen in a thread, ahead of need; its messages between
the steps of its own replica. A leader asks for its next block before it runs out of rows, and is answered when there
is one, or when the whole job is complete.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from queue import Empty, Full, Queue
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpcinfer.comm.outbox import Outbox
from hpcinfer.recovery.claims import Claim, Claimer

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

_TAG_WANT, _TAG_DEAL = 21, 22
_DEAL = struct.Struct("<?qi")  # end, block, generation; then rows as int64
_POLL_S = 0.2  # between two looks at the job directory when nothing can be claimed


class Deal(NamedTuple):
    """A block to work on, or the end of the job."""

    is_end: bool
    block: int = -1
    generation: int = 0
    rows: tuple[int, ...] = ()

    def to_bytes(self) -> bytes:
        """Encode."""
        return _DEAL.pack(self.is_end, self.block, self.generation) + np.asarray(self.rows, np.int64).tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> Deal:
        """Decode what `to_bytes` made."""
        is_end, block, generation = _DEAL.unpack_from(data)
        return Deal(is_end, block, generation, tuple(np.frombuffer(data, np.int64, -1, _DEAL.size).tolist()))


class ClaimAhead:
    """Claims blocks in a thread, `ahead` of them in advance."""

    def __init__(self, claimer: Claimer, ahead: int) -> None:
        self._claimer = claimer
        self._claims: Queue[Claim] = Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self.is_complete = False
        self.num_done = claimer.num_done  # rows of the whole job known to be finished
        self._thread = threading.Thread(target=self._run, name="claims", daemon=True)
        self._thread.start()

    def take(self) -> Claim | None:
        """Next claim, or None if there is none now. Not collective."""
        if self._error is not None:
            raise self._error
        try:
            return self._claims.get_nowait()
        except Empty:
            return None

    def close(self) -> None:
        """Stop the thread. Not collective."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set() and not self.is_complete:
                claim = self._claimer.claim()
                is_complete = claim is None and self._claimer.is_complete()
                self.num_done = self._claimer.num_done
                self.is_complete = is_complete
                if claim is None:
                    self._stop.wait(_POLL_S)
                else:
                    self._put(claim)
        except BaseException as error:  # raised again where the claims are taken
            self._error = error

    def _put(self, claim: Claim) -> None:
        while not self._stop.is_set():
            try:
                return self._claims.put(claim, timeout=_POLL_S)
            except Full:
                continue


class Dealer:
    """Answers the leaders. On the claimant only."""

    def __init__(self, world: Collectives, claims: ClaimAhead, num_leaders: int) -> None:
        self._world, self.claims, self._num_left = world, claims, num_leaders
        self._wanting: deque[int] = deque()
        self._sent = Outbox()

    def serve(self) -> None:
        """Answer those who wait, as far as there are blocks. Not collective."""
        while (message := self._world.probe_bytes(_TAG_WANT)) is not None:
            self._wanting.append(message[0])
        while self._wanting and (deal := self._next()) is not None:
            self._sent.keep(self._world.send_bytes(deal.to_bytes(), self._wanting.popleft(), _TAG_DEAL))
            self._num_left -= deal.is_end

    def close(self) -> None:
        """Serve until every leader knows that the job is complete. Not collective."""
        while self._num_left > 0:
            self.serve()
            time.sleep(0.01)
        self._sent.flush()
        self.claims.close()

    def _next(self) -> Deal | None:
        claim = self.claims.take()
        if claim is not None:
            return Deal(False, claim.block, claim.generation, tuple(claim.rows.tolist()))
        return Deal(True) if self.claims.is_complete else None


class DealClient:
    """Asks the claimant for blocks, one at a time and ahead of need. On every leader."""

    def __init__(self, world: Collectives, claimant: int = 0) -> None:
        self._world, self._claimant = world, claimant
        self._sent = Outbox()
        self._has_asked = False
        self.is_ended = False

    def ask(self) -> None:
        """Ask for a block unless one is on its way. Not collective."""
        if not self._has_asked and not self.is_ended:
            self._sent.keep(self._world.send_bytes(b"", self._claimant, _TAG_WANT))
            self._has_asked = True

    def poll(self) -> Deal | None:
        """Take the answer if it is there. Not collective."""
        message = self._world.probe_bytes(_TAG_DEAL)
        if message is None:
            return None
        self._has_asked = False
        deal = Deal.from_bytes(message[1])
        self.is_ended = deal.is_end
        return None if deal.is_end else deal
