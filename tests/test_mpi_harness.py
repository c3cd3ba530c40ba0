"""The MPI harness itself: it passes, fails, skips and times out as its tests do, and says which rank."""

import subprocess
import sys
import textwrap
from pathlib import Path

import jobs
import pytest

HEADER = "import pytest, time\n"


def outcome_of(folder: Path, body: str, **limits: float) -> str:
    """Output of plain pytest over a file with this body."""
    jobs.mpiexec_command()
    path = folder / "test_sample.py"
    path.write_text(HEADER + textwrap.dedent(body))
    settings = "; ".join(f"mpi_harness.{name} = {value}" for name, value in limits.items())
    (folder / "conftest.py").write_text(f"import mpi_harness\n{settings}\n")
    argv = [sys.executable, "-m", "pytest", "-p", "mpi_harness", "-p", "no:cacheprovider", "-rs", str(path)]
    return subprocess.run(argv, capture_output=True, text=True, cwd=Path(jobs.__file__).parent, timeout=90).stdout


@pytest.mark.mpi(min_size=2)
def test_ranks_meet() -> None:
    from mpi4py import MPI

    assert MPI.COMM_WORLD.size >= 2
    assert MPI.COMM_WORLD.allreduce(MPI.COMM_WORLD.rank) == sum(range(MPI.COMM_WORLD.size))


@pytest.mark.mpi(min_size=3)
def test_least_number_of_ranks_is_kept() -> None:
    from mpi4py import MPI

    assert MPI.COMM_WORLD.size >= 3


@pytest.mark.mpi
@pytest.mark.parametrize("word", ["a", "b::c [d]"])
def test_parameters_and_shared_folders_work(word: str, mpi_tmp_path: Path) -> None:
    from mpi4py import MPI

    (mpi_tmp_path / str(MPI.COMM_WORLD.rank)).write_text(word)
    MPI.COMM_WORLD.barrier()
    assert len(list(mpi_tmp_path.iterdir())) == MPI.COMM_WORLD.size


def test_failing_rank_is_named_and_ends_the_others(tmp_path: Path) -> None:
    output = outcome_of(tmp_path, """
        @pytest.mark.mpi(min_size=3)
        def test_before():
            pass

        @pytest.mark.mpi(min_size=3)
        def test_one_rank():
            from mpi4py import MPI
            assert MPI.COMM_WORLD.rank != 1, "rank one says no"
            MPI.COMM_WORLD.barrier()
        """, MEETING_LIMIT_S=1)
    assert "--- rank 1 of 4 ---" in output and "rank one says no" in output
    assert "no result from rank 0, 2, 3 of 4" in output
    assert "1 failed, 1 passed" in output


def test_hanging_test_is_ended_with_its_stack(tmp_path: Path) -> None:
    output = outcome_of(tmp_path, """
        @pytest.mark.mpi(min_size=3)
        def test_rank_waits_for_ever():
            from mpi4py import MPI
            MPI.COMM_WORLD.recv(source=MPI.COMM_WORLD.rank)
        """, TEST_LIMIT_S=2)
    assert "no result from rank 0, 1, 2, 3 of 4" in output
    assert "in test_rank_waits_for_ever" in output


def test_job_over_its_limit_is_killed(tmp_path: Path) -> None:
    output = outcome_of(tmp_path, """
        @pytest.mark.mpi(min_size=3)
        def test_rank_sleeps():
            time.sleep(1000)
        """, JOB_LIMIT_S=4)
    assert "killed after 4 s" in output and "1 failed" in output


def test_skips_and_unmarked_tests_are_reported(tmp_path: Path) -> None:
    output = outcome_of(tmp_path, """
        @pytest.mark.mpi(min_size=4)
        def test_skipped():
            pytest.skip("for this reason")

        def test_alone():
            pass
        """)
    assert "for this reason" in output and "1 passed, 1 skipped" in output


def test_killed_job_leaves_no_rank() -> None:
    job = jobs.start_mpi(3, [sys.executable, "-c", "import mpi4py.MPI, time; print('up', flush=True); time.sleep(100)"])
    jobs.wait_until(lambda: job.stdout.count("up") == 3)
    ranks = job.ranks()
    assert len(ranks) == 3
    assert job.kill().rc == -9
    assert not any(rank.is_running() for rank in ranks)


def test_job_over_its_time_is_killed_and_says_what_it_wrote() -> None:
    job = jobs.start_mpi(0, [sys.executable, "-c", "import time; print('so far', flush=True); time.sleep(100)"])
    with pytest.raises(jobs.JobTimeoutError, match="so far"):
        job.wait(1)
    assert not job.is_running
