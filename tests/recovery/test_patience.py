import errno
import itertools
import os
import threading
import time

import pytest

from hpcinfer.errors import StorageError
from hpcinfer.recovery import patience
from hpcinfer.recovery.patience import AWAY, GONE, PatientFile, patiently


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(patience, "_FIRST_PAUSE_S", 0.001)


def _failing(number, times):
    left = itertools.count(times, -1)

    def call():
        if next(left) > 0:
            raise OSError(number, os.strerror(number))
        return "answer"

    return call


@pytest.mark.parametrize("number", sorted(AWAY))
def test_file_system_that_comes_back_is_waited_for_and_the_log_says_so_once(tmp_path, caplog, number):
    assert patiently(_failing(number, 3), tmp_path / "a") == "answer"
    began, ended = (record.getMessage() for record in caplog.records)
    assert str(tmp_path / "a") in began and os.strerror(number) in began and "1 min" in began
    assert str(tmp_path / "a") in ended and "back" in ended


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOENT])
def test_other_errors_are_raised_at_once(tmp_path, caplog, number):
    with pytest.raises(OSError, match=os.strerror(number)):
        patiently(_failing(number, 1), tmp_path)
    assert not caplog.text


def test_what_was_here_a_moment_ago_is_waited_for(tmp_path):
    assert patiently(_failing(errno.ENOENT, 2), tmp_path, errors=GONE) == "answer"


def test_patience_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(patience, "LIMIT_S", 0.3)
    start = time.monotonic()
    with pytest.raises(StorageError, match="(?s)Input/output error, for 0.*same command again"):
        patiently(_failing(errno.EIO, 10**6), tmp_path)
    assert 0.3 < time.monotonic() - start < 10


def test_call_that_takes_long_to_fail_is_tried_again(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    call = _failing(errno.ETIMEDOUT, 1)

    def slowly():
        now[0] += 1000
        return call()

    assert patiently(slowly, tmp_path) == "answer"


def test_nobody_waits_who_was_told_not_to(tmp_path):
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    start = time.monotonic()
    with pytest.raises(StorageError):
        patiently(_failing(errno.EIO, 10**6), tmp_path, stop=stop)
    assert time.monotonic() - start < 10


def test_file_is_opened_anew_after_a_failure(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"0123456789")
    file, pread, left = PatientFile(tmp_path / "a"), os.pread, [2]
    assert file.read(2, 3) == b"234"

    def fail(*arguments):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(*arguments)

    (tmp_path / "a").unlink()
    (tmp_path / "a").write_bytes(b"abcdefghij")
    monkeypatch.setattr(os, "pread", fail)
    assert file.read(2, 3) == b"cde" and file.read(8, 10) == b"ij" and file.read(20, 1) == b""
