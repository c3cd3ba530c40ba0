"""The inquirer: one rank's part in finding out who moves, step by step, whenever the watchdog's thread comes by."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hpcinfer.recovery.hangs.autopsy import Answer, Roster, Verdict, collector, judge, write_report
from hpcinfer.recovery.hangs.inquiry import Inquiries
from hpcinfer.recovery.hangs.standstill import Kind, Standing, Threads
from hpcinfer.report.slow_ranks import Pace, slow_ranks

if TYPE_CHECKING:
    from hpcinfer.comm.protocol import World

log = logging.getLogger(__name__)

SUSPECT = 0.75  # of the timeout: who stands still for so long asks
TURN = 0.05  # of the timeout: ranks take turns to ask without a reason, so that the first one alive does
_MOST_TURNS = 10
_TESTIFY, _JUDGE, _STAND_IN = 0.1, 0.25, 0.5  # of the timeout, since the inquiry; the last for other ranks
_UNMISSED = 1.0  # the same, where nobody waits for those that do not answer
_ASKING = (Kind.WAITING, Kind.IDLE, Kind.STUCK)


class Inquirer:
    """This rank's part in the inquiries of one MPI job."""

    def __init__(
        self, world: World, roster: Roster, inquiries: Inquiries, threads: Threads, timeout_s: float
    ) -> None:
        self._world, self._roster, self._inquiries, self._threads = world, roster, inquiries, threads
        self._timeout_s = timeout_s
        self.measure: Callable[[], Pace | None] = lambda: None
        self._slow: set[int] = set()  # ranks that were named
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
        if self._roster.rank == min(set(range(len(self._roster.holders))) - self._world.failed()):
            self._remove_fruitless()
            self._inquiries.close()

    def _wants_to_ask(self) -> bool:
        turn = TURN * min(self._roster.rank, _MOST_TURNS)
        if self._closed_s >= (1.0 + turn) * self._timeout_s:
            return True
        is_new = self._said not in _ASKING or self._closed_s >= SUSPECT * self._timeout_s  # not what was found harmless
        return is_new and self._stands()[0] in _ASKING

    def _stands(self) -> tuple[Kind, Standing]:
        return self._threads.stands(SUSPECT * self._timeout_s)

    def _answer(self, number: int) -> None:
        kind, standing = self._stands()
        if kind is self._said:
            return
        place = standing.name if kind is Kind.STUCK and standing is not self._threads.main else self._threads.place
        stacks = {each.name: list(each.stack) for each in self._threads.standings.values()}
        gone = tuple(rank for rank in self._roster.neighbours() if self._roster.holders[rank].is_gone())
        answer = Answer(self._roster.rank, kind, gone=gone, pace=self.measure())
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
        verdict = judge(self._roster, answers, self._world.failed(), can_lose_ranks=self._world.is_tolerant)
        if not is_ours or (verdict.is_hang and not self._is_time(answers.values())):
            return False, None
        if verdict.is_hang:
            evidence = self._inquiries.evidence(number)
            report = write_report(self._roster, verdict, answers.values(), evidence, self._age_s)
            verdict = replace(verdict, report=report)
        if not self._inquiries.publish(number, verdict):
            return False, self._inquiries.verdict(number)
        if verdict.is_hang:
            log.error("%s\n  all stacks: %s", verdict.report, self._inquiries.folder(number))
        self._name_slow_ranks(answers.values())
        self._remove_fruitless()
        return True, verdict

    def _is_time(self, answers: Iterable[Answer]) -> bool:
        """Whether somebody has waited for the whole timeout, and those that have not answered had time to do so."""
        waits = [answer.still_s + self._age_s - answer.age_s for answer in answers if answer.kind in _ASKING]
        is_missed = max(waits, default=0.0) >= self._timeout_s
        return self._age_s >= (_JUDGE if is_missed else _UNMISSED) * self._timeout_s

    def _testify(self, number: int, answered: Iterable[int]) -> None:
        near = [rank for rank in answered if self._roster.share_host(rank, self._roster.rank)]
        if self._age_s < _TESTIFY * self._timeout_s or self._roster.rank != min(near, default=-1):
            return
        for rank in self._roster.neighbours():
            if rank not in near and rank not in self._testified:
                self._inquiries.testify(number, rank, describe_process(self._roster.holders[rank].pid))
                self._testified.add(rank)

    def _name_slow_ranks(self, answers: Iterable[Answer]) -> None:
        for slow in slow_ranks(answer.pace for answer in answers if answer.pace):
            if slow.rank not in self._slow:
                self._slow.add(slow.rank)
                log.warning("%s", slow)

    def _remove_fruitless(self) -> None:
        while self._fruitless:
            self._inquiries.remove(self._fruitless.pop())


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


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
