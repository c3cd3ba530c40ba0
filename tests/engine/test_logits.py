import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcinfer.config import SamplingParams
from hpcinfer.engine.logits import adjust, log_total, sample, score, uniform
from hpcinfer.engine.request import Request
from hpcinfer.engine.sequence import Sequence
from hpcinfer.kernels import create_kernels

KERNELS = create_kernels("reference")
GRID = (np.arange(200) + 0.5) / 200  # values of u
# Halves, so that values tie often; top_p and min_p are such that no sum of probabilities hits them.
rows = st.lists(st.integers(-8, 8).map(lambda x: x / 2), min_size=1, max_size=12).map(lambda x: np.array(x, np.float32))


def probabilities(row, params):
    """What `sample` draws from, in float64 and step by step."""
    weights = [math.exp((float(value) - float(row.max())) / params.temperature) for value in row]
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    kept = [i for i in order if weights[i] >= params.min_p]
    kept = kept[: params.top_k] if params.top_k > 0 else kept
    total = sum(weights[i] for i in kept)
    while sum(weights[i] for i in kept[:-1]) >= params.top_p * total:
        kept.pop()
    total = sum(weights[i] for i in kept)
    return np.array([weights[i] / total if i in kept else 0.0 for i in range(len(row))])


def frequencies(row, params):
    return np.bincount([sample(row, params, u, KERNELS) for u in GRID], minlength=len(row)) / len(GRID)


def array(*values):
    return np.array(values, np.float32)


def sequence(prompt, output=(), **params):
    seq = Sequence(0, Request(0, tuple(prompt), SamplingParams(**params)), 0)
    seq.token_ids += output
    return seq


@settings(max_examples=60)
@given(
    row=rows, temperature=st.sampled_from([0.3, 1.0, 2.7]), top_k=st.sampled_from([-1, 0, 1, 3, 100]),
    top_p=st.sampled_from([1.0, 0.9137, 0.5219, 0.0173]), min_p=st.sampled_from([0.0, 0.0731, 0.3379, 1.0]),
)  # fmt: skip
def test_draws_follow_the_distribution(row, temperature, top_k, top_p, min_p):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected, found = probabilities(row, params), frequencies(row, params)
    assert np.abs(found - expected).max() <= 2 / len(GRID)
    assert not found[expected == 0].any()


def test_equal_logits_are_ordered_by_id():
    row = array(1, 3, 3, 2, 3, 3)
    assert np.flatnonzero(frequencies(row, SamplingParams(top_k=2))).tolist() == [1, 2]
    assert np.flatnonzero(frequencies(row, SamplingParams(top_p=0.4))).tolist() == [1, 2]
    assert sample(row, SamplingParams(temperature=0), 0.99, KERNELS) == 1
    assert [sample(row, SamplingParams(top_k=2), u, KERNELS) for u in (0.0, 0.49, 0.51, 0.999)] == [1, 1, 2, 2]


def test_logits_that_temperature_would_merge_keep_their_order():
    row = array(1.0, np.nextafter(np.float32(1), np.float32(2)), 1.0)
    assert sample(row, SamplingParams(temperature=1e6, top_k=1), 0.5, KERNELS) == 1


def test_top_p_keeps_the_token_that_reaches_it():
    row = np.log(array(0.5, 0.3, 0.15, 0.05))
    for top_p, kept in ((0.499, 1), (0.501, 2), (0.799, 2), (0.801, 3), (0.951, 4), (1e-9, 1)):
        assert np.count_nonzero(frequencies(row, SamplingParams(top_p=top_p))) == kept


def test_min_p_of_one_keeps_only_the_best():
    assert frequencies(array(2, 1.99, 2), SamplingParams(min_p=1.0)).tolist() == [0.5, 0, 0.5]


def test_forbidden_tokens_are_never_drawn():
    row = array(-np.inf, 0, -np.inf, 0, -np.inf)
    for params in (SamplingParams(), SamplingParams(top_k=5), SamplingParams(top_p=0.999)):
        assert frequencies(row, params).tolist() == [0, 0.5, 0, 0.5, 0]
        assert sample(row, params, 0.0, KERNELS) == 1 and sample(row, params, 1 - 2**-53, KERNELS) == 3


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-10])
@pytest.mark.filterwarnings("error")
def test_tiny_temperatures_take_the_most_likely_token(temperature):
    row = array(0.5, 30000, -30000, 29999.99, -np.inf)
    assert all(sample(row, SamplingParams(temperature=temperature), u, KERNELS) == 1 for u in (0.0, 0.5, 0.9999))


@pytest.mark.parametrize("temperature", [1e30, 1e300])
@pytest.mark.filterwarnings("error")
def test_huge_temperatures_take_every_allowed_token(temperature):
    found = frequencies(array(5, -500, 1, -np.inf), SamplingParams(temperature=temperature))
    assert np.abs(found - [1 / 3, 1 / 3, 1 / 3, 0]).max() < 0.01


@pytest.mark.parametrize(("row", "token_id"), [
    (array(-np.inf, -np.inf), 0), (array(1, np.nan, np.inf), 2), (array(1, np.inf, np.inf), 1),
    (array(np.nan, np.nan), 0), (array(np.nan, -np.inf), 0),
])  # fmt: skip
def test_rows_without_a_distribution_give_a_token_and_no_error(row, token_id):
    for params in (SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_k=1, top_p=0.5, min_p=0.5)):
        assert sample(row, params, 0.7, KERNELS) == token_id


@pytest.mark.filterwarnings("error")
def test_nan_is_never_drawn():
    row, hole = array(1, np.nan, 3, np.nan, 2), array(1, -np.inf, 3, -np.inf, 2)
    for params in (SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_k=4), SamplingParams(top_p=0.9)):
        assert frequencies(row, params).tolist() == frequencies(hole, params).tolist()


def by_full_sort(row, params, u):
    """What `sample` chooses, by the plain definition: all ids sorted, all sums made."""
    temperature = np.float32(params.temperature)
    weights = KERNELS.exp((row - row.max()) / temperature)
    weights[weights < np.float32(params.min_p)] = 0
    ids = np.lexsort((np.arange(len(row)), -row))
    total = np.cumsum(weights, dtype=np.float64)[-1]
    if params.top_k > 0:
        ids = ids[: params.top_k]
        total = np.cumsum(weights[ids], dtype=np.float64)[-1]
    elif params.top_p == 1:
        ids = np.arange(len(row))
    sums, kept = [], 0.0
    for weight in weights[ids].astype(np.float64).tolist():
        kept += weight
        sums.append(kept)
        if params.top_p < 1 and kept >= params.top_p * total:
            break
    return next(int(i) for i, upto in zip(ids, sums, strict=False) if upto > u * sums[-1])


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1, 63, 64, 65, 1000, 1025, 3000]),
    spread=st.sampled_from([0.0, 0.01, 1.0, 8.0]), is_coarse=st.booleans(), u=st.floats(0, 1 - 2**-53),
    temperature=st.sampled_from([0.2, 1.0, 5.0]), top_k=st.sampled_from([0, 1, 50, 2000]),
    top_p=st.sampled_from([1.0, 1 - 1e-9, 0.95, 0.5, 1e-6]), min_p=st.sampled_from([0.0, 1e-3, 0.3]),
)  # fmt: skip
def test_choice_is_that_of_a_full_sort(seed, size, spread, is_coarse, u, temperature, top_k, top_p, min_p):
    row = (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)
    row = np.round(row) if is_coarse else row  # many ties
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert sample(row, params, u, KERNELS) == by_full_sort(row, params, u)


class _Sorts:
    """Kernels that say how many candidates were asked for."""

    def __init__(self):
        self.counts, self.exp = [], KERNELS.exp

    def largest(self, row, count):
        self.counts.append(count)
        return KERNELS.largest(row, count)


def test_no_more_is_sorted_than_the_probability_needs():
    flat, steep = np.zeros(5000, np.float32), np.linspace(0, -500, 5000, dtype=np.float32)
    for row, params, counts in (
        (steep, SamplingParams(top_p=0.9), [64]), (flat, SamplingParams(top_p=0.1), [64, 1024]),
        (flat, SamplingParams(top_p=0.5), [64, 1024, 5000]), (flat, SamplingParams(), []),
        (flat, SamplingParams(min_p=0.5), []), (flat, SamplingParams(top_k=7, top_p=0.9), [7]),
    ):  # fmt: skip
        kernels = _Sorts()
        sample(row, params, 0.5, kernels)
        assert kernels.counts == counts


# Penalties.

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


def test_the_row_itself_is_left_alone():
    row = np.ones(12, np.float32)
    adjust(row, 0, SEEN, (4,))
    assert (row == 1).all()


def test_end_tokens_are_forbidden_until_min_tokens():
    for num_output, forbidden in ((0, True), (2, True), (3, False)):
        seq = sequence([0], [9] * num_output, min_tokens=3, max_tokens=5, stop_token_ids=(2,))
        assert seq.request.sampling.adjusts_logits(num_output) == forbidden
        row = adjust(np.zeros(6, np.float32), 0, seq, (1,))
        assert np.isneginf(row[[1, 2]]).all() == forbidden and np.isfinite(row[[0, 3, 4, 5]]).all()


def test_ids_outside_the_vocabulary_are_no_index():
    seq = sequence([0], logit_bias=((10**9, 5.0),), stop_token_ids=(10**9,), min_tokens=1)
    assert not adjust(np.zeros(4, np.float32), 0, seq, (7,)).any()


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


# Log-probabilities.


def grains_of(row, sizes, width, padding=np.nan):
    """A row [V] as [1, G, U]; padded columns mean nothing."""
    grains = np.full((1, len(sizes), width), padding, np.float32)
    for g, part in enumerate(np.split(row, np.cumsum(sizes)[:-1])):
        grains[0, g, : len(part)] = part
    return grains


def test_log_total_is_that_of_the_row_whatever_its_company():
    random, sizes = np.random.default_rng(3), (6, 6, 5, 5, 5, 5, 5, 5)
    whole = np.concatenate([grains_of(random.standard_normal(42).astype("f4") * 10, sizes, 8) for _ in range(17)])
    together = log_total(whole, sizes, KERNELS)
    assert together.dtype == np.float64
    alone = [log_total(whole[i : i + 1].copy(), sizes, KERNELS)[0] for i in range(17)]
    reverse = log_total(np.ascontiguousarray(whole[::-1]), sizes, KERNELS)[::-1]
    assert together.tobytes() == np.array(alone).tobytes() == np.ascontiguousarray(reverse).tobytes()


@given(row=st.lists(st.floats(-40, 40, width=32), min_size=4, max_size=20).map(lambda x: np.array(x, np.float32)))
def test_probabilities_sum_to_one(row):
    sizes = tuple(map(len, np.array_split(row, 4)))
    log_sum = float(log_total(grains_of(row, sizes, 5), sizes, KERNELS)[0])
    assert abs(np.exp(row.astype(np.float64) - log_sum).sum() - 1) < 1e-5


def test_grains_without_ids_or_hope_add_nothing():
    row = array(1, 2, -np.inf)
    for sizes in ((1, 1, 1, 0), (2, 1, 0, 0), (0, 0, 2, 1)):
        assert log_total(grains_of(row, sizes, 2), sizes, KERNELS)[0] == pytest.approx(math.log(math.e + math.e**2))


def test_most_likely_tokens_are_best_first_then_lowest_id():
    row = array(1, 3, 2, 3, -1)
    scored = score(row, 4.0, 4, 3, KERNELS)
    assert (scored.token_id, scored.logprob) == (4, -5.0) and scored.top == ((1, -1.0), (3, -1.0), (2, -2.0))
    assert score(row, 4.0, 0, 0, KERNELS).top == ()
    assert [i for i, _ in score(row, 0.0, 0, 20, KERNELS).top] == [1, 3, 2, 0, 4]
    assert score(array(0, -np.inf), 0.0, 1, 1, KERNELS).logprob == -math.inf
