"""A rank's life in a job: member of a replica, survivor of it, spare rank, member of another one.

    serve ──death──> regroup ──> serve on what is left     (a follower may have become the leader)
                        │
                        └──> spare ──invited──> serve      (left out of a smaller mesh, or kept warm from the start)

Only the ranks of the replica that was hit take part. Where the MPI is not fault tolerant nothing here but `serve`
happens: the launcher ends the job at the first death.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from hpcinfer.comm.node.patience import watch
from hpcinfer.comm.regroup import Decision, Guests, Offers, View, answer_invitation, regroup
from hpcinfer.comm.tolerant import TolerantGroup
from hpcinfer.engine.replica import Replica
from hpcinfer.errors import EXIT_USAGE, HpcInferError, RankFailedError, RevokedError
from hpcinfer.model.refill import HeldWeights, Refill
from hpcinfer.recovery.dealing import STOP, TAG_WANT, WANT, Roster
from hpcinfer.recovery.desk import Office
from hpcinfer.recovery.failover.leadership import Leadership
from hpcinfer.recovery.failover.sharing import Sharing
from hpcinfer.recovery.failover.spares import Spares
from hpcinfer.recovery.failover.state import State, free_memory, observe
from hpcinfer.recovery.failover.succession import Plan, Succession
from hpcinfer.recovery.serve import Serving, place_of, rank_report
from hpcinfer.recovery.witness import Witness
from hpcinfer.report.metrics import SPARE

if TYPE_CHECKING:
    from hpcinfer.comm.mpi import MpiGroup
    from hpcinfer.comm.protocol import Pending

log = logging.getLogger(__name__)


class Member:
    """One rank, from the loaded model to the end of the job."""

    def __init__(self, serving: Serving, line: MpiGroup | None) -> None:
        """Take the place that the layout gives.

        Args:
            serving: what is served.
            line: all ranks, where they may die; the same as `serving.mail`. None where they may not.
        """
        self._serving, self._line, self._rank = serving, line, serving.mail.rank
        layout = serving.layout
        places = [(i, replica) for i, replica in enumerate(layout.replicas) if self._rank in replica.members]
        self._view = View(1, places[0][1].members if places else ())
        self._plan = Plan(places[0][0], places[0][1].mesh.pp, places[0][1].mesh.tp) if places else Plan(-1, 1, 1)
        self._spares = Spares(serving.mail, layout.spares)
        self._succession = Succession(serving, line, self._spares)
        office = Office(
            serving.mail, serving.job, serving.election, serving.lease_timeout_s,
            tuple(Roster(i, replica.members) for i, replica in enumerate(layout.replicas)), line is not None,
            self._spares.is_idle, self._succession.replace, serving.stopper, serving.options.metrics.timeline,
        )  # fmt: skip
        self.witness = Witness(serving.job.paths, serving.name, serving.job.attempt)
        self._state = State(0, 0, ())
        self._replica: Replica | None = None
        self._sharing = Sharing(serving, line)
        self._held: HeldWeights | None = None  # of the last place, until the next one has its weights
        self._stack = ExitStack()
        self._leadership = Leadership(serving, office, self.witness, self._stack)
        self._place: dict[str, Any] = {}
        self._word: Pending | None = None  # to the claimant, that this rank is to stop
        self._cache = {"kv_cache_bytes": 0, "num_blocks": 0}
        self._recoveries: list[dict[str, Any]] = []
        self._traffic: Counter[str] = Counter()  # of the sums of all replicas that this rank was in

    def run(self, replica: Replica | None) -> dict[str, Any]:
        """Serve until the job is complete.

        Collective over the world, as far as it lives.

        Args:
            replica: this rank's part, loaded; None on a spare rank, and where a member has died while it was loaded.

        Returns:
            The report of this rank.
        """
        self._replica = replica
        self._held = self._serving.loading.held() if replica is None else None
        del replica  # after a death nothing else may keep its memory
        with self._stack as stack:
            stack.enter_context(self.witness)
            try:
                self._live()
            except RevokedError:
                log.debug("rank %d: the others have come to the end", self._rank)
        if self._leadership.desk is not None:
            self._leadership.desk.release()
        if self._replica is not None:
            self._replica.groups.close_arrays()
        self._serving.loading.finish()
        return self.report()

    def report(self) -> dict[str, Any]:
        """Say what this rank has done so far. Not collective; may be called from another thread."""
        metrics = self._serving.options.metrics
        report = rank_report(self._place, self._serving, metrics, self._leadership.counts)
        timeline = {} if self._leadership.desk is None else {"timeline": metrics.timeline.to_json()}
        return {**report, **self._cache, **timeline, "traffic": dict(self._traffic), "recoveries": self._recoveries}

    def _live(self) -> None:
        while True:
            if self._rank not in self._view.members:
                with self._serving.options.metrics.phase(SPARE):
                    is_needed = self._wait_as_spare()
                if not is_needed:
                    return self._leave()
            try:
                self._replica = self._replica or self._build()
                if self._replica is not None:
                    self._serve(self._replica)
                    return self._leave(is_stopped=self._replica.engine.is_stopped)
            except RevokedError:
                raise
            except RankFailedError as error:
                found = error.found
            else:
                continue  # given up: this is a spare rank now
            self._regroup(found)

    def _leave(self, *, is_stopped: bool = False) -> None:
        """End all waiting on this rank's word, unless others are still stopping: the claimant is the last of them."""
        is_last = not is_stopped or self._leadership.is_claimant
        if self._line is not None and is_last:
            self._line.revoke()

    def _wait_as_spare(self) -> bool:
        """Wait until a replica needs this rank; False when the job has ended. A claimant only claims and deals on."""
        assert self._line is not None, f"{self._rank = } has no place in {self._view}"
        pause = self._line.pause()
        while (view := self._next_view()) is None:
            if self._is_over():
                return False
            pause()
        self._view, self._plan, self._state = view, Plan.from_bytes(view.plan), State(0, 0, ())
        self._spares.announce(is_free=False)
        log.info("rank %d joins replica %d", self._rank, self._plan.replica)
        return True

    def _next_view(self) -> View | None:
        """The replica that needs this rank; a claimant leads one or none, since only leaders claim and deal."""
        assert self._line is not None
        invited = None if self._leadership.is_claimant else answer_invitation(self._line, self._view)
        return invited or self._succession.replace_all(self._view)

    def _is_over(self) -> bool:
        """Whether this spare rank, if it claims for the others, has come to the end."""
        desk = self._leadership.desk
        if desk is None or not desk.is_claimant:
            self._pass_on()
            return False
        desk.turn(tuple)
        is_over = desk.is_complete or desk.is_stopping()
        if is_over:
            desk.close()
        return is_over

    def _build(self) -> Replica | None:
        """Load this rank's part of its replica; None if the replica is given up."""
        start, group = time.perf_counter(), self._group()
        group.check()  # a death that is known, as one during the first load, needs no other rank to be found
        try:
            source = self._sharing.source(self._plan.replica, self._held)
            replica = self._serving.build(group, self._plan.mesh, source, partial(self._let_go, source))
        except HpcInferError as error:
            if isinstance(error, RankFailedError) or error.exit_code != EXIT_USAGE:
                raise
            self._dissolve(error)
            return None
        self._note(
            refill_s=time.perf_counter() - start, **{f"bytes_{name}": count for name, count in source.num_bytes.items()}
        )
        return replica

    def _let_go(self, source: Refill) -> None:
        """Keep the weights of the last place no more: those of this one are there."""
        self._held = None
        source.forget()

    def _group(self) -> TolerantGroup:
        assert self._line is not None
        return TolerantGroup(self._line, self._view.members, self._view.epoch)

    def _serve(self, replica: Replica) -> None:
        """Run the loop to the end of the job. Collective over the replica."""
        self._place = {"replica": self._plan.replica, **place_of(replica)}
        self._cache = {"kv_cache_bytes": replica.kv_cache_bytes, "num_blocks": replica.num_blocks}
        if not replica.is_leader:
            self.witness.serve(self._plan.replica, self._view.epoch)
        leader, leadership, group = None, self._leadership, replica.runner.pipeline.replica
        if replica.is_leader:
            roster = Roster(self._plan.replica, self._view.members)
            leader = leadership.begin(replica, roster, self._view, self._state, self._sharing)
        if self._line is not None:
            leadership.part = group.broadcast_bytes(leadership.part.encode() if leader else None).decode()
        if isinstance(group, TolerantGroup):
            group.while_idle = partial(self._sharing.turn, is_idle=True)
            self._serving.loading.watch(watch(group))
        self._sharing.begin(self._weights_of(replica))
        try:
            replica.engine.run(leader, self._sharing.turn if leader else self._between_steps)
        finally:
            self._serving.loading.watch(lambda: None)
            self._sharing.end()
            if replica.groups.stage_arrays is None:  # those of GPUs are enqueued, or part of a recording
                self._traffic.update(replica.runner.stage.reducer.traffic._asdict())
            if leader is not None:
                self._note(first_token_time=leader.first_token_time)
                self._serving.loading.note_first_token(leader.first_token_time)
        if leader is not None:
            leadership.keep(replica.scheduler.unfinished())
        if leadership.desk is not None:
            leadership.desk.close()

    def _between_steps(self) -> None:
        """What a follower does besides computing."""
        self._pass_on()
        self._sharing.turn()

    def _weights_of(self, replica: Replica) -> HeldWeights:
        stage = replica.runner.stage
        return HeldWeights(stage.config, self._serving.kernels, stage.plan, stage.weights)

    def _pass_on(self) -> None:
        """Tell the claimant, once, of a reason to stop that only this rank may have: leaders do so themselves."""
        if self._serving.stopper.reason() is not None and self._word is None:
            claimant = self._serving.election.term.rank
            self._word = self._serving.mail.send_bytes(WANT.pack(STOP), claimant, TAG_WANT)

    def _regroup(self, cause: str) -> None:
        """Agree with the other survivors on how to go on. Collective over the survivors."""
        assert self._line is not None
        found_time, start = time.time(), time.perf_counter()
        old = self._view
        self._state = observe(self._replica, old.epoch, self._leadership.part, self._state)
        if self._replica is not None:
            self._held = self._weights_of(self._replica)
            self._replica.close()
        self._replica = None
        offer = replace(self._state, free_bytes=free_memory(self._serving.kernels)).to_bytes()
        self._view = regroup(self._line, old, offer, self._decide)
        agree_s = time.perf_counter() - start
        if self._rank not in self._view.members:
            self._spares.announce(is_free=True)
            return
        if dead := sorted(self._line.failed() & set(old.members)):  # the MPI may have said no more than "a rank"
            cause = f"rank {', '.join(map(str, dead))} of the world has died"
        self._plan = Plan.from_bytes(self._view.plan)
        self._recoveries.append({
            "replica": self._plan.replica, "cause": cause, "found_time": found_time, "agree_s": agree_s,
            "members": len(self._view.members), "mesh": str(self._plan.mesh),
        })  # fmt: skip
        if self._rank == self._view.members[0]:
            log.warning("replica %d: %s; %d ranks go on as pp=%d tp=%d", self._plan.replica, cause,
                        len(self._view.members), self._plan.pp, self._plan.tp)  # fmt: skip

    def _decide(self, offers: Offers, guests: Guests) -> Decision:
        """Choose members and mesh, on the coordinator: the new leader."""
        decision, self._state = self._succession.decide(self._plan, offers, guests)
        return decision

    def _dissolve(self, error: HpcInferError) -> None:
        """Give the replica up: its ranks become spare ones, its rows go to other replicas."""
        if self._succession.is_last_hope(self._plan, self._view.members):
            error.__dict__.pop("is_agreed", None)  # by this replica alone: the others wait to be told, or ended
            raise error
        log.warning("replica %d is given up: %s", self._plan.replica, error.found)
        self._leadership.give_up(self._plan.replica)
        self._view = self._view._replace(members=())
        self._spares.announce(is_free=True)

    def _note(self, **facts: float | None) -> None:
        """Add to what is known of the last recovery."""
        if self._recoveries:
            self._recoveries[-1].update(facts)
