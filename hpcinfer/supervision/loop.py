"""The supervisor's loop: start a step per replica, watch them, start again what died, until the job is complete."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from hpcinfer.errors import EXIT_DONE, EXIT_RESUMABLE, EXIT_USAGE
from hpcinfer.supervision.base import Burial, Cluster, Outcome, Replica, Rules, Watch
from hpcinfer.supervision.nodes import Placement, Roster
from hpcinfer.supervision.step import Step

log = logging.getLogger(__name__)

_POLL_S = 0.1
_LOOK_S = 5.0  # between looks at leases
_COUNT_S = 30.0  # between looks at the journal, if no step ends
_ASK_S, _ASK_AGAIN_S = 30.0, 1.0  # between questions to Slurm, and when a step has died
_SILENT_S = 30.0  # survivors of a step may need a moment to give a sign of life again
_IDLE_S = 15.0  # a replica that has had no row for so long will get none
_AFTER_S = 20.0  # in which steps see by themselves that the job is complete
_MAX_REFUSALS = 5  # of nodes that are to be given back
_LONGEST_PAUSE_S = 60.0
_CANNOT_START = 126  # exit code of a launcher that the system does not run


class Supervisor:
    """Watches the replicas of one job.

    Args:
        rules: how long and how often.
        roster: nodes for steps.
        watch: the job directory.
        start: starts a step by name, placement, and whether it is to open a retry of errors.
        cluster: the scheduler; None without one.
        told_to_stop: why to stop; None as long as there is no reason.
    """

    def __init__(
        self, rules: Rules, roster: Roster, watch: Watch, start: Callable[[str, Placement, bool], Step], *,
        name: str, cluster: Cluster | None = None, told_to_stop: Callable[[], str | None] = lambda: None,
    ) -> None:  # fmt: skip
        self._rules, self._roster, self._watch, self._start = rules, roster, watch, start
        self._name, self._cluster, self._told_to_stop = name, cluster, told_to_stop
        self._replicas = [Replica(number) for number in range(rules.num_replicas)]
        self._outcome: Outcome | None = None
        self._is_led = False  # a step has opened the job, so that others may join
        self._was_refused = self._has_begun = False
        self._end_at: float | None = None  # when steps that were asked to stop are ended
        self._next_look, self._next_count, self._asked = 0.0, 0.0, -math.inf
        self._given_up: set[str] = set()  # nodes of replicas that were sent home
        self._num_refusals = 0

    def run(self) -> Outcome:
        """Go on until the job is complete, or cannot go on, and no step is left."""
        try:
            while not self.turn(time.monotonic()):
                time.sleep(_POLL_S)
        finally:
            self._end_all()
        assert self._outcome is not None
        return self._outcome

    def turn(self, now: float) -> bool:
        """Do what is to be done now; returns whether all is over."""
        for replica in self._running():
            code = replica.step.poll() if replica.step else None
            if code is not None:
                self._ended(replica, code, now)
        if self._outcome is None:
            self._decide(now)
        else:
            self._hurry(now)
        return self._outcome is not None and not self._running()

    def _decide(self, now: float) -> None:
        if reason := self._told_to_stop():
            log.info("stopping (%s): %d steps put their work away", reason, len(self._running()))
            self._finish(Outcome.STOPPED, now)
            return
        self._look(now)
        if self._outcome is not None:
            return
        self._fill(now)
        if not self._running() and (all(each.is_over for each in self._replicas) or self._is_stuck()):
            self._finish(Outcome.REFUSED if self._was_refused and not self._has_begun else Outcome.FAILED, now)

    def _is_stuck(self) -> bool:
        """Whether no step could start even later."""
        if self._roster.has_room(self._rules.ranks):
            return False
        log.error("%d ranks of a replica have no room on the nodes that are left", self._rules.ranks)
        return True

    def _running(self) -> list[Replica]:
        return [replica for replica in self._replicas if replica.step is not None]

    # Starting

    def _fill(self, now: float) -> None:
        """Start what is to run and does not. One step goes ahead: it builds the index, or sees that all is done."""
        for replica in self._replicas:
            if replica.step is None and not replica.is_over and now >= replica.not_before:
                if not self._may_join() and self._running():
                    return
                placement = self._roster.take(self._rules.ranks)
                if placement is None:
                    return
                self._launch(replica, placement, now)

    def _may_join(self) -> bool:
        if not self._is_led and self._rules.retries_errors:
            self._is_led = any(self._watch.num_in_flight(replica.name) is not None for replica in self._running())
        elif not self._is_led:
            self._is_led = self._watch.is_open() and not self._watch.is_complete()
        return self._is_led

    def _launch(self, replica: Replica, placement: Placement, now: float) -> None:
        replica.num_starts += 1
        replica.name = f"{self._name}.{replica.number}-{replica.num_starts}"
        replica.placement = placement
        replica.silent_since = replica.idle_since = None
        log.info("replica %d starts on %s", replica.number, ", ".join(f"{node} ({ranks})" for node, ranks in placement))
        try:
            replica.step = self._start(replica.name, placement, self._rules.retries_errors and not self._is_led)
        except OSError as error:
            log.error("the launcher cannot be started: %s", error)
            self._roster.give(placement)
            self._died(replica, _CANNOT_START, Burial(0, is_rows_fault=False), now)

    # Endings

    def _ended(self, replica: Replica, code: int, now: float) -> None:
        assert replica.step is not None
        replica.step.bury()
        replica.step = None
        self._roster.give(replica.placement)
        if code != EXIT_DONE:
            self._ask(now, _ASK_AGAIN_S)
        is_node_lost = code != EXIT_DONE and self._roster.is_down(replica.placement)
        burial = self._watch.bury(replica.name, code, is_node_lost=is_node_lost)
        if self._outcome is not None:
            return
        if (code == EXIT_DONE or self._is_led) and self._watch.is_complete():
            self._finish(Outcome.COMPLETE, now)
        elif replica.is_sent_home:
            self._given_up.update(seat.node for seat in replica.placement)
        elif code == EXIT_RESUMABLE:
            log.info("replica %d was stopped; so are the others", replica.number)
            self._finish(Outcome.STOPPED, now)
        elif code == EXIT_USAGE:
            self._refused(replica)
        else:
            self._died(replica, code, burial, now)

    def _refused(self, replica: Replica) -> None:
        """A wrong job, or a node that is not like the others: starting again would not help."""
        log.error("replica %d refuses the job, and is not started again", replica.number)
        replica.is_over = self._was_refused = True
        self._roster.bar(replica.placement)

    def _died(self, replica: Replica, code: int, burial: Burial, now: float) -> None:
        if burial.num_finished:
            self._has_begun, replica.num_failures = True, 0
            self._roster.praise(replica.placement)
        replica.num_failures += 1
        if not burial.is_rows_fault:
            self._roster.strike(replica.placement)
        words = f"replica {replica.number} died (exit code {code}) after {burial.num_finished} finished rows"
        if replica.num_failures > self._rules.restarts:
            replica.is_over = True
            log.error("%s; it is not started again: %d times in a row without a finished row", words,
                      replica.num_failures)
            return
        pause_s = min(self._rules.backoff_s * 2.0 ** (replica.num_failures - 1), _LONGEST_PAUSE_S)
        replica.not_before = now + pause_s
        left_out = f"; left out: {', '.join(self._roster.left_out)}" if self._roster.left_out else ""
        log.warning("%s; it starts again in %.1f s%s", words, pause_s, left_out)

    def _finish(self, outcome: Outcome, now: float) -> None:
        """Nothing is started any more. Steps see that a job is complete; else they are asked to stop."""
        self._outcome = outcome
        if outcome is Outcome.COMPLETE:
            self._end_at = now + _AFTER_S
            return
        for replica in self._running():
            if replica.step:
                replica.step.stop()
        self._end_at = now + self._rules.grace_s

    def _hurry(self, now: float) -> None:
        """End steps that do not end by themselves, first with a word."""
        if self._end_at is not None and now >= self._end_at:
            for replica in self._running():
                log.warning("replica %d does not end by itself", replica.number)
                if replica.step:
                    replica.step.end()
            self._end_at = now + 5.0

    def _end_all(self) -> None:
        """After an error of ours: leave no step behind."""
        for replica in self._running():
            if replica.step:
                replica.step.end()

    # Looking

    def _look(self, now: float) -> None:
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_S
        self._ask(now)
        if self._is_led and now >= self._next_count:
            self._next_count = now + _COUNT_S
            if self._watch.is_complete():  # and no launcher says so
                self._finish(Outcome.COMPLETE, now)
                return
        for replica in self._running():
            self._check(replica, now)
        if self._rules.gives_back:
            self._send_home(now)
            self._give_back()

    def _ask(self, now: float, after_s: float = _ASK_S) -> None:
        """Learn which nodes are down, if that was so long ago."""
        if self._cluster is not None and now - self._asked >= after_s:
            self._asked = now
            self._roster.set_down(self._cluster.down(self._roster.names))

    def _check(self, replica: Replica, now: float) -> None:
        """End a step that is dead, though its launcher does not say so."""
        is_silent = self._watch.is_silent(replica.name)
        replica.silent_since = (replica.silent_since or now) if is_silent else None
        is_lost = self._roster.is_lost(replica.placement)
        if is_lost or (replica.silent_since is not None and now - replica.silent_since >= _SILENT_S):
            log.warning("replica %d %s: it is ended", replica.number, "has lost a node" if is_lost else "is silent")
            if replica.step:
                replica.step.end()

    # Towards the end

    def _send_home(self, now: float) -> None:
        """Stop replicas that have had nothing to do for a while: the others have taken the last blocks."""
        counts = {replica.number: self._watch.num_in_flight(replica.name) for replica in self._running()}
        if not any(counts.values()):
            return
        for replica in self._running():
            is_idle = counts[replica.number] == 0
            replica.idle_since = (replica.idle_since or now) if is_idle else None
            if replica.idle_since is not None and now - replica.idle_since >= _IDLE_S and not replica.is_sent_home:
                log.info("replica %d has no work any more", replica.number)
                replica.is_sent_home = replica.is_over = True
                if replica.step:
                    replica.step.stop()

    def _give_back(self) -> None:
        """Give back nodes of replicas that were sent home; a Slurm that is busy with the last change is asked again."""
        free = [name for name in self._roster.idle if name in self._given_up and name != self._rules.kept_node]
        kept = [name for name in self._roster.names if name not in free]
        if not free or self._cluster is None or self._num_refusals >= _MAX_REFUSALS:
            return
        if self._cluster.shrink(kept):
            log.info("given back to Slurm: %s", ", ".join(free))
            self._roster.drop(free)
        else:
            self._num_refusals += 1
