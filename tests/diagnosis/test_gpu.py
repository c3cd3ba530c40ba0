import pytest
from made_up_ranks import cluster, levels, rank_facts

from hpcinfer.diagnosis.devices import Devices
from hpcinfer.diagnosis.finding import ERROR, OK, WARNING, fold
from hpcinfer.diagnosis.gpu import check_gpus, visible_gpus


def of(node_gpus, open_gpus, tool_gpus=-1, **environment):
    findings = check_gpus([rank_facts(devices=Devices(node_gpus, open_gpus, tool_gpus), environment=environment)])
    return [finding for finding in findings if "unless --device cuda" not in finding.found]


@pytest.mark.parametrize(("text", "count"), [
    (None, None), ("", 0), ("0,1,2,3", 4), ("GPU-8ad,GPU-7cd", 2), ("-1", 0), ("NoDevFiles", 0), ("0,1,-1,3", 2),
])  # fmt: skip
def test_visible_devices_are_counted_as_cuda_does(text, count):
    assert visible_gpus(text) == count


def test_nodes_without_gpus_are_no_finding():
    assert check_gpus(cluster(10, 4)) == []


def test_whole_nodes_are_fine():
    (finding,) = of(8, 8, 8, SLURM_GPUS_ON_NODE="8", CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")
    assert finding.level == OK and "8 of 8" in finding.found


@pytest.mark.parametrize("environment", [{}, {"SLURM_GPUS_ON_NODE": "4"}, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}])
def test_half_a_node_is_a_warning_with_what_may_fail(environment):
    (finding,) = of(8, 4, 4, **environment)
    assert finding.level == WARNING and "4 of the node's 8" in finding.found and "NOT_INITIALIZED" in finding.hint


def test_a_rank_that_is_bound_to_its_own_gpu_is_fine():
    (finding,) = of(4, 4, CUDA_VISIBLE_DEVICES="2")
    assert finding.level == OK and "1 of the node's 4" in finding.found


def test_more_devices_than_slurm_gave_is_an_error():
    findings = of(8, 8, SLURM_GPUS_ON_NODE="4", CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")
    assert ERROR in levels(findings) and "Slurm gave 4" in findings[0].found


def test_a_gpu_that_the_driver_has_lost_is_a_warning():
    assert levels(of(8, 8, 7)) == [WARNING]


@pytest.mark.parametrize(("open_gpus", "environment", "words"), [
    (0, {}, "can be opened"), (4, {"CUDA_VISIBLE_DEVICES": ""}, "hides all"),
])  # fmt: skip
def test_hidden_gpus_are_warnings(open_gpus, environment, words):
    findings = of(4, open_gpus, **environment)
    assert WARNING in levels(findings) and words in findings[0].found


def test_promised_gpus_without_a_driver_are_an_error():
    assert levels(of(0, 0, SLURM_GPUS_ON_NODE="4")) == [ERROR]
    assert of(0, 0, CUDA_VISIBLE_DEVICES="") == []


def test_ranks_of_a_node_that_share_one_of_several_gpus_are_named():
    facts = [rank_facts(rank, devices=Devices(4, 4), environment={"CUDA_VISIBLE_DEVICES": str(rank // 2)})
             for rank in range(4)]  # fmt: skip
    shared = [finding for finding in check_gpus(facts) if "share" in finding.found]
    assert [finding.ranks for finding in shared] == [(0, 1), (2, 3)] and set(levels(shared)) == {WARNING}


def test_equal_nodes_fold_into_one_line():
    facts = [rank_facts(rank, node=rank // 4, devices=Devices(4, 2)) for rank in range(400)]
    assert [len(finding.ranks) for finding in fold(check_gpus(facts))] == [400, 400]
