import pytest

from hpcinfer.comm import launcher
from hpcinfer.comm.launcher import Launch, check_world_size, read_launch
from hpcinfer.errors import MeshError, PeerError


def open_mpi(rank, size, local=None):
    local_size = {} if local is None else {"OMPI_COMM_WORLD_LOCAL_SIZE": str(local)}
    return {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(size), **local_size}


def srun(rank, size, per_node=None, tasks=None):
    """What srun sets in a step; SLURM_NTASKS is the step's, whatever the allocation has."""
    more = {"SLURM_STEP_TASKS_PER_NODE": per_node} if per_node else {}
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(size)}
    return {"SLURM_PROCID": str(rank), **step, "SLURM_NTASKS": str(tasks or size), **more}


def sbatch(tasks):
    """What a batch script sees without srun: it is task 0 of no step."""
    return {"SLURM_PROCID": "0", "SLURM_NTASKS": str(tasks), "SLURM_TASKS_PER_NODE": f"{tasks}(x1)"}


def pmi(rank, size):
    return {"PMI_RANK": str(rank), "PMI_SIZE": str(size)}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch("", 0, 1, 1)),
        ({**open_mpi(3, 8, 4), "OMPI_COMM_WORLD_LOCAL_RANK": "2"}, Launch("mpirun (Open MPI)", 3, 8, 4, 2)),
        ({**srun(5, 6, "6"), "SLURM_LOCALID": "1"}, Launch("srun", 5, 6, 6, 1)),
        (open_mpi(3, 8, 4), Launch("mpirun (Open MPI)", 3, 8, 4)),
        (open_mpi(0, 2), Launch("mpirun (Open MPI)", 0, 2, 1)),
        ({**pmi(1, 4), "MPI_LOCALNRANKS": "2"}, Launch("mpiexec (PMI)", 1, 4, 2)),
        (srun(5, 6), Launch("srun", 5, 6, 1)),
        (srun(5, 6, "6"), Launch("srun", 5, 6, 6)),
        (srun(0, 11, "4(x2),3"), Launch("srun", 0, 11, 4)),
        (srun(0, 19, "3,16(x1)"), Launch("srun", 0, 19, 16)),
        ({**srun(1, 4, "2(x2)"), **pmi(1, 4)}, Launch("mpiexec (PMI)", 1, 4, 2)),  # srun --mpi=pmi2
        ({**srun(0, 1, "1"), **open_mpi(2, 4, 4)}, Launch("mpirun (Open MPI)", 2, 4, 4)),  # mpirun in a step
        (sbatch(8), Launch("", 0, 1, 1)),
    ],
)
def test_launchers_are_recognised(environment, expected):
    assert read_launch(environment) == expected


@pytest.mark.parametrize("value", ["", "two", "-1", "1.5"])
def test_malformed_variables_are_no_launcher(value):
    assert read_launch({"OMPI_COMM_WORLD_RANK": value, "OMPI_COMM_WORLD_SIZE": "2"}) == Launch("", 0, 1, 1)
    assert read_launch({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": value}) == Launch("", 0, 1, 1)


@pytest.mark.parametrize(
    ("environment", "world_size"),
    [
        ({}, 1),
        (open_mpi(0, 4), 4),
        (pmi(0, 4), 4),
        (srun(0, 4), 4),
        (srun(0, 2, tasks=8), 2),  # a step smaller than the allocation
        ({**sbatch(4), **open_mpi(0, 4)}, 4),
        ({**srun(0, 1), **open_mpi(0, 2)}, 2),  # mpirun's daemons are a step of one task per node
        ({"SLURM_NTASKS": "1"}, 1),
        ({"SLURM_NTASKS": ""}, 1),
    ],
)
def test_right_worlds_are_accepted(environment, world_size):
    check_world_size(world_size, environment)


@pytest.mark.parametrize(
    ("environment", "world_size", "source"),
    [
        (open_mpi(0, 4), 1, "mpirun (Open MPI) says 4"),
        (srun(0, 4), 1, "srun says 4"),  # an MPI that does not know this launcher: four worlds of one rank
        ({**srun(0, 4), **pmi(0, 4)}, 1, "mpiexec (PMI) says 4"),
        (sbatch(8), 1, "SLURM_NTASKS says 8"),  # srun was forgotten
        ({**sbatch(8), **open_mpi(0, 2)}, 2, "SLURM_NTASKS says 8"),
        ({}, 2, "alone says 1"),
    ],
)
def test_wrong_worlds_are_refused_with_both_sizes(environment, world_size, source):
    with pytest.raises(MeshError) as caught:
        check_world_size(world_size, environment)
    assert caught.value.found == f"the MPI world has {world_size} ranks, {source}"
    assert "srun --mpi=pmix" in caught.value.hint and caught.value.exit_code == 2


def test_of_many_worlds_of_one_rank_only_the_first_speaks(monkeypatch):
    waits = []
    monkeypatch.setattr(launcher.time, "sleep", waits.append)
    with pytest.raises(PeerError) as caught:
        check_world_size(1, srun(3, 4))
    assert caught.value.exit_code == 2 and waits[0] >= 1  # its exit must not end the one that speaks


def test_larger_rank_of_one_wrong_world_is_told_apart():
    with pytest.raises(MeshError):  # `settle` chooses who speaks
        check_world_size(2, open_mpi(1, 4))
