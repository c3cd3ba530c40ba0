"""The Slurm job that this process runs in, as Slurm's own commands see it. Nothing here needs Slurm to be there.

Slurm is asked seldom, by one process of the job, and never waited for long: thousands of jobs share one controller.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

log = logging.getLogger(__name__)

_TIMEOUT_S = 5.0
_LEAVING = ("COMPLETING", "CANCELLED")  # how a cancelled job looks, and most others that end
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")


class SlurmJob(NamedTuple):
    """What `scontrol show job` says; times are seconds since 1970."""

    state: str
    reason: str = "None"
    start: float | None = None
    end: float | None = None
    limit_s: float | None = None  # None: unlimited
    restarts: int = 0
    is_preempted: bool = False


class Answer(NamedTuple):
    """What a command of Slurm has printed, or in a line why it could not."""

    is_done: bool
    text: str


def job_name(environment: Mapping[str, str] = os.environ) -> str:
    """The job as Slurm's commands want it, of an array the one task; empty outside Slurm. Not collective."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID", ""), environment.get("SLURM_ARRAY_TASK_ID", "")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID", "")


def ask(environment: Mapping[str, str] = os.environ) -> SlurmJob | None:
    """Ask Slurm about this job; None if there is none, or no answer in time. Not collective."""
    name = job_name(environment)
    answer = _call(["scontrol", "--oneliner", "show", "job", name], environment) if name else Answer(False, "")
    if name and not answer.is_done:
        log.warning("Slurm does not say how job %s is: %s", name, answer.text)
    return parse_job(answer.text, environment.get("SLURM_JOB_ID", "")) if answer.is_done else None


def requeue(environment: Mapping[str, str] = os.environ) -> Answer:
    """Have Slurm start this job again from the beginning of its script. Not collective."""
    return _call(["scontrol", "requeue", job_name(environment)], environment)


def parse_job(text: str, job_id: str) -> SlurmJob | None:
    """Read a job of what `scontrol --oneliner show job` prints; the tasks of an array may come together."""
    for line in text.splitlines():
        fields = dict(reversed(re.findall(r"(\S+?)=(\S*)", line)))  # the first of a name counts
        if fields.get("JobId") == job_id and "JobState" in fields:
            restarts = fields.get("Restarts", "")
            return SlurmJob(
                fields["JobState"], fields.get("Reason", ""), _time(fields.get("StartTime")),
                _time(fields.get("EndTime")), _duration(fields.get("TimeLimit")),
                int(restarts) if restarts.isdigit() else 0, _time(fields.get("PreemptTime")) is not None,
            )  # fmt: skip
    return None


def objection(job: SlurmJob | None, environment: Mapping[str, str] = os.environ) -> str:
    """Say why a job that was told to stop must not be put back into the queue by us; empty if it may be.

    Not collective. A cancelled job looks as any other that is ending, but it has neither reached its limit nor was
    it preempted, nor does it wait to run again.
    """
    if job is None:
        return "Slurm does not answer"
    before = environment.get("SLURM_RESTART_COUNT", "")
    if job.state in _WAITING or job.restarts > (int(before) if before.isdigit() else 0):
        return "Slurm starts the job again by itself"
    is_over = job.reason == "TimeLimit" or _has_run_out(job)
    if job.state in _LEAVING and not is_over and not job.is_preempted:
        return "the job was cancelled"
    return ""


def _has_run_out(job: SlurmJob) -> bool:
    times = job.start, job.end, job.limit_s
    return None not in times and job.end - job.start >= job.limit_s  # type: ignore[operator]


def _call(argv: list[str], environment: Mapping[str, str]) -> Answer:
    settings = {**environment, "SLURM_TIME_FORMAT": "%s", "LC_ALL": "C"}
    try:
        done = subprocess.run(argv, env=settings, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              errors="replace", timeout=_TIMEOUT_S, check=False)  # fmt: skip
    except subprocess.TimeoutExpired:
        return Answer(False, f"no answer within {_TIMEOUT_S:.0f} s")
    except OSError as error:
        return Answer(False, f"{argv[0]}: {error.strerror or error}")
    if done.returncode == 0:
        return Answer(True, done.stdout)
    return Answer(False, next(iter(done.stderr.splitlines()), f"exit code {done.returncode}"))


def _time(text: str | None) -> float | None:
    return float(text) if text and text.isdigit() and text != "0" else None


def _duration(text: str | None) -> float | None:
    """Read D-HH:MM:SS or HH:MM:SS; None for UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text or "")
    if not match:
        return None
    days, hours, minutes, seconds = (int(number or 0) for number in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
