"""When the time is over: told by Slurm or by the user, measured on this node's clock only."""

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.comm.serial import SerialGroup
from hpcinfer.config import JobOptions
from hpcinfer.recovery import slurm_job, time_limit
from hpcinfer.recovery.slurm_job import SlurmJob
from hpcinfer.recovery.time_limit import Pace, Period, TimeLimit, agree_time_limit, find_period

NOW = 1_000_000.0
TOLD = {"SLURM_JOB_ID": "7", "SLURM_JOB_START_TIME": "999900", "SLURM_JOB_END_TIME": "1000500"}


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock that stands still, in a process of 30 s, without Slurm."""
    monkeypatch.setattr(time_limit.time, "time", lambda: NOW)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: NOW - 30)
    monkeypatch.setattr(slurm_job, "ask", lambda environment: None)


def test_nobody_has_set_a_limit():
    assert find_period(None, {}) is None
    assert find_period(None, {"SLURM_JOB_ID": "7"}) is None


def test_users_limit_counts_from_the_start_of_the_process():
    assert find_period(100.0, {}) == Period(70, 100, "--time-limit")


def test_end_of_the_allocation_is_what_slurm_says():
    assert find_period(None, TOLD) == Period(500, 600, "SLURM_JOB_END_TIME")


def test_slurm_is_asked_where_its_environment_does_not_say(monkeypatch):
    job = SlurmJob("RUNNING", start=NOW - 60, end=NOW + 240, limit_s=300)
    monkeypatch.setattr(slurm_job, "ask", lambda environment: job)
    assert find_period(None, {"SLURM_JOB_ID": "7"}) == Period(240, 300, "scontrol")
    assert find_period(None, TOLD).source == "SLURM_JOB_END_TIME"
    job = job._replace(limit_s=None)  # without a limit Slurm shows an end that is a year ahead
    assert find_period(None, {"SLURM_JOB_ID": "7"}) is None


def test_end_that_comes_first_counts():
    assert find_period(100.0, TOLD).source == "--time-limit"
    assert find_period(1000.0, TOLD).source == "SLURM_JOB_END_TIME"


@pytest.mark.parametrize("behind_s", [0, 99, 101, 3600])
def test_clock_behind_slurms_never_gives_more_than_the_whole_time(monkeypatch, behind_s):
    monkeypatch.setattr(time_limit.time, "time", lambda: NOW - behind_s)
    assert find_period(None, TOLD).left_s == min(500 + behind_s, 600)


@pytest.mark.parametrize("text", ["", "soon", "-5", "1e9", " 7"])
def test_end_that_is_no_number_is_no_end(text):
    assert find_period(None, {**TOLD, "SLURM_JOB_END_TIME": text}) is None


@pytest.mark.parametrize(("whole_s", "margin_s", "stops_after_s"), [
    (3600, 60, 3540), (100, 60, 90), (600, 60, 540), (600, 0, 600), (86400, 900, 85500),
])  # fmt: skip
def test_margin_is_a_tenth_of_the_time_at_most(whole_s, margin_s, stops_after_s):
    limit = TimeLimit.of(Period(whole_s, whole_s, "test"), margin_s)
    assert limit.left_s == pytest.approx(stops_after_s, abs=1)


def test_time_left_runs_out_on_the_monotonic_clock(monkeypatch):
    limit = TimeLimit.of(Period(60, 1000, "test"), 50)
    assert 9 < limit.left_s <= 10
    monkeypatch.setattr(time_limit.time, "time", lambda: NOW + 10_000)  # somebody sets the clock
    assert 9 < limit.left_s <= 10
    end = limit.stop_at + 3
    monkeypatch.setattr(time_limit.time, "monotonic", lambda: end)
    assert limit.left_s == -3


def test_ranks_count_the_same_seconds_whatever_their_clocks_say(ranks, monkeypatch):
    for name, value in TOLD.items():
        monkeypatch.setenv(name, value)
    found = ranks(3, lambda group: agree_time_limit(JobOptions(stop_margin=10.0), group))
    lefts = [limit.left_s for limit in found]
    assert max(lefts) - min(lefts) < 5 and max(lefts) <= 490
    assert {limit.source for limit in found} == {"SLURM_JOB_END_TIME"}


def test_no_limit_is_agreed_upon_too(monkeypatch):
    for name in TOLD:
        monkeypatch.delenv(name, raising=False)
    assert agree_time_limit(JobOptions(), SerialGroup()) is None
    assert agree_time_limit(JobOptions(time_limit=100.0), SerialGroup()).left_s == pytest.approx(60, abs=1)


def test_speed_that_nobody_has_measured_is_not_guessed():
    pace = Pace()
    assert pace.seconds_for(10) is None
    pace.observe(5, now=0.0)
    assert pace.seconds_for(10) is None
    pace.observe(5, now=60.0)
    assert pace.seconds_for(10) is None  # nothing was finished
    pace.observe(25, now=100.0)
    assert pace.seconds_for(10) == 50


def test_speed_is_that_of_the_last_while():
    pace = Pace(window_s=100)
    for second in range(1001):
        pace.observe(second if second < 500 else 500 + 10 * (second - 500), now=float(second))
    assert pace.seconds_for(100) == pytest.approx(10)


def test_speed_falls_while_nothing_is_finished():
    pace = Pace(window_s=100)
    pace.observe(0, now=0.0)
    pace.observe(50, now=50.0)
    expected = [pace.seconds_for(10)]
    for now in (60.0, 90.0):
        pace.observe(50, now=now)
        expected.append(pace.seconds_for(10))
    assert expected == sorted(set(expected))


@given(rate=st.floats(0.01, 1000), step_s=st.floats(0.01, 30), rows=st.integers(0, 10**6))
def test_even_speed_is_found_whatever_the_steps(rate, step_s, rows):
    pace = Pace(window_s=1e9)  # all counts, as far as it is looked at
    steps = max(int(1e9 / 120 / step_s) + 1, 1)
    for i in range(4):
        pace.observe(int(rate * i * steps * step_s), now=i * steps * step_s)
    assert pace.seconds_for(rows) == pytest.approx(rows / rate, rel=0.01)


def test_many_looks_take_little_memory():
    pace = Pace(window_s=10)
    for look in range(100_000):
        pace.observe(look, now=look / 1000)
    assert len(pace._samples) < 200
