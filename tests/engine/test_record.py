from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.config import SamplingParams
from hpcinfer.engine.record import NO_TOKEN, UNBOUNDED, StepRecord
from hpcinfer.engine.request import Request
from hpcinfer.engine.sequence import Finish

works = st.lists(st.tuples(st.just(NO_TOKEN) | st.integers(0, 2**31 - 1), st.sampled_from(Finish)), max_size=20)
params = st.builds(SamplingParams, temperature=st.floats(0, 2), stop=st.lists(st.text(), max_size=2).map(tuple))
prompts = st.lists(st.integers(0, 2**31 - 1), max_size=9).map(tuple)
requests = st.lists(st.builds(Request, st.integers(0, 2**40), prompts, params), max_size=4)


@given(
    step=st.integers(0, 2**63 - 1), works=works, requests=requests, is_last=st.booleans(),
    num_tokens=st.integers(0, UNBOUNDED), digest=st.binary(min_size=8, max_size=8),
)  # fmt: skip
def test_records_survive_their_bytes(step, works, requests, is_last, num_tokens, digest):
    token_ids, finishes = tuple(token for token, _ in works), tuple(finish for _, finish in works)
    record = StepRecord(step, token_ids, finishes, tuple(requests), is_last, num_tokens, digest)
    again = StepRecord.from_bytes(record.to_bytes())
    assert again == record
    assert all(type(finish) is Finish for finish in again.finishes) and all(type(t) is int for t in again.token_ids)


def test_records_are_small():
    empty = StepRecord(5, (), ())
    assert len(empty.to_bytes()) <= 32
    assert len(StepRecord(5, (7,) * 64, (Finish.NONE,) * 64).to_bytes()) == len(empty.to_bytes()) + 5 * 64


def test_large_requests_and_many_are_told_apart():
    many = tuple(Request(row, tuple(range(row * 1000)), SamplingParams(max_tokens=row + 1)) for row in range(30))
    assert StepRecord.from_bytes(StepRecord(0, (), (), many).to_bytes()).requests == many
