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
    return {"bytes_read": 1 << 30, "bytes_received": 0, "bytes_sent": 0, "last_byte_s": 9.5, "last_layer_s": 10.0,
            **values}  # fmt: skip


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
    ({}, "storage"), ({"last_byte_s": 5.0}, "compute"), ({"bytes_received": 8 << 30}, "network"),
])  # fmt: skip
def test_load_is_bound_by_what_comes_last(values, bound):
    found = judge(made_up_rank(loading=loading(**values)))["load"]
    assert (found.bound, found.seconds) == (bound, 10.0) and found.hint


def test_one_rank_that_reads_most_is_imbalance():
    ranks = [made_up_rank(loading=loading(bytes_read=each)) for each in (1 << 30, 1 << 20, 1 << 20)]
    assert judge(*ranks)["load"].bound == "imbalance"


def test_stage_is_not_advised_where_there_is_one():
    read = {"store": 1 << 30, "stage": 1 << 30, "input": 0}
    assert not judge(made_up_rank(loading=loading(), bytes_read=read))["load"].hint


@pytest.mark.parametrize(("cpu_s", "bound"), [(0.9, "compute"), (0.2, "storage")])
def test_merge_is_bound_by_who_is_busy(cpu_s, bound):
    assert judge(made_up_rank(cpu_seconds={"merge": cpu_s}))["merge"].bound == bound
    assert "merge" not in judge(made_up_rank(), output_bytes=0)


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
