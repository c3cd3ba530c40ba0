"""The command as users start it: alone, on several ranks, and where things are broken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import find_mpiexec, mpi_environment, mpiexec_command, run_job, start_mpi

MODEL = Path(__file__).parents[1] / "examples/demo_model"
SICK = str(Path(__file__).with_name("sick_doctor.py"))


def doctor(*flags, ranks=0, **environment):
    return run_job(ranks, *flags, module="hpcinfer.doctor", env=environment, timeout=60)


def lines(run):
    """Findings as (level, check, text)."""
    return [(line[:8].strip(), line[9:22].strip(), line[23:]) for line in run.stdout.splitlines()[:-1]]


def is_open_mpi():
    path = find_mpiexec()
    return path and "--oversubscribe" in path


def test_alone_it_says_what_can_be_said(tmp_path):
    run = doctor("--model", MODEL, "--output", tmp_path / "out.jsonl")
    assert run.rc == 0, run.stdout + run.stderr
    found = lines(run)
    assert ("ok", "world") in {line[:2] for line in found} and ("ok", "model") in {line[:2] for line in found}
    assert any("append, hard link" in text for _, _, text in found)
    assert "alone" in run.stdout.splitlines()[-1] or "1 rank " in run.stdout.splitlines()[-1]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("ranks", [2, 4])
def test_on_ranks_each_finding_is_one_line_of_the_first(tmp_path, ranks):
    run = doctor("--model", MODEL, "--output", tmp_path / "out.jsonl", ranks=ranks)
    assert run.rc == 0, run.stdout + run.stderr
    found = lines(run)
    assert {level for level, _, _ in found} <= {"ok", "warning"} and len(set(found)) == len(found)
    assert any(f"one world of {ranks} ranks" in text for _, check, text in found if check == "world")
    assert any(f"{ranks * (ranks - 1) // 2} pairs" in text for _, check, text in found if check == "network")
    assert os.listdir(tmp_path) == []


def test_fault_tolerance_is_seen_with_its_transport():
    if not is_open_mpi():
        pytest.skip("needs Open MPI")
    command = [*mpiexec_command(), "--with-ft", "ulfm", "-n", "2", sys.executable, "-m", "hpcinfer.doctor"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **mpi_environment()})
    assert "ok       dead ranks    fault tolerance is on over ob1" in run.stdout, run.stdout + run.stderr


def test_json_has_the_same_findings(tmp_path):
    run = doctor("--json", "--output", tmp_path / "missing/out.jsonl", ranks=2)
    report = json.loads(run.stdout)
    assert run.rc == 1 and report["errors"] == sum(each["level"] == "error" for each in report["findings"]) > 0
    assert set(report["findings"][0]) == {"level", "check", "found", "hint", "ranks"}
    assert set(report["hosts"]) == {"0", "1"}


def test_a_model_that_is_not_there_is_an_error():
    run = doctor("--model", "/nowhere/at/all")
    assert run.rc == 1 and ("error", "model") in {line[:2] for line in lines(run)}


def test_singletons_are_told_by_the_first_and_fail_alike():
    for rank in (0, 1):
        run = doctor(PMI_RANK=str(rank), PMI_SIZE="2")
        assert run.rc == 1 and ("2 processes, each an MPI world of its own" in run.stdout) == (rank == 0)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_without_an_mpi_library_says_so_itself(rank):
    run = doctor(PMI_RANK=rank, PMI_SIZE="2", MPI4PY_LIBMPI="/nowhere/libmpi.so")
    assert run.rc == 1 and "no MPI library" in run.stdout and f"rank {rank} of 2" in run.stdout


@pytest.mark.parametrize(("moment", "words"), [
    ("start", "still waits after 3 s: starting MPI"), ("facts", "did not answer"),
    ("measuring", "still waits after 3 s: "),
])  # fmt: skip
def test_a_rank_that_hangs_does_not_hang_the_doctor(moment, words):
    if not is_open_mpi():
        pytest.skip("ranks are told apart by Open MPI's variables")
    run = start_mpi(3, [sys.executable, SICK, moment, "--time-limit", "3"]).wait(40)
    assert run.rc == 1 and words in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize(("moment", "words"), [
    ("facts-death", "rank 1 did not answer"), ("measuring-death", "a rank died: "),
])  # fmt: skip
def test_a_rank_that_dies_is_told_by_the_others(moment, words):
    if not is_open_mpi():
        pytest.skip("needs Open MPI")
    command = [*mpiexec_command(), "--with-ft", "ulfm", "-n", "3", sys.executable, SICK, moment, "--time-limit", "4"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **mpi_environment()})
    assert run.returncode != 0 and words in run.stdout, run.stdout + run.stderr


def test_wrong_usage_ends_with_two():
    assert doctor("--nope").rc == 2 and doctor("--threads", "x").rc == 2
