import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.report.classes import (
    CLASSES,
    COMMUNICATION,
    COMPUTE,
    INPUT_OUTPUT,
    SCHEDULING,
    WAITING,
    mean_shares,
    time_classes,
)

PHASES = ("forward", "sampling", "pipeline", "waiting for the leader", "waiting for results", "waiting for work",
          "waiting as a spare", "input and output", "scheduling")  # fmt: skip


def rank(run_s=100.0, kernels=60.0, reducing_s=0.0, **seconds):
    return {"seconds": seconds, "phases": {"run": run_s}, "kernels": {"products": kernels} if kernels else {},
            "traffic": {"calls": 1, "num_bytes": 4, "seconds": reducing_s}}  # fmt: skip


def test_each_class_has_its_phases():
    found = time_classes(rank(reducing_s=10.0, **{
        "forward": 70.0, "sampling": 5.0, "pipeline": 4.0, "waiting for results": 3.0, "waiting for work": 2.0,
        "input and output": 6.0, "waiting for weights": 1.0,
    }))  # fmt: skip
    assert found == {COMPUTE: 60.0, COMMUNICATION: 14.0, WAITING: 5.0, INPUT_OUTPUT: 7.0, SCHEDULING: 14.0}


def test_kernels_without_a_clock_have_all_of_the_model_but_its_sums():
    assert time_classes(rank(kernels=0, forward=50.0, sampling=10.0, reducing_s=20.0))[COMPUTE] == 40.0


def test_spare_ranks_wait():
    assert time_classes(rank(kernels=0, **{"waiting as a spare": 99.0}))[WAITING] == 99.0


@given(st.lists(st.floats(0, 10), min_size=len(PHASES), max_size=len(PHASES)), st.floats(0, 30), st.floats(0, 30))
def test_classes_add_up_to_the_run(values, kernels, reducing_s):
    seconds = dict(zip(PHASES, values, strict=True))
    found = time_classes(rank(sum(values) + 1.0, kernels, reducing_s, **seconds))
    assert sum(found.values()) == pytest.approx(sum(values) + 1.0) and min(found.values()) >= 0


def test_shares_of_several_ranks_are_those_of_their_time():
    one = dict.fromkeys(CLASSES, 0.0)
    assert mean_shares([{**one, COMPUTE: 3.0}, {**one, WAITING: 1.0}])[COMPUTE] == 0.75
    assert set(mean_shares([]).values()) == {0.0}
