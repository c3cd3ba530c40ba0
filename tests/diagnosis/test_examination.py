from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from made_up_ranks import cluster, levels, place

from hpcinfer.comm.launcher import Launch
from hpcinfer.comm.library import MpiLibrary
from hpcinfer.diagnosis.devices import Devices
from hpcinfer.diagnosis.examination import examine_alone, judge
from hpcinfer.diagnosis.facts import DoctorOptions
from hpcinfer.diagnosis.finding import ERROR, OK, WARNING, render
from hpcinfer.diagnosis.node import Limit, SharedMemory, Software
from hpcinfer.diagnosis.trial import Trial

SICKNESSES = (
    lambda fact: replace(fact, mpi=MpiLibrary("", "cannot load")),
    lambda fact: replace(fact, mpi=fact.mpi._replace(has_fault_tolerance=True)),
    lambda fact: replace(fact, launch=Launch("", 0, 1, 1), world_size=1),
    lambda fact: replace(fact, environment={"SLURM_NTASKS": "99", "OMP_PROC_BIND": "true", "SLURM_JOB_END_TIME": "1"}),
    lambda fact: replace(fact, processors=fact.processors._replace(cpus=(0,), cores=1, threads=4)),
    lambda fact: replace(fact, processors=fact.processors._replace(cpus=tuple(range(64)), cores=32, problem="bad")),
    lambda fact: replace(fact, software=Software({"numpy": ""})),
    lambda fact: replace(fact, limits={"NOFILE": Limit(10, 20), "AS": Limit(1, 1), "CPU": Limit(0, 0)}),
    lambda fact: replace(fact, limits={}),
    lambda fact: replace(fact, shared_memory=SharedMemory("/dev/shm", fact.rank, -1)),
    lambda fact: replace(fact, devices=Devices(8, 4, 3, ("mlx5_0",))),
    lambda fact: replace(fact, places=(place("model", "nfs", problem="gone"), place("output", "tmpfs", quota="full"))),
    lambda fact: replace(fact, trial=Trial({"hard link": "no", "fsync": "no"}, 9.0, 1e6)),
)


@given(st.dictionaries(st.integers(0, 23), st.lists(st.sampled_from(SICKNESSES), max_size=4)), st.booleans())
def test_whatever_is_wrong_each_finding_is_a_line_that_says_what_to_do(sick, is_whole):
    facts = cluster(6, 4)
    for rank, sicknesses in sick.items():
        for sickness in sicknesses:
            facts[rank] = sickness(facts[rank])
    hosts = {fact.rank: fact.host for fact in facts}
    findings = judge(facts, is_whole=is_whole)
    assert len({finding._replace(ranks=()) for finding in findings}) == len(findings)
    for finding in findings:
        assert finding.level in (OK, WARNING, ERROR) and set(finding.ranks) <= set(hosts)
        assert (finding.level == OK or finding.hint) and len(render(finding, hosts).splitlines()) == 1


def test_a_thousand_healthy_ranks_are_a_handful_of_lines():
    findings = judge(cluster(125, 8))
    assert set(levels(findings)) == {OK} and len(findings) < 12
    assert all(len(finding.ranks) in (0, 1000) for finding in findings)


def test_what_one_rank_of_a_node_finds_is_said_of_the_node():
    def lost(fact):
        return replace(fact, trial=Trial({"hard link": "no"})) if fact.host == "node002" and fact.trial else fact

    (finding,) = [finding for finding in judge(cluster(6, 4, lost)) if finding.level == ERROR]
    assert finding.ranks == (8, 9, 10, 11)


def test_a_process_alone_is_judged_by_itself(tmp_path):
    examination = examine_alone(DoctorOptions(output=str(tmp_path / "out")), MpiLibrary("Open MPI 5.0.11"), 0)
    assert ERROR not in levels(examination.findings) and list(examination.hosts) == [0] and examination.is_complete
