"""Command lines and environments of steps, and which launcher is taken."""

import os
import socket
from pathlib import Path

import pytest

from hpcinfer.errors import ConfigError
from hpcinfer.recovery.inflight import STEP_VARIABLE
from hpcinfer.supervision.launchers import Mpiexec, Srun, choose_launcher
from hpcinfer.supervision.nodes import Seat

HERE = (Seat(socket.gethostname(), 2),)
AWAY = (Seat("n1", 2), Seat("n2", 1))
PROGRAM = ["python", "-m", "hpcinfer.run"]


def mpiexec(environment=None, *, is_open_mpi=True, is_crowded=False):
    return Mpiexec("/bin/mpiexec", is_open_mpi, environment or {}, is_crowded)


def tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def site(tmp_path):
    """An allocation whose tools are scripts."""
    tool(tmp_path, "srun", 'echo "MPI plugin types are... none pmi2 ${PLUGINS-pmix pmix_v4}"')
    tool(tmp_path, "mpiexec", 'echo "mpiexec (Open MPI) 5.0"')
    return {"PATH": f"{tmp_path}:{os.defpath}", "SLURM_JOB_ID": "7", "HPCINFER_MPIRUN": str(tmp_path / "mpiexec")}


def test_step_here_is_bound_nowhere():
    argv, environment = mpiexec().command("s.0-1", HERE, PROGRAM)
    assert argv == ["/bin/mpiexec", "-n", "2", "--bind-to", "none", "--oversubscribe", *PROGRAM]
    assert environment[STEP_VARIABLE] == "s.0-1" and environment["OMPI_MCA_btl"] == "self,sm,tcp"


def test_step_elsewhere_names_its_hosts_and_takes_its_name_along():
    argv, environment = mpiexec({"PATH": "/bin"}).command("s.0-1", AWAY, PROGRAM)
    assert argv[argv.index("--host") + 1] == "n1:2,n2:1" and argv[argv.index("-n") + 1] == "3"
    passed_on = [argv[i + 1] for i, word in enumerate(argv) if word == "-x"]
    assert passed_on == ["PATH", STEP_VARIABLE]
    assert "OMPI_MCA_btl" not in environment  # the fabric is Open MPI's to find


def test_mpich_has_flags_of_its_own():
    argv, environment = mpiexec(is_open_mpi=False).command("s.0-1", AWAY, PROGRAM)
    assert argv == ["/bin/mpiexec", "-n", "3", "-hosts", "n1:2,n2:1", *PROGRAM]
    assert not [name for name in environment if name.startswith("OMPI")]


def test_ranks_that_share_cores_yield():
    assert "OMPI_MCA_mpi_yield_when_idle" not in mpiexec().command("s", HERE, PROGRAM).environment
    crowded = mpiexec(is_crowded=True).command("s", HERE, PROGRAM).environment
    assert crowded["OMPI_MCA_mpi_yield_when_idle"] == "1"
    mine = mpiexec({"OMPI_MCA_mpi_yield_when_idle": "0"}, is_crowded=True).command("s", HERE, PROGRAM).environment
    assert mine["OMPI_MCA_mpi_yield_when_idle"] == "0"


def test_size_of_the_allocation_is_not_that_of_a_step():
    allocation = {"SLURM_NTASKS": "8", "SLURM_NPROCS": "8", "SLURM_JOB_ID": "7"}
    for launcher in (mpiexec(allocation), Srun("/bin/srun", allocation, {})):
        environment = launcher.command("s", AWAY, PROGRAM).environment
        assert environment["SLURM_JOB_ID"] == "7" and "SLURM_NTASKS" not in environment
        assert "SLURM_NPROCS" not in environment


def test_ranks_of_a_step_survive_each_other_where_that_is_wanted():
    argv = mpiexec({"HPCINFER_FAULT_TOLERANCE": "yes"}).command("s", HERE, PROGRAM).argv
    assert "--with-ft ulfm" in " ".join(argv)
    for launcher in (mpiexec(), mpiexec({"HPCINFER_FAULT_TOLERANCE": "yes"}, is_open_mpi=False)):
        assert "--with-ft" not in launcher.command("s", HERE, PROGRAM).argv


def test_site_adds_flags():
    argv = mpiexec({"HPCINFER_MPIRUN_FLAGS": "--with-ft ulfm --mca a 'b c'"}).command("s", HERE, PROGRAM).argv
    assert argv[-8:] == ["--with-ft", "ulfm", "--mca", "a", "b c", *PROGRAM]
    argv = Srun("/bin/srun", {"HPCINFER_SRUN_FLAGS": "--qos x"}, {}).command("s", AWAY, PROGRAM).argv
    assert argv[-5:] == ["--qos", "x", *PROGRAM]


def test_srun_asks_for_what_the_step_needs_and_no_more():
    environment = {"SLURM_CPUS_PER_TASK": "4", "SLURM_MEM_PER_NODE": "8000"}
    argv = Srun("/bin/srun", environment, {"n1": 4, "n2": 4}).command("s", AWAY, PROGRAM).argv
    assert {"--nodes=2", "--ntasks=3", "--nodelist=n1,n2", "--cpus-per-task=4", "--exact", "--mpi=pmix",
            "--mem=4000M", "--kill-on-bad-exit=1"} <= set(argv)  # fmt: skip
    whole = Srun("/bin/srun", environment, {"n1": 2, "n2": 1}).command("s", AWAY, PROGRAM).argv
    assert not [flag for flag in whole if flag.startswith("--mem")]


def test_srun_starts_the_mpi_of_the_site():
    site = {"HPCINFER_SRUN_MPI": "pmi2", "HPCINFER_SRUN_BIND": "none"}
    argv = Srun("/bin/srun", site, {}).command("s", AWAY, []).argv
    assert {"--mpi=pmi2", "--cpu-bind=none"} <= set(argv)


def test_srun_is_taken_in_an_allocation(site):
    assert choose_launcher("auto", site, {"a": 1}, 1).name == "srun"
    assert choose_launcher("mpiexec", site, {"a": 1}, 1).name == "mpiexec"


def test_mpiexec_is_taken_where_srun_cannot_start_our_mpi(site):
    assert choose_launcher("auto", {**site, "PLUGINS": "pmi"}, {"a": 1}, 1).name == "mpiexec"
    assert choose_launcher("srun", {**site, "PLUGINS": "pmi"}, {"a": 1}, 1).name == "srun"
    assert choose_launcher("auto", {**site, "PLUGINS": "", "HPCINFER_SRUN_MPI": "pmi2"}, {"a": 1}, 1).name == "srun"


def test_mpiexec_is_taken_outside_of_slurm(site):
    del site["SLURM_JOB_ID"]
    launcher = choose_launcher("auto", site, {"a": 1}, 1)
    assert launcher.name == "mpiexec" and launcher.is_open_mpi
    with pytest.raises(ConfigError, match="no allocation"):
        choose_launcher("srun", site, {"a": 1}, 1)


def test_missing_launcher_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        choose_launcher("auto", {"PATH": str(tmp_path), "HPCINFER_MPIRUN": "nowhere"}, {"a": 1}, 1)


def test_cores_are_crowded_when_all_steps_together_are(site):
    assert choose_launcher("mpiexec", site, {"a": 10**6}, 10**6).is_crowded
    assert not choose_launcher("mpiexec", site, {"a": 0}, 0).is_crowded
