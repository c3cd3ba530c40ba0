"""Results that come late, as those of a device: when they are waited for, and that they are the same."""

import pytest
from engine_runs import REQUESTS, lead, make_replica, run_engine, run_mesh
from late_kernels import LateKernels

from hpcinfer.engine.frontend import ListFrontend


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_next_batches_begin_before_late_results_are_waited_for(tiny_store, tokenizer, expected, in_flight):
    kernels = LateKernels()
    run = run_engine(tiny_store, tokenizer, kernels=kernels, micro_batches=in_flight, max_num_seqs=4)
    assert run.finished == expected
    waits = [i for i, (event, _) in enumerate(kernels.events) if event == "wait"]
    assert [kernels.events[i][1] for i in waits] == list(range(len(waits))) and 2 * len(waits) == len(kernels.events)
    begun = [sum(event == "begin" for event, _ in kernels.events[:i]) for i in waits]
    ahead = [count - number - 1 for number, count in enumerate(begun)]  # batches behind the one that is waited for
    assert max(ahead) == in_flight - 1 and ahead.count(in_flight - 1) > len(ahead) / 2


@pytest.mark.parametrize(("tp", "pp", "in_flight"), [(2, 1, 2), (3, 2, 3)])
def test_late_results_are_the_same_on_every_mesh(tiny_store, tokenizer, expected, tp, pp, in_flight):
    assert run_mesh(tiny_store, tokenizer, tp, pp, in_flight, LateKernels)[0].finished == expected


def test_waiting_for_a_device_is_time_of_the_model(tiny_store, tokenizer):
    kernels = LateKernels()
    replica = make_replica(tiny_store, kernels=kernels)
    kernels.metrics = replica.runner.metrics
    lead(replica, tokenizer, ListFrontend(REQUESTS[:2]))
    assert kernels.places == {"forward"} and kernels.metrics.seconds["sampling"] > 0
