"""Stopping before the end: who asked for it, and what becomes of the job then.

A signal handler only sets a flag; the loop looks at it between two steps, and puts the work away.
"""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from hpcinfer.agree import on_root
from hpcinfer.recovery import slurm_job
from hpcinfer.recovery.job import Job
from hpcinfer.recovery.sidecar import JournalReader
from hpcinfer.recovery.states import RowStates
from hpcinfer.recovery.time_limit import Pace, TimeLimit

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import Collectives

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_CANCELLED = "cancelled"
TIME_LIMIT = "time limit"


class Stopper:
    """Whether this process is to stop, and why. Use as a context manager, in the main thread.

    The first Ctrl-C stops as the other signals do; the second one ends the process at once.
    """

    def __init__(self, time_limit: TimeLimit | None = None) -> None:
        self.time_limit = time_limit
        self.pace = Pace()
        self._told = ""  # the first reason that came from outside
        self._before: dict[signal.Signals, Any] = {}

    def reason(self) -> str | None:
        """Why to stop; None as long as there is no reason. Not collective."""
        is_over = self.time_limit is not None and self.time_limit.left_s <= 0
        return self._told or (TIME_LIMIT if is_over else None)

    @property
    def is_cancelled(self) -> bool:
        """Whether the user has pressed Ctrl-C: then the job is never put back into the queue."""
        return self._told == _CANCELLED

    def stop(self, reason: str) -> None:
        """Stop for a reason that another rank has. Not collective."""
        self._told = self._told or reason

    def has_time_for(self, num_rows: int) -> bool:
        """Whether so many rows, all that are claimed among them, would be finished in time. Not collective.

        Args:
            num_rows: that are claimed and not finished, and those of the next block.
        """
        if self.reason() is not None:
            return False
        expected_s = self.pace.seconds_for(num_rows)
        return self.time_limit is None or expected_s is None or expected_s <= self.time_limit.left_s

    def __enter__(self) -> Stopper:
        for number in _SIGNALS:
            # A shell lets what it starts in the background ignore Ctrl-C.
            if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            self._told = _CANCELLED  # counts more than what came before
        else:
            self._told = self._told or signal.Signals(number).name


class Stopped(NamedTuple):
    """Where a job stands that was stopped."""

    reason: str
    num_done: int
    num_rows: int
    num_kept: int = 0  # sequences that go on where they are


def agree_to_stop(stopper: Stopper, job: Job, group: Collectives) -> Stopped | None:
    """Find out together whether the job ends here: a rank has a reason to stop, and rows are not finished.

    Collective over the group.
    """
    reasons = [data.decode() for data in group.all_gather_bytes((stopper.reason() or "").encode())]
    if not any(reasons):
        return None
    num_done, num_unfinished = json.loads(on_root(group, lambda: json.dumps(_count(job)).encode()))
    reason = _CANCELLED if _CANCELLED in reasons else next(filter(None, reasons))
    return Stopped(reason, num_done, job.index.num_rows) if num_unfinished else None


def _count(job: Job) -> tuple[int, int]:
    states = RowStates(job.index.num_rows, job.attempt)
    states.read_all(JournalReader(job.paths))
    return states.num_done, states.num_unfinished


def say_farewell(stopped: Stopped, *, requeue: bool) -> None:
    """Say where a stopped job stands, then put it back into Slurm's queue if that is wanted, and say that.

    Not collective: one rank does it for all, as the last of all it does.
    """
    log.info("%s", farewell(stopped))
    if requeue and (told := put_back(stopped, os.environ)):
        log.info("%s", told)


def farewell(stopped: Stopped) -> str:
    """Say in a line where the job stands, and what to do. Not collective."""
    line = f"stopped early ({stopped.reason}): {stopped.num_done} of {stopped.num_rows} rows are finished"
    if stopped.num_kept:
        line += f", {stopped.num_kept} more are kept where they were"
    return f"{line}; the same command goes on, with any number of ranks"


def put_back(stopped: Stopped, environment: Mapping[str, str] = os.environ) -> str:
    """Put a stopped job back into Slurm's queue, if that is right; say in a line what has become of it.

    Not collective. Slurm ends the job at once.

    Returns:
        Nothing where there is no Slurm.
    """
    name = slurm_job.job_name(environment)
    if not name:
        return ""
    objection = "the job was cancelled" if stopped.reason == _CANCELLED else ""
    objection = objection or slurm_job.objection(slurm_job.ask(environment), environment)
    if not objection:
        answer = slurm_job.requeue(environment)
        if answer.is_done:
            return f"Slurm starts job {name} again"
        objection = answer.text
    return f"not requeued: {objection}"
