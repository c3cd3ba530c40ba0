from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from hpcinfer.report.timeline import Timeline


def make(steps, interval_s=0.25):
    """A timeline that begins at 1000, of (seconds after the last step, tokens)."""
    with patch("time.time", return_value=1000.0):
        timeline = Timeline(interval_s)
    now = 1000.0
    for after, tokens in steps:
        now += after
        timeline.step(tokens, 3, 2 * tokens, tokens + 1, now=now)
    return timeline.to_json()


STEPS = st.lists(st.tuples(st.floats(0, 30), st.integers(0, 64)), max_size=200)


@given(steps=STEPS)
def test_nothing_is_lost_however_long_a_run_is(steps):
    found = make(steps)
    assert sum(found["steps"]) == len(steps) and sum(found["tokens"]) == sum(tokens for _, tokens in steps)
    assert sum(found["sequences"]) == 3 * len(steps)
    assert sum(found["batch_tokens"]) == 2 * sum(tokens for _, tokens in steps)
    assert max(found["blocks"], default=0) == max((tokens + 1 for _, tokens in steps), default=0)
    columns = ("steps", "tokens", "longest_s", "sequences", "batch_tokens", "blocks")
    assert {len(found[name]) for name in columns} == {len(found["steps"])} and len(found["steps"]) <= 512
    longest = max((after for after, _ in steps[1:]), default=0.0)
    assert abs(max(found["longest_s"], default=0.0) - longest) < 1e-5


def test_a_stall_is_seen_where_it_was():
    found = make([(0.1, 8)] * 20 + [(1.5, 8)] + [(0.1, 8)] * 20)
    assert [i for i, longest in enumerate(found["longest_s"]) if longest > 1] == [int(3.5 / 0.25)]
    assert found["start_time"] == 1000.0 and found["interval_s"] == 0.25


def test_pauses_are_no_steps():
    with patch("time.time", return_value=0.0):
        timeline = Timeline()
    timeline.step(1, now=1.0)
    timeline.pause()
    timeline.step(1, now=9.0)
    assert max(timeline.to_json()["longest_s"]) == 0.0


def test_what_was_done_so_far_is_known():
    timeline = Timeline()
    for _ in range(3):
        timeline.step(8, 10, 12, 5)
    assert (timeline.num_steps, timeline.num_tokens, timeline.num_sequences) == (3, 24, 30)
    assert timeline.to_json()["last_step_time"] > 0
