"""Draws and log-probabilities on CPUs: what is drawn, and that it is what the plain definition says."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stages import native_was_built

from hpcinfer.kernels import create_kernels
from hpcinfer.kernels.protocol import Changes, Draw
from hpcinfer.kernels.sampling import log_totals, sample

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
    return np.bincount([sample(row, params._replace(u=u), KERNELS) for u in GRID], minlength=len(row)) / len(GRID)


def array(*values):
    return np.array(values, np.float32)


def how(temperature=1.0, **filters):
    return Draw(temperature, **filters)


@settings(max_examples=60)
@given(
    row=rows, temperature=st.sampled_from([0.3, 1.0, 2.7]), top_k=st.sampled_from([-1, 0, 1, 3, 100]),
    top_p=st.sampled_from([1.0, 0.9137, 0.5219, 0.0173]), min_p=st.sampled_from([0.0, 0.0731, 0.3379, 1.0]),
)  # fmt: skip
def test_draws_follow_the_distribution(row, temperature, top_k, top_p, min_p):
    params = how(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected, found = probabilities(row, params), frequencies(row, params)
    assert np.abs(found - expected).max() <= 2 / len(GRID)
    assert not found[expected == 0].any()


def test_equal_logits_are_ordered_by_id():
    row = array(1, 3, 3, 2, 3, 3)
    assert np.flatnonzero(frequencies(row, how(top_k=2))).tolist() == [1, 2]
    assert np.flatnonzero(frequencies(row, how(top_p=0.4))).tolist() == [1, 2]
    assert sample(row, how(temperature=0, u=0.99), KERNELS) == 1
    assert [sample(row, how(top_k=2, u=u), KERNELS) for u in (0.0, 0.49, 0.51, 0.999)] == [1, 1, 2, 2]


def test_logits_that_temperature_would_merge_keep_their_order():
    row = array(1.0, np.nextafter(np.float32(1), np.float32(2)), 1.0)
    assert sample(row, how(temperature=1e6, top_k=1, u=0.5), KERNELS) == 1


def test_top_p_keeps_the_token_that_reaches_it():
    row = np.log(array(0.5, 0.3, 0.15, 0.05))
    for top_p, kept in ((0.499, 1), (0.501, 2), (0.799, 2), (0.801, 3), (0.951, 4), (1e-9, 1)):
        assert np.count_nonzero(frequencies(row, how(top_p=top_p))) == kept


def test_min_p_of_one_keeps_only_the_best():
    assert frequencies(array(2, 1.99, 2), how(min_p=1.0)).tolist() == [0.5, 0, 0.5]


def test_forbidden_tokens_are_never_drawn():
    row = array(-np.inf, 0, -np.inf, 0, -np.inf)
    for params in (how(), how(top_k=5), how(top_p=0.999)):
        assert frequencies(row, params).tolist() == [0, 0.5, 0, 0.5, 0]
        assert [sample(row, params._replace(u=u), KERNELS) for u in (0.0, 1 - 2**-53)] == [1, 3]


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-10])
@pytest.mark.filterwarnings("error")
def test_tiny_temperatures_take_the_most_likely_token(temperature):
    row = array(0.5, 30000, -30000, 29999.99, -np.inf)
    assert all(sample(row, how(temperature=temperature, u=u), KERNELS) == 1 for u in (0.0, 0.5, 0.9999))


@pytest.mark.parametrize("temperature", [1e30, 1e300])
@pytest.mark.filterwarnings("error")
def test_huge_temperatures_take_every_allowed_token(temperature):
    found = frequencies(array(5, -500, 1, -np.inf), how(temperature=temperature))
    assert np.abs(found - [1 / 3, 1 / 3, 1 / 3, 0]).max() < 0.01


@pytest.mark.parametrize(("row", "token_id"), [
    (array(-np.inf, -np.inf), 0), (array(1, np.nan, np.inf), 2), (array(1, np.inf, np.inf), 1),
    (array(np.nan, np.nan), 0), (array(np.nan, -np.inf), 0),
])  # fmt: skip
def test_rows_without_a_distribution_give_a_token_and_no_error(row, token_id):
    for params in (how(temperature=0), how(), how(top_k=1, top_p=0.5, min_p=0.5)):
        assert sample(row, params._replace(u=0.7), KERNELS) == token_id


@pytest.mark.filterwarnings("error")
def test_nan_is_never_drawn():
    row, hole = array(1, np.nan, 3, np.nan, 2), array(1, -np.inf, 3, -np.inf, 2)
    for params in (how(temperature=0), how(), how(top_k=4), how(top_p=0.9)):
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
    params = how(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert sample(row, params._replace(u=u), KERNELS) == by_full_sort(row, params, u)


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
        (steep, how(top_p=0.9), [64]), (flat, how(top_p=0.1), [64, 1024]),
        (flat, how(top_p=0.5), [64, 1024, 5000]), (flat, how(), []),
        (flat, how(min_p=0.5), []), (flat, how(top_k=7, top_p=0.9), [7]),
    ):  # fmt: skip
        kernels = _Sorts()
        sample(row, params._replace(u=0.5), kernels)
        assert kernels.counts == counts


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
    together = log_totals(whole, sizes, KERNELS)
    assert together.dtype == np.float64
    alone = [log_totals(whole[i : i + 1].copy(), sizes, KERNELS)[0] for i in range(17)]
    reverse = log_totals(np.ascontiguousarray(whole[::-1]), sizes, KERNELS)[::-1]
    assert together.tobytes() == np.array(alone).tobytes() == np.ascontiguousarray(reverse).tobytes()


@given(row=st.lists(st.floats(-40, 40, width=32), min_size=4, max_size=20).map(lambda x: np.array(x, np.float32)))
def test_probabilities_sum_to_one(row):
    sizes = tuple(map(len, np.array_split(row, 4)))
    log_sum = float(log_totals(grains_of(row, sizes, 5), sizes, KERNELS)[0])
    assert abs(np.exp(row.astype(np.float64) - log_sum).sum() - 1) < 1e-5


def test_grains_without_ids_or_hope_add_nothing():
    row = array(1, 2, -np.inf)
    for sizes in ((1, 1, 1, 0), (2, 1, 0, 0), (0, 0, 2, 1)):
        assert log_totals(grains_of(row, sizes, 2), sizes, KERNELS)[0] == pytest.approx(math.log(math.e + math.e**2))


SETS = ["reference", pytest.param("native", marks=pytest.mark.skipif(not native_was_built(), reason="was not built"))]


@pytest.mark.parametrize("name", SETS)
def test_most_likely_tokens_are_best_first_then_lowest_id(name):
    kernels, sizes = create_kernels(name), (3, 0, 2)
    rows = array(1, 3, 2, 3, -1), array(0, -np.inf, 0, 0, 5)
    logits = np.concatenate([grains_of(row, sizes, 3) for row in rows])
    scores = kernels.score(logits, sizes, np.array([4, 1]), 3)
    assert scores.values.tolist() == [-1, -np.inf] and scores.log_sums.dtype == np.float64
    assert scores.top_ids.tolist() == [[1, 3, 2], [4, 0, 2]] and scores.top_values.tolist() == [[3, 3, 2], [5, 0, 0]]
    assert kernels.score(logits, sizes, np.array([4, 1]), 0).top_ids.shape == (2, 0)
    assert kernels.score(logits, sizes, np.array([4, 1]), 20).top_ids.tolist() == [[1, 3, 2, 0, 4], [4, 0, 2, 3, 1]]


# Rows of a batch.


def changes(places, biases=0.0, factors=1.0, penalties=0.0):
    """What becomes of some logits."""
    rest = (np.full(len(places), each, np.float32) for each in (biases, factors, penalties))
    return Changes(np.array(places), *rest)


@pytest.mark.parametrize("name", SETS)
def test_rows_are_changed_before_a_choice_and_stay_as_they_were(name):
    kernels, sizes = create_kernels(name), (3, 0, 2)
    logits = np.concatenate([grains_of(array(1, 3, 2, 3, -1), sizes, 3)] * 5)
    before = logits.tobytes()
    made = {1: changes([1, 3], -np.inf), 2: changes([4], 5.0), 3: changes([1, 4], factors=2.0),
            4: changes([1], penalties=1.0)}  # fmt: skip
    best = kernels.argmax(logits, sizes, made)
    assert best.places.tolist() == [1, 2, 4, 3, 3] and best.values.tolist() == [3, 2, 4, 3, 3]
    draws = [Draw(0.0, changes=made.get(i)) for i in range(5)]
    assert kernels.draw(logits, sizes, draws).tolist() == [1, 2, 4, 3, 3]
    assert logits.tobytes() == before


@pytest.mark.parametrize("name", SETS)
def test_rows_of_a_batch_are_drawn_one_by_one(name):
    kernels, sizes, random = create_kernels(name), (40, 0, 33), np.random.default_rng(4)
    rows = random.standard_normal((4, 73)).astype(np.float32) * 3
    logits = np.concatenate([grains_of(row, sizes, 64) for row in rows])
    draws = [Draw(0.0), Draw(1.0, u=0.7), Draw(0.8, 5, 0.9, u=0.4), Draw(0.0, known_id=72)]
    expected = [*(sample(row, draw, kernels) for row, draw in zip(rows[:3], draws, strict=False)), 72]
    assert kernels.draw(logits, sizes, draws).tolist() == expected


@pytest.mark.parametrize("name", SETS)
def test_what_is_on_the_host_need_not_be_waited_for(name):
    kernels = create_kernels(name)
    fetch = kernels.fetch([kernels.device(array(1, 2)), np.arange(3)])
    assert not fetch.is_late and [each.tolist() for each in fetch.wait()] == [[1, 2], [0, 1, 2]]
    parts = [kernels.device(np.full((2, grains, 3), grains, np.float32)) for grains in (1, 2)]
    assert np.asarray(kernels.join_grains(parts))[1, :, 0].tolist() == [1, 2, 2]
    assert np.asarray(kernels.take(kernels.device(array(5, 6, 7)), [2, 0])).tolist() == [7, 5]
