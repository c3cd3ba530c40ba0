"""The desk of a leader: where it gets its blocks. It asks the claimant, and becomes it when that has died."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hpcinfer.comm.outbox import Outbox
from hpcinfer.recovery.claim_ahead import ClaimAhead
from hpcinfer.recovery.dealing import (
    STOP,
    STOPPED,
    TAG_DEAL,
    TAG_PULSE,
    TAG_ROSTER,
    TAG_WANT,
    WANT,
    Answer,
    Deal,
    Dealer,
    Roster,
)
from hpcinfer.recovery.election import Election
from hpcinfer.recovery.job import Job
from hpcinfer.recovery.leases import Lease
from hpcinfer.recovery.punctual import PunctualClaimer
from hpcinfer.recovery.stopping import Stopper
from hpcinfer.report.health import Health, Pulse
from hpcinfer.report.progress import Progress
from hpcinfer.report.timeline import Timeline

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

log = logging.getLogger(__name__)

Held = Callable[[], tuple[Deal, ...]]


@dataclass(frozen=True)
class Office:
    """What leaders and claimants of an MPI job share."""

    mail: Collectives  # all ranks of the world; nobody else receives there with the tags of dealing
    job: Job
    election: Election
    lease_timeout_s: float
    rosters: tuple[Roster, ...]  # of all replicas, at the start
    is_tolerant: bool  # whether others go on when the claimant dies
    is_idle: Callable[[int], bool]  # whether a rank of the world is a spare one
    on_lost: Callable[[Roster], None]  # called on the claimant, with a replica none of whose ranks is left
    stopper: Stopper
    timeline: Timeline = field(default_factory=Timeline)  # of this rank's steps


class Desk:
    """Asks the claimant for blocks, ahead of need; claims and deals while it is the claimant. On every leader."""

    def __init__(self, office: Office, roster: Roster) -> None:
        """Begin to ask.

        Args:
            office: what all share.
            roster: this leader's replica.
        """
        self._office, self._mail, self._roster = office, office.mail, roster
        self._sent = Outbox()
        self._has_asked = False
        self.is_ended = self.is_stopped = False
        self._lease: Lease | None = None
        self._dealer: Dealer | None = None
        self._progress: Progress | None = None
        self._health: Health | None = None  # of all replicas, on the claimant
        self._next_pulse = 0.0
        self._heard: dict[int, Roster] | None = None  # while a new claimant learns who holds what

    def open(self) -> None:
        """Begin to claim and to deal, as the first claimant. Not collective."""
        self._lease = self._start_lease()
        if self._office.is_tolerant:
            self._office.election.begin(self._lease.name)
        self._open([], list(self._office.rosters))

    @property
    def is_claimant(self) -> bool:
        """Whether this leader claims and deals."""
        return self._dealer is not None or self._heard is not None

    @property
    def is_complete(self) -> bool:
        """Whether it is the claimant, and the whole job is complete."""
        return self._dealer is not None and self._dealer.claims.is_complete

    def turn(self, held: Held) -> tuple[Deal, ...]:
        """Do what there is to do between two steps: take deals that have come, deal to others. Not collective.

        Args:
            held: tells what this leader works on; all that is finished is durable when it returns.
        """
        while self._office.election.term.rank in self._mail.failed():
            self._replace_claimant(held)
        if self._heard is not None:
            self._take_over(self._heard)
        if self._dealer is not None and self._progress is not None:
            self._dealer.serve()
            for roster in self._dealer.lost():
                self._office.on_lost(roster)
            self._progress.update(self._dealer.claims.num_done, self._describe_health)
        self._beat()
        return self._poll()

    def ask(self, num_rows: int) -> None:
        """Ask for about so many rows, unless an answer is on its way. Not collective."""
        if not self._has_asked and not self.is_ended:
            self._send(WANT.pack(num_rows), TAG_WANT)
            self._has_asked = True

    def stop(self) -> None:
        """Have all leaders stop. Not collective."""
        if not self.is_stopped:
            self.is_stopped = self.is_ended = True
            self._send(WANT.pack(STOP), TAG_WANT)

    def is_stopping(self) -> bool:
        """Whether all leaders are to stop, for a reason of this rank or of another one. Not collective."""
        if self._office.stopper.reason() is not None:
            self.stop()
        return self.is_stopped

    def look(self) -> None:
        """Look at the job directory now, since there is nothing to do. Not collective."""
        if self._dealer is not None:
            self._dealer.claims.look()

    def report(self, roster: Roster) -> None:
        """Tell the claimant who this replica is now. Not collective."""
        self._roster, self._has_asked = roster, False
        self._send(roster.to_bytes(), TAG_ROSTER)

    def close(self) -> None:
        """Stay until every leader knows of the end, or has stopped. Not collective."""
        if self.is_stopped:
            self._send(WANT.pack(STOPPED), TAG_WANT)
        if self._dealer is not None and self._progress is not None:
            self._dealer.close(self._office.is_idle)
            self._listen()
            self._progress.close(self._dealer.claims.num_done)

    def release(self) -> None:
        """Give up the lease, if there is one: what was claimed and is not finished is free at once. Not collective."""
        if self._lease is not None:
            self._lease.close()

    def _poll(self) -> tuple[Deal, ...]:
        """Take the claimant's answer if it is there."""
        message = self._mail.probe_bytes(TAG_DEAL)
        if message is None or message[0] != self._office.election.term.rank:
            return ()
        self._has_asked = False
        answer = Answer.from_bytes(message[1])
        self.is_ended = self.is_ended or answer.is_end
        self.is_stopped = self.is_stopped or answer.is_stop
        return answer.deals

    def _beat(self) -> None:
        """Tell the claimant now and then how far this replica is; the claimant listens."""
        now = time.monotonic()
        if now < self._next_pulse:
            return
        self._next_pulse = now + self._pulse_s
        self._listen()
        if self._roster.members and not self.is_ended:
            line = self._office.timeline
            pulse = Pulse(self._roster.replica, line.num_steps, line.num_tokens, line.num_sequences, now)
            self._send(pulse.to_bytes(), TAG_PULSE)

    @property
    def _pulse_s(self) -> float:
        """Between two pulses; the claimant of many replicas hears some hundred a second."""
        return max(1.0, len(self._office.rosters) / 200)

    def _listen(self) -> None:
        while self._health is not None and (message := self._mail.probe_bytes(TAG_PULSE)) is not None:
            self._health.hear(Pulse.from_bytes(message[1]), time.monotonic())

    def _describe_health(self) -> str:
        if self._health is None or self._dealer is None:
            return ""
        now, dead, rosters = time.monotonic(), self._mail.failed(), self._dealer.rosters
        recovering = {each.replica for each in rosters.values() if each.leader in dead}
        lost = {each.replica for each in self._office.rosters} - {each.replica for each in rosters.values() if
                                                                   each.members}  # fmt: skip
        tokens_per_s = self._health.tokens_per_s(now)
        return f"{tokens_per_s:.1f} output tokens/s, {self._health.describe(now, recovering, lost)}"

    def _send(self, data: bytes, tag: int) -> None:
        self._sent.keep(self._mail.send_bytes(data, self._office.election.term.rank, tag))

    def _replace_claimant(self, held: Held) -> None:
        """Become the claimant, unless somebody was faster; tell whoever it is what this replica holds."""
        election = self._office.election
        if election.follow().rank in self._mail.failed():
            lease = self._start_lease()
            if election.stand(self._mail.rank, lease.name):
                log.warning("the claimant has died; rank %d claims from now on", self._mail.rank)
                self._lease, self._heard = lease, {}
            else:
                lease.close()
        if election.term.rank not in self._mail.failed():
            self.report(self._roster._replace(held=held()))
            if self.is_stopped:
                self._send(WANT.pack(STOP), TAG_WANT)

    def _take_over(self, heard: dict[int, Roster]) -> None:
        """Learn what the replicas hold; when all that live have said it, claim what nobody holds."""
        while (message := self._mail.probe_bytes(TAG_ROSTER)) is not None:
            roster = Roster.from_bytes(message[1])
            if roster.held is None and roster.replica in heard:
                roster = roster._replace(held=heard[roster.replica].held)
            heard[roster.replica] = roster
        known = {rank for roster in heard.values() for rank in roster.members} | self._mail.failed()
        if all(rank in known or self._office.is_idle(rank) for rank in range(self._mail.size)):
            self._heard = None
            rosters = {roster.replica: roster for roster in self._office.rosters} | heard
            self._open(self._office.election.former_leases(), list(rosters.values()))

    def _open(self, former_leases: list[str], rosters: list[Roster]) -> None:
        """Begin to claim and to deal."""
        job = self._office.job
        assert self._lease is not None
        claimer = PunctualClaimer(job.paths, job.index, self._lease, job.attempt, self._office.stopper)
        held = [deal for roster in rosters for deal in roster.held or ()]
        claimer.adopt(deal.block for deal in held)
        for name in former_leases:
            (job.paths.leases / name).unlink(missing_ok=True)  # its rank is dead: what it claimed is free
        claims = ClaimAhead(claimer, len(rosters))
        work = {deal.block: job.index.block_rows(deal.block) for deal in held}
        taken = [row for deal in held for row in deal.rows]
        claims.give_back({block: rows[~np.isin(rows, taken)] for block, rows in work.items()})
        self._dealer = Dealer(self._mail, claims, rosters)
        self._progress = Progress(job.index.num_rows, claimer.num_done)
        replicas = (roster.replica for roster in self._office.rosters)
        self._health = Health(replicas, self._pulse_s, time.monotonic())

    def _start_lease(self) -> Lease:
        return Lease(self._office.job.paths.leases, self._office.lease_timeout_s).start()
