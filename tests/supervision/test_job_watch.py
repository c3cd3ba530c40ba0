"""The job directory as a supervisor sees it: completeness, deaths, claims that are released."""

import json
import signal

import pytest

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.recovery.attempts import open_attempt
from hpcinfer.recovery.claims import Claimer
from hpcinfer.recovery.deaths import CRASH, HUNG, KILLED, NODE_LOST
from hpcinfer.recovery.index import Index, build_index
from hpcinfer.recovery.inflight import CrashFile, InFlight, replica_name
from hpcinfer.recovery.journal import PartWriter
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.leases import Lease
from hpcinfer.recovery.manifest import open_manifest
from hpcinfer.supervision.job_watch import JobWatch

NUM_ROWS = 40


@pytest.fixture
def paths(tmp_path) -> JobPaths:
    source = tmp_path / "in.txt"
    source.write_text("".join(f"prompt {row}\n" for row in range(NUM_ROWS)))
    paths = JobPaths(tmp_path / "out.jsonl")
    open_manifest(paths, {"seed": 1}, SerialGroup())
    build_index(paths, source, "text", SerialGroup())
    return paths


class DeadStep:
    """What a step leaves, written by this process; with `move` by a process of another node."""

    def __init__(self, paths: JobPaths, step: str, rows=(), crash: str = "") -> None:
        self.paths, self.part = paths, f"part-{step}"
        self.lease = Lease(paths.leases, 180.0).start()
        self.writer = PartWriter(paths, self.part)
        self.flight = InFlight(paths, replica_name(step, "0"), part=self.part)
        for row in rows:
            self.flight.opened(row)
        with CrashFile(paths, replica_name(step, "0")) as file:
            file.note(crash)

    def finish(self, rows, *, is_error=False) -> "DeadStep":
        for row in rows:
            self.writer.append(row, 1, b"{}", is_error=is_error)
        self.writer.flush()
        return self


def finish(paths: JobPaths, rows, part="p", attempt=0, *, is_error=False) -> None:
    with PartWriter(paths, part, attempt) as writer:
        for row in rows:
            writer.append(row, 1, b"{}", is_error=is_error)


def causes(paths: JobPaths) -> list[str]:
    return [json.loads(path.read_bytes())["cause"] for path in sorted(paths.deaths.iterdir())]


def test_job_is_complete_when_the_last_row_is_there(paths, tmp_path):
    watch = JobWatch(paths, 180.0)
    assert watch.is_open() and not watch.is_complete()
    finish(paths, range(1, NUM_ROWS))
    assert not watch.is_complete() and (watch.num_done, watch.num_rows) == (NUM_ROWS - 1, NUM_ROWS)
    finish(paths, [0], "q")
    assert watch.is_complete() and watch.merged() is None
    empty = JobWatch(JobPaths(tmp_path / "none.jsonl"), 180.0)
    assert not empty.is_open() and not empty.is_complete() and (empty.num_done, empty.num_rows) == (0, 0)


def test_retry_of_errors_is_seen(paths):
    watch = JobWatch(paths, 180.0)
    finish(paths, range(NUM_ROWS), is_error=True)
    assert watch.is_complete()
    assert open_attempt(paths, Index.open(paths.index), SerialGroup(), retry_errors=True) == 1
    assert not watch.is_complete()
    finish(paths, range(NUM_ROWS), "q", 1)
    assert watch.is_complete()


def test_claims_of_a_dead_step_are_free_at_once(paths):
    """Nobody else could tell: its lease is one of a living process, as from another node."""
    dead = DeadStep(paths, "s.0-1")
    taken = Claimer(paths, Index.open(paths.index), dead.lease).claim()
    other = Lease(paths.leases, 180.0).start()
    claimer = Claimer(paths, Index.open(paths.index), other, poll_s=0.0)
    while (claim := claimer.claim()) is not None:
        assert claim.block != taken.block
    watch = JobWatch(paths, 180.0)
    watch.bury("s.1-1", 137, is_node_lost=False)
    assert claimer.claim() is None
    other.close()
    other = Lease(paths.leases, 180.0).start()
    watch.bury("s.0-1", 137, is_node_lost=False)
    claimer = Claimer(paths, Index.open(paths.index), other, poll_s=0.0)
    claims = []
    while (claim := claimer.claim()) is not None:
        claims.append(claim)
    assert (taken.block, 2) in [(claim.block, claim.generation) for claim in claims]


def test_progress_counts_good_rows(paths):
    watch = JobWatch(paths, 180.0)
    DeadStep(paths, "s.0-1").finish([1, 2, 3]).finish([4], is_error=True)
    DeadStep(paths, "s.1-1").finish([5])
    found = [watch.bury(step, 137, is_node_lost=False).num_finished for step in ("s.0-1", "s.0-1", "never begun")]
    assert found == [3, 0, 0]


def test_row_that_crashes_alone_is_at_fault(paths):
    watch, crash = JobWatch(paths, 180.0), "Fatal Python error: Segmentation fault"
    for step, rows, words in (("a", [4], crash), ("b", [4, 5], crash), ("c", [4], ""), ("d", [], crash)):
        DeadStep(paths, step, rows, words)
    faults = [watch.bury(step, 1, is_node_lost=False).is_rows_fault for step in "abcd"]
    assert faults == [True, False, False, False]


@pytest.mark.parametrize(("crash", "code", "is_node_lost", "cause"), [
    ("", 137, False, KILLED),
    ("", 0, False, KILLED),
    ("", 1, False, KILLED),
    ("Fatal Python error: Segmentation fault", 139, False, CRASH),
    ("Fatal Python error: Segmentation fault", 1, False, CRASH),
    ("", 128 + signal.SIGSEGV, False, CRASH),
    ("", 128 + signal.SIGABRT, False, CRASH),
    ("Traceback: what a survivor said of a peer that was killed", 137, False, KILLED),
    ("hang: rank 3 of 4", 137, False, HUNG),
    ("hang: rank 3 of 4", 1, False, HUNG),
    ("Fatal Python error: Bus error", 135, True, NODE_LOST),
])
def test_cause_of_a_death(crash, code, is_node_lost, cause, paths):
    DeadStep(paths, "s.0-1", [4], crash)
    JobWatch(paths, 180.0).bury("s.0-1", code, is_node_lost=is_node_lost)
    assert causes(paths) == [cause]


def test_rows_in_flight_are_counted_once_the_step_has_begun(paths):
    watch = JobWatch(paths, 180.0)
    assert watch.num_in_flight("s.0-1") is None
    step = DeadStep(paths, "s.0-1", [4, 5])
    watch = JobWatch(paths, 180.0)
    assert watch.num_in_flight("s.0-1") == 2
    step.flight.closed(4)
    step.flight.closed(5)
    assert watch.num_in_flight("s.0-1") == 0


def test_silence_is_a_lease_that_stands_still(paths):
    step = DeadStep(paths, "s.0-1", [4])
    watch = JobWatch(paths, 0.0)
    assert not watch.is_silent("s.0-1")  # seen for the first time
    assert watch.is_silent("s.0-1")
    step.lease.beat()
    assert not watch.is_silent("s.0-1")
    assert not JobWatch(paths, 180.0).is_silent("s.1-1")
