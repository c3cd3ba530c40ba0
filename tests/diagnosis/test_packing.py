from made_up_ranks import cluster, place, rank_facts

from hpcinfer.comm.launcher import Launch
from hpcinfer.comm.library import MpiLibrary, describe_library
from hpcinfer.diagnosis.facts import DoctorOptions, Facts, read_facts
from hpcinfer.diagnosis.packing import pack, unpack
from hpcinfer.diagnosis.trial import Trial


def test_facts_survive_the_way_to_the_root(tmp_path):
    ours = read_facts(DoctorOptions(output=str(tmp_path / "out")), describe_library(is_started=False), 0, 1)
    sick = rank_facts(3, places=(place("model", "nfs4", problem="gone\n\"'ü"),), trial=Trial({"fsync": "no"}, 0.5))
    for facts in (ours, sick, rank_facts(launch=Launch("srun", 1, 2, 1, None)), *cluster(2, 2)):
        assert unpack(Facts, pack(facts)) == facts


def test_facts_of_a_rank_are_small():
    assert len(pack(rank_facts(mpi=MpiLibrary("", "x" * 200)))) < 4096  # a thousand of them go to one rank
