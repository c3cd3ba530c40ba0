"""A rank hangs: it is found in time and named, the job ends or goes on without it, and no row is lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from golden import DEMO_MODEL, Output, demo_prompts, read_output, run_to_output, varied_rows, write_rows
from jobs import CompletedRun, Job, mpi_environment, mpiexec_command, run_job, start_job, wait_until

TIMEOUT_S = 4.0
IN_TIME_S = 2.2 * TIMEOUT_S + 15.0  # until all has ended, on a busy machine
SLOWLY = ("--max-num-seqs", "1")
NUM_ROWS = 480


@pytest.fixture(scope="module")
def prompts(folder: Path) -> Path:
    """Enough rows that a job runs for some seconds."""
    return write_rows(folder / "in.jsonl", varied_rows(demo_prompts(60) * (NUM_ROWS // 60)))


@pytest.fixture(scope="module")
def whole(folder: Path, prompts: Path) -> Output:
    """The undisturbed run, watched as closely as the others."""
    output = run_to_output(folder / "whole", 2, DEMO_MODEL, prompts, "--hang-timeout", str(TIMEOUT_S))
    assert not (folder / "whole" / "out.jsonl.job" / "hangs").exists()
    return output


def arguments_of(place: Path, prompts: Path) -> list[str | Path]:
    """Arguments of a job in a new folder."""
    place.mkdir()
    return ["--model", DEMO_MODEL, "--input", prompts, "--output", place / "out.jsonl"]


def rank_of(process: psutil.Process) -> str:
    """Rank of a process of a job."""
    return process.environ().get("OMPI_COMM_WORLD_RANK", "")


def stop_rank(job: Job, place: Path, rank: int) -> float:
    """Stop a rank as soon as lines are written; returns when."""
    wait_until(lambda: any(path.stat().st_size for path in place.glob("out.jsonl.job/parts/*.jsonl")))
    (victim,) = (process for process in job.ranks() if rank_of(process) == str(rank))
    victim.send_signal(signal.SIGSTOP)
    return time.monotonic()


def assert_ended(run: CompletedRun, *words: str) -> None:
    """Check that the job ended as failed, after one report with these words."""
    assert run.rc == 1, run.stderr
    assert run.stderr.count("hang: no progress for") == 1, run.stderr
    for word in (*words, "; the MPI job ends"):
        assert word in run.stderr, run.stderr


@pytest.mark.parametrize("victim", [0, 1])
def test_stopped_rank_is_named_and_the_same_command_resumes(
    folder: Path, prompts: Path, whole: Output, victim: int
) -> None:
    place = folder / f"stopped-{victim}"
    arguments = arguments_of(place, prompts)
    job = start_job(2, *arguments, *SLOWLY, "-tp", "2", "--hang-timeout", str(TIMEOUT_S))
    since = stop_rank(job, place, victim)
    run = job.wait(IN_TIME_S)
    assert time.monotonic() - since >= 0.9 * TIMEOUT_S
    assert_ended(run, f"missing, treated as dead: rank {victim}/2 on", "gives no sign of life; T (stopped)",
                 f"waiting: rank {1 - victim}/2 on", "/comm/")  # fmt: skip
    assert len(list(place.glob("out.jsonl.job/hangs/*/*/*.evidence"))) == 1
    assert run_job(1, *arguments).rc == 0
    assert read_output(place / "out.jsonl").digest == whole.digest


def test_rank_that_nobody_waits_for_is_found_too(folder: Path, prompts: Path) -> None:
    place = folder / "alone"
    job = start_job(2, *arguments_of(place, prompts), *SLOWLY, "-dp", "2", "--hang-timeout", str(TIMEOUT_S))
    stop_rank(job, place, 1)
    assert_ended(job.wait(IN_TIME_S), "missing, treated as dead: rank 1/2 on")


@pytest.mark.parametrize(
    ("event", "mesh", "words"),
    [
        ("load", "-tp", ["stuck: rank 1/2", "in 'reading weights", "parallel_reads.py"]),
        ("journal", "-dp", ["stuck: rank 1/2", "in 'journal'", "writer_thread.py"]),
        ("library", "-tp", ["missing: rank 1/2", "gives no sign of life; S (sleeping)"]),
    ],
)
def test_rank_that_hangs_by_itself_is_named(
    folder: Path, prompts: Path, event: str, mesh: str, words: list[str]
) -> None:
    run = run_job(2, "1", event, *arguments_of(folder / event, prompts), mesh, "2", "--hang-timeout", str(TIMEOUT_S),
                  module="hanging_rank", cwd=Path(__file__).parent, timeout=60)  # fmt: skip
    assert_ended(run, "missing, treated as dead: rank 1/2 on", *words)


@pytest.mark.parametrize(("mesh", "victim"), [(("-tp", "2"), 1), (("-tp", "2"), 0), (("-pp", "2"), 1)])
def test_job_goes_on_without_the_stopped_rank(
    folder: Path, prompts: Path, whole: Output, mesh: tuple[str, str], victim: int
) -> None:
    place = folder / f"tolerant{'-'.join(mesh)}-{victim}"
    argv = [sys.executable, "-m", "hpcinfer.run", *map(os.fspath, arguments_of(place, prompts)), *SLOWLY, *mesh,
            "--hang-timeout", str(TIMEOUT_S)]  # fmt: skip
    job = start_tolerant(2, argv)
    stop_rank(job, place, victim)
    run = job.wait(90)
    assert (run.rc, read_output(place / "out.jsonl").digest) == (0, whole.digest), run.stderr
    assert run.stderr.count(f"missing, treated as dead: rank {victim}/2 on") == 1, run.stderr
    assert "was killed" in run.stderr and "the MPI job ends" not in run.stderr


def start_tolerant(ranks: int, argv: list[str]) -> Job:
    """Start ranks that survive each other; skips the test when the MPI cannot do that."""
    launcher = [*mpiexec_command(), "--with-ft", "ulfm"]
    probe = subprocess.run([*launcher, "-n", "1", "true"], env={**os.environ, **mpi_environment()}, capture_output=True)
    if probe.returncode:
        pytest.skip("this MPI ends all ranks when one dies: mpiexec knows no --with-ft ulfm")
    return Job([*launcher, "-n", str(ranks), *argv], {**os.environ, **mpi_environment()}, "/")


@pytest.mark.parametrize("value", ["-1", "nan"])
def test_timeout_must_make_sense(folder: Path, prompts: Path, value: str) -> None:
    run = run_job(0, *arguments_of(folder / f"wrong{value}", prompts), f"--hang-timeout={value}")
    assert run.rc == 2 and f"--hang-timeout {value}" in run.stderr.replace(".0", "")
