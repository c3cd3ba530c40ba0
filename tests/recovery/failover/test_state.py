"""What survivors know of their sequences, on its way to the one that decides."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.config import SamplingParams
from hpcinfer.engine.request import Request
from hpcinfer.recovery.failover.state import State, free_memory, observe

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=6).map(tuple)
REQUESTS = st.builds(
    Request,
    st.integers(0, 2**40),
    IDS,
    st.builds(SamplingParams, temperature=st.floats(0, 2), n=st.integers(1, 3), stop=st.just(("a", "ü"))),
    st.lists(IDS, max_size=3).map(tuple),
    st.integers(0, 9),
)
STATES = st.builds(
    State, st.integers(0, 99), st.integers(0, 2**40), st.lists(REQUESTS, max_size=4).map(tuple),
    st.sampled_from(["", "host-1-abc"]), st.integers(0, 2**50),
)  # fmt: skip


@given(state=STATES)
def test_states_survive_encoding(state):
    assert State.from_bytes(state.to_bytes()) == state


def replica(num_records, requests=()):
    return SimpleNamespace(
        engine=SimpleNamespace(num_records=num_records), scheduler=SimpleNamespace(unfinished=lambda: list(requests))
    )


def test_a_replica_that_has_not_begun_says_what_the_one_before_knew():
    last = State(3, 70, (Request(5, (1,), SamplingParams()),), "part-a")
    assert observe(None, 4, "part-b", last) is last
    assert observe(replica(0), 4, "part-b", last) is last


def test_a_replica_that_has_begun_says_what_is_unfinished_now():
    request = Request(5, (1,), SamplingParams(), ((2, 3),))
    last = State(3, 70, (), "part-a")
    assert observe(replica(2, [request]), 4, "part-b", last) == State(4, 2, (request,), "part-b")
    assert observe(replica(2, [request]), 4, "part-b", last).progress > last.progress


def test_free_memory_counts_what_this_process_has_or_its_device():
    assert free_memory(SimpleNamespace(total_bytes=lambda: None)) > 2**20
    assert free_memory(SimpleNamespace(total_bytes=lambda: 1000)) == 900
