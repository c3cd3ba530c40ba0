"""MPI and launcher on a real Slurm: pairs that belong together make one world, others are refused at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden import assert_refused
from jobs import CompletedRun
from slurm_cluster import Cluster

TWO_NODES = ("--nodes=2", "--ntasks-per-node=2")


@pytest.fixture(scope="module")
def mpich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where MPICH is installed: $HPCINFER_TEST_MPICH, or a folder for this session."""
    if "HPCINFER_TEST_MPICH" in os.environ:
        return Path(os.environ["HPCINFER_TEST_MPICH"])
    prefix = tmp_path_factory.mktemp("mpich")
    wheels = os.environ.get("HPCINFER_WHEELS")
    source = ["--no-index", "--find-links", wheels] if wheels else []
    argv = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed", "--prefix", prefix]
    try:
        subprocess.run([*argv, *source, "mpich"], check=True, capture_output=True, timeout=60)
    except subprocess.SubprocessError:
        pytest.skip("no MPICH: pip cannot install it, and HPCINFER_TEST_MPICH names no folder with lib/libmpi.so.12")
    return prefix


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_mpich_makes_one_world(
    launcher: str, mpich: Path, cluster: Cluster, prompts: Path, digest: str, tmp_path: Path
) -> None:
    job = cluster.submit("hpcinfer", tmp_path, *TWO_NODES, INPUT=str(prompts), HPCINFER_LAUNCHER=launcher,
                         HPCINFER_SRUN_MPI="pmi2", HPCINFER_MPIRUN=f"{mpich}/bin/mpiexec",
                         MPI4PY_LIBMPI=f"{mpich}/lib/libmpi.so.12")
    ended = job.wait()
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), ended.log
    assert "4 ranks" in ended.log
    assert job.digest() == digest


@pytest.mark.parametrize("interface", ["pmi2", "none"])
def test_ranks_that_are_worlds_of_their_own_are_refused(
    interface: str, cluster: Cluster, prompts: Path, tmp_path: Path
) -> None:
    job = cluster.submit("hpcinfer", tmp_path, *TWO_NODES, INPUT=str(prompts), HPCINFER_SRUN_MPI=interface)
    ended = job.wait(20)
    assert ended.state == "FAILED"
    run = CompletedRun(ended.exit_code, "", ended.log)
    assert_refused(run, "the MPI world has 1 ranks", "hint: use srun --mpi=pmix")
    assert list(tmp_path.iterdir()) == [tmp_path / f"hpcinfer-{job.job_id}.out"]
