"""Claims of a job whose time is limited: blocks are taken while they would be finished, then the job is stopped."""

import time

import pytest

from hpcinfer.recovery.journal import PartWriter
from hpcinfer.recovery.leases import Lease
from hpcinfer.recovery.punctual import PunctualClaimer
from hpcinfer.recovery.stopping import Stopper
from hpcinfer.recovery.time_limit import TimeLimit


class Work:
    """A job of 400 rows, and its claimer; rows take as long as the test says."""

    def __init__(self, paths, index, lease, writer, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.stopper, self.writer, self.open = Stopper(), writer, []
        self.claimer = PunctualClaimer(paths, index, lease, 0, self.stopper)
        self.block_rows = len(index.block_rows(0))

    def stop_in(self, seconds):
        self.stopper.time_limit = TimeLimit(self.now + seconds, "test")

    def claim(self):
        claim = self.claimer.claim()
        if claim is not None:
            self.open += claim.rows.tolist()
        return claim

    def finish(self, num_rows, row_s):
        for row in self.open[:num_rows]:
            self.writer.append(row, 1, b"{}")
            self.now += row_s
        del self.open[:num_rows]
        self.writer.flush()
        self.claimer.refresh()


@pytest.fixture
def work(make_job, monkeypatch):
    paths, index = make_job(400)
    with Lease(paths.leases, 1000.0) as lease, PartWriter(paths, "part") as writer:
        yield Work(paths, index, lease, writer, monkeypatch)
        monkeypatch.undo()


def test_without_a_limit_all_is_claimed(work):
    while work.claim():
        work.finish(1000, row_s=100.0)
    assert work.claimer.is_complete() and work.stopper.reason() is None


def test_blocks_are_claimed_while_there_is_time_for_all_that_is_open(work):
    work.claim()
    work.finish(1000, row_s=2.0)
    work.stop_in(2.0 * (2 * work.block_rows + 1))
    assert work.claim() and work.claim()
    assert work.claim() is None  # three blocks would not be finished
    assert work.stopper.reason() is None  # two are worked on
    work.finish(work.block_rows, row_s=0.5)  # faster than expected
    assert work.claim()


def test_job_stops_when_nothing_is_open_and_nothing_can_be_begun(work, caplog):
    caplog.set_level("INFO", "hpcinfer")
    work.claim()
    work.finish(1000, row_s=2.0)
    work.stop_in(2.0 * work.block_rows + 1)
    assert work.claim()
    work.finish(len(work.open) - 1, row_s=2.0)
    assert work.claim() is None and work.claim() is None
    assert work.stopper.reason() is None
    work.finish(1, row_s=0.5)
    assert work.claim() is None
    assert work.stopper.reason() == "time limit"
    assert caplog.text.count("no more work is taken") == 1


def test_work_is_taken_as_long_as_nobody_knows_how_long_it_takes(work):
    work.stop_in(0.1)
    assert work.claim() and work.claim()


def test_nothing_is_claimed_by_a_job_that_is_stopping(work):
    work.stopper.stop("SIGTERM")
    assert work.claim() is None


def test_job_that_is_complete_is_not_stopped(work):
    while work.claim():
        pass
    work.finish(1000, row_s=1.0)
    work.stop_in(0.0001)
    assert work.claim() is None
    assert work.claimer.is_complete() and work.stopper._told == ""


def test_adopted_blocks_count_as_open(work):
    claim = work.claim()
    work.finish(len(claim.rows), row_s=2.0)
    others = [block for block in range(6) if block != claim.block][:2]
    work.claimer.adopt(others)
    work.stop_in(2.0 * (2 * work.block_rows + 1))
    assert work.claim() is None


def test_nothing_may_be_adopted(work):
    work.claimer.adopt([])
    assert work.claim()
