"""What Slurm says of a job that is told to stop. The texts are those of Slurm 22.05, cut to some of their fields."""

import os
import stat

import pytest

from hpcinfer.recovery import slurm_job
from hpcinfer.recovery.slurm_job import SlurmJob, job_name, objection, parse_job

HEAD = "JobId={} JobName=job.sh UserId=u(7) Nice=0 JobState={} Reason={} Dependency=(null) Requeue=1 Restarts={}"
TIMES = " BatchFlag=1 RunTime=00:00:02 TimeLimit={} TimeMin=N/A StartTime={} EndTime={} Deadline=N/A"
TAIL = " PreemptEligibleTime=1000 PreemptTime={} SuspendTime=None NodeList=n0 Command=/h/job.sh --x y=z WorkDir=/h"


def text(state, *, reason="None", restarts=0, limit="00:05:00", start=1000, end=1300, preempt="None", job=7):
    return HEAD.format(job, state, reason, restarts) + TIMES.format(limit, start, end) + TAIL.format(preempt)


STOPPED = {  # how a job looked a moment after its SIGTERM
    "signal of the user": (text("RUNNING"), ""),
    "scancel": (text("COMPLETING", end=1002), "the job was cancelled"),
    "scancel, state as newer versions say it": (text("CANCELLED", end=1002), "the job was cancelled"),
    "scancel of a job without a limit": (text("COMPLETING", limit="UNLIMITED", end=1002), "the job was cancelled"),
    "time limit": (text("COMPLETING", reason="TimeLimit", limit="00:01:00", end=1088), ""),
    "time limit, no reason given": (text("COMPLETING", limit="00:01:00", end=1088), ""),
    "time limit, state as newer versions say it": (text("TIMEOUT", limit="00:01:00", end=1088), ""),
    "preemption that cancels": (text("COMPLETING", end=1036, preempt=1036), ""),
    "preemption, within its grace time": (text("RUNNING", preempt=1100), ""),
    "preemption that requeues": (text("COMPLETING", restarts=1), "Slurm starts the job again by itself"),
    "somebody else has requeued it": (text("PENDING", reason="BeginTime", restarts=1, start="Unknown", end="Unknown"),
                                      "Slurm starts the job again by itself"),
}  # fmt: skip


@pytest.mark.parametrize("case", STOPPED)
def test_only_what_neither_the_user_nor_slurm_has_decided_is_requeued(case):
    printed, expected = STOPPED[case]
    assert objection(parse_job(printed, "7"), {}) == expected


def test_restarts_of_the_past_do_not_count():
    job = parse_job(text("RUNNING", restarts=2), "7")
    assert objection(job, {"SLURM_RESTART_COUNT": "2"}) == ""
    assert objection(job, {"SLURM_RESTART_COUNT": "1"}) == "Slurm starts the job again by itself"


def test_what_slurm_does_not_say_is_never_guessed():
    assert objection(None, {}) == "Slurm does not answer"
    assert parse_job("", "7") is None
    assert parse_job("slurm_load_jobs error: Invalid job id specified", "7") is None


def test_fields_are_read_by_name():
    assert parse_job(text("RUNNING", limit="1-02:03:04"), "7") == SlurmJob("RUNNING", "None", 1000, 1300, 93784, 0)
    assert parse_job(text("RUNNING", limit="UNLIMITED", end="Unknown"), "7").end is None


def test_command_line_of_the_job_cannot_pretend_to_be_a_field():
    job = parse_job(text("RUNNING") + " Comment=JobState=PENDING Reason=TimeLimit JobState=PENDING", "7")
    assert (job.state, job.reason) == ("RUNNING", "None")


def test_of_an_array_the_own_task_is_found():
    array = text("RUNNING", job=7) + "\n" + text("COMPLETING", job=8, end=1001)
    assert parse_job(array, "8").state == "COMPLETING"
    assert parse_job(array, "9") is None


def test_task_of_an_array_is_named_as_slurm_names_it():
    assert job_name({"SLURM_JOB_ID": "8"}) == "8"
    assert job_name({"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}) == "7_0"
    assert job_name({}) == ""


@pytest.fixture
def scontrol(tmp_path):
    """Put a script in the place of scontrol; gives the environment in which it is found."""

    def install(script):
        path = tmp_path / "scontrol"
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}

    return install


def test_slurm_is_asked_for_seconds_since_1970(scontrol):
    check = '[ "$*" = "--oneliner show job 7" ] && [ "$SLURM_TIME_FORMAT" = %s ]'
    environment = scontrol(f'{check} && echo "{text("X")}"\n')
    assert slurm_job.ask(environment) == SlurmJob("X", "None", 1000, 1300, 300, 0)


def test_no_slurm_is_no_error(caplog):
    assert slurm_job.ask({}) is None and not caplog.text
    environment = {"SLURM_JOB_ID": "7", "PATH": "/nowhere"}
    assert slurm_job.ask(environment) is None
    assert "scontrol: No such file or directory" in caplog.text
    assert slurm_job.requeue(environment) == (False, "scontrol: No such file or directory")


def test_slurm_that_does_not_answer_is_not_waited_for(scontrol, monkeypatch):
    environment = scontrol("exec sleep 60\n")
    monkeypatch.setattr(slurm_job, "_TIMEOUT_S", 0.2)
    assert slurm_job.requeue(environment) == (False, "no answer within 0 s")


def test_refusal_of_slurm_is_passed_on(scontrol):
    environment = scontrol("echo 'Requested operation is presently disabled' >&2; echo more >&2; exit 1\n")
    assert slurm_job.requeue(environment) == (False, "Requested operation is presently disabled")
