import errno
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from hpcinfer.config import SamplingParams
from hpcinfer.data.request import Prepared, RowRequest
from hpcinfer.errors import JobDirectoryError, RequestError
from hpcinfer.recovery.dealing import Deal
from hpcinfer.recovery.rows import PrepareAhead, Refused, RowSource

DEAL = Deal(3, 1, (0, 1, 2))


def prepare(row, line):
    """Lines of text become their bytes; some cannot be served."""
    if line == b"refused":
        raise RequestError("invalid_value", "this one", param="prompt")
    if line == b"bug":
        raise ZeroDivisionError
    return Prepared(RowRequest(row, "completions", "text"), np.frombuffer(line, np.uint8), SamplingParams())


@pytest.fixture
def make_source(make_job, tmp_path):
    """A source over lines of text; the file stays open to its end."""
    files = []

    def make(lines, prepare=prepare):
        _, index = make_job(len(lines), lines.__getitem__)
        files.append((tmp_path / "prompts.txt").open("rb"))
        return RowSource(files[-1], index, SimpleNamespace(kind="text", prepare=prepare), "model")

    yield make
    for file in files:
        file.close()


def take_all(ahead, count):
    rows, end = [], time.monotonic() + 20
    while len(rows) < count and time.monotonic() < end:
        if (row := ahead.take()) is not None:
            rows.append(row)
        else:
            ahead.wait(0.01)
    return rows


def test_rows_come_prepared_and_in_order(make_source):
    source = make_source([f"line {i}" for i in range(50)])
    with PrepareAhead(source) as ahead:
        order = [7, 3, 49, *range(10, 30)]
        for row in order:
            ahead.give(row, DEAL)
        assert ahead.num_open == len(order)
        rows = take_all(ahead, len(order))
        assert [row.row for row in rows] == order and all(row.deal is DEAL for row in rows)
        assert [bytes(row.content.prompt_ids.astype(np.uint8)) for row in rows] == [b"line %d" % i for i in order]
        assert ahead.num_open == 0 and ahead.take() is None


def test_row_that_cannot_be_served_brings_its_record(make_source, caplog):
    with PrepareAhead(make_source(["refused", "bug", "fine"])) as ahead:
        for row in range(3):
            ahead.give(row, DEAL)
        refused, bug, fine = (row.content for row in take_all(ahead, 3))
    assert isinstance(refused, Refused) and json.loads(refused.record)["error"]["code"] == "invalid_value"
    assert bug.error.code == "internal_error" and "ZeroDivisionError" in json.loads(bug.record)["error"]["message"]
    assert isinstance(fine, Prepared) and "this is a bug of hpcinfer" in caplog.text


def test_taking_does_not_wait_for_a_slow_row(make_source):
    may_go_on = threading.Event()
    with PrepareAhead(make_source(["slow"], lambda row, line: may_go_on.wait(20) and prepare(row, line))) as ahead:
        ahead.give(0, DEAL)
        assert ahead.take() is None and ahead.num_open == 1
        ahead.wait(0.01)
        assert ahead.take() is None
        may_go_on.set()
        assert len(take_all(ahead, 1)) == 1


def test_waiting_ends_when_a_row_is_ready_and_loses_none(make_source):
    with PrepareAhead(make_source(["a", "b"])) as ahead:
        ahead.give(0, DEAL)
        ahead.give(1, DEAL)
        start = time.monotonic()
        ahead.wait(20)
        ahead.wait(20)
        assert time.monotonic() - start < 10
        assert [row.row for row in take_all(ahead, 2)] == [0, 1]


def test_input_that_has_changed_ends_the_job(make_source, tmp_path):
    source = make_source(["one", "two"])
    (tmp_path / "prompts.txt").write_text("one\ntoo\n")
    with PrepareAhead(source) as ahead:
        ahead.give(0, DEAL)
        ahead.give(1, DEAL)
        assert len(take_all(ahead, 1)) == 1
        with pytest.raises(JobDirectoryError, match="row 1 of the input has changed"):
            take_all(ahead, 1)


def test_end_does_not_prepare_what_nobody_wants(make_source):
    prepared = []

    def slow(row, line):
        prepared.append(row)
        time.sleep(0.05)
        return prepare(row, line)

    with PrepareAhead(make_source(["x"] * 100, slow)) as ahead:
        for row in range(100):
            ahead.give(row, DEAL)
    assert len(prepared) < 50 and not ahead._thread.is_alive()


def test_row_is_read_again_after_the_file_system_was_away(make_source, monkeypatch):
    source, pread, fails = make_source(["first", "second"]), os.pread, [True] * 5

    def read(*arguments):
        if fails and fails.pop():
            raise OSError(errno.EIO, "Input/output error")
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", read)
    assert source.read(1) == b"second" and not fails


SIGNALLED = """
    import signal
    from hpcinfer.recovery.rows import PrepareAhead
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    with PrepareAhead(None) as ahead:
        signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.00037)
        for _ in range(2000):
            ahead.wait(0.001)
        signal.setitimer(signal.ITIMER_REAL, 0)
"""


def test_no_signal_makes_waiting_last():
    """As that which stops a job does, when it comes at the very end of a wait."""
    subprocess.run([sys.executable, "-c", textwrap.dedent(SIGNALLED)], timeout=60, check=True, cwd="/")
