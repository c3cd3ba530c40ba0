"""Each bound is reached by a run that has it, and names numbers and an option."""

import pytest
from made_up_report import SECONDS, made_up_rank, made_up_run, made_up_timeline

from hpcinfer.report.bounds import bounds, main_bound


def judge(*ranks, **run):
    """Bounds by phase."""
    return {each.phase: each for each in bounds(made_up_run(len(ranks), **run), list(ranks))}


def tp_pair(calls, num_bytes, first_s, second_s=None):
    """Two ranks of a stage that spend their time in sums."""
    second_s = first_s if second_s is None else second_s
    sums = {"calls": calls, "num_bytes": calls * num_bytes}
    return [made_up_rank(0, 0, i, kernels={"products": 20.0}, traffic={**sums, "seconds": each_s})
            for i, each_s in enumerate((first_s, second_s))]  # fmt: skip


def loading(**values):
    return {"bytes_read": 1 << 30, "bytes_received": 0, "bytes_sent": 0, "last_read_s": 9.4, "last_byte_s": 9.5,
            "last_layer_s": 10.0, **values}  # fmt: skip


@pytest.mark.parametrize(("counts", "bound", "word"), [
    ({"steps": 100, "tokens": 6_400}, "compute", "-dp"), ({"steps": 1000, "tokens": 4_000}, "memory", "--max-num-seqs"),
])  # fmt: skip
def test_run_of_kernels_is_bound_by_the_tokens_of_a_step(counts, bound, word):
    found = judge(made_up_rank(counts=counts))["run"]
    assert (found.bound, found.seconds) == (bound, 100.0) and word in found.hint
    assert "where 16 would" in found.evidence and "compute 75 %" in found.evidence
    assert judge(made_up_rank(counts=counts), bytes_per_weight=20.0)["run"].bound == "memory"


def test_small_batches_have_their_reason():
    small = {"counts": {"steps": 1000, "tokens": 4_000}}
    full = made_up_timeline(40.0, 98.0, blocks=95)
    assert "--kv-cache-memory" in judge(made_up_rank(**small, timeline=full))["run"].hint
    assert "more rows" in judge(made_up_rank(**small, peaks={"batch_sequences": 5}))["run"].hint


def test_attention_is_bound_by_memory():
    found = judge(made_up_rank(kernels={"products": 20.0, "attention": 55.0}))["run"]
    assert found.bound == "memory" and "--kv-cache-dtype" in found.hint and "73 %" in found.evidence


@pytest.mark.parametrize(("num_bytes", "bound", "word"), [(4 << 10, "latency", "-tp"), (1 << 20, "network", "-pp")])
def test_sums_are_bound_by_their_size(num_bytes, bound, word):
    found = judge(*tp_pair(100_000, num_bytes, 55.0))["run"]
    assert found.bound == bound and word in found.hint and "550 us each" in found.evidence


def test_sums_in_which_one_rank_waits_for_the_other_are_imbalance():
    assert judge(*tp_pair(100_000, 4 << 10, 55.0, 5.0))["run"].bound == "imbalance"


def test_pipeline_that_waits_is_imbalance():
    found = judge(made_up_rank(kernels={"products": 10.0}, seconds={"forward": 12.0, "pipeline": 80.0}))["run"]
    assert found.bound == "imbalance" and "-pp" in found.hint


@pytest.mark.parametrize(("phase", "bound", "word"), [
    ("waiting for work", "imbalance", "fewer ranks"), ("waiting for results", "latency", "-pp"),
])  # fmt: skip
def test_waiting_is_bound_by_what_is_waited_for(phase, bound, word):
    found = judge(made_up_rank(kernels={"products": 5.0}, seconds={"forward": 6.0, phase: 80.0}))["run"]
    assert found.bound == bound and word in found.hint


@pytest.mark.parametrize(("cpu_s", "bound"), [(95.0, "compute"), (20.0, "storage")])
def test_input_and_output_is_bound_by_who_is_busy(cpu_s, bound):
    seconds = {**SECONDS, "forward": 5.0, "sampling": 0.0, "input and output": 90.0}
    assert judge(made_up_rank(kernels={}, seconds=seconds, cpu_seconds={"run": cpu_s}))["run"].bound == bound


def test_scheduling_is_latency():
    found = judge(made_up_rank(kernels={"products": 10.0}, seconds={"forward": 15.0, "scheduling": 80.0}))["run"]
    assert found.bound == "latency" and "90.00 ms of each step" in found.evidence


@pytest.mark.parametrize(("values", "bound"), [
    ({}, "storage"), ({"last_byte_s": 5.0}, "compute"), ({"bytes_received": 8 << 30, "last_read_s": 5.0}, "network"),
    ({"bytes_received": 8 << 30}, "storage"),
])  # fmt: skip
def test_load_is_bound_by_what_comes_last(values, bound):
    found = judge(made_up_rank(loading=loading(**values)), hosts=["n0", "n1"])["load"]
    assert (found.bound, found.seconds) == (bound, 10.0) and found.hint


def test_one_rank_that_reads_most_is_imbalance():
    ranks = [made_up_rank(loading=loading(bytes_read=each)) for each in (1 << 30, 1 << 20, 1 << 20)]
    found = judge(*ranks)["load"]
    assert (found.bound, found.hint) == ("imbalance", ""), "-pp 1 divides all layers"
    ranks[1]["place"]["pp"] = 2
    assert "-pp" in judge(*ranks)["load"].hint


@pytest.mark.parametrize(("hosts", "has_stage", "words"), [
    (["n0", "n1"], False, "--stage"), (["n0", "n1"], True, ""), (["n0", "n0"], False, ""),
])  # fmt: skip
def test_stage_is_advised_where_there_is_none_and_several_nodes_read(hosts, has_stage, words):
    weights = {**SECONDS, "forward": 90.0, "sampling": 0.0, "waiting for weights": 80.0}
    found = judge(made_up_rank(kernels={"products": 10.0}, loading=loading(), seconds=weights), hosts=hosts,
                  has_stage=has_stage)  # fmt: skip
    for each in (found["load"], found["run"]):
        assert each.bound == "storage" and each.hint.startswith(words) and bool(each.hint) == bool(words)
    assert "waited 1 min 20 s for weights" in found["run"].evidence


@pytest.mark.parametrize(("cpu_s", "bound"), [(0.9, "compute"), (0.2, "storage")])
def test_merge_is_bound_by_who_is_busy(cpu_s, bound):
    assert judge(made_up_rank(cpu_seconds={"merge": cpu_s}))["merge"].bound == bound
    assert "merge" not in judge(made_up_rank(), output_bytes=0)


def test_ranks_that_do_not_merge_count_for_nothing():
    busy, idle = made_up_rank(cpu_seconds={"merge": 0.9}), made_up_rank(cpu_seconds={"merge": 0.0})
    found = judge(*[busy] * 3, *[idle] * 2, num_mergers=3)["merge"]
    assert found.bound == "compute" and "more ranks" not in found.hint and "0.90 cores" in found.evidence
    assert "more ranks" in judge(busy)["merge"].hint


def test_tail_of_several_replicas_is_imbalance():
    found = judge(made_up_rank(0, until_s=50.0), made_up_rank(1, until_s=100.0))["tail"]
    assert (found.bound, found.seconds) == ("imbalance", 50.0) and "-dp" in found.hint
    assert "50 % of it idle, 25.0 % of the whole run" in found.evidence
    assert "tail" not in judge(made_up_rank())
    assert not judge(made_up_rank(0, until_s=98.0), made_up_rank(1, until_s=99.0))["tail"].hint


def test_phases_that_took_no_time_have_no_bound():
    assert judge(made_up_rank(phases={}, loading={})) == {}
    assert main_bound([]) is None


def test_longest_phase_counts_and_the_tail_is_none():
    found = bounds(made_up_run(), [made_up_rank(0, until_s=1.0), made_up_rank(1)])
    assert main_bound(found).phase == "run"


def test_cores_that_others_use_are_seen_first():
    found = judge(made_up_rank(cpu_seconds={"run": 30.0}))["run"]
    assert found.bound == "compute" and "0.30 cores busy" in found.evidence and "hpcinfer doctor" in found.hint
    spare = made_up_rank(place={}, cpu_seconds={"run": 0.0})
    del spare["timeline"]
    assert "cores busy per thread" not in judge(made_up_rank(), spare)["run"].evidence, "leaders alone are judged"
    assert "0.23 cores busy" in judge(made_up_rank(), threads=4)["run"].evidence
