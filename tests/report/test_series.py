import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_report import BEGAN, made_up_rank, made_up_timeline

from hpcinfer.report.series import MOST_POINTS, all_series, total_tokens_per_s


def test_values_are_those_of_the_timeline():
    (found,) = all_series([made_up_rank(3, until_s=60.0)])
    assert (found.replica, found.interval_s, len(found.tokens_per_s)) == (3, 1.0, 100)
    assert found.tokens_per_s[:60] == [40.0] * 60 and found.tokens_per_s[60:] == [0.0] * 40
    assert found.batch_sequences[30] == 32.0 and found.batch_tokens[30] == 40.0 and found.kv_use[30] == 0.5


@given(st.floats(0.01, 5.0), st.floats(-3.0, 3.0), st.floats(1.0, 2000.0))
def test_no_token_is_lost_whatever_the_intervals(interval_s, shift_s, run_s):
    line = {**made_up_timeline(100.0, 50.0, interval_s), "start_time": BEGAN + shift_s}
    (found,) = all_series([made_up_rank(timeline=line, phases={"run": run_s})])
    before = len(found.tokens_per_s) - 1
    widths = [*[found.interval_s] * before, run_s - before * found.interval_s]
    assert not before or 0.49 < widths[-1] / found.interval_s < 1.51
    given_tokens = sum(rate * width for rate, width in zip(found.tokens_per_s, widths, strict=True))
    assert given_tokens == pytest.approx(sum(line["tokens"]), rel=1e-6, abs=1e-6)
    assert len(found.tokens_per_s) <= MOST_POINTS + 1


@pytest.mark.parametrize("run_s", [3.1, 3.9])
def test_even_work_is_even_to_the_end(run_s):
    line = made_up_timeline(100.0, 4.0)
    line["tokens"][3] = 100 * (run_s - 3.0)
    (found,) = all_series([made_up_rank(timeline=line, phases={"run": run_s})])
    assert found.tokens_per_s == pytest.approx([100.0] * round(run_s))
    assert found.kv_use == [0.5] * round(run_s)


def test_replicas_share_their_axis():
    fine = made_up_rank(0, timeline=made_up_timeline(10.0, 90.0, 0.5))
    found = all_series([fine, made_up_rank(1), made_up_rank(1, 0, 1)])
    assert len({len(each.tokens_per_s) for each in found}) == 1 and len(found) == 2
    assert total_tokens_per_s(found)[10] == pytest.approx(50.0)


def test_nobody_has_no_series():
    assert all_series([]) == [] and total_tokens_per_s([]) == []
