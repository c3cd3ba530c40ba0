from dataclasses import replace

import pytest
from made_up_ranks import cluster, levels, rank_facts

from hpcinfer.comm.launcher import Launch
from hpcinfer.comm.library import MpiLibrary
from hpcinfer.diagnosis.finding import ERROR, OK, WARNING, fold
from hpcinfer.diagnosis.world import check_faults, check_library, check_size, check_slurm, check_world

MPIRUN, PMI = "mpirun (Open MPI)", "mpiexec (PMI)"
OPEN_MPI, MPICH = MpiLibrary("Open MPI 5.0.11", transport="ob1"), MpiLibrary("MPICH 5.0.2")


def started(launcher, size, world_size, mpi=OPEN_MPI, **environment):
    return rank_facts(world_size=world_size, launch=Launch(launcher, 0, size, 1), mpi=mpi, environment=environment)


def test_a_healthy_cluster_has_nothing_but_ok():
    findings = check_world(cluster(125, 8))
    assert set(levels(findings)) == {OK} and "one world of 1000 ranks" in findings[0].found


@pytest.mark.parametrize(("mpi", "environment", "hint"), [
    (OPEN_MPI, {"SLURM_STEP_ID": "0", "PMI_FD": "5"}, "srun --mpi=pmix"),
    (MPICH, {"SLURM_STEP_ID": "0", "PMIX_NAMESPACE": "x"}, "srun --mpi=pmi2"),
])  # fmt: skip
def test_singletons_under_srun_are_told_which_pmi_to_ask_for(mpi, environment, hint):
    (finding,) = check_size(started("srun", 4, 1, mpi, SLURM_NTASKS="4", **environment))
    assert finding.level == ERROR and "4 processes, each an MPI world of its own" in finding.found
    assert hint in finding.hint and mpi.name in finding.found


def test_singletons_of_a_foreign_launcher_are_told_to_take_its_own():
    (finding,) = check_size(started(PMI, 4, 1))
    assert finding.level == ERROR and "mpirun of Open MPI" in finding.hint


def test_a_world_that_is_too_small_is_an_error():
    (finding,) = check_size(started(MPIRUN, 4, 2))
    assert finding.level == ERROR and "2 ranks" in finding.found and "says 4" in finding.found


def test_one_process_of_a_batch_job_is_told_to_use_the_launcher():
    (finding,) = check_size(started("", 1, 1, SLURM_NTASKS="8"))
    assert finding.level == WARNING and "srun or mpirun" in finding.hint
    (finding,) = check_size(started(MPIRUN, 2, 2, SLURM_NTASKS="8"))
    assert finding.level == ERROR  # as `hpcinfer run` refuses
    assert levels(check_size(started(MPIRUN, 2, 2, SLURM_NTASKS="1", SLURM_STEP_ID="0"))) == [OK]  # of mpirun's daemons


def test_a_launcher_that_is_not_known_is_an_error():
    (finding,) = check_size(rank_facts(environment={"FLUX_TASK_RANK": "3"}))
    assert finding.level == ERROR and "$FLUX_TASK_RANK" in finding.found
    assert levels(check_size(started("srun", 1, 1, PMIX_RANK="0"))) == [OK]


def test_a_missing_library_is_an_error_where_a_launcher_is():
    none = MpiLibrary("", "cannot load libmpi.so")
    findings = check_world([started("srun", 4, 1, none)])
    assert levels(findings) == [ERROR] and "cannot load libmpi.so" in findings[0].found
    assert levels(check_world([rank_facts(mpi=none)])) == [WARNING, OK]


def test_ranks_with_another_library_are_named_in_one_line():
    facts = cluster(50, 4, lambda fact: replace(fact, mpi=MPICH) if fact.host == "node007" else fact)
    (finding,) = fold(check_library(facts))
    assert finding.level == ERROR and finding.ranks == (28, 29, 30, 31) and "Open MPI 5.0.11 on most" in finding.found


@pytest.mark.parametrize(("launcher", "mpi", "level", "words"), [
    (MPIRUN, OPEN_MPI._replace(has_fault_tolerance=True), OK, "is on over ob1"),
    (MPIRUN, OPEN_MPI._replace(has_fault_tolerance=True, transport="ucx"), WARNING, "go over ucx"),
    ("srun", OPEN_MPI._replace(has_fault_tolerance=True), WARNING, "srun ends the step"),
    (MPIRUN, OPEN_MPI, OK, "is off over ob1"),
    ("srun", MPICH, OK, "MPICH 5.0.2 has no fault tolerance"),
])  # fmt: skip
def test_fault_tolerance_is_said(launcher, mpi, level, words):
    (finding,) = check_faults(started(launcher, 4, 4, mpi))
    assert finding.level == level and words in finding.found


def test_one_rank_alone_has_nobody_to_outlive_it():
    assert check_faults(rank_facts()) == []


def test_nodes_without_ranks_and_the_end_of_the_allocation_are_said():
    more = {"SLURM_JOB_NUM_NODES": "8", "SLURM_JOB_END_TIME": "10000"}
    facts = cluster(4, 2, lambda fact: replace(fact, environment={**fact.environment, **more}))
    nodes, end = check_slurm(facts, now_s=9700)
    assert nodes.level == WARNING and "4 of 8 nodes have ranks: node[000-003]" in nodes.found
    assert end.level == WARNING and "5 min" in end.found
    assert check_slurm(facts, now_s=100)[1].level == OK
    assert check_slurm(cluster(4, 2)) == []
