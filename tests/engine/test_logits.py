import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.config import SamplingParams
from hpcinfer.engine.logits import changes_for, uniform
from hpcinfer.engine.request import Request
from hpcinfer.engine.sequence import Sequence
from hpcinfer.kernels.sampling import change_row


def sequence(prompt, output=(), **params):
    seq = Sequence(0, Request(0, tuple(prompt), SamplingParams(**params)), 0)
    seq.token_ids += output
    return seq


def adjust(row, first_id, seq, eos_ids):
    """A copy of a row with the changes of a sequence."""
    return change_row(row.copy(), changes_for(seq, seq.num_output, eos_ids, range(first_id, first_id + len(row))))


SEEN = sequence(
    [1, 2, 2, 9], [3, 3, 2, 7], repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25,
    logit_bias=((0, 2.0), (3, -1.5), (11, 100.0)), min_tokens=5, stop_token_ids=(5,), max_tokens=10,
)  # fmt: skip


def adjusted_one_by_one(row, seq, eos_ids):
    """What `adjust` does to a whole row, token by token, in float32."""
    params, f4 = seq.request.sampling, np.float32
    result = []
    for token_id, value in enumerate(row):
        value += f4(dict(params.logit_bias).get(token_id, 0.0))
        if seq.num_output < params.min_tokens and token_id in (*eos_ids, *params.stop_token_ids):
            value = f4(-np.inf)
        if token_id in seq.token_ids:
            factor = f4(params.repetition_penalty)
            value = value / factor if value > 0 else value * factor
        count = seq.output_ids.count(token_id)
        if count:
            value -= f4(params.frequency_penalty * count + params.presence_penalty)
        result.append(value)
    return np.array(result, f4)


@given(values=st.lists(st.floats(-30, 30, width=32), min_size=12, max_size=12))
def test_penalties_are_those_of_a_naive_loop(values):
    row = np.array(values, np.float32)
    assert np.array_equal(adjust(row, 0, SEEN, (4, 6)), adjusted_one_by_one(row, SEEN, (4, 6)))


@pytest.mark.parametrize("cuts", [(), (6,), (3, 3, 7), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)])
def test_shards_are_adjusted_as_the_whole_row(cuts):
    row = np.random.default_rng(0).standard_normal(12).astype(np.float32) * 5
    whole = adjust(row, 0, SEEN, (4, 6, 40))
    bounds = itertools.pairwise((0, *cuts, 12))
    assert np.array_equal(np.concatenate([adjust(row[a:b], a, SEEN, (4, 6, 40)) for a, b in bounds]), whole)


def test_end_tokens_are_forbidden_until_min_tokens():
    for num_output, forbidden in ((0, True), (2, True), (3, False)):
        seq = sequence([0], [9] * num_output, min_tokens=3, max_tokens=5, stop_token_ids=(2,))
        assert seq.request.sampling.adjusts_logits(num_output) == forbidden
        row = adjust(np.zeros(6, np.float32), 0, seq, (1,))
        assert np.isneginf(row[[1, 2]]).all() == forbidden and np.isfinite(row[[0, 3, 4, 5]]).all()


def test_ids_outside_the_vocabulary_are_no_index():
    seq = sequence([0], logit_bias=((10**9, 5.0),), stop_token_ids=(10**9,), min_tokens=1)
    assert not adjust(np.zeros(4, np.float32), 0, seq, (7,)).any()


@given(prompt=st.lists(st.integers(0, 20), min_size=1, max_size=8), cut=st.integers(0, 20),
       steps=st.lists(st.lists(st.integers(0, 20), max_size=7), max_size=8),
       penalties=st.tuples(*[st.sampled_from([0.0, 0.5])] * 2), repetition=st.sampled_from([1.0, 1.3]))  # fmt: skip
def test_what_a_sequence_has_seen_grows_with_it(prompt, cut, steps, penalties, repetition):
    params = {"presence_penalty": penalties[0], "frequency_penalty": penalties[1], "repetition_penalty": repetition}
    growing, parts = sequence(prompt, **params), (range(cut), range(cut, 21))
    for new in steps:
        growing.token_ids += new
        fresh = sequence(prompt, growing.output_ids, **params)
        for ids in parts:
            found, expected = (changes_for(each, 9, (), ids) for each in (growing, fresh))
            assert all(a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True))
        row = np.linspace(-3, 3, 21, dtype=np.float32)
        assert np.array_equal(adjust(row, 0, growing, ()), adjusted_one_by_one(row, growing, ()))


def test_nothing_is_adjusted_by_default():
    assert not SamplingParams().adjusts_logits(0)
    for name, value in (("repetition_penalty", 1.1), ("presence_penalty", -0.1), ("frequency_penalty", 0.1),
                        ("logit_bias", ((1, 1.0),)), ("min_tokens", 1)):  # fmt: skip
        assert SamplingParams(**{name: value}).adjusts_logits(0)


# The generator.


def test_draws_are_in_range_distinct_and_even():
    keys = itertools.product((-1, 0, 2**63 - 1), range(25), range(4), range(40))
    draws = [uniform(*key) for key in keys]
    assert all(0 <= u < 1 for u in draws) and len(set(draws)) == len(draws)
    assert np.abs(np.histogram(draws, 10, (0, 1))[0] / len(draws) - 0.1).max() < 0.015


def test_draws_are_the_same_in_every_version():
    assert [uniform(0, 0, 0, 1), uniform(42, 7, 1, 100)] == [0.1464493153210139, 0.3584075563778145]
