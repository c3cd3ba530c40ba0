import os
import sys

import pytest

from hpcinfer.report import progress
from hpcinfer.report.progress import Progress, is_terminal


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def lines(monkeypatch):
    """Lines logged where there is no terminal."""
    said = []
    monkeypatch.setattr(progress, "is_terminal", lambda: False)
    monkeypatch.setattr(progress.log, "info", lambda text, *values: said.append(text % values))
    return said


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(progress, "is_terminal", lambda: True)


def test_lines_come_every_few_seconds(clock, lines):
    shown = Progress(100, 20)
    for done in range(21, 61):
        clock[0] += 0.5
        shown.update(done)
    shown.close(60)
    assert len(lines) == 4
    assert lines[-1] == "60/100 rows, 2.0 rows/s, time left 20.0 s"  # rows of earlier runs count as done, not as speed


def test_no_rate_is_no_forecast(clock, lines):
    shown = Progress(10, 4)
    clock[0] += 6
    shown.update(4)
    assert lines == ["4/10 rows, 0.0 rows/s, time left unknown"]


def test_terminal_gets_a_bar(clock, terminal, capsys):
    shown = Progress(10, 4)
    for done in (5, 6, 9):
        clock[0] += 1
        shown.update(done)
    shown.close(10)
    said = capsys.readouterr().err
    assert "10/10" in said and "rows/s" not in said


def test_bar_counts_each_row_once(clock, terminal):
    shown = Progress(10, 4)
    clock[0] += 1
    shown.update(6)
    shown.update(7)  # too soon
    assert shown._bar.n == 6
    clock[0] += 1
    shown.update(8)
    shown.close(10)
    assert shown._bar.n == 10


@pytest.mark.parametrize(("target", "launched", "expected"), [
    ("/dev/pts/3", True, True), ("/dev/pts/3", False, False), ("/tmp/log", True, False), ("pipe:[7]", True, False),
])  # fmt: skip
def test_terminal_behind_mpirun_is_seen(monkeypatch, target, launched, expected):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.setattr(os, "readlink", lambda path: target)
    monkeypatch.delenv("OMPI_COMM_WORLD_RANK", raising=False)
    if launched:
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    assert is_terminal() == expected


def test_system_without_proc_has_no_terminal_behind_mpirun(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)

    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "readlink", missing)
    assert not is_terminal()


def test_health_is_asked_only_if_it_is_shown(clock, lines):
    shown, asked = Progress(100, 0), []

    def health():
        asked.append(1)
        return "12.0 output tokens/s, 2/2 replicas"

    for done in range(11):
        clock[0] += 1
        shown.update(done, health)
    assert len(asked) == len(lines) == 2
    assert lines[0].endswith("time left 2 min 00 s, 12.0 output tokens/s, 2/2 replicas"), lines


def test_bar_shows_health(clock, terminal, capsys):
    shown = Progress(10, 4)
    clock[0] += 1
    shown.update(6, lambda: "3/4 replicas, replica 1 recovering")
    shown.close(10)
    assert "3/4 replicas, replica 1 recovering" in capsys.readouterr().err
