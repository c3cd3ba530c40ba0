"""Shell: the launchers pass the right flags to a launcher that only says what it was given; all of it is clean."""

import os
import subprocess
from pathlib import Path

import pytest
from sources import CHECKOUT

SHELL = [path for folder in ("scripts", "launch", "slurm", ".ci") for path in sorted((CHECKOUT / folder).iterdir())
         if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env bash")]
FAKE = """#!/bin/sh
[ "$1" = --version ] && { echo "%s"; exit; }
echo "$0 $*"
env | grep -E "^(OMPI|HPCINFER|OMP)_" || true
"""


def launch(folder: Path, script: str, *arguments: str, mpi: str = "mpirun (Open MPI) 5.0.11", **variables: str) -> str:
    """What the launcher behind a script is given: its arguments, then its environment; or what the script says."""
    for name in ("mpirun", "srun", "numactl"):
        (folder / name).write_text(FAKE % mpi)
        (folder / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "SLURM", "HPCINFER"))}
    environment = {**kept, "PATH": f"{folder}:{kept['PATH']}", **variables}
    run = subprocess.run([CHECKOUT / script, *arguments], capture_output=True, text=True, env=environment, timeout=30)
    return run.stdout + run.stderr


@pytest.mark.parametrize("path", SHELL, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shell_is_strict_and_short(path: Path) -> None:
    text = path.read_text()
    assert os.access(path, os.X_OK) or path.suffix == ".sbatch"
    assert text.count("\n") <= 60
    assert "set -euo pipefail" in text or text.count("\n") == 2


def test_shell_passes_shellcheck() -> None:
    try:
        run = subprocess.run(["shellcheck", *SHELL], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no shellcheck")
    assert run.returncode == 0, run.stdout


def test_local_yields_when_cores_are_shared(tmp_path: Path) -> None:
    shared = launch(tmp_path, "launch/local.sh", "4", "work", HPCINFER_CORES="2")
    assert "mpirun -n 4 --bind-to none --oversubscribe" in shared and "OMPI_MCA_mpi_yield_when_idle=1" in shared
    alone = launch(tmp_path, "launch/local.sh", "2", "work", HPCINFER_CORES="8")
    assert "--oversubscribe" not in alone and "when_idle" not in alone and "HPCINFER_THREADS=4" in alone


@pytest.mark.parametrize("script", [("launch/local.sh", "4"), ("launch/mpirun.sh",)])
def test_fault_tolerance_is_asked_for_by_a_variable(tmp_path: Path, script: tuple[str, ...]) -> None:
    assert "--with-ft ulfm" in launch(tmp_path, *script, "work", HPCINFER_FAULT_TOLERANCE="yes")
    assert "ulfm" not in launch(tmp_path, *script, "work")


def test_local_gives_mpich_no_flags_of_open_mpi(tmp_path: Path) -> None:
    said = launch(tmp_path, "launch/local.sh", "4", "work", mpi="HYDRA build details", HPCINFER_CORES="2")
    assert "mpirun -n 4 " in said and "oversubscribe" not in said and "OMPI" not in said


@pytest.mark.parametrize("arguments", [(), ("4",), ("0", "work"), ("work", "4")])
def test_local_says_its_usage(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert "usage: launch/local.sh RANKS COMMAND" in launch(tmp_path, "launch/local.sh", *arguments)


def test_mpirun_takes_hosts_from_a_file(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("n0\nn1\n\n")
    variables = {"HPCINFER_HOSTFILE": str(hosts), "HPCINFER_RANKS_PER_NODE": "4", "HPCINFER_THREADS": "8"}
    said = launch(tmp_path, "launch/mpirun.sh", "work", "-x", **variables)
    assert "--map-by ppr:4:node:pe=8" in said and f"--hostfile {hosts}" in said
    assert said.splitlines()[0].endswith("bind.sh work -x")
    said = launch(tmp_path, "launch/mpirun.sh", "work", mpi="HYDRA", **variables)
    assert f"mpirun -ppn 4 -n 8 -f {hosts}" in said


def test_srun_needs_an_allocation(tmp_path: Path) -> None:
    assert "no allocation" in launch(tmp_path, "launch/srun.sh", "work")
    variables = {"SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "4", "HPCINFER_SRUN_FLAGS": "-l -v"}
    said = launch(tmp_path, "launch/srun.sh", "work", **variables)
    assert "srun --mpi=pmix --cpus-per-task=4 --cpu-bind=cores -l -v" in said and "HPCINFER_THREADS=4" in said


def test_bind_sets_threads_and_memory_domain(tmp_path: Path) -> None:
    assert "OMP_NUM_THREADS=3" in launch(tmp_path, "launch/bind.sh", "env", HPCINFER_THREADS="3")
    said = launch(tmp_path, "launch/bind.sh", "work", HPCINFER_NUMA="yes", SLURM_LOCALID="0")
    assert "numactl --cpunodebind=0 --membind=0 work" in said


def test_batch_job_runs_one_step(tmp_path: Path) -> None:
    job = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(CHECKOUT)}
    said = launch(tmp_path, "slurm/hpcinfer.sbatch", **job, MODEL="m", INPUT="in put", OPTIONS="-tp 2")
    assert "python -m hpcinfer.run --model m --input in put --output completions.jsonl -tp 2" in said
    assert "MODEL" in launch(tmp_path, "slurm/hpcinfer.sbatch", INPUT="x")
