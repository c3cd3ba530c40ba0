"""How the survivors of a group agree on who goes on, when any of them may die meanwhile.

The lowest living member coordinates: it collects an offer from every living one (what they know, as bytes), decides,
and tells each its view: the new members, their epoch, and a plan. When the coordinator dies the next one begins anew
with whoever lives; a member that has taken up a view already comes with that view. Spare ranks wait for an invitation:
each INVITE is followed by one WELCOME of the same host, whether it needs the guest in the end or not.
The failure detector of the MPI is trusted: who is called dead never comes back.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from hpcinfer.errors import RankFailedError

if TYPE_CHECKING:
    from hpcinfer.comm.mpi import MpiGroup

_TAG_JOIN, _TAG_VIEW, _TAG_GONE, _TAG_INVITE, _TAG_ACCEPT, _TAG_WELCOME = 31, 32, 36, 33, 34, 35
_ACCEPT_S = 0.2  # a spare rank that has not answered by then is not needed
_CALL_S = 0.05  # members that have not come by then are invited: they may have become spare ranks
_numbers = itertools.count(1)  # of invitations of this process

Offers = dict[int, bytes]  # by rank of the world


class View(NamedTuple):
    """What a coordinator has decided."""

    epoch: int
    members: tuple[int, ...]  # ranks of the world, in the order of the new group
    plan: bytes = b""

    def to_bytes(self) -> bytes:
        """Encode."""
        return json.dumps([self.epoch, self.members]).encode() + b"\n" + self.plan

    @staticmethod
    def from_bytes(data: bytes) -> View:
        """Decode what `to_bytes` made."""
        head, _, plan = data.partition(b"\n")
        epoch, members = json.loads(head)
        return View(epoch, tuple(members), plan)


class Decision(NamedTuple):
    """Who goes on, and how; survivors that are left out become spare ranks."""

    members: tuple[int, ...]
    plan: bytes


class Guests:
    """Spare ranks that were invited; all of them wait for `welcome`."""

    def __init__(self, line: MpiGroup) -> None:
        self._line = line
        self._invited: dict[int, int] = {}  # number of the invitation, by rank
        self.epochs: dict[int, int] = {}  # last epoch of each that has accepted, by rank

    def invite(self, candidates: Sequence[int], wanted: int) -> list[int]:
        """Ask one after another until `wanted` have accepted; returns those. Not collective."""
        accepted: list[int] = []
        for rank in candidates:
            if len(accepted) < wanted and rank not in self._line.failed():
                self.call(rank)
                deadline, pause = time.monotonic() + _ACCEPT_S, self._line.pause()
                while rank not in self.epochs and time.monotonic() < deadline and rank not in self._line.failed():
                    self.poll()
                    pause()
                accepted += [rank] if rank in self.epochs else []
        return accepted

    def call(self, rank: int) -> None:
        """Invite a rank, without waiting for its answer. Not collective."""
        if rank not in self._invited:
            self._invited[rank] = next(_numbers)
            self._line.send_bytes(str(self._invited[rank]).encode(), rank, _TAG_INVITE)

    def poll(self) -> None:
        """Take an answer, if there is one. Not collective."""
        message = self._line.probe_bytes(_TAG_ACCEPT)
        if message is not None:
            number, epoch = map(int, message[1].split())
            if self._invited.get(message[0]) == number:
                self.epochs[message[0]] = epoch

    def welcome(self, view: View) -> None:
        """Tell all that were invited what was decided. Not collective."""
        for rank in self._invited:
            self._line.send_bytes(view.to_bytes(), rank, _TAG_WELCOME)


Decide = Callable[[Offers, Guests], Decision]


def regroup(line: MpiGroup, old: View, offer: bytes, decide: Decide) -> View:
    """Find the next view of a group whose members have died.

    Collective over the members of `old` that live.

    Args:
        line: all ranks of the world.
        old: the view that this rank was in.
        offer: what it knows.
        decide: called on the coordinator, with the offers of all survivors in the order of the group.

    Returns:
        The new view, the same on every survivor. One that is not among its members is a spare rank from now on.
    """
    while True:
        living = [rank for rank in old.members if rank not in line.failed()]
        if living[0] == line.rank:
            return _Coordinator(line, old, offer).run(decide)
        view = _follow(line, old, offer, living[0])
        if view is not None:
            return view


def found(
    line: MpiGroup, candidates: Sequence[int], wanted: int, decide: Callable[[Sequence[int]], Decision],
    *, host: View | None = None,
) -> View | None:  # fmt: skip
    """Make a group of spare ranks; None if nobody has accepted. Not collective.

    Args:
        line: all ranks of the world.
        candidates: spare ranks.
        wanted: members at most.
        decide: chooses among those that have accepted.
        host: the last view of this rank, if it is a spare rank that becomes the first member itself.
    """
    guests = Guests(line)
    members = ([] if host is None else [line.rank]) + guests.invite(candidates, wanted - (host is not None))
    decision = decide(members) if members else Decision((), b"")
    epoch = 1 + max([*guests.epochs.values(), 0 if host is None else host.epoch])
    view = View(epoch, decision.members, decision.plan)
    guests.welcome(view)
    return view if view.members else None


def answer_invitation(line: MpiGroup, last: View) -> View | None:
    """Accept an invitation, if there is one, and wait for what comes of it. On a spare rank. Not collective.

    Args:
        line: all ranks of the world.
        last: the view that has left this rank out.

    Returns:
        The view that this rank is a member of; None if nobody needs it now.
    """
    _answer_latecomer(line, last)
    message = line.probe_bytes(_TAG_INVITE)
    if message is None:
        return None
    host, number = message[0], message[1].decode()
    line.send_bytes(f"{number} {last.epoch}".encode(), host, _TAG_ACCEPT)
    data = _wait_for(line, host, _TAG_WELCOME)
    view = None if data is None else View.from_bytes(data)
    return view if view is not None and line.rank in view.members and view.epoch > last.epoch else None


def _answer_latecomer(line: MpiGroup, last: View) -> None:
    """Tell one that takes this rank for its coordinator that it is a spare rank too: others have died at the telling.

    It waits for a view that is newer than its own.
    """
    message = line.probe_bytes(_TAG_JOIN)
    if message is not None:
        epoch = View.from_bytes(message[1]).epoch
        view = last if last.epoch > epoch else View(epoch + 1, ())
        line.send_bytes(view.to_bytes(), message[0], _TAG_VIEW)


@dataclass
class _Coordinator:
    """Collects the survivors: views with offers as their plans, by rank."""

    line: MpiGroup
    old: View
    offer: bytes
    joined: dict[int, View] = field(default_factory=dict)

    def run(self, decide: Decide) -> View:
        guests = Guests(self.line)
        self.joined[self.line.rank] = self.old._replace(plan=self.offer)
        self._collect(guests)
        living = sorted(self.joined.keys() - self.line.failed(), key=self._place)
        decision = decide({rank: self.joined[rank].plan for rank in living}, guests)
        epoch = 1 + max([view.epoch for view in self.joined.values()] + list(guests.epochs.values()))
        view = View(epoch, decision.members, decision.plan)
        self._dismiss([rank for rank in living if rank not in (*view.members, *guests.epochs)], view)
        for rank in living:
            if rank in view.members and rank != self.line.rank:
                self.line.send_bytes(view.to_bytes(), rank, _TAG_VIEW)
        guests.welcome(view)
        return view

    def _dismiss(self, ranks: list[int], view: View) -> None:
        """Tell those that are left out, and wait until they know it: nobody who goes on could tell them later."""
        for rank in ranks:
            self.line.send_bytes(view.to_bytes(), rank, _TAG_VIEW)
        for rank in ranks:
            while (data := _wait_for(self.line, rank, _TAG_GONE)) is not None and int(data) != view.epoch:
                continue  # what it said to an earlier coordinator

    def _collect(self, guests: Guests) -> None:
        """Wait until every rank that may know something has come, or is dead."""
        pause, deadline = self.line.pause(), time.monotonic() + _CALL_S
        while missing := self._missing():
            message = self.line.probe_bytes(_TAG_JOIN)
            if message is not None:
                self.joined[message[0]] = View.from_bytes(message[1])
                continue
            if time.monotonic() > deadline:
                for rank in sorted(missing):
                    guests.call(rank)
                guests.poll()
                for rank in missing & guests.epochs.keys():
                    self.joined[rank] = View(guests.epochs[rank], (rank,))
            pause()

    def _missing(self) -> set[int]:
        known = {rank for view in self.joined.values() for rank in view.members}
        return known - self.joined.keys() - self.line.failed()

    def _place(self, rank: int) -> tuple[int, int]:
        """Survivors as they stood in the old view, then those that had joined later."""
        members = self.old.members
        return (members.index(rank), 0) if rank in members else (len(members), rank)


def _follow(line: MpiGroup, old: View, offer: bytes, coordinator: int) -> View | None:
    """Bring the offer, and wait for a newer view; None when the coordinator has died."""
    line.send_bytes(old._replace(plan=offer).to_bytes(), coordinator, _TAG_JOIN)
    while (data := _wait_for(line, coordinator, _TAG_VIEW)) is not None:
        view = View.from_bytes(data)
        if view.epoch > old.epoch:
            if line.rank not in view.members:
                line.send_bytes(str(view.epoch).encode(), coordinator, _TAG_GONE)
            return view
    return None


def _wait_for(line: MpiGroup, rank: int, tag: int) -> bytes | None:
    """Wait for a message of a rank; None if it dies."""
    pause = line.pause()
    while True:
        try:
            data = line.probe_bytes_of(rank, tag)
        except RankFailedError:
            if rank not in line.failed():
                raise
            return None
        if data is not None:
            return data
        pause()
