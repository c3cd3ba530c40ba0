import errno
import os
import random
import time
import zlib

import numpy as np
import pytest

from hpcinfer.errors import JobDirectoryError
from hpcinfer.recovery import journal
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
    data, sidecar = writer._data, writer._sidecar
    assert events == [("write", data), ("sync", data), ("write", sidecar), ("sync", sidecar)]


def test_a_part_has_one_writer(paths):
    PartWriter(paths, "a").close()
    with pytest.raises(JobDirectoryError, match="File exists"):
        PartWriter(paths, "a")


class _FailingDisk:
    """`os.write` and `os.fsync`, of which one call fails; a failing write stores the first half of what it is given."""

    def __init__(self, fails_at):
        self.num_calls, self._fails_at = 0, fails_at

    def write(self, descriptor, data):
        if self._fails():
            os.pwrite(descriptor, data[:len(data) // 2], os.lseek(descriptor, 0, os.SEEK_END))
            raise OSError(errno.ENOSPC, "No space left on device")
        return _WRITE(descriptor, data)

    def fsync(self, descriptor):
        if self._fails():
            raise OSError(errno.EIO, "Input/output error")

    def _fails(self):
        self.num_calls += 1
        return self.num_calls == self._fails_at


def _write_until_failure(paths, flushed):
    with PartWriter(paths, "a") as writer:
        for row in range(5):
            writer.append(row, 1, b"line %d" % row + b"x" * row)
            if row % 2:
                writer.flush()
                flushed += [row - 1, row]


def test_what_is_sealed_was_stored_whichever_call_fails(tmp_path, monkeypatch):
    fails_at, has_failed = 0, True
    while has_failed:
        fails_at += 1
        paths = JobPaths(tmp_path / f"out{fails_at}")
        paths.create()
        disk, flushed = _FailingDisk(fails_at), []
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", disk.write)
            patch.setattr(os, "fsync", disk.fsync)
            try:
                _write_until_failure(paths, flushed)
                has_failed = False
            except JobDirectoryError as error:
                assert "a.jsonl" in str(error) and "make room" in str(error)
        entries = _read(paths)
        lines = _lines(paths, "a", entries)
        assert set(flushed) <= set(lines)
        assert lines == {row: b"line %d" % row + b"x" * row + b"\n" for row in range(len(lines))}
        assert all(zlib.crc32(lines[int(entry["row"])]) == entry["crc"] for entry in entries)
    assert fails_at > 3 * 4 and len(lines) == 5


def test_failed_writer_stores_nothing_more(paths, monkeypatch):
    disk = _FailingDisk(1)
    writer = PartWriter(paths, "a")
    writer.append(0, 1, b"x" * 100)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", disk.write)
        with pytest.raises(JobDirectoryError, match="No space left"):
            writer.flush()
    sizes = [path.stat().st_size for path in paths.parts.iterdir()]
    writer.append(1, 1, b"y")
    with pytest.raises(JobDirectoryError, match="could not be stored before"):
        writer.flush()
    writer.close()
    assert [path.stat().st_size for path in paths.parts.iterdir()] == sizes and len(_read(paths)) == 0


def test_another_error_closes_the_files_and_flushes_nothing(paths):
    with pytest.raises(KeyboardInterrupt), PartWriter(paths, "a") as writer:
        writer.append(0, 1, b"x")
        raise KeyboardInterrupt
    assert len(_read(paths)) == 0
    with pytest.raises(OSError):
        os.fstat(writer._data)


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
