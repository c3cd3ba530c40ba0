"""The watchdog: finds a rank that hangs, says who waits for whom and where, and has it treated as dead.

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
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from hpcinfer.errors import EXIT_FAILED, HpcInferError
from hpcinfer.recovery.autopsy import Answer, Roster, Verdict, collector, judge, write_report
from hpcinfer.recovery.inquiry import Inquiries
from hpcinfer.recovery.leases import Holder
from hpcinfer.recovery.standstill import Kind, Standing, Threads
from hpcinfer.report.metrics import Metrics
from hpcinfer.units import format_seconds

log = logging.getLogger(__name__)

_LOOKS = 20  # per timeout
_SUSPECT = 0.75  # of the timeout: who stands still for so long asks
_TESTIFY, _JUDGE, _STAND_IN = 0.1, 0.25, 0.5  # of the timeout, since the inquiry; the last for other ranks
_UNMISSED = 0.75  # the same, where nobody waits for those that do not answer
_GIVE_UP = 1.25  # of the timeout: a rank that is stuck ends by itself, if nobody has done it
_LAST_WORDS_S = 10.0  # for the MPI library to end the job
_MOST_TURNS = 10  # ranks take turns to ask without a reason: the first one alive does
_ASKING = (Kind.WAITING, Kind.IDLE, Kind.STUCK)


class Inquirer:
    """This rank's part in the inquiries of one MPI job."""

    def __init__(
        self, roster: Roster, inquiries: Inquiries, threads: Threads, timeout_s: float, *, can_lose_ranks: bool
    ) -> None:
        self._roster, self._inquiries, self._threads = roster, inquiries, threads
        self._timeout_s, self._can_lose_ranks = timeout_s, can_lose_ranks
        self.lost: set[int] = set()  # ranks known to have died
        self._closed = self._current = 0  # numbers of inquiries
        self._age_s = self._closed_s = 0.0  # since this rank knows of the current one; since the last one was closed
        self._said: Kind | None = None
        self._testified: set[int] = set()
        self._fruitless: list[int] = []

    def poll(self, elapsed_s: float) -> tuple[Verdict, bool] | None:
        """Take one step: ask, answer, or judge. Not collective.

        Returns:
            A verdict that is a hang, when there is a new one, and whether it is this rank's.
        """
        number = max(self._inquiries.latest(), self._closed)
        if number == self._closed:
            self._closed_s += elapsed_s
            if not self._wants_to_ask():
                return None
            number += 1
            self._inquiries.open(number)
        self._age_s += elapsed_s
        if number != self._current:
            self._current, self._age_s, self._said, self._testified = number, 0.0, None, set()
        is_own, verdict = False, self._inquiries.verdict(number)
        if verdict is None:
            self._answer(number)
            is_own, verdict = self._judge(number)
        if verdict is None:
            return None
        self._closed, self._closed_s = number, 0.0
        self._fruitless += [] if verdict.is_hang else [number]
        return (verdict, is_own) if verdict.is_hang else None

    def close(self) -> None:
        """Remove inquiries that have found nothing. Not collective."""
        if self._roster.rank == 0:
            self._remove_fruitless()
            self._inquiries.close()

    def _wants_to_ask(self) -> bool:
        turn = min(self._roster.rank, _MOST_TURNS) / _LOOKS
        if self._closed_s >= (1.0 + turn) * self._timeout_s:
            return True
        is_rested = self._closed == 0 or self._closed_s >= _SUSPECT * self._timeout_s
        return is_rested and self._stands()[0] in _ASKING

    def _stands(self) -> tuple[Kind, Standing]:
        return self._threads.stands(_SUSPECT * self._timeout_s)

    def _answer(self, number: int) -> None:
        kind, standing = self._stands()
        if kind is self._said:
            return
        place = standing.name if kind is Kind.STUCK and standing is not self._threads.main else self._threads.place
        stacks = {each.name: list(each.stack) for each in self._threads.standings.values()}
        gone = tuple(rank for rank in self._roster.neighbours() if self._roster.holders[rank].is_gone())
        answer = Answer(self._roster.rank, kind, gone=gone)
        if kind is not Kind.MOVING:
            answer = replace(answer, place=place, still_s=standing.still_s, age_s=self._age_s, stack=standing.stack,
                             threads=stacks)  # fmt: skip
        self._inquiries.answer(number, answer)
        self._said = kind

    def _judge(self, number: int) -> tuple[bool, Verdict | None]:
        """Say what is seen of silent neighbours, and give the verdict: at once when nothing is wrong."""
        answers = self._inquiries.answers(number)
        self._testify(number, answers.keys())
        is_ours = self._roster.rank == collector(answers) or self._age_s >= _STAND_IN * self._timeout_s
        verdict = judge(self._roster, answers, self.lost, can_lose_ranks=self._can_lose_ranks)
        is_missed = any(answer.kind in _ASKING for answer in answers.values())
        if not is_ours or (verdict.is_hang and self._age_s < (_JUDGE if is_missed else _UNMISSED) * self._timeout_s):
            return False, None
        if verdict.is_hang:
            evidence = self._inquiries.evidence(number)
            report = write_report(self._roster, verdict, answers.values(), evidence, self._age_s)
            verdict = replace(verdict, report=report)
        if not self._inquiries.publish(number, verdict):
            return False, self._inquiries.verdict(number)
        if verdict.is_hang:
            log.error("%s\n  all stacks: %s", verdict.report, self._inquiries.folder(number))
        self._remove_fruitless()
        return True, verdict

    def _testify(self, number: int, answered: Iterable[int]) -> None:
        near = [rank for rank in answered if self._roster.share_host(rank, self._roster.rank)]
        if self._age_s < _TESTIFY * self._timeout_s or self._roster.rank != min(near, default=-1):
            return
        for rank in self._roster.neighbours():
            if rank not in near and rank not in self._testified:
                self._inquiries.testify(number, rank, describe_process(self._roster.holders[rank].pid))
                self._testified.add(rank)

    def _remove_fruitless(self) -> None:
        while self._fruitless:
            self._inquiries.remove(self._fruitless.pop())


class Watchdog:
    """Watches one rank together with all others. Use as a context manager; leave it after a collective of all ranks."""

    def __init__(
        self, roster: Roster, hangs: Path, timeout_s: float, end: Callable[[], None], *, can_lose_ranks: bool = False
    ) -> None:
        """Prepare.

        Args:
            roster: see `exchange_roster`.
            hangs: directory of inquiries, shared by all ranks; made when there is one.
            timeout_s: how long all may stand still; 0 is for ever, nothing is watched.
            end: ends the MPI job with a failure.
            can_lose_ranks: whether the others go on when a rank is killed.
        """
        self._roster, self._timeout_s, self._end = roster, timeout_s, end
        self._can_lose_ranks = can_lose_ranks
        self._threads = Threads()
        inquiries = Inquiries(hangs / roster.name)
        self._inquirer = Inquirer(roster, inquiries, self._threads, timeout_s, can_lose_ranks=can_lose_ranks)
        self._stop = threading.Event()
        self._has_warned = False
        self._jobs = [threading.Thread(target=self._run, args=(step,), name=name, daemon=True)
                      for step, name in ((self._look, "watchdog"), (self._write, "watchdog files"))]  # fmt: skip

    def follow(self, metrics: Metrics) -> None:
        """Take phases of these metrics as signs of progress. Not collective."""
        self._threads.follow(metrics)

    def forget(self, ranks: Iterable[int]) -> None:
        """Wait for no answer of these ranks any more: they have died. Not collective."""
        self._inquirer.lost.update(ranks)

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
        pause_s = self._timeout_s / _LOOKS
        last = time.monotonic()
        while not self._stop.wait(pause_s):
            now = time.monotonic()
            step(min(now - last, 2 * pause_s))
            last = now
        if step == self._write:
            self._inquirer.close()

    def _look(self, elapsed_s: float) -> None:
        self._threads.look(elapsed_s)
        kind, standing = self._threads.stands(_SUSPECT * self._timeout_s)
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
            self._end_all() if not self._can_lose_ranks else _end_process(self._roster.holders[self._roster.rank])

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
            threading.Thread(target=self._end, daemon=True).start()
            time.sleep(_LAST_WORDS_S)
        os._exit(EXIT_FAILED)


def describe_process(pid: int) -> str:
    """Say in what states the threads of a process of this host are, as far as the system tells. Not collective."""
    states = Counter[str]()
    for task in Path(f"/proc/{pid}/task").glob("*"):
        state = next((line[6:].strip() for line in _read(task / "status").splitlines() if line[:6] == "State:"), "")
        where = _read(task / "wchan").strip("0\n")
        states[f"{state or 'unknown'}{f' in {where}' if where else ''}"] += 1
    kernel = [line.split()[-1].partition("+")[0] for line in _read(Path(f"/proc/{pid}/stack")).splitlines()]
    threads = ", ".join(f"{state} ({count} threads)" for state, count in states.most_common()) or "no such process"
    return f"{threads}; kernel stack: {' '.join(kernel)}" if kernel else threads


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


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
