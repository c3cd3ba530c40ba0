import errno
import os
import time

import pytest

from hpcinfer.diagnosis import trial
from hpcinfer.diagnosis.trial import try_out


def test_a_good_directory_does_everything_and_keeps_nothing(tmp_path):
    result = try_out(tmp_path)
    assert result.problems == {} and result.sync_s >= 0 and abs(result.clock_offset_s) < 1
    assert os.listdir(tmp_path) == []


def test_a_directory_that_is_not_there_is_said(tmp_path):
    assert try_out(tmp_path / "missing").problems == {"write": "No such file or directory"}


@pytest.mark.parametrize(("function", "operation"), [("link", "hard link"), ("fsync", "fsync"), ("replace", "rename")])
def test_what_the_file_system_refuses_is_named(tmp_path, monkeypatch, function, operation):
    def refuse(*arguments):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(trial.os, function, refuse)
    assert try_out(tmp_path).problems == {operation: "Operation not permitted"}
    assert os.listdir(tmp_path) == []


def test_a_file_system_that_lies_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(trial.os, "link", lambda old, new: None)
    assert "hard link" in try_out(tmp_path).problems
    monkeypatch.undo()
    real = os.open
    monkeypatch.setattr(trial.os, "open", lambda path, flags, *more: real(path, flags & ~os.O_EXCL, *more))
    assert list(try_out(tmp_path).problems) == ["O_EXCL"]


def test_a_directory_that_hangs_costs_little(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "ANSWER_LIMIT_S", 0.2)
    monkeypatch.setattr(trial, "_try_out", lambda folder: time.sleep(5))
    assert "no answer" in try_out(tmp_path).problems["write"]
