import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.report.health import Health, Pulse


def beat(health, replica, at, steps, tokens=0, sequences=0):
    health.hear(Pulse(replica, steps, tokens, sequences, at + 500.0), at)  # its clock is another one


def after_two_pulses(*steps, batches=None):
    """Replicas that made so many steps in the last second."""
    health = Health(range(len(steps)), 1.0, 0.0)
    batches = batches or [10] * len(steps)
    for replica, (count, batch) in enumerate(zip(steps, batches, strict=True)):
        beat(health, replica, 1.0, 0)
        beat(health, replica, 2.0, count, 7 * count, count * batch)
    return health


@given(st.lists(st.integers(0, 2**62), min_size=4, max_size=4), st.floats(0, 1e9))
def test_pulse_survives_its_way(counts, time):
    assert Pulse.from_bytes(Pulse(*counts, time).to_bytes()) == Pulse(*counts, time)


def test_all_well_is_short_and_tokens_add_up():
    health = after_two_pulses(10, 12)
    assert health.describe(2.5) == "2/2 replicas" and health.tokens_per_s(2.5) == pytest.approx(154.0)


def test_those_that_are_not_well_are_named():
    health = after_two_pulses(10, 10, 10)
    assert health.describe(2.5, {1}, {2}) == "1/3 replicas, replica 1 recovering, replica 2 lost"


def test_replica_of_which_nothing_is_heard_is_silent():
    health = after_two_pulses(10, 10)
    for at in range(3, 20):
        beat(health, 0, float(at), 10 * at, 10 * at)
    assert health.describe(19.5) == "1/2 replicas, replica 1 silent for 17.5 s"
    assert health.tokens_per_s(19.5) == pytest.approx(10.0)
    assert Health([0], 1.0, 0.0).describe(9.0) == "1/1 replicas"  # it may still load


def test_slow_replica_is_named_unless_its_batches_are_larger():
    health = after_two_pulses(10, 10, 3)
    words = health.describe(2.5)
    assert words == "3/3 replicas, replica 2 slow (3.3 times the others' time for a step)"
    assert after_two_pulses(10, 10, 3, batches=[10, 10, 40]).describe(2.5) == "3/3 replicas"
    assert after_two_pulses(10, 10, 0).describe(2.5) == "3/3 replicas"  # it has no work


def test_another_leader_counts_from_zero():
    health = after_two_pulses(100)
    beat(health, 0, 3.0, 1, 5)
    assert health.tokens_per_s(3.0) == 0.0
    beat(health, 0, 4.0, 3, 25)
    assert health.tokens_per_s(4.0) == pytest.approx(20.0)


def test_only_some_are_named():
    words = Health(range(9), 1.0, 0.0).describe(0.0, set(range(5)))
    assert words.startswith("4/9 replicas, replica 0 recovering") and words.endswith("replica 2 recovering and 2 more")


def test_one_long_step_makes_nobody_slow():
    health = Health(range(2), 1.0, 0.0)
    for at in range(1, 9):
        beat(health, 0, float(at), 10 * at, 70 * at, 100 * at)
        beat(health, 1, float(at), 10 * at - 8 * (at == 8), 70 * at, 100 * at)
    assert health.describe(8.5) == "2/2 replicas"
