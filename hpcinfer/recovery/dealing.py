"""Dealing: one claimant per MPI job takes blocks from the job directory and deals them to the replicas' leaders.

Its file accesses happen in a thread, ahead of need (`claim_ahead`); its messages between the steps of its own replica.
A leader asks for the rows that it lacks before it runs out of them, and is answered when there are some, or when the
whole job is complete. What a leader that has died was dealt, and what its successor does not hold, is dealt again.
"""

from __future__ import annotations

import json
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpcinfer.comm.outbox import Outbox
from hpcinfer.recovery.claim_ahead import ClaimAhead

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

TAG_WANT, TAG_DEAL, TAG_ROSTER, TAG_PULSE = 21, 22, 23, 25
WANT = struct.Struct("<q")  # rows
STOP = -1  # wanted by a leader that stops, and with it the whole MPI job
STOPPED = -2  # said by a leader that has stopped
_ANSWER = struct.Struct("<??i")  # end, stop, deals
_DEAL = struct.Struct("<qii")  # block, generation, rows; then the rows


class Deal(NamedTuple):
    """A block to work on."""

    block: int
    generation: int
    rows: tuple[int, ...]


class Answer(NamedTuple):
    """Some blocks, or the end: of the job, or of this MPI job's part in it."""

    is_end: bool
    deals: tuple[Deal, ...] = ()
    is_stop: bool = False

    def to_bytes(self) -> bytes:
        """Encode."""
        parts = [_ANSWER.pack(self.is_end, self.is_stop, len(self.deals))]
        for deal in self.deals:
            parts += [_DEAL.pack(deal.block, deal.generation, len(deal.rows)), np.asarray(deal.rows, "<i8").tobytes()]
        return b"".join(parts)

    @staticmethod
    def from_bytes(data: bytes) -> Answer:
        """Decode what `to_bytes` made."""
        is_end, is_stop, num_deals = _ANSWER.unpack_from(data)
        deals, at = list[Deal](), _ANSWER.size
        for _ in range(num_deals):
            block, generation, num_rows = _DEAL.unpack_from(data, at)
            rows = np.frombuffer(data, "<i8", num_rows, at + _DEAL.size)
            deals.append(Deal(block, generation, tuple(rows.tolist())))
            at += _DEAL.size + rows.nbytes
        return Answer(is_end, tuple(deals), is_stop)


class Roster(NamedTuple):
    """Who a replica is, and what it works on: its leader tells the claimant when either is not what was known."""

    replica: int
    members: tuple[int, ...]  # ranks of the world; none if it was given up
    held: tuple[Deal, ...] | None = None  # rows that are not finished; None: what was dealt and is not finished

    @property
    def leader(self) -> int:
        """Its leader; -1 if the replica was given up."""
        return self.members[0] if self.members else -1

    def to_bytes(self) -> bytes:
        """Encode."""
        return json.dumps(self).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Roster:
        """Decode what `to_bytes` made."""
        replica, members, held = json.loads(data)
        deals = [Deal(block, generation, tuple(rows)) for block, generation, rows in held or ()]
        return Roster(replica, tuple(members), None if held is None else tuple(deals))


def _by_block(deals: Iterable[Deal]) -> dict[int, np.ndarray]:
    return _add({}, deals)


def _add(rows: dict[int, np.ndarray], deals: Iterable[Deal]) -> dict[int, np.ndarray]:
    """Add the rows of deals to those of their blocks."""
    for deal in deals:
        rows[deal.block] = np.append(rows.get(deal.block, np.zeros(0, np.int64)), np.array(deal.rows, np.int64))
    return rows


class Dealer:
    """Answers the leaders. On the claimant only."""

    def __init__(self, mail: Collectives, claims: ClaimAhead, rosters: list[Roster]) -> None:
        self._mail, self.claims = mail, claims
        self.rosters = {roster.replica: roster for roster in rosters}
        self._dealt = {roster.replica: _by_block(roster.held or ()) for roster in rosters}
        self._wanting: deque[tuple[int, int]] = deque()  # leader, rows
        self._told: set[int] = set()  # leaders that know of the end
        is_later = any(roster.held is not None for roster in rosters)  # another claimant has begun to deal
        self._first_round: list[int] | None = None if is_later else []  # leaders that had their share; None: all had
        self._is_small: bool | None = None  # whether the job is dealt as cards are; None until the first leader asks
        self._pool: list[Deal] = []  # blocks that are claimed and laid out
        self._is_stopping = False
        self._dead: frozenset[int] = frozenset()
        self._sent = Outbox()

    def serve(self) -> None:
        """Answer those who wait, as far as there are blocks. Not collective."""
        self._hear()
        self._bury()
        for _ in range(len(self._wanting)):
            leader, wanted = self._wanting.popleft()
            answer = self._answer(leader, wanted)
            if answer is None:
                self._wanting.append((leader, wanted))
            else:
                self._send(leader, answer)

    def close(self, is_idle: Callable[[int], bool]) -> None:
        """Serve until every leader knows of the end, or has stopped. Not collective.

        Args:
            is_idle: whether a rank of the world is a spare one.
        """
        while not all(self._is_done(rank) or is_idle(rank) for rank in range(self._mail.size)):
            self.serve()
            time.sleep(0.01)
        self._sent.flush()
        self.claims.close()

    def lost(self) -> list[Roster]:
        """Replicas none of whose ranks is left, each once; what they were dealt is dealt again. Not collective.

        Those that were given up are not among them: their ranks live and could not serve.
        """
        gone = [roster for roster in self.rosters.values() if self._dead.issuperset(roster.members)]
        for roster in gone:
            del self.rosters[roster.replica]
            self._deal_again(roster.replica, ())
        return [roster for roster in gone if roster.members]

    def _hear(self) -> None:
        while (message := self._mail.probe_bytes(TAG_ROSTER)) is not None:
            if message[0] in self._mail.failed():
                continue  # after a cut of the network both sides go on, each for itself
            roster = Roster.from_bytes(message[1])
            self.rosters[roster.replica] = roster
            if roster.held is not None:
                self._deal_again(roster.replica, roster.held)
        while (message := self._mail.probe_bytes(TAG_WANT)) is not None:
            leader, data = message
            [wanted] = WANT.unpack(data)
            if wanted in (STOP, STOPPED):
                self._stop()
            if wanted == STOPPED:
                self._told.add(leader)
            else:
                self._wanting.append((leader, wanted))

    def _bury(self) -> None:
        """Forget leaders that have died."""
        if self._mail.failed() != self._dead:
            self._dead = self._mail.failed()
            self._wanting = deque(want for want in self._wanting if want[0] not in self._dead)
            self._end_first_round()

    def _deal_again(self, replica: int, held: tuple[Deal, ...]) -> None:
        """Have the rows that a replica was dealt dealt again, but for those that it still holds.

        Not all of its blocks: others may work on the rest of one, since an earlier death.
        """
        self._end_first_round()
        kept, dealt = _by_block(held), self._dealt.get(replica, {})
        none = np.zeros(0, np.int64)
        self.claims.give_back({block: rows[~np.isin(rows, kept.get(block, none))] for block, rows in dealt.items()})
        self._dealt[replica] = kept

    def _end_first_round(self) -> None:
        self._first_round = None

    def _stop(self) -> None:
        """Have all leaders stop, asked or not."""
        if not self._is_stopping:
            self._is_stopping = True
            for roster in self.rosters.values():
                if roster.members:
                    self._send(roster.leader, Answer(True, is_stop=True))

    def _send(self, leader: int, answer: Answer) -> None:
        self._sent.keep(self._mail.send_bytes(answer.to_bytes(), leader, TAG_DEAL))
        if answer.is_end and not answer.is_stop:  # a leader that is to stop says when it has
            self._told.add(leader)

    def _is_done(self, rank: int) -> bool:
        """Whether nothing more is to be said to a rank: it is dead, or its leader knows of the end."""
        told = (roster.members for roster in self.rosters.values() if roster.leader in self._told)
        return rank in self._dead or any(rank in members for members in told)

    def _replica_of(self, leader: int) -> int | None:
        return next((r.replica for r in self.rosters.values() if r.leader == leader), None)

    def _answer(self, leader: int, wanted: int) -> Answer | None:
        """Blocks for about so many rows; None if there are none now, or if others come first."""
        if self._is_stopping:
            return Answer(True, is_stop=True)
        replica = self._replica_of(leader)
        if replica is None:  # its roster is on its way
            return None
        if self._first_round is None:
            num_left = len(self.rosters) - len(self._told)
            deals = self._deals(min(wanted, -(-self._num_undealt // max(1, num_left))))
        else:
            deals = [] if leader in self._first_round else self._first_deals(leader, wanted)
        if not deals:
            return Answer(True) if self.claims.is_complete else None
        _add(self._dealt.setdefault(replica, {}), deals)
        return Answer(False, tuple(deals))

    def _first_deals(self, leader: int, wanted: int) -> list[Deal]:
        """What a leader begins with; of a job that fits into all replicas at once an even part, as cards are dealt."""
        assert self._first_round is not None
        if self._is_small is None:
            self._is_small = self.claims.num_undealt <= wanted * len(self.rosters)
            if self._is_small:
                self.claims.claim_all()
        deals = self._cards() if self._is_small else self._deals(wanted)
        if deals:
            self._first_round.append(leader)
        if len(self._first_round) == len(self.rosters):
            self._end_first_round()
        return deals

    def _cards(self) -> list[Deal]:
        """Every n-th block for the next of n leaders, once all are claimed; long rows come first."""
        assert self._first_round is not None
        self._pool += self._claimed(self.claims.num_undealt)
        if self.claims.num_undealt > 0:
            return []
        step = len(self.rosters) - len(self._first_round)
        deals = self._pool[::step]
        del self._pool[::step]
        return deals

    @property
    def _num_undealt(self) -> int:
        return self.claims.num_undealt + sum(len(deal.rows) for deal in self._pool)

    def _deals(self, num_rows: int) -> list[Deal]:
        """Blocks of so many rows or a little more, as far as they are claimed; one at least."""
        deals = list[Deal]()
        while self._pool and (num_rows > 0 or not deals):
            deals.append(self._pool.pop(0))
            num_rows -= len(deals[-1].rows)
        return deals + self._claimed(num_rows) if num_rows > 0 or not deals else deals

    def _claimed(self, num_rows: int) -> list[Deal]:
        """The same of those that are not laid out."""
        deals = list[Deal]()
        while num_rows > 0 or not deals:
            claim = self.claims.take()
            if claim is None:
                break
            deals.append(Deal(claim.block, claim.generation, tuple(claim.rows.tolist())))
            num_rows -= len(claim.rows)
        return deals
