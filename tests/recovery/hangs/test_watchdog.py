"""The watchdog: ranks that are objects, a clock that we move, a directory that is real, processes that are killed."""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from jobs import wait_until

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.recovery.hangs import watchdog
from hpcinfer.recovery.hangs.autopsy import Roster, Verdict
from hpcinfer.recovery.hangs.inquirer import Inquirer, describe_process
from hpcinfer.recovery.hangs.inquiry import Inquiries
from hpcinfer.recovery.hangs.standstill import Kind, Standing
from hpcinfer.recovery.hangs.watchdog import Watchdog
from hpcinfer.recovery.leases import Holder
from hpcinfer.report.metrics import IDLE, Metrics
from hpcinfer.report.slow_ranks import Pace

TIMEOUT_S = 100.0
TICK_S = 5.0


class FakeWorld(SerialGroup):
    """A world that may lose ranks, or not."""

    is_tolerant = True
    lost: frozenset[int] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()

    def failed(self) -> frozenset[int]:
        """Ranks that have died."""
        return self.lost

    def abort(self, exit_code: int) -> None:
        """End all."""
        self.ended.set()


class FakeThreads:
    """What a rank is at, as the test says."""

    def __init__(self) -> None:
        self.kind, self.still_s, self.place = Kind.MOVING, 0.0, "forward"
        self.main = Standing("MainThread", Kind.STUCK, ("somewhere.py:1 work",))
        self.standings = {1: self.main}

    def stands(self, limit_s: float) -> tuple[Kind, Standing]:
        """The kind, once it has lasted."""
        self.main.still_s = self.still_s
        return (self.kind if self.still_s >= limit_s else Kind.MOVING), self.main


class Ranks:
    """Some ranks on one host, of which none hangs yet."""

    def __init__(self, directory: Path, count: int) -> None:
        holders = tuple(replace(Holder.this_process(), pid=os.getpid()) for _ in range(count))
        self.inquiries, self.threads = Inquiries(directory / "hangs" / "job"), [FakeThreads() for _ in range(count)]
        self.world = FakeWorld()
        self.ranks = [Inquirer(self.world, Roster("job", rank, holders), self.inquiries, threads, TIMEOUT_S)  # type: ignore[arg-type]
                      for rank, threads in enumerate(self.threads)]  # fmt: skip
        self.silent: set[int] = set()
        self.time_s = 0.0
        self.found: dict[int, tuple[float, Verdict, bool]] = {}  # by rank: when, what, whose

    def all_are(self, kind: Kind) -> None:
        """Have all do the same from now on."""
        for threads in self.threads:
            threads.kind, threads.still_s = kind, 0.0

    def tick(self) -> None:
        """Pass a moment on all ranks that live."""
        self.time_s += TICK_S
        for rank, (inquirer, threads) in enumerate(zip(self.ranks, self.threads, strict=True)):
            if rank not in self.silent:
                threads.still_s += TICK_S * (threads.kind is not Kind.MOVING)
                found = inquirer.poll(TICK_S)
                if found is not None:
                    self.found.setdefault(rank, (self.time_s, *found))

    def tick_until(self, time_s: float) -> None:
        """Pass so much time, or less if all have a verdict."""
        while self.time_s < time_s and len(self.found) < len(self.ranks) - len(self.silent):
            self.tick()


def test_rank_that_is_waited_for_is_found_in_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ranks = Ranks(tmp_path, 4)
    ranks.all_are(Kind.WAITING)
    ranks.silent = {2}
    ranks.tick_until(300)
    assert set(ranks.found) == {0, 1, 3}
    for rank, (when, verdict, is_own) in ranks.found.items():
        assert TIMEOUT_S <= when <= 1.1 * TIMEOUT_S
        assert verdict.missing == {2: 0} and not verdict.must_end
        assert is_own == (rank == 0)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and "somewhere.py:1 work" in record.message and "rank 2/4" in record.message


def test_nothing_is_written_while_all_goes_well(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 3)
    ranks.tick_until(TIMEOUT_S - TICK_S)
    assert not list(tmp_path.iterdir())


def test_long_wait_for_one_that_moves_is_no_hang(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ranks = Ranks(tmp_path, 3)
    ranks.all_are(Kind.WAITING)
    ranks.threads[1].kind = Kind.MOVING
    ranks.tick_until(20 * TIMEOUT_S)
    assert not ranks.found and not caplog.records
    assert 10 < ranks.inquiries.latest() <= 27, "asked again and again, but not more often than needed"
    assert len(list(ranks.inquiries.directory.iterdir())) <= 2
    ranks.ranks[0].close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("silent", [1, 0])
def test_rank_that_nobody_waits_for_is_found_too(tmp_path: Path, silent: int) -> None:
    ranks = Ranks(tmp_path, 3)
    ranks.silent = {silent}
    ranks.tick_until(10 * TIMEOUT_S)
    when, verdict, _ = ranks.found[2]
    assert list(verdict.missing) == [silent] and 2 * TIMEOUT_S <= when <= 2.2 * TIMEOUT_S


@pytest.mark.parametrize("start_s", range(5, 200, 15))
def test_hang_is_found_in_time_whenever_it_begins(tmp_path: Path, start_s: int) -> None:
    ranks = Ranks(tmp_path, 3)
    ranks.tick_until(start_s)
    ranks.all_are(Kind.WAITING)
    ranks.silent = {1}
    ranks.tick_until(1000)
    assert 0.95 * TIMEOUT_S <= ranks.found[0][0] - start_s <= 1.1 * TIMEOUT_S


def test_rank_that_answers_late_is_not_missing(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 3)
    ranks.all_are(Kind.WAITING)
    ranks.silent, ranks.threads[1].kind = {1}, Kind.MOVING
    ranks.tick_until(0.9 * TIMEOUT_S)
    assert ranks.inquiries.latest() == 1
    ranks.silent = set()
    ranks.tick_until(5 * TIMEOUT_S)
    assert not ranks.found


def test_rank_that_is_stuck_says_so_itself(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 3)
    ranks.all_are(Kind.WAITING)
    ranks.threads[0].kind = Kind.STUCK
    ranks.tick_until(300)
    assert [verdict.missing for _, verdict, _ in ranks.found.values()] == 3 * [{0: 1}]
    assert {rank: is_own for rank, (*_, is_own) in ranks.found.items()} == {0: False, 1: True, 2: False}


def test_leaders_that_wait_for_the_rest_of_the_job_are_no_hang(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 3)
    ranks.all_are(Kind.IDLE)
    ranks.threads[2].kind = Kind.WAITING  # a follower of one of them
    ranks.tick_until(10 * TIMEOUT_S)
    assert not ranks.found
    ranks.silent = {0}
    ranks.tick_until(13 * TIMEOUT_S)
    assert ranks.found[1][1].missing == {0: 1}, "unless the one that gives them work is silent"


def test_all_wait_for_each_other(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2)
    ranks.all_are(Kind.WAITING)
    ranks.tick_until(300)
    when, verdict, _ = ranks.found[0]
    assert verdict.is_deadlock and verdict.must_end and when >= TIMEOUT_S


def test_next_one_judges_when_the_first_is_gone(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 4)
    ranks.all_are(Kind.WAITING)
    ranks.silent = {3}
    ranks.tick_until(0.85 * TIMEOUT_S)
    ranks.silent = {0, 3}  # it has answered, and then it died
    ranks.tick_until(300)
    assert ranks.found[1][1].missing == {3: 0} and ranks.found[1][0] <= 1.35 * TIMEOUT_S


def test_stopped_rank_reads_its_verdict_when_it_goes_on(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 3)
    ranks.all_are(Kind.WAITING)
    ranks.silent = {1}
    ranks.tick_until(300)
    ranks.silent = set()
    ranks.tick()
    assert ranks.found[1][1].missing == {1: 0}


def test_lost_ranks_are_not_waited_for(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 3)
    ranks.all_are(Kind.WAITING)
    ranks.threads[0].kind = Kind.MOVING
    ranks.silent = {2}
    ranks.world.lost = frozenset({2})
    ranks.tick_until(500)
    assert not ranks.found


def test_slow_rank_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ranks = Ranks(tmp_path, 2)
    for rank, inquirer in enumerate(ranks.ranks):
        pace = Pace(rank, f"node{rank}", 0, 0, rank, 0.5, 10.0 + 90.0 * rank, 10, 100)
        inquirer.measure = lambda pace=pace: pace  # type: ignore[misc]
    ranks.tick_until(4 * TIMEOUT_S)
    assert ranks.inquiries.latest() > 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.message.startswith("rank 1 on node1 takes 10.0 times as long")


def test_half_written_answers_are_not_there_yet(tmp_path: Path) -> None:
    inquiries = Inquiries(tmp_path)
    inquiries.open(1)
    inquiries.folder(1).joinpath("1.json").write_text('{"rank": 1, "ki')
    inquiries.folder(1).joinpath(".2.json.ab.tmp").write_text("{}")
    assert inquiries.answers(1) == {} and inquiries.verdict(1) is None
    assert inquiries.publish(1, Verdict({1: None})) and not inquiries.publish(1, Verdict())
    assert inquiries.verdict(1) == Verdict({1: None})


# --- real threads, real processes ---


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def holder_of(pid: int) -> Holder:
    """The holder that the process would be."""
    start_time = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    return replace(Holder.this_process(), pid=pid, start_time=start_time)


def nothing_to_do(watch: Watchdog) -> AbstractContextManager[None]:
    """Say that the main thread waits for work."""
    metrics = Metrics()
    watch.follow(metrics)
    return metrics.phase(IDLE)


def test_stopped_process_is_killed_and_the_others_go_on(tmp_path: Path, child: subprocess.Popen[bytes],
                                                        caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    child.send_signal(signal.SIGSTOP)
    roster = Roster("job", 0, (Holder.this_process(), holder_of(child.pid)))
    with Watchdog(FakeWorld(), roster, tmp_path, 1.0) as watch, nothing_to_do(watch):
        assert child.wait(20) == -signal.SIGKILL
    assert f"pid {child.pid}" in caplog.text and "T (stopped)" in caplog.text
    assert (tmp_path / "job" / "1" / "verdict.json").exists(), "the autopsy stays"


def test_job_ends_where_ranks_cannot_be_lost(tmp_path: Path, child: subprocess.Popen[bytes],
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    world, exited = FakeWorld(), threading.Event()
    world.is_tolerant = False
    monkeypatch.setattr(watchdog, "_LAST_WORDS_S", 0.1)
    monkeypatch.setattr(os, "_exit", lambda code: exited.set())
    roster = Roster("job", 0, (Holder.this_process(), holder_of(child.pid)))
    with Watchdog(world, roster, tmp_path, 1.0) as watch, nothing_to_do(watch):
        assert world.ended.wait(20) and exited.wait(5)


def test_zero_watches_nothing(tmp_path: Path) -> None:
    before = threading.active_count()
    with Watchdog(FakeWorld(), Roster("job", 0, (Holder.this_process(),) * 2), tmp_path, 0.0):
        assert threading.active_count() == before


def test_thread_that_is_stuck_ends_a_rank_that_is_alone(tmp_path: Path) -> None:
    code = f"""
import os, sys, threading, types
from pathlib import Path
from hpcinfer.log import start_logging
from hpcinfer.recovery.hangs.autopsy import exchange_roster
from hpcinfer.recovery.hangs.watchdog import Watchdog
from hpcinfer.comm.serial import SerialGroup
start_logging(is_root=True)
with Watchdog(SerialGroup(), exchange_roster(SerialGroup()), Path({str(tmp_path)!r}), 1.0):
    namespace = {{"__name__": "hpcinfer.recovery.journal", "os": os}}
    exec("def flush(pipe):\\n    os.read(pipe, 1)", namespace)
    namespace["flush"](os.pipe()[0])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1, run
    assert "hang: rank 0/1" in run.stderr and "flush" in run.stderr and "MainThread has stood still" in run.stderr
    assert not list(tmp_path.iterdir())


def test_nobody_else_is_killed(child: subprocess.Popen[bytes]) -> None:
    holder = holder_of(child.pid)
    for other in (replace(holder, start_time=1), replace(holder, boot_id="other"), replace(holder, pid_namespace=1)):
        assert not watchdog._end_process(other), asdict(other)
    assert child.poll() is None
    assert watchdog._end_process(holder) and child.wait(10) == -signal.SIGKILL
    assert not watchdog._end_process(holder)


def test_process_is_described(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGSTOP)
    wait_until(lambda: describe_process(child.pid).startswith("T (stopped)"), timeout=10)
    assert "(1 threads)" in describe_process(child.pid)
    assert describe_process(2**22 + 1) == "no such process"

