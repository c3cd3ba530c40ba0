from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from made_up_ranks import cluster, levels, rank_facts

from hpcinfer.diagnosis.binding import check_binding, is_crowded
from hpcinfer.diagnosis.finding import ERROR, OK, WARNING, fold
from hpcinfer.diagnosis.node import Processors


def node(masks, threads=1, node_cpus=8, smt=1, **environment):
    """Ranks of one node, with these masks; `smt` CPUs make a core."""
    return [
        rank_facts(rank, environment=environment,
                   processors=Processors(tuple(mask), max(len(mask) // smt, 1), node_cpus, threads, "EPYC"))
        for rank, mask in enumerate(masks)
    ]  # fmt: skip


def one(facts):
    (finding,) = fold(check_binding(facts))
    return finding


def test_each_rank_of_a_big_cluster_on_its_own_core_is_one_ok():
    finding = one(cluster(125, 8))
    assert finding.level == OK and len(finding.ranks) == 1000 and not is_crowded(cluster(125, 8))


def test_ranks_pinned_to_the_same_core_while_others_idle_are_an_error():
    finding = one(node([[0]] * 4))
    assert finding.level == ERROR and "CPU 0" in finding.found and "4 times slower" in finding.found
    assert "7 CPUs of the node have no rank" in finding.found and "--cpu-bind" in finding.hint


def test_pairs_pinned_to_the_same_cores_are_found_as_well():
    findings = fold(check_binding(node([[0], [0], [1], [1]])))
    assert levels(findings) == [ERROR, ERROR] and [finding.ranks for finding in findings] == [(0, 1), (2, 3)]


def test_a_small_allocation_is_not_blamed_for_the_rest_of_the_node():
    finding = one(node([[0, 1]] * 4, SLURM_CPUS_ON_NODE="2"))
    assert finding.level == WARNING and "take turns" in finding.found


def test_more_threads_than_cpus_is_a_warning():
    finding = one(node([range(8)] * 2, threads=8))
    assert finding.level == WARNING and "2 ranks of 8 threads on CPUs 0-7" in finding.found
    assert is_crowded(node([range(8)] * 2, threads=8))


def test_a_wide_mask_for_all_is_fine_as_ranks_share_it_out():
    assert one(node([range(8)] * 4, threads=2)).level == OK


def test_threads_on_both_cpus_of_a_core_are_said():
    finding = one(node([range(8)] * 8, smt=2))
    assert finding.level == WARNING and "4 cores" in finding.found


def test_masks_that_overlap_are_said():
    finding = one(node([[0, 1, 2, 3], [2, 3, 4, 5]], threads=2))
    assert finding.level == WARNING and "CPUs 2-3" in finding.found and finding.ranks == (0, 1)


def test_idle_cores_are_said_with_the_number_of_threads_that_fits():
    finding = one(node([range(8)] * 2))
    assert finding.level == WARNING and "6 of 8 cores" in finding.found and "OMP_NUM_THREADS=4" in finding.hint


def test_openmp_that_binds_by_itself_puts_all_ranks_on_the_first_cores():
    finding = one(node([range(8)] * 2, threads=4, OMP_PROC_BIND="close"))
    assert finding.level == ERROR and "$OMP_PROC_BIND" in finding.found
    assert one(node([range(8)] * 2, threads=4, OMP_PROC_BIND="false")).level == OK
    assert one(node([[0], [1]], node_cpus=2, OMP_PROC_BIND="true")).level == OK  # the launcher has bound them


def test_a_wrong_number_of_threads_is_an_error_of_its_rank():
    facts = [replace(fact, processors=fact.processors._replace(problem="OMP_NUM_THREADS=x: expected a number"))
             if fact.rank == 3 else fact for fact in cluster(2, 4)]
    findings = check_binding(facts)
    assert findings[0].level == ERROR and findings[0].ranks == (3,)


def test_virtual_hosts_of_one_machine_share_its_cpus():
    facts = [replace(fact, machine="one", host=f"v{fact.rank}") for fact in node([[0, 1]] * 3, node_cpus=2)]
    assert one(facts).level == WARNING


@given(st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=6), st.integers(1, 3))
def test_more_threads_than_cpus_is_never_called_fine(masks, threads):
    facts = node(masks, threads, node_cpus=6)
    union = set().union(*masks)
    if threads * len(masks) > len(union) or any(threads > len(mask) for mask in masks):
        assert is_crowded(facts)
    assert {rank for finding in check_binding(facts) for rank in finding.ranks} <= set(range(len(masks)))
