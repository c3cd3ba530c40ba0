import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.config import SamplingParams
from hpcinfer.engine.request import Request

floats = st.floats(allow_nan=False)
ids = st.integers(0, 2**31 - 1)
PARAMS = st.builds(
    SamplingParams,
    temperature=floats, top_p=floats, top_k=st.integers(-1, 2**40), min_p=floats, repetition_penalty=floats,
    presence_penalty=floats, frequency_penalty=floats,
    logit_bias=st.lists(st.tuples(ids, floats), max_size=3).map(tuple),
    max_tokens=st.integers(0, 2**40), min_tokens=st.integers(0, 100),
    stop=st.lists(st.text(), max_size=3).map(tuple), stop_token_ids=st.lists(ids, max_size=3).map(tuple),
    ignore_eos=st.booleans(), n=st.integers(1, 128), logprobs=st.none() | st.integers(0, 20), echo=st.booleans(),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
)  # fmt: skip
TOKENS = st.lists(ids, max_size=40).map(tuple)
REQUESTS = st.builds(Request, st.integers(0, 2**63 - 1), TOKENS, PARAMS, st.lists(TOKENS, max_size=3).map(tuple),
                     st.integers(0, 2**31 - 1))  # fmt: skip


def bits(value):
    return struct.pack("<d", value)


@given(request=REQUESTS)
def test_requests_survive_their_bytes(request):
    again = Request.from_bytes(request.to_bytes())
    assert again == request and hash(again) == hash(request)
    assert bits(again.sampling.temperature) == bits(request.sampling.temperature)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, 0.7000000000000001])
def test_floats_are_exact(value):
    params = SamplingParams(temperature=value, logit_bias=((3, -value),))
    again = Request.from_bytes(Request(0, (1,), params).to_bytes()).sampling
    assert bits(again.temperature) == bits(value) and bits(again.logit_bias[0][1]) == bits(-value)


def test_seed_and_logprobs_of_zero_are_not_none():
    params = SamplingParams(seed=0, logprobs=0)
    assert Request.from_bytes(Request(0, (1,), params).to_bytes()).sampling == params


def test_defaults_cost_no_bytes():
    assert len(Request(1, (1, 2, 3), SamplingParams()).to_bytes()) <= 24 + 4 * 3 + 2


def test_ids_too_large_for_a_record_are_no_silent_wrap():
    with pytest.raises(OverflowError):
        Request(0, (2**31,), SamplingParams()).to_bytes()
