"""Dealing: one claimant per MPI job takes blocks from the job directory and deals them to the replicas' leaders.

The claimant is the leader of replica 0. Its file accesses happen in a thread, ahead of need; its messages between
the steps of its own replica. A leader asks for the rows that it lacks before it runs out of them, and is answered when
there are some, or when the whole job is complete.
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
_WANT = struct.Struct("<q")  # rows
_ANSWER, _DEAL = struct.Struct("<?i"), struct.Struct("<qii")  # end, deals; block, generation, rows, then the rows
_POLL_S = 0.2  # between two looks at the job directory when nothing can be claimed
_BLOCKS_AHEAD = 4  # claimed in advance, per replica


class Deal(NamedTuple):
    """A block to work on."""

    block: int
    generation: int
    rows: tuple[int, ...]


class Answer(NamedTuple):
    """Some blocks, or the end of the job."""

    is_end: bool
    deals: tuple[Deal, ...] = ()

    def to_bytes(self) -> bytes:
        """Encode."""
        parts = [_ANSWER.pack(self.is_end, len(self.deals))]
        for deal in self.deals:
            parts += [_DEAL.pack(deal.block, deal.generation, len(deal.rows)), np.asarray(deal.rows, "<i8").tobytes()]
        return b"".join(parts)

    @staticmethod
    def from_bytes(data: bytes) -> Answer:
        """Decode what `to_bytes` made."""
        is_end, num_deals = _ANSWER.unpack_from(data)
        deals, at = list[Deal](), _ANSWER.size
        for _ in range(num_deals):
            block, generation, num_rows = _DEAL.unpack_from(data, at)
            rows = np.frombuffer(data, "<i8", num_rows, at + _DEAL.size)
            deals.append(Deal(block, generation, tuple(rows.tolist())))
            at += _DEAL.size + rows.nbytes
        return Answer(is_end, tuple(deals))


class ClaimAhead:
    """Claims blocks in a thread, some for each replica in advance."""

    def __init__(self, claimer: Claimer, num_replicas: int) -> None:
        self._claimer = claimer
        self._claims: Queue[Claim] = Queue(maxsize=_BLOCKS_AHEAD * num_replicas)
        self._num_unclaimed = claimer.num_unclaimed
        self._num_claimed = self._num_taken = 0  # rows; each is written by one thread
        self._stop, self._wake = threading.Event(), threading.Event()
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
            claim = self._claims.get_nowait()
        except Empty:
            return None
        self._num_taken += len(claim.rows)
        return claim

    @property
    def num_undealt(self) -> int:
        """Unfinished rows that nobody works on, as far as we know."""
        return self._num_unclaimed + self._num_claimed - self._num_taken

    def look(self) -> None:
        """Look at the job directory now, since somebody has nothing to do. Not collective."""
        self._wake.set()

    def close(self) -> None:
        """Stop the thread. Not collective."""
        self._stop.set()
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set() and not self.is_complete:
                claim = self._claimer.claim()
                self._num_claimed += 0 if claim is None else len(claim.rows)  # before the next line: never too few
                is_complete = claim is None and self._claimer.is_complete()
                self.num_done, self._num_unclaimed = self._claimer.num_done, self._claimer.num_unclaimed
                self.is_complete = is_complete
                if claim is None:
                    self._wake.wait(_POLL_S)
                    self._wake.clear()
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
        self._world, self.claims = world, claims
        self._num_leaders = self._num_left = num_leaders  # in all; that do not know of the end
        self._wanting: deque[tuple[int, int]] = deque()  # leader, rows
        self._first_round: list[int] | None = []  # leaders that had their first share; None once all have
        self._is_small: bool | None = None  # whether the job is dealt as cards are; None until the first leader asks
        self._pool: list[Deal] = []  # its blocks
        self._sent = Outbox()

    def serve(self) -> None:
        """Answer those who wait, as far as there are blocks. Not collective."""
        while (message := self._world.probe_bytes(_TAG_WANT)) is not None:
            leader, data = message
            self._wanting.append((leader, *_WANT.unpack(data)))
        for _ in range(len(self._wanting)):
            leader, wanted = self._wanting.popleft()
            answer = self._answer(leader, wanted)
            if answer is None:
                self._wanting.append((leader, wanted))
                continue
            self._sent.keep(self._world.send_bytes(answer.to_bytes(), leader, _TAG_DEAL))
            self._num_left -= answer.is_end

    def close(self) -> None:
        """Serve until every leader knows that the job is complete. Not collective."""
        while self._num_left > 0:
            self.serve()
            time.sleep(0.01)
        self._sent.flush()
        self.claims.close()

    def _answer(self, leader: int, wanted: int) -> Answer | None:
        """Blocks for about so many rows; None if there are none now, or if others come first."""
        if self._first_round is None:
            deals = self._deals(min(wanted, -(-self.claims.num_undealt // max(1, self._num_left))))
        else:
            deals = [] if leader in self._first_round else self._first_deals(leader, wanted)
        if not deals:
            return Answer(True) if self.claims.is_complete else None
        return Answer(False, tuple(deals))

    def _first_deals(self, leader: int, wanted: int) -> list[Deal]:
        """What a leader begins with; of a job that fits into all replicas at once an even part, as cards are dealt."""
        assert self._first_round is not None
        if self._is_small is None:
            self._is_small = self.claims.num_undealt <= wanted * self._num_leaders
        deals = self._cards() if self._is_small else self._deals(wanted)
        if deals:
            self._first_round.append(leader)
        if len(self._first_round) == self._num_leaders:
            self._first_round = None
        return deals

    def _cards(self) -> list[Deal]:
        """Every n-th block for the next of n leaders, once all are claimed; long rows come first."""
        assert self._first_round is not None
        self._pool += self._deals(self.claims.num_undealt)
        if self.claims.num_undealt > 0:
            return []
        step = self._num_leaders - len(self._first_round)
        deals = self._pool[::step]
        del self._pool[::step]
        return deals

    def _deals(self, num_rows: int) -> list[Deal]:
        """Blocks of so many rows or a little more, as far as they are claimed; one at least."""
        deals = list[Deal]()
        while num_rows > 0 or not deals:
            claim = self.claims.take()
            if claim is None:
                break
            deals.append(Deal(claim.block, claim.generation, tuple(claim.rows.tolist())))
            num_rows -= len(claim.rows)
        return deals


class DealClient:
    """Asks the claimant for blocks, ahead of need. On every leader."""

    def __init__(self, world: Collectives, claimant: int = 0) -> None:
        self._world, self._claimant = world, claimant
        self._sent = Outbox()
        self._has_asked = False
        self.is_ended = False

    def ask(self, num_rows: int) -> None:
        """Ask for about so many rows, unless an answer is on its way. Not collective."""
        if not self._has_asked and not self.is_ended:
            self._sent.keep(self._world.send_bytes(_WANT.pack(num_rows), self._claimant, _TAG_WANT))
            self._has_asked = True

    def poll(self) -> tuple[Deal, ...]:
        """Take the answer if it is there. Not collective."""
        message = self._world.probe_bytes(_TAG_DEAL)
        if message is None:
            return ()
        self._has_asked = False
        answer = Answer.from_bytes(message[1])
        self.is_ended = answer.is_end
        return answer.deals
