import os
import threading
import time

import numpy as np
import pytest

from hpcinfer.errors import JobDirectoryError
from hpcinfer.recovery import writer_thread
from hpcinfer.recovery.journal import PartWriter
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.sidecar import IS_ERROR, JournalReader
from hpcinfer.recovery.writer_thread import WriterThread


@pytest.fixture
def paths(tmp_path):
    paths = JobPaths(tmp_path / "out.jsonl")
    paths.create()
    return paths


def rows_of(paths):
    return [int(row) for _, entries in JournalReader(paths).read() for row in entries["row"]]


def wait_for(is_true):
    end = time.monotonic() + 20
    while not is_true() and time.monotonic() < end:
        time.sleep(0.005)
    assert is_true()


class Disk:
    """An `os.fsync` that waits until it may go on, and then fails if it has to."""

    def __init__(self, error=None):
        self.is_asked, self.may_go_on, self._error = threading.Event(), threading.Event(), error

    def fsync(self, descriptor):
        self.is_asked.set()
        assert self.may_go_on.wait(20)
        if self._error is not None:
            raise self._error


def test_lines_are_stored_in_order_and_finished_at_the_end(paths):
    with PartWriter(paths, "a", attempt=2) as part, WriterThread(part) as writer:
        for row in range(100):
            writer.append(row, 5, b"line %d" % row, is_error=row == 7)
    [(_, entries)] = JournalReader(paths).read()
    assert entries["row"].tolist() == list(range(100)) and set(entries["generation"]) == {5}
    assert np.flatnonzero(entries["flags"] & IS_ERROR).tolist() == [7] and set(entries["attempt"]) == {2}
    assert paths.part_data("a").read_bytes() == b"".join(b"line %d\n" % row for row in range(100))


def test_caller_does_not_wait_for_the_disk_and_nothing_is_finished_before_it_is_durable(paths, monkeypatch):
    disk = Disk()
    with PartWriter(paths, "a") as part, WriterThread(part) as writer:
        monkeypatch.setattr(os, "fsync", disk.fsync)
        writer.append(0, 1, b"x")
        writer.flush()
        assert disk.is_asked.wait(20)
        writer.append(1, 1, b"y")
        writer.maybe_flush(1.0)
        writer.flush()
        writer.check()
        assert rows_of(paths) == []
        disk.may_go_on.set()
        wait_for(lambda: rows_of(paths) == [0, 1])


def test_lines_are_flushed_in_time_without_being_asked(paths):
    with PartWriter(paths, "a") as part, WriterThread(part, interval_s=0.05) as writer:
        writer.append(0, 1, b"x")
        wait_for(lambda: rows_of(paths) == [0])


def test_lines_that_never_stop_coming_are_flushed_in_time(paths):
    with PartWriter(paths, "a") as part, WriterThread(part, interval_s=0.05) as writer:
        row, end = 0, time.monotonic() + 20
        while not rows_of(paths) and time.monotonic() < end:
            writer.append(row, 1, b"x")
            row += 1
            time.sleep(0.002)
        assert rows_of(paths)


def test_finished_block_is_flushed_after_its_own_interval(paths):
    with PartWriter(paths, "a") as part, WriterThread(part) as writer:
        writer.append(0, 1, b"x")
        writer.maybe_flush(0.0)
        wait_for(lambda: rows_of(paths) == [0])


def test_failure_of_the_disk_comes_back_to_the_caller(paths, monkeypatch):
    disk = Disk(OSError(28, "No space left on device"))
    raises = pytest.raises(JobDirectoryError, match="No space left")
    with raises, PartWriter(paths, "a") as part, WriterThread(part) as writer:
        monkeypatch.setattr(os, "fsync", disk.fsync)
        writer.append(0, 1, b"x")
        writer.flush()
        writer.check()  # nothing has failed yet
        disk.may_go_on.set()
        wait_for(lambda: writer._error is not None)
        for call in (writer.check, writer.flush, lambda: writer.append(1, 1, b"y")):
            with pytest.raises(JobDirectoryError, match="No space left"):
                call()
    monkeypatch.undo()
    assert rows_of(paths) == [] and paths.part_data("a").read_bytes() == b"x\n"


def test_caller_that_waits_for_room_hears_of_the_failure(paths, monkeypatch):
    monkeypatch.setattr(writer_thread, "_MAX_WAITING", 2)
    disk = Disk(OSError(122, "Disk quota exceeded"))
    raises = pytest.raises(JobDirectoryError, match="quota exceeded")
    with raises, PartWriter(paths, "a") as part, WriterThread(part) as writer:
        monkeypatch.setattr(os, "fsync", disk.fsync)
        threading.Timer(0.1, disk.may_go_on.set).start()
        writer.append(0, 1, b"x")
        writer.flush()
        for row in range(1, 100):
            writer.append(row, 1, b"x")


def test_after_an_error_of_the_caller_nothing_more_is_stored(paths, monkeypatch):
    disk = Disk()
    with pytest.raises(KeyboardInterrupt), PartWriter(paths, "a") as part, WriterThread(part) as writer:
        monkeypatch.setattr(os, "fsync", disk.fsync)
        writer.append(0, 1, b"x")
        writer.flush()
        assert disk.is_asked.wait(20)
        writer.append(1, 1, b"y")
        writer.flush()
        threading.Timer(0.1, disk.may_go_on.set).start()
        raise KeyboardInterrupt
    monkeypatch.undo()
    assert rows_of(paths) == [0] and part._part is None


def test_error_of_the_caller_does_not_wait_for_a_file_system_that_is_away(paths, monkeypatch):
    disk, start = Disk(OSError(5, "Input/output error")), time.monotonic()
    disk.may_go_on.set()
    with pytest.raises(KeyboardInterrupt), PartWriter(paths, "a") as part, WriterThread(part) as writer:
        monkeypatch.setattr(os, "fsync", disk.fsync)
        writer.append(0, 1, b"x")
        writer.flush()
        assert disk.is_asked.wait(20)
        raise KeyboardInterrupt
    assert time.monotonic() - start < 10
    assert rows_of(paths) == []
