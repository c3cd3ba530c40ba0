"""What a rank needs while it leads a replica: part file, feeder, desk. It outlives the deaths of followers."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from hpcinfer.engine.leader import Leader
from hpcinfer.engine.outputs import Outputs
from hpcinfer.engine.replica import Replica
from hpcinfer.engine.request import Request
from hpcinfer.recovery.dealing import Roster
from hpcinfer.recovery.desk import Desk, Office
from hpcinfer.recovery.failover.sharing import Sharing
from hpcinfer.recovery.failover.state import State
from hpcinfer.recovery.feeder import Feeder, RowCounts
from hpcinfer.recovery.journal import PartWriter
from hpcinfer.recovery.leases import incarnation_name
from hpcinfer.recovery.rows import PrepareAhead, RowSource
from hpcinfer.recovery.serve import Serving
from hpcinfer.recovery.sidecar import rows_of_part
from hpcinfer.recovery.snapshots import Snapshots
from hpcinfer.recovery.witness import Witness
from hpcinfer.recovery.writer_thread import WriterThread

if TYPE_CHECKING:
    from hpcinfer.comm.regroup import View


class Leadership:
    """One rank's, whether it leads now or not."""

    def __init__(self, serving: Serving, office: Office, witness: Witness, stack: ExitStack) -> None:
        """Prepare for it.

        Args:
            serving: what is served.
            office: what all leaders share.
            witness: is told which rows are in flight.
            stack: closes what is opened when the rank's work ends.
        """
        self._serving, self._office, self._witness, self._stack = serving, office, witness, stack
        self._feeder: Feeder | None = None  # while this rank leads
        self.desk: Desk | None = None  # since it has led for the first time
        self.part = ""  # of the leader's finished rows, whoever leads
        self.counts = RowCounts()

    @property
    def is_claimant(self) -> bool:
        """Whether this rank claims and deals, also as a spare one."""
        return self.desk is not None and self.desk.is_claimant

    def begin(self, replica: Replica, roster: Roster, view: View, state: State, sharing: Sharing) -> Leader:
        """Open what a leader needs, or go on with it. Not collective.

        Args:
            replica: this rank's part, built.
            roster: who the replica is.
            view: how it was agreed upon; the first one is no one's successor.
            state: what is to be gone on with.
            sharing: gives weights to others while there is nothing to do.
        """
        requests = self._unfinished(state)
        if self._feeder is not None:
            self._feeder.desk.report(roster)
        else:
            self._feeder = self._open_feeder(roster)
            if view.epoch > 1:
                self._feeder.adopt(requests)
                self._feeder.desk.report(roster._replace(held=self._feeder.held()))
        rows = [request.row for request in requests]
        self._witness.serve(roster.replica, view.epoch, part=self.part, rows=rows)
        outputs = Outputs(self._serving.preparer.tokenizer, replica.runner.eos_ids)
        while_idle = partial(sharing.turn, is_idle=True)
        leader = Leader(replica.scheduler, outputs, self._feeder, replica.runner, while_idle=while_idle)
        leader.resume(self._feeder.set_apart(requests))
        return leader

    def keep(self, requests: list[Request]) -> None:
        """Keep what was stopped in the middle. Not collective."""
        if self._feeder is not None:
            self._feeder.keep(requests)

    def give_up(self, replica: int) -> None:
        """Lead no more: the replica is given up, its rows go to others. Not collective."""
        given_up = Roster(replica, (), ())
        if self._office.mail.rank == self._serving.election.term.rank:
            self.open_desk(given_up)
        if self._feeder is not None:
            self._feeder.held()  # what is finished is durable now, and will not be dealt again
        if self.desk is not None:
            self.desk.report(given_up)
        self._feeder = None

    def open_desk(self, roster: Roster) -> Desk:
        """Take the desk that this rank has had before, or a new one; the first claimant begins to claim with it.

        Not collective.
        """
        if self.desk is None:
            self.desk = Desk(self._office, roster)
            if self._office.mail.rank == self._serving.election.term.rank:
                self.desk.open()
        return self.desk

    def _unfinished(self, state: State) -> list[Request]:
        """Requests to go on with; a leader that has died may have finished some that its followers do not know of."""
        if self._feeder is not None or not state.part:
            return list(state.requests)
        job = self._serving.job
        finished = rows_of_part(job.paths, state.part, job.attempt)
        return [request for request in state.requests if request.row not in finished]

    def _open_feeder(self, roster: Roster) -> Feeder:
        serving, job, enter = self._serving, self._serving.job, self._stack.enter_context
        self.part = incarnation_name()
        part = enter(PartWriter(job.paths, self.part, job.attempt))
        writer = enter(WriterThread(part))
        file = enter(job.input_path.open("rb"))
        snapshots = Snapshots(job.paths, job.index, job.attempt)
        source = RowSource(file, job.index, serving.preparer, serving.model_name, snapshots)
        rows = enter(PrepareAhead(source))
        return Feeder(source, rows, writer, self.open_desk(roster), self.counts, self._witness)
