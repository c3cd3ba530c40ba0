"""Fits: parameters of made-up data are found again, and nothing is fitted to too few points."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.scaling.fit import Fit, fit

RANKS = (1, 2, 4, 8, 16, 32)

rates, contentions = st.floats(1, 1e5), st.floats(0, 1)
coherencies = st.one_of(st.just(0.0), st.floats(1e-6, 0.1))


@given(rates, contentions, coherencies)
def test_usl_finds_its_parameters_again(rate, contention, coherency):
    true = Fit("USL", rate, contention, coherency, 0.0, len(RANKS), max(RANKS))
    found = fit("USL", RANKS, [true.at(n) for n in RANKS])
    assert found.rate == pytest.approx(rate, rel=1e-5)
    assert found.contention == pytest.approx(contention, abs=1e-5)
    assert found.coherency == pytest.approx(coherency, abs=1e-6)
    assert found.residual < 1e-6 and found.largest == 32


@given(rates, contentions)
def test_amdahl_is_usl_without_coherency(rate, contention):
    data = [rate * n / (1 + contention * (n - 1)) for n in RANKS]
    found = fit("Amdahl", RANKS, data)
    assert (found.rate, found.coherency) == (pytest.approx(rate, rel=1e-5), 0.0)
    assert found.contention == pytest.approx(contention, abs=1e-5)


@given(contentions, coherencies, st.lists(st.floats(0.8, 1.25), min_size=4, max_size=4))
def test_no_other_valid_parameters_are_better(contention, coherency, noise):
    true = Fit("USL", 10.0, contention, coherency, 0.0, 4, 8)
    data = [true.at(n) * factor for n, factor in zip(RANKS, noise, strict=False)]

    def square(rate, contention, coherency):
        other = Fit("USL", rate, contention, coherency, 0.0, 4, 8)
        return sum((x / other.at(n) - 1) ** 2 for n, x in zip(RANKS, data, strict=False))

    found = fit("USL", RANKS[:4], data)
    assert found.rate > 0 and 0 <= found.contention <= 1 and found.coherency >= 0
    least = square(*found[1:4])
    assert least == pytest.approx(4 * found.residual**2, rel=1e-6, abs=1e-9)
    for rate, contention, coherency in itertools.product((0.7, 1, 1.4), (-0.1, 0, 0.1), (-0.02, 0, 0.02)):
        near = found.rate * rate, min(max(found.contention + contention, 0), 1), max(found.coherency + coherency, 0)
        assert square(*near) >= least - 1e-9


@pytest.mark.parametrize(("law", "ranks"), [("Amdahl", [2, 2, 2]), ("USL", [1, 2, 2]), ("USL", []), ("Amdahl", [])])
def test_too_few_points_have_no_fit(law, ranks):
    assert fit(law, ranks, [1.0] * len(ranks)) is None


@pytest.mark.parametrize("rates", [[0.0, 0.0, 0.0], [10.0, 0.0, 5.0]])
def test_points_without_a_rate_have_no_fit(rates):
    assert fit("Amdahl", [1, 2, 4], rates) is None and fit("USL", [1, 2, 4], rates) is None


def test_fit_says_what_it_is():
    text = str(fit("USL", [1, 2, 4], [100, 150, 160]))
    assert "contention" in text and "coherency" in text and "3 points, as many as it has parameters" in text
    assert "highest at" in text and "parameters" not in str(fit("Amdahl", [1, 2, 4], [100, 150, 160]))


def test_best_number_of_ranks():
    assert Fit("USL", 1.0, 0.0, 0.01, 0.0, 3, 4).best == 10
    assert Fit("Amdahl", 1.0, 0.5, 0.0, 0.0, 3, 4).best == float("inf")
    assert Fit("USL", 1.0, 1.0, 0.5, 0.0, 3, 4).best == 1
