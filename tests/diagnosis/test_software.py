from dataclasses import replace

import pytest
from made_up_ranks import VERSIONS, cluster, levels, rank_facts

from hpcinfer.comm.launcher import Launch
from hpcinfer.diagnosis.finding import ERROR, OK, WARNING, fold
from hpcinfer.diagnosis.node import Software
from hpcinfer.diagnosis.software import check_software


def with_software(nodes, software):
    return cluster(100, 10, lambda fact: replace(fact, software=software) if fact.host in nodes else fact)


def test_a_healthy_cluster_is_one_ok():
    (finding,) = fold(check_software(cluster(125, 8)))
    assert finding.level == OK and finding.found == "native, avx512"


def test_unlike_instruction_sets_are_a_warning_of_the_few():
    findings = fold(check_software(with_software({"node007"}, Software(VERSIONS, ("avx2",)))))
    (unlike,) = [finding for finding in findings if finding.level == WARNING]
    assert unlike.ranks == tuple(range(70, 80)) and unlike.found == "avx2 here, avx512 on most ranks"


def test_unlike_processors_are_a_warning():
    facts = cluster(4, 2, lambda fact: replace(fact, processors=fact.processors._replace(model="Xeon"))
                    if fact.rank > 5 else fact)  # fmt: skip
    assert [finding.ranks for finding in fold(check_software(facts)) if finding.check == "nodes"] == [(6, 7)]


@pytest.mark.parametrize(("name", "version", "level"), [
    ("hpcinfer", "0.0.9", ERROR), ("python", "3.12.1", ERROR), ("numpy", "1.26", ERROR), ("torch", "2.0", WARNING),
])  # fmt: skip
def test_versions_that_differ_name_the_ranks(name, version, level):
    software = Software({**VERSIONS, name: version}, ("avx512",))
    findings = [each for each in fold(check_software(with_software({"node001"}, software))) if each.level != OK]
    assert levels(findings) == [level] and findings[0].ranks == tuple(range(10, 20)) and name in findings[0].found


def test_a_patch_release_of_python_is_no_difference():
    software = Software({**VERSIONS, "python": "3.11.2"}, ("avx512",))
    assert set(levels(check_software(with_software({"node001"}, software)))) == {OK}


def test_no_native_kernels_is_a_warning_and_without_torch_an_error():
    (slow,) = check_software([rank_facts(software=Software(VERSIONS))])
    (none,) = check_software([rank_facts(software=Software({**VERSIONS, "torch": ""}))])
    assert (slow.level, none.level) == (WARNING, ERROR) and "C compiler" in slow.hint


def test_a_package_that_is_missing_is_an_error():
    assert levels(check_software([rank_facts(software=Software({**VERSIONS, "numpy": ""}, ("plain",)))])) == [ERROR, OK]
    alone = rank_facts(software=Software({**VERSIONS, "mpi4py": ""}, ("plain",)))
    assert levels(check_software([alone])) == [OK]  # a laptop without MPI
    assert levels(check_software([replace(alone, launch=Launch("srun", 0, 1, 1))])) == [ERROR, OK]


def test_an_instruction_set_that_is_not_there_is_an_error():
    (finding,) = check_software([rank_facts(software=Software(VERSIONS, problem="$HPCINFER_SIMD is 'avx1024'"))])
    assert finding.level == ERROR and "avx1024" in finding.found
