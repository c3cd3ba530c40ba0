import errno
import itertools
import os
import random
import resource
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from hpcinfer.errors import JobDirectoryError, StorageError
from hpcinfer.recovery import journal, patience, sidecar
from hpcinfer.recovery.journal import PartWriter
from hpcinfer.recovery.layout import JobPaths
from hpcinfer.recovery.sidecar import ENTRY, IS_ERROR, JournalReader, created_time, void_lines

_WRITE = os.write


@pytest.fixture
def paths(tmp_path):
    paths = JobPaths(tmp_path / "out.jsonl")
    paths.create()
    return paths


def _read(paths, reader=None):
    found = [entries for _, entries in (reader or JournalReader(paths)).read()]
    return np.concatenate(found) if found else np.empty(0, ENTRY)


def _lines(paths, part, entries):
    data = paths.part_data(part).read_bytes()
    return {int(entry["row"]): data[entry["offset"]:entry["offset"] + entry["length"]] for entry in entries}


def _write_some(paths, part="a", rows=range(5)):
    with PartWriter(paths, part, attempt=3) as writer:
        for row in rows:
            writer.append(row, 7, b"line %d" % row + b"x" * row, is_error=row % 2 == 1)
            if row % 2:
                writer.flush()


def test_entries_say_what_was_written(paths):
    _write_some(paths)
    entries = _read(paths)
    assert entries["row"].tolist() == [0, 1, 2, 3, 4]
    assert set(entries["generation"]) == {7} and set(entries["attempt"]) == {3}
    assert (entries["flags"] & IS_ERROR).tolist() == [0, 1, 0, 1, 0]
    assert _lines(paths, "a", entries)[3] == b"line 3xxx\n"
    assert abs(created_time(paths.part_sidecar("a")) - time.time()) < 60


def test_part_begins_by_the_clock_of_the_file_system(paths, monkeypatch):
    """So that its age, which is taken by that clock too, is right whatever the nodes' clocks say."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1000)
    PartWriter(paths, "a").close()
    assert abs(created_time(paths.part_sidecar("a")) - now) < 60


@pytest.mark.parametrize("suffix", ["jsonl", "sidecar"])
def test_a_file_truncated_at_any_byte_gives_whole_lines_or_none(paths, suffix):
    _write_some(paths)
    path = paths.parts / f"a.{suffix}"
    data, whole = path.read_bytes(), _lines(paths, "a", _read(paths))
    counts = []
    for size in range(len(data), -1, -1):
        os.truncate(path, size)
        found = _lines(paths, "a", _read(paths))
        assert found == {row: whole[row] for row in range(len(found))}
        counts.append(len(found))
    assert counts == sorted(counts, reverse=True) and counts[0] == 5 and counts[-1] == 0


@pytest.mark.parametrize("damage", [b"\0" * ENTRY.itemsize * 2, b"\xff" * 40, b"garbage"])
def test_garbage_at_the_end_of_a_sidecar_is_ignored(paths, damage):
    _write_some(paths)
    with paths.part_sidecar("a").open("ab") as file:
        file.write(damage)
    assert len(_read(paths)) == 5


def test_flipped_bit_in_an_entry_is_seen(paths):
    _write_some(paths, rows=range(1))
    path = paths.part_sidecar("a")
    data = bytearray(path.read_bytes())
    for bit in range(ENTRY.itemsize * 8):
        data[ENTRY.itemsize + bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert len(_read(paths)) == 0
        data[ENTRY.itemsize + bit // 8] ^= 1 << bit % 8


def test_reader_goes_on_where_it_stopped(paths):
    reader = JournalReader(paths)
    with PartWriter(paths, "a") as writer:
        assert len(_read(paths, reader)) == 0
        for row in range(6):
            writer.append(row, 1, b"x")
            if row % 2:
                writer.flush()
                assert _read(paths, reader)["row"].tolist() == [row - 1, row]
    _write_some(paths, "b", range(10, 12))
    assert _read(paths, reader)["row"].tolist() == [10, 11]
    assert len(_read(paths, reader)) == 0


def test_entry_that_comes_before_its_line_is_read_later(paths):
    _write_some(paths, rows=range(2))
    data = paths.part_data("a").read_bytes()
    paths.part_data("a").write_bytes(data[:-1])
    reader = JournalReader(paths)
    assert _read(paths, reader)["row"].tolist() == [0]
    paths.part_data("a").write_bytes(data)
    assert _read(paths, reader)["row"].tolist() == [1]


@pytest.mark.parametrize("position", [2, ENTRY.itemsize + 5, 3 * ENTRY.itemsize + 26])
def test_flipped_byte_in_a_sidecar_costs_one_line_at_most(paths, position):
    _write_some(paths)
    path = paths.part_sidecar("a")
    whole = path.read_bytes()
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 8]) + whole[position + 1:])
    reader = JournalReader(paths)
    damaged = {position // ENTRY.itemsize - 1} & set(range(5))
    assert set(_read(paths, reader)["row"]) == set(range(5)) - damaged
    path.write_bytes(whole)  # it was only not to be seen yet
    assert set(_read(paths, reader)["row"]) == damaged and len(_read(paths, reader)) == 0


def test_sizes_that_a_cache_remembers_hide_nothing_from_a_new_reader(paths, monkeypatch):
    """As on NFS: names and sizes may be old, what is opened is as the server has it."""
    _write_some(paths)
    monkeypatch.setattr(sidecar, "_size_bytes", lambda path: 0)
    assert len(_read(paths)) == 5


@pytest.mark.parametrize("old", ["jsonl", "sidecar"])
def test_old_size_of_one_file_shows_fewer_lines_and_later_all(paths, monkeypatch, old):
    _write_some(paths)
    path = paths.parts / f"a.{old}"
    new = path.read_bytes()
    for size in range(0, len(new), 7):
        path.write_bytes(new[:size])
        reader = JournalReader(paths)
        seen = _read(paths, reader)["row"].tolist()
        assert seen == list(range(len(seen))) and len(seen) < 5
        path.write_bytes(new)
        assert seen + _read(paths, reader)["row"].tolist() == list(range(5))


def test_pending_lines_are_not_finished(paths):
    writer = PartWriter(paths, "a")
    writer.append(0, 1, b"x")
    assert len(_read(paths)) == 0
    assert not writer.maybe_flush(time.monotonic() + 4)
    assert writer.maybe_flush(time.monotonic() + 6)
    assert len(_read(paths)) == 1
    writer.close()


def test_data_is_durable_before_its_entry_is_written(paths, monkeypatch):
    events = []
    monkeypatch.setattr(journal, "write_all", lambda fd, data: events.append(("write", fd)))
    monkeypatch.setattr(journal.os, "fsync", lambda fd: events.append(("sync", fd)))
    writer = PartWriter(paths, "a")
    events.clear()
    writer.append(0, 1, b"x")
    writer.flush()
    data, sidecar = writer._part._data, writer._part._sidecar
    assert events == [("write", data), ("sync", data), ("write", sidecar), ("sync", sidecar)]


def test_a_part_has_one_writer(paths):
    PartWriter(paths, "a").close()
    with pytest.raises(JobDirectoryError, match="File exists"):
        PartWriter(paths, "a")


class _FailingDisk:
    """`os.write` and `os.fsync`, of which some calls fail; a write that fails stores the first half of its data."""

    def __init__(self, number, fails_at):
        self.num_calls, self._number, self._fails_at = 0, number, fails_at

    def break_in(self, patch):
        patch.setattr(os, "write", self._write)
        patch.setattr(os, "fsync", self._fsync)

    def _write(self, descriptor, data):
        self.num_calls += 1
        if self.num_calls in self._fails_at:
            os.pwrite(descriptor, data[:len(data) // 2], os.lseek(descriptor, 0, os.SEEK_END))
            raise OSError(self._number, os.strerror(self._number))
        return _WRITE(descriptor, data)

    def _fsync(self, descriptor):
        self.num_calls += 1
        if self.num_calls in self._fails_at:
            raise OSError(self._number, os.strerror(self._number))


@pytest.fixture
def impatient(monkeypatch):
    """Pauses that take no time."""
    monkeypatch.setattr(patience, "_FIRST_PAUSE_S", 0.0)


def _write_until_failure(paths, flushed):
    with PartWriter(paths, "a") as writer:
        for row in range(5):
            writer.append(row, 1, b"line %d" % row + b"x" * row)
            if row % 2:
                writer.flush()
                flushed += [row - 1, row]


def _line(row):
    return b"line %d" % row + b"x" * row + b"\n"


def _found(paths):
    """Lines by row; those of several parts must be alike."""
    found = {}
    for part, entries in JournalReader(paths).read():
        for row, line in _lines(paths, part, entries).items():
            assert found.setdefault(row, line) == line == _line(row)
        assert all(zlib.crc32(_line(int(entry["row"]))) == entry["crc"] for entry in entries)
    return found


def test_what_is_sealed_was_stored_whichever_call_fails(tmp_path, monkeypatch):
    for fails_at in itertools.count(1):
        paths = JobPaths(tmp_path / f"out{fails_at}")
        paths.create()
        disk, flushed = _FailingDisk(errno.ENOSPC, {fails_at}), []
        with monkeypatch.context() as patch:
            disk.break_in(patch)
            try:
                _write_until_failure(paths, flushed)
            except JobDirectoryError as error:
                assert "a.jsonl" in str(error) and "No space left" in str(error) and "make room" in str(error)
        found = _found(paths)
        assert set(flushed) <= set(found) == set(range(len(found)))
        if disk.num_calls < fails_at:
            break
    assert fails_at > 3 * 4 and len(found) == 5


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EROFS])
def test_file_system_that_is_away_for_a_moment_costs_a_new_part(tmp_path, monkeypatch, caplog, impatient, number):
    for fails_at in itertools.count(1):
        paths = JobPaths(tmp_path / f"out{fails_at}")
        paths.create()
        disk = _FailingDisk(number, {fails_at, fails_at + 1, fails_at + 2})
        caplog.clear()
        with monkeypatch.context() as patch:
            disk.break_in(patch)
            _write_until_failure(paths, [])
        assert set(_found(paths)) == set(range(5))
        if disk.num_calls < fails_at:
            break
        assert caplog.text.count("trying again") == caplog.text.count("is back") == 1
        assert len(list(paths.parts.glob("a*.jsonl"))) > 1
    assert fails_at > 3 * 4


def test_lines_of_an_outage_are_kept_in_memory(paths, monkeypatch, impatient):
    disk = _FailingDisk(errno.EIO, range(1, 100))
    with PartWriter(paths, "a") as writer:
        writer.append(0, 1, b"first")
        writer.flush()
        with monkeypatch.context() as patch:
            disk.break_in(patch)
            writer.append(1, 1, b"second")
            writer.append(2, 1, b"third")
            writer.flush()
        writer.append(3, 1, b"fourth")
    found = {part: _lines(paths, part, entries) for part, entries in JournalReader(paths).read()}
    first, second = found
    assert first == "a" and found["a"] == {0: b"first\n"}
    assert found[second] == {1: b"second\n", 2: b"third\n", 3: b"fourth\n"}
    void_lines(paths, "a", [0])  # of the first part, not of the second
    assert sorted(_read(paths)["row"]) == [1, 2, 3]


def test_outage_that_stays_ends_the_writer_and_loses_nothing_durable(paths, monkeypatch, impatient):
    monkeypatch.setattr(patience, "LIMIT_S", 0.2)
    writer = PartWriter(paths, "a")
    writer.append(0, 1, b"first")
    writer.flush()
    with monkeypatch.context() as patch:
        _FailingDisk(errno.EIO, range(1, 10**6)).break_in(patch)
        writer.append(1, 1, b"second")
        with pytest.raises(StorageError, match="(?s)Input/output error, for .*start the same command again"):
            writer.flush()
        with pytest.raises(JobDirectoryError, match="could not be stored before"):
            writer.flush()
    writer.close()
    assert _read(paths)["row"].tolist() == [0]


def test_failed_writer_stores_nothing_more(paths, monkeypatch):
    writer = PartWriter(paths, "a")
    writer.append(0, 1, b"x" * 100)
    with monkeypatch.context() as patch:
        _FailingDisk(errno.ENOSPC, {1}).break_in(patch)
        with pytest.raises(JobDirectoryError, match="No space left"):
            writer.flush()
    sizes = [path.stat().st_size for path in paths.parts.iterdir()]
    writer.append(1, 1, b"y")
    with pytest.raises(JobDirectoryError, match="could not be stored before"):
        writer.flush()
    writer.close()
    assert [path.stat().st_size for path in paths.parts.iterdir()] == sizes and len(_read(paths)) == 0


def test_file_that_may_not_grow_is_an_error_that_says_so(paths, children):
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with PartWriter(paths, "a") as writer:
            writer.append(0, 1, b"x" * 900)
            writer.flush()
            writer.append(1, 1, b"y" * 900)
            with pytest.raises(JobDirectoryError, match="(?s)File too large.*ulimit -f"):
                writer.flush()

    children.start(work)
    children.wait()
    assert _read(paths)["row"].tolist() == [0]


def test_another_error_closes_the_files_and_flushes_nothing(paths):
    with pytest.raises(KeyboardInterrupt), PartWriter(paths, "a") as writer:
        writer.append(0, 1, b"x")
        raise KeyboardInterrupt
    assert len(_read(paths)) == 0
    assert not any(str(paths.parts) in os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink())


def test_void_lines_are_not_read(paths):
    _write_some(paths, "a")
    _write_some(paths, "ab")
    offsets = {int(entry["row"]): int(entry["offset"]) for entry in _read(paths)}
    void_lines(paths, "a", [offsets[1], offsets[4]])
    void_lines(paths, "a", [offsets[4], offsets[0]])
    found = {part: entries["row"].tolist() for part, entries in JournalReader(paths).read()}
    assert found == {"a": [2, 3], "ab": [0, 1, 2, 3, 4]}


def test_a_writer_killed_at_any_moment_loses_nothing_that_was_flushed(paths, children):
    told_end, tell_end = os.pipe()
    rng = random.Random(5)

    def work(part):
        with PartWriter(paths, part) as writer:
            for row in range(10**6):
                writer.append(row, 1, b"row %d " % row + b"y" * (row % 300))
                if row % 7 == 0:
                    writer.flush()
                    os.write(tell_end, row.to_bytes(8, "little"))

    for part in "abcdef":
        pid = children.start(lambda part=part: work(part))
        flushed = os.read(told_end, 8)
        time.sleep(rng.uniform(0, 0.05))
        children.kill(pid)
        while len(flushed) < 8 or os.get_blocking(told_end):
            os.set_blocking(told_end, False)
            try:
                flushed = os.read(told_end, 1 << 16)[-8:] or flushed
            except BlockingIOError:
                break
        os.set_blocking(told_end, True)
        entries = dict(JournalReader(paths).read())[part]
        found = _lines(paths, part, entries)
        assert len(found) > int.from_bytes(flushed, "little")
        assert all(line == b"row %d " % row + b"y" * (row % 300) + b"\n" for row, line in found.items())
