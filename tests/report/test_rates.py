"""Rates leave out loading, and what was made meanwhile."""

import pytest
from made_up_report import made_up_rank, made_up_run

from hpcinfer.report.rates import rates_of

EVEN = made_up_rank(until_s=100.0)  # a second: 40 output tokens, 400 of batches; 5 prompt tokens to an output token


def test_all_tokens_count_where_nothing_was_loaded_meanwhile():
    rates = rates_of(made_up_run(1), [EVEN])
    assert rates.output == pytest.approx(40.0) and rates.total == pytest.approx(240.0)


@pytest.mark.parametrize("loaded_s", [10.0, 10.4, 99.0])
def test_tokens_that_came_before_all_weights_do_not_count(loaded_s):
    rates = rates_of(made_up_run(1, loaded_s=loaded_s), [EVEN])
    assert rates.output == pytest.approx(40.0) and rates.total == pytest.approx(240.0)


def test_a_run_that_was_over_before_the_last_weights_counts_whole():
    assert rates_of(made_up_run(1, loaded_s=120.0), [EVEN]).output == pytest.approx(40.0)


def test_replicas_that_began_late_and_ranks_that_lead_nobody():
    late = made_up_rank(1, until_s=100.0)
    late["timeline"]["tokens"][:50] = [0] * 50
    follower = made_up_rank(0, tp_rank=1)
    rates = rates_of(made_up_run(3, loaded_s=50.0), [EVEN, late, follower])
    assert rates.output == pytest.approx((40.0 * 50 + 4000) / 50)


def test_nothing_was_made():
    rank = made_up_rank(until_s=0.0)
    assert rates_of(made_up_run(1, loaded_s=1.0), [rank]) == (0.0, 0.0)
