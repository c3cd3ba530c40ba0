"""What goes on while a rank waits."""

from threading import Thread

import pytest

from hpcinfer.comm import waiting
from hpcinfer.comm.waiting import Pause, is_working_meanwhile, turn_meanwhile, work_meanwhile


@pytest.fixture
def calls(monkeypatch):
    """Work of five turns, and how often it was called."""
    monkeypatch.setattr(waiting, "_meanwhile", {})
    calls = []

    def turn():
        calls.append(None)
        return len(calls) < 5

    work_meanwhile(turn)
    return calls


def test_who_waits_calls_it_until_it_is_over(calls):
    pause = Pause()
    for count in range(1, 5):
        pause()
        assert len(calls) == count and is_working_meanwhile()
    pause()
    assert not is_working_meanwhile()
    pause()
    assert len(calls) == 5


def test_no_other_thread_calls_it(calls):
    thread = Thread(target=lambda: [turn_meanwhile(), Pause()()])
    thread.start()
    thread.join()
    assert not calls and is_working_meanwhile()
    turn_meanwhile()
    assert len(calls) == 1
