"""Kill ranks of a running job: it goes on without a restart, and its output is that of the undisturbed run."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from golden import DEMO_MODEL, Output, demo_prompts, read_output, run_to_output, varied_rows, write_rows
from jobs import Job, fault_tolerance, run_job, start_job, wait_until

NUM_ROWS = 144
FLAGS = ("--seed", "3", "--max-num-seqs", "1", "--lease-timeout", "30")  # slow enough to be hit
SMALL = ("--kv-cache-memory", "2200KiB")  # room for a sequence on two ranks, not on one
A_WHILE_S = 0.4  # of computing
SOON_S = 0.02  # after the death before


class Kill(NamedTuple):
    """The death of one rank."""

    rank: int
    when: Callable[[Path], bool]  # of the job's folder
    later_s: float = 0.0


def is_serving(folder: Path) -> bool:
    """Whether rows are computed: the leaders have opened their parts."""
    return any(Path(folder, "out.jsonl.job", "parts").glob("*.jsonl"))


def is_merging(folder: Path) -> bool:
    """Whether all rows are in the journal: the end is near."""
    return num_finished(folder) >= NUM_ROWS


def at_once(folder: Path) -> bool:
    """Say that the time has come."""
    return True


def num_finished(folder: Path) -> int:
    """Rows in the journal."""
    sidecars = Path(folder, "out.jsonl.job", "parts").glob("*.sidecar")
    return sum((path.stat().st_size - 32) // 32 for path in sidecars)


@pytest.fixture(scope="module")
def prompts(folder: Path) -> Path:
    """Rows of every kind."""
    return write_rows(folder / "in.jsonl", varied_rows((demo_prompts(48) * 3)[:NUM_ROWS]))


@pytest.fixture(scope="module")
def whole(folder: Path, prompts: Path) -> Output:
    """The undisturbed run."""
    return run_to_output(folder / "whole", 1, DEMO_MODEL, prompts, *FLAGS)


def start(folder: Path, prompts: Path, mesh: str, flags: tuple[str, ...], *options: str) -> Job:
    """Start a job with these flags of the launcher; a mesh is `dp pp tp spare`."""
    dp, pp, tp, spares = map(int, mesh.split())
    folder.mkdir()
    return start_job(dp * pp * tp + spares, "--model", DEMO_MODEL, "--input", prompts, "--output",
                     folder / "out.jsonl", "-dp", str(dp), "-pp", str(pp), "-tp", str(tp), "--spare-ranks", str(spares),
                     *FLAGS, *options, flags=flags)  # fmt: skip


def kill(job: Job, folder: Path, kills: list[Kill]) -> None:
    """Kill ranks one after another; each must be there."""
    for victim in kills:
        wait_until(lambda when=victim.when: when(folder) or not job.is_running)
        time.sleep(victim.later_s)
        assert job.kill_rank(victim.rank), f"rank {victim.rank} is gone already: {job.stderr}"


def assert_unharmed(job: Job, folder: Path, whole: Output) -> tuple[Output, str]:
    """The job ends well: all rows, none twice, the same bytes. Gives the output, and what was logged."""
    run = job.wait(100)
    assert run.rc == 0, run.stderr
    assert "Traceback" not in run.stderr, run.stderr
    output = read_output(folder / "out.jsonl")
    assert output.digest == whole.digest
    merged = json.loads((folder / "out.jsonl.job" / "complete.json").read_text())
    assert (merged["num_done"], merged["num_overlaps"], merged["num_conflicts"]) == (NUM_ROWS, 0, 0)
    return output, run.stderr


def recoveries(output: Output) -> list[dict[str, Any]]:
    """Of all ranks that are left."""
    return [each for rank in output.report["ranks"] for each in rank["recoveries"]]


CASES = {  # mesh, deaths, what the log says
    "the leader and claimant of two stages": ("1 2 1 0", [Kill(0, is_serving, A_WHILE_S)],
        ["rank 0 of the world has died; 1 ranks go on as pp=1 tp=1", "the claimant has died"]),
    "a rank of three that share layers": ("1 1 3 0", [Kill(1, is_serving, A_WHILE_S)],
        ["rank 1 of the world has died; 2 ranks go on as pp=1 tp=2"]),
    "whose place a spare rank takes": ("1 1 2 1", [Kill(1, is_serving, A_WHILE_S)],
        ["rank 1 of the world has died; 2 ranks go on as pp=1 tp=2"]),
    "all but the spare rank": ("1 1 2 1", [Kill(0, is_serving, A_WHILE_S), Kill(1, at_once, SOON_S)], []),
    "the first of two replicas": ("2 1 1 0", [Kill(0, is_serving, A_WHILE_S)],
        ["the claimant has died", "replica 0 is lost"]),
    "one of each replica, the second during the first recovery": ("2 1 2 0",
        [Kill(3, is_serving, A_WHILE_S), Kill(0, at_once, SOON_S)], ["go on as pp=1 tp=1", "the claimant has died"]),
    "in the merge": ("1 1 2 0", [Kill(0, is_merging)], []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_job_outlives(case: str, folder: Path, prompts: Path, whole: Output) -> None:
    mesh, kills, words = CASES[case]
    place = folder / case.replace(" ", "-")
    job = start(place, prompts, mesh, fault_tolerance())
    kill(job, place, kills)
    output, log = assert_unharmed(job, place, whole)
    for word in ("fault tolerance: when a rank dies the others go on", *words):
        assert word in log, log
    assert output.report["run"]["world_size"] <= job_size(mesh) - len(kills) + (case == "in the merge")
    if words:
        assert all(each["agree_s"] >= 0 for each in recoveries(output))


def job_size(mesh: str) -> int:
    """Ranks that were started."""
    dp, pp, tp, spares = map(int, mesh.split())
    return dp * pp * tp + spares


def test_what_is_left_of_two_replicas_makes_one_where_each_alone_has_no_room(
    folder: Path, prompts: Path, whole: Output
) -> None:
    place = folder / "halves"
    job = start(place, prompts, "2 1 2 0", fault_tolerance(), *SMALL)
    kill(job, place, [Kill(1, is_serving, A_WHILE_S), Kill(3, at_once)])
    _, log = assert_unharmed(job, place, whole)
    assert "is given up: the KV cache" in log, log


def test_job_ends_with_a_word_when_what_is_left_has_no_room(folder: Path, prompts: Path, whole: Output) -> None:
    place = folder / "half"
    job = start(place, prompts, "1 1 2 0", fault_tolerance(), *SMALL)
    kill(job, place, [Kill(1, is_serving, A_WHILE_S)])
    run = job.wait(60)
    assert run.rc == 2, run.stderr
    assert "spread the model over more ranks" in run.stderr
    assert not (place / "out.jsonl").exists()


def test_without_a_tolerant_mpi_the_launcher_ends_the_job_and_the_next_one_resumes(
    folder: Path, prompts: Path, whole: Output
) -> None:
    place = folder / "fragile"
    job = start(place, prompts, "1 1 2 0", ())
    kill(job, place, [Kill(1, is_serving, A_WHILE_S)])
    ended = job.wait(60)
    assert ended.rc != 0
    assert "fault tolerance: none in this MPI or launcher" in ended.stderr
    assert num_finished(place) < NUM_ROWS
    run = run_job(1, "--model", DEMO_MODEL, "--input", prompts, "--output", place / "out.jsonl", *FLAGS)
    assert run.rc == 0, run.stderr
    assert read_output(place / "out.jsonl").digest == whole.digest
