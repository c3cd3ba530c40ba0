"""Who asks to stop, and what becomes of the job: signals only set a flag, Slurm is asked at the end."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from hpcinfer.recovery import slurm_job
from hpcinfer.recovery.journal import PartWriter
from hpcinfer.recovery.slurm_job import Answer, SlurmJob
from hpcinfer.recovery.stopping import Stopped, Stopper, agree_to_stop, farewell, put_back, say_farewell
from hpcinfer.recovery.time_limit import Period, TimeLimit


def limit(left_s):
    return TimeLimit.of(Period(left_s, 1000.0, "test"), 0.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signal_is_the_reason(number):
    with Stopper() as stopper:
        assert stopper.reason() is None
        os.kill(os.getpid(), number)
        assert stopper.reason() == number.name and not stopper.is_cancelled


def test_handlers_are_those_from_before_afterwards():
    numbers = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT
    before = [signal.getsignal(number) for number in numbers]
    with Stopper():
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in numbers] == before


def test_first_reason_stays_but_the_users_ctrl_c_counts_more():
    with Stopper(limit(-1.0)) as stopper:
        assert stopper.reason() == "time limit"
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        stopper.stop("of another rank")
        assert stopper.reason() == "SIGUSR1"
        os.kill(os.getpid(), signal.SIGINT)
        assert stopper.reason() == "cancelled" and stopper.is_cancelled


def test_reason_of_another_rank_is_taken_over():
    stopper = Stopper()
    stopper.stop("SIGTERM")
    assert stopper.reason() == "SIGTERM"


def child(code):
    """Start a process with a stopper; returns it once the code has printed a line."""
    head = "import signal, sys, time\nfrom hpcinfer.recovery.stopping import Stopper\nstopper = Stopper().__enter__()\n"
    process = subprocess.Popen([sys.executable, "-c", head + code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_second_ctrl_c_ends_the_process_at_once():
    code = "print('ready', flush=True)\nwhile not stopper.reason(): time.sleep(0.01)\nprint('asked', flush=True)\n"
    with child(code + "time.sleep(60)") as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == -signal.SIGINT


def test_process_in_the_background_of_a_shell_goes_on_at_ctrl_c():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stopper() as stopper:
            os.kill(os.getpid(), signal.SIGINT)
            assert stopper.reason() is None
    finally:
        signal.signal(signal.SIGINT, previous)


def test_time_runs_out():
    stopper = Stopper(limit(0.05))
    assert stopper.reason() is None
    time.sleep(0.06)
    assert stopper.reason() == "time limit" and not stopper.is_cancelled


def test_work_is_taken_while_it_would_be_finished_in_time():
    stopper = Stopper(limit(100.0))
    assert stopper.has_time_for(10**9)  # nobody knows how long that takes
    stopper.pace.observe(0, now=0.0)
    stopper.pace.observe(20, now=10.0)
    assert stopper.has_time_for(190) and not stopper.has_time_for(210)
    stopper.time_limit = None
    assert stopper.has_time_for(10**9)
    stopper.stop("SIGTERM")
    assert not stopper.has_time_for(0)


STOPPED = Stopped("SIGTERM", 5, 40, num_kept=3)
SLURM = {"SLURM_JOB_ID": "7"}


@pytest.fixture
def job(make_job):
    """A job of 40 rows, five of which are finished, one of them with an error."""
    paths, index = make_job(40)
    with PartWriter(paths, "part") as writer:
        for row in range(5):
            writer.append(row, 1, b"{}", is_error=row == 3)
    return SimpleNamespace(paths=paths, index=index, attempt=0)


def finish(job):
    with PartWriter(job.paths, "rest") as writer:
        for row in range(5, 40):
            writer.append(row, 1, b"{}")


def agree(ranks, job, reasons):
    def on_rank(group):
        stopper = Stopper()
        if reasons[group.rank]:
            stopper.stop(reasons[group.rank])
        return agree_to_stop(stopper, job, group)

    found = set(ranks(len(reasons), on_rank))
    assert len(found) == 1
    return found.pop()


def test_job_ends_for_all_ranks_where_one_has_a_reason(ranks, job):
    assert agree(ranks, job, ["", "", "SIGTERM"]) == Stopped("SIGTERM", 5, 40)
    assert agree(ranks, job, ["time limit", "SIGUSR1"]) == Stopped("time limit", 5, 40)
    assert agree(ranks, job, ["SIGTERM", "", "cancelled"]) == Stopped("cancelled", 5, 40)


def test_job_goes_on_without_a_reason_or_when_nothing_is_left_to_do(ranks, job):
    assert agree(ranks, job, ["", ""]) is None
    finish(job)
    assert agree(ranks, job, ["SIGTERM", ""]) is None


def test_rows_that_are_to_be_computed_again_are_left_to_do(ranks, job):
    finish(job)
    job.attempt = 1
    assert agree(ranks, job, ["SIGTERM"]) == Stopped("SIGTERM", 40, 40)


START = "stopped early (SIGTERM): 5 of 40 rows are finished, 3 more are kept where they were; "
RESUME = "the same command goes on, with any number of ranks"


@pytest.fixture
def slurm(monkeypatch):
    """Slurm, as told; gives the jobs that were put back into its queue."""
    requeued = []

    def install(job, answer=Answer(True, "")):  # noqa: B008
        monkeypatch.setattr(slurm_job, "ask", lambda environment: job)
        monkeypatch.setattr(slurm_job, "requeue", lambda environment: requeued.append(environment) or answer)
        return requeued

    return install


def test_where_the_job_stands_is_said_before_it_is_put_back(slurm, caplog, monkeypatch):
    slurm(SlurmJob("RUNNING"))
    monkeypatch.setattr("os.environ", SLURM)
    caplog.set_level("INFO")
    say_farewell(STOPPED, requeue=True)
    assert caplog.messages == [START + RESUME, "Slurm starts job 7 again"]


def test_job_is_requeued_when_that_was_asked_for(slurm):
    requeued = slurm(SlurmJob("RUNNING"))
    assert put_back(STOPPED, SLURM) == "Slurm starts job 7 again" and requeued == [SLURM]


def test_job_is_not_requeued_without_the_option_or_outside_slurm(slurm, caplog):
    requeued = slurm(SlurmJob("RUNNING"))
    caplog.set_level("INFO")
    say_farewell(STOPPED, requeue=False)
    assert put_back(STOPPED, {}) == "" and caplog.messages == [farewell(STOPPED)] == [START + RESUME]
    assert not requeued


def test_what_the_user_cancelled_is_never_requeued(slurm):
    requeued = slurm(SlurmJob("COMPLETING", start=1000, end=1002, limit_s=300))
    assert put_back(STOPPED, SLURM) == "not requeued: the job was cancelled"
    slurm(SlurmJob("RUNNING"))
    assert put_back(STOPPED._replace(reason="cancelled"), SLURM) == "not requeued: the job was cancelled"
    assert not requeued


def test_job_that_slurm_requeues_is_not_requeued_twice(slurm):
    requeued = slurm(SlurmJob("COMPLETING", restarts=1))
    assert "not requeued: Slurm starts the job again by itself" in put_back(STOPPED, SLURM)
    assert not requeued


def test_job_that_slurm_does_not_requeue_says_why(slurm):
    slurm(SlurmJob("RUNNING"), Answer(False, "Requested operation is presently disabled"))
    assert put_back(STOPPED, SLURM) == "not requeued: Requested operation is presently disabled"
