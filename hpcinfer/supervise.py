"""`hpcinfer supervise`: one MPI step per replica; what dies is started again. Needs neither MPI nor torch."""

import argparse
import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcinfer.cli import add_options, given_options, read_options
from hpcinfer.config import EngineOptions, JobMeshOptions, JobOptions, ModelOptions, SamplingParams, SuperviseOptions
from hpcinfer.errors import EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE, EXIT_USAGE
from hpcinfer.log import start_logging

if TYPE_CHECKING:
    from hpcinfer.recovery.stopping import Stopper
    from hpcinfer.supervision.base import Outcome
    from hpcinfer.supervision.job_watch import JobWatch
    from hpcinfer.supervision.launchers import Launcher
    from hpcinfer.supervision.nodes import Placement
    from hpcinfer.supervision.step import Step

HELP = "run a job as one MPI step per replica, and start again those that die"
EXAMPLE = "hpcinfer supervise -dp 2 --model examples/demo_model --input prompts.jsonl --output completions.jsonl"

log = logging.getLogger(__name__)

_STEP = "hpcinfer.run"
_PASSED_ON: dict[type, str] = {  # what the steps get: all of `hpcinfer run`
    ModelOptions: "model",
    JobOptions: "job",
    JobMeshOptions: "mesh (each replica is a step of its own)",
    EngineOptions: "engine (changes no result)",
    SamplingParams: "sampling (rows that say nothing else)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command, and all of `hpcinfer run`."""
    add_options(parser, SuperviseOptions, title="supervisor")
    for config, title in _PASSED_ON.items():
        add_options(parser, config, title=title, given_only=config is SamplingParams)


def command(args: argparse.Namespace) -> int:
    """Supervise the job until it is complete, then merge."""
    from hpcinfer.recovery.job import check_job_options
    from hpcinfer.recovery.leases import incarnation_name
    from hpcinfer.recovery.stopping import Stopper
    from hpcinfer.recovery.time_limit import TimeLimit, find_period
    from hpcinfer.supervision.job_watch import JobWatch
    from hpcinfer.supervision.loop import Supervisor
    from hpcinfer.supervision.nodes import Roster
    from hpcinfer.supervision.plan import make_plan

    start_logging(is_root=True, who="supervisor")
    job = read_options(args, JobOptions)
    check_job_options(job)
    plan = make_plan(read_options(args, SuperviseOptions), read_options(args, JobMeshOptions), job, os.environ)
    period = find_period(job.time_limit)
    watch = JobWatch.of(Path(job.output), job.lease_timeout)
    steps = _Steps(plan.launcher, {config: given_options(args, config) for config in _PASSED_ON})
    with Stopper(TimeLimit.of(period, job.stop_margin) if period else None) as stopper:
        supervisor = Supervisor(plan.rules, Roster(plan.nodes), watch, steps.start, name=incarnation_name(),
                                cluster=plan.allocation, told_to_stop=stopper.reason)  # fmt: skip
        log.info("%d replicas of %d ranks, started by %s", plan.rules.num_replicas, plan.rules.ranks,
                 plan.launcher.name)
        return _conclude(supervisor.run(), watch, job, stopper)


@dataclass(frozen=True)
class _Steps:
    """Starts the replicas, each as its own `hpcinfer run`."""

    launcher: "Launcher"
    options: dict[type, dict[str, Any]]  # by config dataclass: values by field name

    def start(self, name: str, placement: "Placement", opens_retry: bool) -> "Step":
        """Start a step."""
        from hpcinfer.supervision.flags import to_flags
        from hpcinfer.supervision.step import LaunchedStep

        flags = [flag for config, values in self.options.items()
                 for flag in to_flags(self._of_a_step(values, opens_retry=opens_retry), config,
                                      given_only=config is SamplingParams)]  # fmt: skip
        program = [sys.executable, "-m", _STEP, *flags]
        return LaunchedStep(name, self.launcher.command(name, placement, program))

    def _of_a_step(self, values: dict[str, Any], *, opens_retry: bool) -> dict[str, Any]:
        """What differs: one replica, and what concerns the whole job is for the supervisor to do."""
        changed: dict[str, Any] = {
            "data_parallel_size": 1, "retry_errors": opens_retry, "fail_on_error": False, "requeue": False,
            "merge": False,
        }  # fmt: skip
        if (limit_s := values.get("time_limit")) is not None:
            changed["time_limit"] = max(limit_s - (time.monotonic() - _START), 1.0) // 1
        return {**values, **{name: value for name, value in changed.items() if name in values}}


_START = time.monotonic()


def _conclude(outcome: "Outcome", watch: "JobWatch", job: JobOptions, stopper: "Stopper") -> int:
    """Do what is left when no step runs any more; returns the exit code."""
    from hpcinfer.supervision.base import Outcome

    is_complete = watch.is_complete()
    if outcome is Outcome.COMPLETE:
        return _merge(watch, job, stopper)
    if outcome is Outcome.STOPPED:
        is_late = is_complete and watch.merged() and not job.retry_errors  # a step was faster than the signal
        return _merge(watch, job, stopper) if is_late else _stopped(watch, job, stopper)
    log.error("%s; %d of %d rows are finished, and kept", outcome.value, watch.num_done, watch.num_rows)
    return EXIT_USAGE if outcome is Outcome.REFUSED else EXIT_FAILED


def _merge(watch: "JobWatch", job: JobOptions, stopper: "Stopper") -> int:
    """Write the output in a process of its own, unless a step has; a signal ends that, and nothing is lost."""
    if watch.merged() is None:
        process = subprocess.Popen([sys.executable, "-m", "hpcinfer", "merge", job.output], stdout=2,
                                   start_new_session=True)  # fmt: skip
        while process.poll() is None:
            if stopper.reason() is not None:
                process.terminate()
                process.wait()
                return _stopped(watch, job, stopper)
            time.sleep(0.05)
    report = watch.merged()
    if report is None:
        return EXIT_FAILED
    log.info("the job is complete: %d rows, %d errors", report.num_rows, report.num_failed)
    print(job.output, flush=True)
    failed = report.num_conflicts > 0 or (job.fail_on_error and report.num_failed > 0)
    return EXIT_FAILED if failed else EXIT_DONE


def _stopped(watch: "JobWatch", job: JobOptions, stopper: "Stopper") -> int:
    from hpcinfer.recovery.stopping import Stopped, say_farewell

    stopped = Stopped(stopper.reason() or "a step was stopped", watch.num_done, watch.num_rows)
    say_farewell(stopped, requeue=job.requeue)
    return EXIT_RESUMABLE


if __name__ == "__main__":
    from hpcinfer.__main__ import main

    raise SystemExit(main(["supervise", *sys.argv[1:]]))
