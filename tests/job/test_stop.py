"""Stop a job in the middle, go on with another mesh: the same file, and what was in flight is not computed again."""

import json
import os
import re
import signal
import stat
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from golden import DEMO_MODEL, Output, demo_prompts, read_output, run_to_output, varied_rows, write_rows
from jobs import CompletedRun, Job, fault_tolerance, run_job, start_job, wait_until

NUM_ROWS = 720
FLAGS = ("--seed", "5", "--lease-timeout", "30")
SLOWLY = ("--max-num-seqs", "3")  # time to stop a job, with a row in the middle; changes no result
BUSY_S = 5  # that a busy machine may take longer
STOPPED = re.compile(r"stopped early \((.+?)\): (\d+) of (\d+) rows are finished(?:, (\d+) more are kept)?")
RESUME = "the same command goes on, with any number of ranks"


@pytest.fixture(scope="module")
def prompts(folder: Path) -> Path:
    """Rows that are long enough to be stopped in the middle, of every kind."""
    rows = varied_rows(demo_prompts(40) * (NUM_ROWS // 40))
    for row in rows:
        if row["max_tokens"] and "logprobs" not in row:
            row.update(max_tokens=row["max_tokens"] * 8, ignore_eos=True)
    return write_rows(folder / "in.jsonl", rows)


@pytest.fixture(scope="module")
def whole(folder: Path, prompts: Path) -> Output:
    """The undisturbed run."""
    return run_to_output(folder / "whole", 2, DEMO_MODEL, prompts, *FLAGS)


class Place:
    """A job in a folder of its own, which is stopped and started again."""

    def __init__(self, folder: Path, prompts: Path) -> None:
        folder.mkdir()
        self.output = folder / "out.jsonl"
        self.arguments = ["--model", DEMO_MODEL, "--input", prompts, "--output", self.output, *FLAGS]

    def start(
        self, ranks: int, *flags: str, env: dict[str, str] | None = None, launcher: tuple[str, ...] = ()
    ) -> Job:
        """Start it on so many ranks, slowly."""
        return start_job(ranks, *self.arguments, *SLOWLY, *flags, env=env, flags=launcher)

    def num_finished(self) -> int:
        """Rows in the journal."""
        sidecars = Path(f"{self.output}.job", "parts").glob("*.sidecar")
        return sum(max(path.stat().st_size - 32, 0) // 32 for path in sidecars)

    def wait_for_rows(self, job: Job, count: int = 1) -> None:
        """Wait until so many more rows are finished."""
        wanted = self.num_finished() + count
        wait_until(lambda: self.num_finished() >= wanted or not job.is_running)
        assert job.is_running, job.stderr

    def finish(self, ranks: int, *flags: str) -> Output:
        """Run the rest."""
        run = run_job(ranks, *self.arguments, *flags)
        assert run.rc == 0, run.stderr
        return read_output(self.output)

    def snapshots(self) -> list[Any]:
        """Snapshots that are there."""
        return list(Path(f"{self.output}.job", "snapshots").rglob("*.json"))


class Stop(NamedTuple):
    """What a stopped job said."""

    reason: str
    num_done: int
    num_kept: int


def read_stop(run: CompletedRun) -> Stop:
    """Check that a job has stopped as it should, with one line that says what to do."""
    assert run.rc == 75, (run.rc, run.stderr)
    assert "Traceback" not in run.stderr, run.stderr
    [match] = STOPPED.finditer(run.stderr)
    assert int(match[3]) == NUM_ROWS
    return Stop(match[1], int(match[2]), int(match[4] or 0))


def check_report(place: Place, stop: Stop) -> None:
    """Check that the run that was stopped has left its report and its page."""
    report = json.loads(Path(f"{place.output}.job", "report.json").read_text())
    assert (report["run"]["stopped"], report["run"]["num_done"]) == (stop.reason, stop.num_done)
    assert f"stopped early ({stop.reason})" in Path(f"{place.output}.job", "report.html").read_text()


@pytest.fixture
def place(tmp_path: Path, prompts: Path) -> Place:
    """A new job."""
    return Place(tmp_path / "job", prompts)


def resumed_tokens(output: Output) -> int:
    """Tokens that the last run did not compute."""
    return sum(rank["tokens"]["resumed"] for rank in output.report["ranks"])


def signal_launcher(job: Job, number: int) -> None:
    """Let the launcher pass it on to all ranks."""
    job.interrupt(number)


def signal_ranks(job: Job, number: int) -> None:
    """Send it to every rank, as Slurm does."""
    for rank in job.ranks():
        rank.send_signal(number)


def signal_last(job: Job, number: int) -> None:
    """Send it to the last rank only."""
    job.ranks()[-1].send_signal(number)


@pytest.mark.parametrize(("number", "send", "first", "second"), [
    (signal.SIGUSR1, signal_launcher, (2, "-tp", "2"), (3, "-pp", "3")),
    (signal.SIGTERM, signal_ranks, (2, "-pp", "2"), (0,)),
    (signal.SIGTERM, signal_last, (4, "-dp", "2", "-tp", "2"), (1,)),
    (signal.SIGUSR2, signal_last, (2, "-dp", "2"), (2, "-tp", "2")),
    (signal.SIGTERM, signal_launcher, (0,), (2, "-dp", "2")),
], ids=["tp2 to pp3", "pp2 to one process", "a follower of dp2 tp2", "a leader of dp2", "one process to dp2"])
@pytest.mark.time_limit(300)
def test_signal_stops_the_job_and_another_mesh_goes_on(
    number: int, send: Any, first: tuple[Any, ...], second: tuple[Any, ...], place: Place, whole: Output
) -> None:
    job = place.start(*first)
    place.wait_for_rows(job)
    send(job, number)
    run = job.wait()
    stop = read_stop(run)
    assert stop.reason == signal.Signals(number).name
    assert RESUME in run.stderr
    assert 0 < stop.num_done == place.num_finished() < NUM_ROWS
    assert not place.output.exists()
    assert stop.num_kept > 0
    check_report(place, stop)
    output = place.finish(*second)
    assert output.digest == whole.digest
    assert resumed_tokens(output) >= stop.num_kept
    assert sum(rank["rows"]["finished"] for rank in output.report["ranks"]) == NUM_ROWS - stop.num_done
    assert not place.snapshots()


def test_job_that_is_stopped_again_and_again_ends_with_the_same_bytes(place: Place, whole: Output) -> None:
    done, kept = 0, 0
    for ranks, flags in ((0, ()), (2, ("-tp", "2")), (2, ("-pp", "2"))):
        job = place.start(ranks, *flags)
        place.wait_for_rows(job)
        signal_ranks(job, signal.SIGTERM)
        stop = read_stop(job.wait())
        assert stop.num_done >= done
        done, kept = stop.num_done, kept + stop.num_kept
    assert kept > 0
    output = place.finish(2, "-dp", "2")
    assert output.digest == whole.digest
    assert resumed_tokens(output) > 0


@pytest.mark.time_limit(300)
@pytest.mark.parametrize("killed", [0, 1, 2], ids=["the leader", "a follower", "a spare rank"])
def test_job_that_has_lost_a_rank_is_stopped_and_goes_on(killed: int, place: Place, whole: Output) -> None:
    job = place.start(3, "-tp", "2", "--spare-ranks", "1", launcher=fault_tolerance())
    place.wait_for_rows(job)
    assert job.kill_rank(killed)
    place.wait_for_rows(job)
    signal_ranks(job, signal.SIGTERM)
    stop = read_stop(job.wait())
    assert stop.reason == "SIGTERM"
    output = place.finish(2, "-pp", "2")
    assert output.digest == whole.digest
    assert bool(resumed_tokens(output)) == bool(stop.num_kept)  # between two blocks there may be none


@pytest.mark.parametrize(("ranks", "flags"), [(2, ("-pp", "2")), (2, ("-dp", "2"))], ids=["pp2", "dp2"])
def test_time_limit_stops_the_job_before_it_is_reached(
    ranks: int, flags: tuple[str, ...], place: Place, whole: Output
) -> None:
    start = time.monotonic()
    run = place.start(ranks, *flags, "--max-num-seqs", "1", "--time-limit", "0:10", "--stop-margin", "2").wait()
    assert 8 < time.monotonic() - start < 10 + BUSY_S  # the margin is a tenth of the limit at most: here 1 s
    stop = read_stop(run)
    assert stop.reason == "time limit"
    assert stop.num_done == place.num_finished()
    output = place.finish(1)
    assert output.digest == whole.digest
    assert bool(resumed_tokens(output)) == bool(stop.num_kept)


def test_time_that_is_over_before_the_start_computes_nothing(place: Place) -> None:
    run = place.start(2, "-tp", "2", "--time-limit", "0").wait()
    assert read_stop(run) == Stop("time limit", 0, 0)
    assert place.num_finished() == 0


def test_end_of_the_allocation_is_a_time_limit(place: Place) -> None:
    allocation = {"SLURM_JOB_START_TIME": str(int(time.time()) - 50), "SLURM_JOB_END_TIME": str(int(time.time()) + 10)}
    job = place.start(0, env=allocation)
    assert read_stop(job.wait()).reason == "time limit"


def test_stopped_job_that_was_complete_is_merged(place: Place, whole: Output) -> None:
    assert place.finish(1).digest == whole.digest
    place.output.unlink()
    assert place.start(1, "--time-limit", "0").wait().rc == 0
    assert read_output(place.output).digest == whole.digest


SHOWN = (
    "JobId=7 JobName=x JobState={state} Reason=None Restarts=0 TimeLimit=01:00:00 StartTime={start} EndTime={end}"
    " PreemptTime=None"
)


class Slurm:
    """A scontrol that says what it is told to, and keeps what it was told."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._calls = folder, folder / "calls"
        self._calls.touch()
        self._shown = folder / "shown"
        script = f'#!/bin/sh\necho "$*" >> {self._calls}\n[ "$1" = requeue ] || cat {self._shown}\n'
        (folder / "scontrol").write_text(script)
        (folder / "scontrol").chmod(stat.S_IRWXU)
        self.show("RUNNING", left_s=3600)

    def show(self, state: str, left_s: float) -> None:
        """Say from now on that the job is like this."""
        now = int(time.time())
        self._shown.write_text(SHOWN.format(state=state, start=now, end=now + int(left_s)) + "\n")

    @property
    def environment(self) -> dict[str, str]:
        """Of a job of this Slurm."""
        return {"PATH": f"{self._folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}

    @property
    def requeued(self) -> list[str]:
        """Jobs that were put back into the queue."""
        calls = [line.split() for line in self._calls.read_text().splitlines()]
        return [words[1] for words in calls if words[0] == "requeue"]


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    """A Slurm whose job 7 is running."""
    (tmp_path / "slurm").mkdir()
    return Slurm(tmp_path / "slurm")


def stop_under_slurm(place: Place, slurm: Slurm, number: int, *flags: str, state: str = "RUNNING") -> CompletedRun:
    """Stop a job of two ranks that runs under Slurm, which says then that it is in this state."""
    job = place.start(2, "-dp", "2", *flags, env=slurm.environment)
    place.wait_for_rows(job)
    slurm.show(state, left_s=3600 if state == "RUNNING" else 10)
    signal_ranks(job, number)
    return job.wait()


def test_preempted_job_is_requeued_once_by_all_of_its_ranks(place: Place, slurm: Slurm) -> None:
    run = stop_under_slurm(place, slurm, signal.SIGTERM, "--requeue")
    assert read_stop(run).reason == "SIGTERM"
    assert slurm.requeued == ["7"]
    assert "Slurm starts job 7 again" in run.stderr


def test_job_is_requeued_only_if_that_is_asked_for(place: Place, slurm: Slurm) -> None:
    run = stop_under_slurm(place, slurm, signal.SIGUSR1)
    assert read_stop(run).num_kept > 0
    assert slurm.requeued == []
    assert RESUME in run.stderr


def test_cancelled_job_is_flushed_and_never_requeued(place: Place, slurm: Slurm) -> None:
    run = stop_under_slurm(place, slurm, signal.SIGTERM, "--requeue", state="COMPLETING")
    assert read_stop(run).num_done == place.num_finished() > 0
    assert slurm.requeued == []
    assert RESUME in run.stderr and "not requeued: the job was cancelled" in run.stderr


def test_ctrl_c_is_a_cancellation(place: Place, slurm: Slurm) -> None:
    run = stop_under_slurm(place, slurm, signal.SIGINT, "--requeue")
    assert read_stop(run).reason == "cancelled"
    assert slurm.requeued == []


def test_end_of_the_job_that_slurm_tells_when_asked_is_a_time_limit(place: Place, slurm: Slurm) -> None:
    slurm.show("RUNNING", left_s=10)
    run = place.start(2, "-tp", "2", "--requeue", env=slurm.environment).wait()
    assert read_stop(run).reason == "time limit"
    assert slurm.requeued == ["7"]
