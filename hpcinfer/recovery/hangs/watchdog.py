"""The watchdog: finds a rank that hangs, says who waits for whom, and has it treated as dead; names slow ranks.

One thread per rank looks at the others of its process, and another one at the files of inquiries, which may be on what
hangs. A rank that stands still for three quarters of the timeout opens an inquiry; all ranks answer; after the last
quarter one of them draws up the report. Once per timeout there is an inquiry anyway, for those whom nobody waits for.
Time counts only while a watchdog runs: whoever was stopped has seen none.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hpcinfer.errors import EXIT_FAILED, HpcInferError
from hpcinfer.recovery.hangs.autopsy import Roster, Verdict
from hpcinfer.recovery.hangs.inquirer import SUSPECT, TURN, Inquirer
from hpcinfer.recovery.hangs.inquiry import Inquiries
from hpcinfer.recovery.hangs.standstill import Kind, Threads
from hpcinfer.recovery.leases import Holder
from hpcinfer.report.metrics import Metrics
from hpcinfer.report.slow_ranks import Pace
from hpcinfer.units import format_seconds

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import World

log = logging.getLogger(__name__)

_GIVE_UP = 1.25  # of the timeout: a rank that is stuck ends by itself, if nobody has done it
_LAST_WORDS_S = 10.0  # for the MPI library to end the job


class Watchdog:
    """Watches one rank together with all others. Use as a context manager; leave it after a collective of all ranks."""

    def __init__(self, world: World, roster: Roster, hangs: Path, timeout_s: float) -> None:
        """Prepare.

        Args:
            world: the ranks of the roster; asked who has died, and ended, from other threads.
            roster: see `exchange_roster`.
            hangs: directory of inquiries, shared by all ranks; made when there is one.
            timeout_s: how long all may stand still; 0 is for ever, nothing is watched.
        """
        self._world, self._roster, self._timeout_s = world, roster, timeout_s
        self._threads = Threads()
        self._inquirer = Inquirer(world, roster, Inquiries(hangs / roster.name), self._threads, timeout_s)
        self._stop = threading.Event()
        self._has_warned = False
        self.last_word: Callable[[str], None] = lambda text: None  # told why before this rank ends itself
        self._jobs = [threading.Thread(target=self._run, args=(step,), name=name, daemon=True)
                      for step, name in ((self._look, "watchdog"), (self._write, "watchdog files"))]  # fmt: skip

    def follow(self, metrics: Metrics) -> None:
        """Take phases of these metrics as signs of progress. Not collective."""
        self._threads.follow(metrics)

    def measure(self, pace: Callable[[], Pace | None]) -> None:
        """Ask this now and then how much this rank has computed; it is called from another thread. Not collective."""
        self._inquirer.measure = pace

    def __enter__(self) -> Watchdog:
        if 0 < self._timeout_s < math.inf:
            for job in self._jobs if len(self._roster.holders) > 1 else self._jobs[:1]:
                job.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for job in self._jobs:
            if job.ident is not None:
                job.join(1.0)  # it may hang in the file system

    def _run(self, step: Callable[[float], None]) -> None:
        """Do a step again and again, telling it the time since the last one, as far as it can be known."""
        pause_s = TURN * self._timeout_s
        last = time.monotonic()
        while not self._stop.wait(pause_s):
            now = time.monotonic()
            step(min(now - last, 2 * pause_s))
            last = now
        if step == self._write:
            self._inquirer.close()

    def _look(self, elapsed_s: float) -> None:
        self._threads.look(elapsed_s)
        kind, standing = self._threads.stands(SUSPECT * self._timeout_s)
        if kind is not Kind.STUCK:
            self._has_warned = False
            return
        text = f"{standing.name} has stood still for {format_seconds(standing.still_s)}, at\n    "
        text += "\n    ".join(standing.stack)
        if not self._has_warned:
            log.warning("%s", text)
            self._has_warned = True
        if standing.still_s >= _GIVE_UP * self._timeout_s:
            log.error("hang: %s; treated as dead: %s", self._roster.where(self._roster.rank), text)
            self.last_word(text)
            _end_process(self._roster.holders[self._roster.rank]) if self._world.is_tolerant else self._end_all()

    def _write(self, elapsed_s: float) -> None:
        try:
            found = self._inquirer.poll(elapsed_s)
        except (OSError, HpcInferError) as error:
            log.debug("watchdog: %s", error)
            return
        if found is not None:
            self._act(*found)

    def _act(self, verdict: Verdict, is_own: bool) -> None:
        own = self._roster.rank
        if verdict.must_end:
            if not is_own:
                time.sleep(_LAST_WORDS_S)  # the one that has said why ends all
            self._end_all()
        for rank, killer in verdict.missing.items():
            if own in (rank, killer) and _end_process(self._roster.holders[rank]):
                log.warning("%s was killed", self._roster.where(rank))

    def _end_all(self) -> None:
        if len(self._roster.holders) > 1:
            threading.Thread(target=self._world.abort, args=(EXIT_FAILED,), daemon=True).start()
            time.sleep(_LAST_WORDS_S)
        os._exit(EXIT_FAILED)


def _end_process(holder: Holder) -> bool:
    """Send SIGKILL to a process, if it is surely the one, on this host; whether it was there."""
    here = Holder.this_process()
    if not here.boot_id or (holder.boot_id, holder.pid_namespace) != (here.boot_id, here.pid_namespace):
        return False
    try:
        descriptor = os.pidfd_open(holder.pid)
    except OSError:
        return False
    try:
        if holder.is_gone():  # asked once we hold it: nobody else can have its number from now on
            return False
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
